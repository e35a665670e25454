"""What the report reads: plain files that training and the demo leave behind, checked once, here.

    ROOT/summary.json            Summary below: the demo's figures
    ROOT/details.json            Details below: what is too long for the summary
    ROOT/{autoencoder,calm,baseline}/metrics.jsonl   one JSON object a line, "kind" "train" or "eval", with step, tokens,
                                 seconds (training time, evaluation excluded) and the objective's own figures

Every file must be there. A figure that was not measured is null and shows as "not measured"; a run that stopped
before its first evaluation has no eval rows, and its curves say so. Brier figures are fractions in [-1, 1];
BrierLM is 100 times their geometric mean and null when one of them is not positive.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nextvec.errors import DataError
from nextvec.files import read_json

RUNS = ("autoencoder", "calm", "baseline")
Orders = tuple[float, float, float, float]  # Brier-1 to Brier-4
M = TypeVar("M", bound="Input")


class Input(BaseModel):
    """Base of all inputs: frozen; keys the report does not know are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class AutoencoderSummary(Input):
    token_accuracy: float | None  # fraction of held-out tokens decoded right at the posterior mean
    sigma: float | None  # mean posterior standard deviation, latent units
    collapsed_dims: int | None  # latent dimensions with KL < 0.01 nats


class GenerateSpeed(Input):
    t1: float | None  # tokens/s at temperature 1, batch 1
    t05: float | None  # tokens/s at temperature 0.5, batch 1


class ModelSummary(Input):
    brier: Orders | None
    brier_stderr: Orders | None  # standard errors clustered by document
    brier_lm: float | None
    brier_lm_stderr: float | None = None
    train_tokens_per_s: float | None
    train_tokens: int | None
    generate_tokens_per_s: GenerateSpeed


class Summary(Input):
    autoencoder: AutoencoderSummary
    calm: ModelSummary
    baseline: ModelSummary
    seconds: float  # the whole demo, wall clock
    K: int  # tokens per patch
    L: int  # latent dimensions
    V: int  # vocabulary
    recipe: str
    decode_rule: str
    seed: int
    N: int | None = None  # candidates of the batch temperature sampler
    scored_tokens_per_file: int | None = None  # the held-out scores are on this many first tokens of each file


class Sample(Input):
    model: str  # a name to show
    prompt: str
    temperature: float
    patches: tuple[str, ...]  # text of each generated patch, in order
    frequency_penalty: float = 0.0


class Accuracy(Input):
    """Shares in [0, 1] with standard errors clustered by document."""

    token: float
    token_stderr: float | None
    patch: float
    patch_stderr: float | None


class Reconstruction(Input):
    """`evaluate.reconstruction.ReconstructionResult.to_dict()`."""

    accuracy: dict[str, Accuracy]  # at mean, draw, doubled, noise-c (mean + c eps, latent units)
    sigma: float
    kl: float  # nats per patch
    collapsed_dimensions: int
    sigma_per_dimension: tuple[float, ...]
    kl_per_dimension: tuple[float, ...]  # nats
    patches: int
    documents: int


class Cost(Input):
    """`evaluate.cost.Cost.to_dict()`: parameters, and operations per token of text, by part and in total."""

    name: str
    patch_size: int
    context: int  # positions attended
    params: int  # with the input embedding, without the autoencoder
    autoencoder_params: int
    parameters: dict[str, float]
    inference: dict[str, float]  # the head as published
    inference_split: dict[str, float]  # the head as it runs here
    training: dict[str, float]
    training_split: dict[str, float]


class Details(Input):
    reconstruction: Reconstruction | None = None
    cost: dict[str, Cost] = Field(default_factory=dict)  # "calm", "baseline", then any other, in the order to show
    samples: tuple[Sample, ...] = ()
    corpus: str = ""  # what was read, for the first sentence: "the Python 3.11 standard library"
    protocol: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """The rows of one metrics.jsonl, by kind, in order of step."""

    train: tuple[dict[str, Any], ...]
    eval: tuple[dict[str, Any], ...]

    def curve(self, kind: str, x: str, y: str, order: int | None = None) -> tuple[list[float], list[float]]:
        """The finite points (x, y) of the rows of `kind`; `order` picks from a y that is a list."""
        xs, ys = [], []
        for row in self.train if kind == "train" else self.eval:
            a, b = number(row.get(x)), number(row.get(y), order)
            if a is not None and b is not None:
                xs.append(a)
                ys.append(b)
        return xs, ys


@dataclass(frozen=True)
class Inputs:
    summary: Summary
    details: Details
    metrics: dict[str, Metrics]


def read_inputs(root: Path) -> Inputs:
    """Read everything under `root`. Raises DataError, in one sentence, for a missing or damaged file."""
    return Inputs(
        _parse(Summary, root / "summary.json"),
        _parse(Details, root / "details.json"),
        {name: read_metrics(root / name / "metrics.jsonl") for name in RUNS},
    )


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl. A step logged twice (a resumed run) counts once, the later row; a last line cut short by a
    crash is left out. Raises DataError with the line number for any other bad line, or when the file is missing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"metrics {path} does not exist; train this run first, for instance by `nextvec demo`"
        ) from None
    except OSError as error:
        raise DataError(f"metrics {path} cannot be read: {error}") from None
    rows: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "eval": {}}
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if index == len(lines):
                break
            raise DataError(f"metrics {path}, line {index}: not JSON; delete that line") from None
        if not isinstance(row, dict) or row.get("kind") not in rows or number(row.get("step")) is None:
            raise DataError(
                f"metrics {path}, line {index}: a row needs a step and a kind train or eval; delete that line"
            )
        rows[row["kind"]][row["step"]] = row
    train, evaluated = (tuple(row for _, row in sorted(rows[kind].items())) for kind in ("train", "eval"))
    return Metrics(train, evaluated)


def number(value: Any, order: int | None = None) -> float | None:
    """A finite float, or None; `order` picks one entry of a list first."""
    if order is not None:
        value = value[order] if isinstance(value, list | tuple) and len(value) > order else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _parse(model: type[M], path: Path) -> M:
    data = read_json(path, "report input")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        found = "is missing" if first["type"] == "missing" else f"{first['msg']}; got {first['input']!r}"
        raise DataError(f"report input {path}: {where}: {found}; `nextvec demo` writes it anew") from None
