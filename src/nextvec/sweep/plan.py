"""From a spec to its jobs: complete settings of each row and seed, its steps at the budget, and what identifies it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvec.config import AutoencoderConfig, AutoencoderRun, CalmRun, RunConfig
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.cost import cost
from nextvec.evaluate.windows import BASELINE_STRIDE, plan_windows
from nextvec.sweep.spec import Row, SweepSpec
from nextvec.text.shards import TokenShards
from nextvec.train.data import data_folders
from nextvec.train.settings import complete_run

MODEL_SHARE = 0.4  # of a budget that counts the autoencoder: at least so much is for the model itself
SAVE_MINUTES = 2.0  # between checkpoints of a row, where its settings do not say: what a kill may cost
PROBE_DRAWS = 2  # per position, where Brier figures are measured during training
Rate = Callable[[RunConfig], float]  # seconds of one optimiser step


@dataclass(frozen=True)
class Vocabulary:
    """Of the tokenizer, or of the one to be trained."""

    vocab_size: int
    mask_id: int


@dataclass(frozen=True)
class Job:
    """One row at one seed."""

    row: Row
    seed: int
    run: RunConfig  # of the row's stage, with its steps; data.path is filled in by `with_data`
    autoencoder: AutoencoderRun | None  # that an lm row is trained on; None where its model uses none
    identity: dict[str, Any]  # all that its result depends on

    @property
    def folder(self) -> Path:
        """Below the sweep's folder."""
        return Path("rows", self.row.stage, self.row.folder, f"seed-{self.seed}")

    @property
    def autoencoder_folder(self) -> Path:
        assert self.autoencoder is not None
        return Path("autoencoders", digest({"data": self.identity["data"], "run": self.identity["autoencoder"]})[:12])


def digest(value: object) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_jobs(spec: SweepSpec, rate: Rate, vocabulary: Vocabulary | None = None) -> list[Job]:
    """All jobs, seed by seed, so that a table over all rows is complete early. `rate` is asked for a budget in seconds.

    vocabulary: of the tokenizer; None: as the spec lets expect. Raises ConfigError in one sentence, before any work, for
    settings that do not hold.
    """
    vocabulary = vocabulary or expected_vocabulary(spec)
    stride = common_stride(spec, vocabulary)
    return [_job(spec, row, seed, vocabulary, stride, rate) for seed in spec.seeds for row in spec.points()]


def assumed_vocabulary(spec: SweepSpec) -> tuple[Vocabulary, str | None]:
    """For planning only: where shards or tokenizer are not there yet, data.vocab_size, and a line that says so."""
    missing = next((path for path in (spec.data.shards, spec.data.tokenizer) if path and not Path(path).exists()), None)
    if missing is None:
        return expected_vocabulary(spec), None
    size = spec.data.vocab_size
    return Vocabulary(size, 0), f"{missing} does not exist yet: planned for a vocabulary of {size:,} tokens"


def common_stride(spec: SweepSpec, vocabulary: Vocabulary) -> int:
    """Tokens between scored positions, the same for all rows: they are scored at the same positions."""
    if spec.evaluate.stride is not None:
        return spec.evaluate.stride
    sizes = [_autoencoder(spec, row, 0, vocabulary).model.patch_size for row in spec.points() if row.stage == "lm"]
    return math.lcm(*sizes) if sizes else BASELINE_STRIDE


def tokens_per_step(run: RunConfig) -> int:
    return run.data.rows * run.data.context_tokens * run.train.accumulate


def flops_per_token(run: RunConfig) -> float:
    """Operations of training per token of text as `nextvec flops` counts them, the head split, at the run's own context."""
    settings: dict[str, Any] = {}
    if not isinstance(run, AutoencoderRun):
        settings["context"] = run.data.context_tokens // run.model.patch_size
    if isinstance(run, CalmRun):
        settings |= {"draws": run.draws, "auxiliary": run.recipe.name == "fast"}
    return cost(run.model, **settings).training_split.total


def expected_vocabulary(spec: SweepSpec) -> Vocabulary:
    """What the spec's tokenizer has, or is to have where it is trained."""
    if spec.data.shards is not None:
        folder, beside = data_folders(spec.data.shards)
        if beside is None:
            raise DataError(f"{spec.data.shards} has no held-out shards (valid/), on which rows are scored")
        manifest = TokenShards.open(folder).manifest
        return Vocabulary(manifest.vocab_size, manifest.mask_id)
    if spec.data.tokenizer is not None:
        from nextvec.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(spec.data.tokenizer)
        return Vocabulary(tokenizer.vocab_size, tokenizer.mask_id)
    return Vocabulary(spec.data.vocab_size, 0)


