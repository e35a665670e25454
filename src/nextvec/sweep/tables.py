"""The arithmetic of a sweep's tables: means over seeds, paired differences, orderings of the paper, races to a loss.

Errors. Over two or more seeds: the standard error of their mean, sd / sqrt(n), which holds for seeds of the kind that
were run. With one seed there is no spread between seeds, and the error is that of the held-out documents (clustered; of a
difference: the paired bootstrap of `nextvec compare`), which says nothing about another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.compare import compare
from nextvec.files import read_json
from nextvec.scoring.brier import BrierResult
from nextvec.sweep.folder import RESULT, SWEEP, read_sweep

NAMES = (*(f"Brier-{order}" for order in (1, 2, 3, 4)), "BrierLM")
Basis = Literal["seeds", "documents", "none"]  # what an error is over
Result = Mapping[str, Any]
OPTIONAL: dict[str, Any] = {"about": "", "paper": {}, "ranking": [], "reach": []}  # keys of a spec
NEEDED = (  # of a result
    "stage", "failed", "brier", "autoencoder", "held_out", "identity", "tokens", "seconds", "cpu_seconds", "machine",
    "command", "nextvec",
)  # fmt: skip
RESAMPLES = 2000  # of the bootstrap with one seed


@dataclass(frozen=True)
class Figure:
    """A mean with its standard error; `value` None where it is not defined in every seed."""

    value: float | None
    error: float | None = None
    over: Basis = "none"


@dataclass(frozen=True)
class TableRow:
    """One row of a sweep, all its seeds together."""

    name: str
    stage: str
    results: Mapping[int, Result]  # by seed, finished ones

    @property
    def failed(self) -> list[str]:
        """The sentences of seeds whose training stopped."""
        return [result["failed"] for result in self.results.values() if result["failed"]]


@dataclass(frozen=True)
class Sweep:
    """What a sweep's folder holds: rows in the order of its spec, also those without a result yet."""

    path: Path
    spec: Mapping[str, Any]
    rows: tuple[TableRow, ...]

    def stages(self) -> list[str]:
        return list(dict.fromkeys(row.stage for row in self.rows))

    def of(self, stage: str) -> list[TableRow]:
        return [row for row in self.rows if row.stage == stage]

    @property
    def missing(self) -> int:
        """Rows times seeds without a result."""
        return len(self.rows) * len(self.spec["seeds"]) - sum(len(row.results) for row in self.rows)


def read_sweep_results(path: Path) -> Sweep:
    """Read a sweep's folder. Raises DataError or ConfigError in one sentence for anything else."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder that `nextvec sweep` wrote")
    if not (path / SWEEP).is_file():
        raise DataError(f"{path} is no sweep: it has no {SWEEP}; report takes the folders that `nextvec sweep` wrote")
    record = _whole(read_sweep(path), path / SWEEP, ("spec", "rows"))
    spec = OPTIONAL | _whole(record["spec"], path / SWEEP, ("name", "seeds", "data"))
    rows = []
    for row in record["rows"]:
        found = {}
        for seed in spec["seeds"]:
            file = path / "rows" / row["stage"] / row["folder"] / f"seed-{seed}" / RESULT
            if file.is_file():
                found[seed] = _whole(read_json(file, "result"), file, NEEDED)
        rows.append(TableRow(row["name"], row["stage"], found))
    return Sweep(path, spec, tuple(rows))


def _whole(record: Any, file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Raises DataError where a file lacks what every one of its kind has."""
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            raise DataError(f"{file} is damaged: it has no {key}; move it away, and `nextvec sweep` makes it again")
    return dict(record)


def mean(values: Sequence[float]) -> Figure:
    """Mean and, from two values on, its standard error.

    >>> mean([1.0, 2.0, 3.0])
    Figure(value=2.0, error=0.5773502691896258, over='seeds')
    """
    if not values:
        return Figure(None)
    centre = sum(values) / len(values)
    if len(values) == 1:
        return Figure(centre)
    spread = math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))
    return Figure(centre, spread / math.sqrt(len(values)), "seeds")


