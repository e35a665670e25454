"""Runs the jobs of a sweep: data once, autoencoders shared, each row trained, scored and written; what is done is skipped."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from nextvec import __version__
from nextvec.config import AutoencoderRun, RunConfig
from nextvec.errors import ConfigError, DataError, UserError
from nextvec.evaluate.brier import Document, evaluate_brier
from nextvec.evaluate.reconstruction import evaluate_reconstruction
from nextvec.files import read_json, write_json
from nextvec.hardware import choose_device, environment
from nextvec.lock import held
from nextvec.model.autoencoder import Autoencoder
from nextvec.rundir import load_autoencoder, load_run
from nextvec.sweep.estimate import Rates
from nextvec.sweep.folder import (
    FORMAT,
    LOCK,
    RATES,
    RESULT,
    begin,
    check_begun,
    check_folder,
    open_folder,
    write_sweep,
)
from nextvec.sweep.plan import PROBE_DRAWS, Job, Rate, Vocabulary, flops_per_token, make_jobs
from nextvec.sweep.spec import SweepSpec
from nextvec.text.prepare import prepare
from nextvec.text.readers import documents, expand
from nextvec.text.shards import TokenShards
from nextvec.text.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from nextvec.train.data import data_folders
from nextvec.train.loop import train
from nextvec.train.metrics import read_metrics
from nextvec.train.objectives import BrierProbe, build_objective

Say = Callable[[str], None]
RECONSTRUCTION = "reconstruction.json"
SCORING_SEED = 0  # the same draws for every row
LONG = ("sigma_per_dimension", "kl_per_dimension")  # of a reconstruction, left out of a row's result


@dataclass(frozen=True)
class Corpus:
    """Shards to train on, and the held-out documents that every row is scored on."""

    shards: TokenShards
    valid: TokenShards
    tokenizer: TextTokenizer
    held_out: Sequence[Document]


@dataclass(frozen=True)
class Progress:
    """What one sitting did."""

    finished: int  # rows, in this sitting
    skipped: int  # finished before
    busy: int  # left to another process


def run_sweep(
    spec: SweepSpec,
    out: Path,
    *,
    only: Callable[[Job], bool] | None = None,
    device: str = "auto",
    command: str = "",
    say: Say = print,
    show: bool = True,
    rate: Rate | None = None,
) -> Progress:
    """Run every job that is not finished yet, seed by seed. Several processes may share the folder, each takes what is free.

    only: which jobs to run; command: what goes on with this sweep, kept in the results; rate: seconds of a step, instead of
    measuring them. A row whose loss is not finite is a result, too: its sentence. Raises ConfigError for a spec that does not
    hold or was edited after rows began, and KeyboardInterrupt after an interrupted row has saved itself.
    """
    out = Path(out)
    place = choose_device(device)
    make_jobs(spec, rate or (lambda run: 1e-3))  # mistakes show before any work
    check_folder(out)
    with held(out / LOCK, wait=True):
        open_folder(out, spec)
        corpus = open_corpus(spec, out, say)
        rates = rate or Rates(out / RATES, place)
        vocabulary = Vocabulary(corpus.tokenizer.vocab_size, corpus.tokenizer.mask_id)
        if isinstance(rates, Rates):
            draft = make_jobs(spec, lambda run: 1e-3, vocabulary)
            rates.in_turn(job for job in draft if (budget := spec.budget_of(job.row)) is not None and budget.seconds)
        jobs = make_jobs(spec, rates, vocabulary)
        check_begun(out, spec, jobs)
        write_sweep(out, spec)
    sitting = _Sitting(spec, out, corpus, place, command, say, show)
    finished = skipped = busy = 0
    wanted = [job for job in jobs if only is None or only(job)]
    for number, job in enumerate(wanted, 1):
        folder = out / job.folder
        if (folder / RESULT).is_file():
            skipped += 1
            continue
        with held(folder / LOCK, wait=False) as mine:
            if not mine:
                busy += 1
                continue
            if not (folder / RESULT).is_file():  # another process may have finished it meanwhile
                say(f"row {number} of {len(wanted)}: {job.row.stage}, {job.row.name}, seed {job.seed}")
                say(sitting.run(job))
                finished += 1
    return Progress(finished, skipped, busy)


class _Sitting:
    """What all rows of one call have in common."""

    def __init__(
        self, spec: SweepSpec, out: Path, corpus: Corpus, device: torch.device, command: str, say: Say, show: bool
    ) -> None:
        self.spec, self.out, self.corpus, self.device = spec, out, corpus, device
        self.command, self.say, self.show = command, say, show

    def run(self, job: Job) -> str:
        """Train, score, write result.json; returns one line for the reader. Its autoencoder may fail, too."""
        folder = self.out / job.folder
        begin(folder, job)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        failed, scores = None, dict[str, Any]()
        try:
            encoder = self.autoencoder(job) if job.autoencoder is not None else None
            self._train(job.run, folder, encoder, self._probe(job))
            scores = self._scores(job, folder)
        except (ConfigError, DataError):
            raise
        except UserError as error:  # something is not finite: that is a finding, and the other rows go on
            failed = str(error).partition(";")[0]
        result = {**self._record(job, folder, load), "failed": failed, **scores}
        write_json(folder / RESULT, result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return _line(result)

    def autoencoder(self, job: Job) -> Autoencoder:
        """The trained autoencoder of a row, made now if no other row has made it."""
        assert job.autoencoder is not None
        folder = self.out / job.autoencoder_folder
        with held(folder / LOCK, wait=True):
            if not (folder / RECONSTRUCTION).is_file():
                self.say(f"training the autoencoder {job.autoencoder_folder}")
                self._train(job.autoencoder, folder, None, None)
                found = self._reconstruction(folder)
                write_json(folder / RECONSTRUCTION, found)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return load_autoencoder(folder)[0]

    def _probe(self, job: Job) -> BrierProbe | None:
        """The beginnings of the held-out documents, where the spec asks for a curve."""
        asked = self.spec.evaluate
        if not asked.curve or isinstance(job.run, AutoencoderRun):
            return None
        begun = [document[: asked.context_tokens] for document in self.corpus.held_out]
        stride = job.identity["evaluate"]["stride"]
        return BrierProbe(begun, asked.context_tokens, stride, PROBE_DRAWS, SCORING_SEED, per_document=True)

    def _train(self, run: RunConfig, folder: Path, autoencoder: Autoencoder | None, probe: BrierProbe | None) -> None:
        if (folder / "model.safetensors").is_file():
            return
        data = run.data.override(path=str(self.corpus.shards.path), packing=run.data.packing or self.packing)
        config = run.override(data=data)
        result = train(
            config,
            build_objective(config, self.corpus.tokenizer, autoencoder, probe),
            folder,
            resume=(folder / "config.yaml").is_file(),
            device=self.device.type,
            valid=self.corpus.valid.path,
            eval_batches=self.spec.evaluate.batches,
            show=self.show,
            command=self.command,
        )
        if result.interrupted:
            raise KeyboardInterrupt

    @property
    def packing(self) -> str:
        return self.corpus.shards.manifest.packing

    def _reconstruction(self, folder: Path) -> dict[str, Any]:
        model, _ = load_autoencoder(folder, self.device)
        found = evaluate_reconstruction(
            model,
            self.corpus.held_out,
            generator=torch.Generator(self.device).manual_seed(SCORING_SEED),
            tokenizer_hash=self.corpus.tokenizer.hash,
        )
        if not (math.isfinite(found.sigma) and math.isfinite(found.kl)):
            raise UserError("training left an autoencoder whose latents are not finite")
        return {"training": _training(folder), "reconstruction": found.to_dict()}

    def _record(self, job: Job, folder: Path, load: float | None) -> dict[str, Any]:
        """What tables and readers need of a row beside its scores."""
        found, budget = None, self.spec.budget_of(job.row)
        if job.autoencoder is not None and (path := self.out / job.autoencoder_folder / RECONSTRUCTION).is_file():
            found = _short(read_json(path, "autoencoder's figures"))
        return {
            "format": FORMAT,
            "nextvec": __version__,
            "command": self.command,
            "row": job.row.name,
            "stage": job.row.stage,
            "seed": job.seed,
            "changes": dict(job.row.changes),
            "budget": None if budget is None else budget.model_dump(exclude_none=True),
            "steps": job.run.train.steps,
            **_training(folder),
            "flops_per_token": flops_per_token(job.run),
            "brier": None,
            "autoencoder": found,
            "held_out": [row for row in read_metrics(folder) if row["kind"] == "eval"],
            "identity": job.identity,
            "machine": {**environment().to_dict(), "load_average": load},
        }

    def _scores(self, job: Job, folder: Path) -> dict[str, Any]:
        """The figures of a trained row. Raises UserError where they are not finite."""
        if isinstance(job.run, AutoencoderRun):
            return {"autoencoder": _short(self._reconstruction(folder))}
        model = load_run(folder, self.device).model
        assert not isinstance(model, Autoencoder)
        asked = self.spec.evaluate
        found = evaluate_brier(
            model,
            self.corpus.held_out,
            context_tokens=asked.context_tokens,
            stride=job.identity["evaluate"]["stride"],
            draws=asked.draws,
            generator=torch.Generator(self.device).manual_seed(SCORING_SEED),
            tokenizer_hash=self.corpus.tokenizer.hash,
        )
        return {"brier": found.to_dict()}


def _training(folder: Path) -> dict[str, Any]:
    """What a finished training used: tokens, and seconds without evaluation and saving."""
    rows = read_metrics(folder)
    last = rows[-1] if rows else {}
    return {name: last.get(name) for name in ("tokens", "seconds", "cpu_seconds")}


def _short(found: dict[str, Any]) -> dict[str, Any]:
    record = {name: value for name, value in found["reconstruction"].items() if name not in LONG}
    return {**found["training"], "latent": len(found["reconstruction"]["kl_per_dimension"]), **record}


def _line(result: dict[str, Any]) -> str:
    if result["failed"]:
        return f"  failed: {result['failed']}"
    if result["brier"] is not None:
        orders = " ".join(f"{100 * value:.2f}" for value in result["brier"]["brier"])
        whole = result["brier"]["brier_lm"]
        return f"  Brier-1..4 (x100) {orders}; BrierLM {'not defined' if whole is None else f'{whole:.2f}'}"
    accuracy = result["autoencoder"]["accuracy"]["draw"]["token"]
    return f"  {accuracy:.2%} of held-out tokens right at a posterior draw"


def open_corpus(spec: SweepSpec, out: Path, say: Say) -> Corpus:
    """Shards and held-out documents: the spec's own, or prepared below `out` once."""
    asked = spec.data
    if asked.shards is not None:
        folder, beside = data_folders(asked.shards)
        assert beside is not None, "make_jobs has looked"
    else:
        tokenizer = _tokenizer(spec, out / "data", say)
        prepared = prepare(
            asked.source,
            tokenizer,
            out / "data" / "shards",
            valid_fraction=asked.valid_fraction,
            text_key=asked.text_key,
        )
        if prepared.valid is None:
            raise DataError(
                f"no document of {', '.join(asked.source)} was held out, and rows are scored on such: give more "
                "documents or a larger data.valid_fraction"
            )
        folder, beside = prepared.train, prepared.valid
    shards, valid = TokenShards.open(folder), TokenShards.open(beside)
    count = min(valid.documents, spec.evaluate.documents or valid.documents)
    held_out = [valid.document(index)[: spec.evaluate.document_tokens] for index in range(count)]
    return Corpus(shards, valid, shards.tokenizer, held_out)


def _tokenizer(spec: SweepSpec, folder: Path, say: Say) -> TextTokenizer:
    if spec.data.tokenizer is not None:
        return load_tokenizer(spec.data.tokenizer)
    if not (folder / "tokenizer.json").is_file():
        say(f"training a tokenizer of {spec.data.vocab_size:,} tokens on {', '.join(spec.data.source)}")
        texts = documents(expand(spec.data.source), spec.data.text_key, _refuse)
        train_tokenizer(texts, spec.data.vocab_size).save(folder)
    return load_tokenizer(folder)


def _refuse(message: str) -> NoReturn:
    raise DataError(message)


__all__ = ["Corpus", "Progress", "open_corpus", "run_sweep"]