def _autoencoder(spec: SweepSpec, row: Row, seed: int, vocabulary: Vocabulary) -> AutoencoderRun:
    found = _complete(spec, row, "autoencoder", seed, vocabulary, None)
    assert isinstance(found, AutoencoderRun)
    return found


def _complete(
    spec: SweepSpec, row: Row, stage: str, seed: int, vocabulary: Vocabulary, autoencoder: AutoencoderConfig | None
) -> RunConfig:
    settings = spec.settings(row, stage, seed)
    settings["data"] = {**settings.get("data", {}), "path": ""}
    settings["train"] = {"save_minutes": SAVE_MINUTES, **settings["train"]}
    return complete_run(settings, vocabulary, autoencoder, f"{spec.name}, row {row.name}, {stage}")


def _job(spec: SweepSpec, row: Row, seed: int, vocabulary: Vocabulary, stride: int, rate: Rate) -> Job:
    encoder = _autoencoder(spec, row, seed, vocabulary) if row.stage == "lm" else None
    run = _complete(spec, row, row.stage, seed, vocabulary, encoder.model if encoder is not None else None)
    if isinstance(run, CalmRun) and not run.model.uses_autoencoder:
        encoder = None
    steps = _steps(spec, row, run, encoder, rate)
    train = run.train.override(steps=steps)
    if spec.evaluate.curve and not isinstance(run, AutoencoderRun):
        train = train.override(eval_every=-(-steps // spec.evaluate.curve))
    run = run.override(train=train)
    _check_lengths(spec, row, run, encoder, stride)
    identity = {
        "data": spec.data.model_dump(mode="json"),
        "evaluate": {**spec.evaluate.model_dump(mode="json"), "stride": stride},
        "autoencoder": None if encoder is None else _plain(encoder),
        row.stage: _plain(run),
    }
    return Job(row, seed, run, encoder, identity)


def _plain(run: RunConfig) -> dict[str, Any]:
    """What a result depends on; how often a run is logged and saved, and what is kept, is not of it."""
    found = run.model_dump(mode="json")
    free = ("log_every", "save_every", "save_minutes", "keep_last", "keep_every")
    return {**found, "train": {name: value for name, value in found["train"].items() if name not in free}}


def _steps(spec: SweepSpec, row: Row, run: RunConfig, encoder: AutoencoderRun | None, rate: Rate) -> int:
    """Optimiser steps of the row's stage at the budget, less what its autoencoder takes where that counts."""
    budget = spec.budget_of(row)
    if budget is None:
        return run.train.steps
    where = f"{spec.name}, row {row.name}"
    if f"{row.stage}.train.steps" in row.changes:
        raise ConfigError(f"{where}: the budget says the steps; leave {row.stage}.train.steps out")

    def price(of: RunConfig) -> float:
        """Of one step, in what the budget is in."""
        if budget.seconds is not None:
            return rate(of)
        return tokens_per_step(of) * (flops_per_token(of) if budget.flops is not None else 1.0)

    amount = budget.tokens or budget.flops or budget.seconds
    assert amount is not None, "one of the three is given"
    left = amount
    if budget.autoencoder and encoder is not None:
        left -= encoder.train.steps * price(encoder)
        if left < MODEL_SHARE * amount:
            raise ConfigError(
                f"{where}: {encoder.train.steps:,} steps of the autoencoder take {1 - left / amount:.0%} of a budget of "
                f"{budget}, and at least {MODEL_SHARE:.0%} are for the model: give a larger budget or fewer "
                "autoencoder.train.steps"
            )
    if left < price(run):
        raise ConfigError(f"{where}: a budget of {budget} is less than one step of {tokens_per_step(run):,} tokens")
    return round(left / price(run))


def _check_lengths(spec: SweepSpec, row: Row, run: RunConfig, encoder: AutoencoderRun | None, stride: int) -> None:
    """Lengths that would only fail after training: windows that K does not divide, positions that the model cannot start at."""
    where = f"{spec.name}, row {row.name}"
    for each in (encoder, run):
        if each is not None and each.data.context_tokens % (size := each.model.patch_size):
            raise ConfigError(
                f"{where}: data.context_tokens must be a multiple of K {size}; got {each.data.context_tokens}"
            )
    if isinstance(run, AutoencoderRun):
        return
    if stride % run.model.patch_size:
        raise ConfigError(f"{where}: evaluate.stride must be a multiple of K {run.model.patch_size}; got {stride}")
    try:
        plan_windows([], spec.evaluate.context_tokens, stride)
    except ConfigError as error:
        raise ConfigError(f"{spec.name}, evaluate: {error}") from None