def score(row: TableRow, name: str) -> Figure:
    """Brier-n or BrierLM (NAMES) over the seeds. Not defined where a seed failed or has an order that is not positive."""
    values = [_score_of(result, name) for result in row.results.values()]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Figure(None)
    if len(known) == 1:
        (result,) = row.results.values()
        error = _document_error(result["brier"], name)
        return Figure(known[0], error, "documents" if error is not None else "none")
    return mean(known)


def measured(row: TableRow, get: Callable[[Result], float | None]) -> Figure:
    """Any other number over the seeds."""
    values = [get(result) for result in row.results.values()]
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else Figure(None)


def loss_key(result: Result) -> str:
    """The held-out metric that a row minimises."""
    if result["stage"] != "lm":
        return "cross_entropy"
    kind = str(result["identity"]["lm"]["model"]["head"]["kind"])
    return "cross_entropy" if kind == "autoregressive" else kind


def encoder(row: TableRow) -> str:
    """The settings of the autoencoder that a CALM stands on, its seed aside; empty for rows that use none."""
    if row.stage != "lm" or not row.results:
        return ""
    found = next(iter(row.results.values()))["identity"]["autoencoder"]
    return "" if found is None else str({**found, "train": {**found["train"], "seed": None}})


def losses_compare(rows: Sequence[TableRow]) -> bool:
    """Whether the held-out losses of rows of one stage are on one scale: the same head, exponent and autoencoder."""
    scales = set()
    for row in rows:
        for result in row.results.values():
            energy = result["identity"]["lm"]["energy"]["alpha"] if row.stage == "lm" else None
            scales.add((loss_key(result), energy, encoder(row)))
    return len(scales) <= 1


def held_out(result: Result) -> float | None:
    """The last held-out loss of a result; None where training failed."""
    rows = result["held_out"]
    value = rows[-1].get(loss_key(result)) if rows and not result["failed"] else None
    return None if value is None else float(value)


def difference(a: TableRow, b: TableRow, name: str) -> Figure:
    """b minus a, paired: over the seeds that both have; over documents where that is one seed."""
    shared = [seed for seed in a.results if seed in b.results]
    pairs = [(_score_of(a.results[seed], name), _score_of(b.results[seed], name)) for seed in shared]
    gaps = [y - x for x, y in pairs if x is not None and y is not None]
    if not gaps or len(gaps) < len(shared):
        return Figure(None)
    if len(gaps) > 1:
        return mean(gaps)
    first, second = (BrierResult.from_dict(row.results[shared[0]]["brier"]) for row in (a, b))
    try:
        found = compare(first, second, generator=torch.Generator().manual_seed(0), resamples=RESAMPLES)
    except (ConfigError, DataError):  # other positions: the difference has no paired error
        return Figure(gaps[0])
    scale = 1.0 if name == "BrierLM" else 100.0
    error = next((item.stderr for item in found.differences if item.name == name), None)
    return Figure(gaps[0], None if error is None else scale * error, "none" if error is None else "documents")


@dataclass(frozen=True)
class Ordering:
    """One pair of rows that the paper orders, and what was found here."""

    better: str  # the paper's
    worse: str
    gap: Figure  # BrierLM of `better` minus `worse` here; Brier-1 (x100) where that has no value or no error
    figure: str  # which of them

    @property
    def verdict(self) -> Literal["holds", "reversed", "tie", "open"]:
        """A gap within one standard error is a tie; without an error, or a gap, the question is open."""
        if self.gap.value is None or self.gap.error is None:
            return "open"
        if abs(self.gap.value) <= self.gap.error:
            return "tie"
        return "holds" if self.gap.value > 0 else "reversed"


def orderings(sweep: Sweep) -> list[Ordering]:
    """Every pair of finished rows that the paper gives different figures for, or ranks."""
    ranking = sweep.spec["ranking"]
    paper: dict[str, float] = {name: -float(place) for place, name in enumerate(ranking)} or sweep.spec["paper"]
    rows = [row for row in sweep.rows if row.name in paper and row.results]
    found = []
    for index, first in enumerate(rows):
        for second in rows[index + 1 :]:
            if paper[first.name] == paper[second.name]:
                continue
            better, worse = (first, second) if paper[first.name] > paper[second.name] else (second, first)
            found.append(Ordering(better.name, worse.name, *decisive(worse, better)))
    return found


def decisive(a: TableRow, b: TableRow) -> tuple[Figure, str]:
    """b minus a in the figure that decides between them, and its name: BrierLM, or Brier-1 where that has no value or error."""
    gap = difference(a, b, "BrierLM")
    if gap.error is not None:
        return gap, "BrierLM"
    return difference(a, b, "Brier-1"), "Brier-1"  # BrierLM is not defined, or not in every resample of the documents


@dataclass(frozen=True)
class Race:
    """How soon a row reaches a held-out loss, over its seeds. None: not in every seed, or unknown."""

    row: str
    final: Figure  # held-out loss at the end
    steps: Figure
    cpu_seconds: Figure
    reached: int  # seeds that reached it
    seeds: int


def target(sweep: Sweep, stage: str) -> tuple[TableRow, dict[int, float]] | None:
    """Of the rows that the spec names under `reach`, the one with the best mean final held-out loss, and it by seed."""
    best: tuple[float, TableRow, dict[int, float]] | None = None
    for row in sweep.of(stage):
        if row.name in sweep.spec["reach"]:
            losses = {seed: loss for seed, result in row.results.items() if (loss := held_out(result)) is not None}
            value = sum(losses.values()) / len(losses) if losses else math.inf
            if losses and (best is None or value < best[0]):
                best = (value, row, losses)
    return None if best is None else best[1:]


def races(sweep: Sweep, stage: str) -> list[Race]:
    """Every row of a stage that has results against the stage's target; seeds are compared with their own."""
    aim = target(sweep, stage)
    if aim is None:
        return []
    found = []
    for row in [row for row in sweep.of(stage) if row.results]:
        marks = [first_at(row.results[seed], loss) for seed, loss in aim[1].items() if seed in row.results]
        hits = [mark for mark in marks if mark is not None]
        all_of = hits if len(hits) == len(marks) else []
        found.append(
            Race(
                row.name,
                measured(row, held_out),
                mean([mark["step"] for mark in all_of]),
                mean([mark["cpu_seconds"] for mark in all_of]),
                len(hits),
                len(marks),
            )
        )
    return found


def first_at(result: Result, loss: float) -> dict[str, float] | None:
    """Step and seconds at which the held-out loss first is at or below `loss`, on straight lines between evaluations."""
    key = loss_key(result)
    before: Mapping[str, Any] | None = None
    for row in result["held_out"]:
        value = row.get(key)
        if value is None:
            return None
        if value <= loss:
            if before is None or before[key] == value:
                return {name: float(row[name]) for name in ("step", "seconds", "cpu_seconds")}
            part = (before[key] - loss) / (before[key] - value)
            return {
                name: before[name] + part * (row[name] - before[name]) for name in ("step", "seconds", "cpu_seconds")
            }
        before = row
    return None


def _score_of(result: Result, name: str) -> float | None:
    """BrierLM, or Brier-n times 100."""
    brier = result["brier"]
    if brier is None:
        return None
    if name == "BrierLM":
        return None if brier["brier_lm"] is None else float(brier["brier_lm"])
    return 100.0 * float(brier["brier"][NAMES.index(name)])


def _document_error(brier: Mapping[str, Any], name: str) -> float | None:
    if name == "BrierLM":
        return None if brier["brier_lm_stderr"] is None else float(brier["brier_lm_stderr"])
    errors = brier["brier_stderr"]
    return None if errors is None else 100.0 * float(errors[NAMES.index(name)])
