"""Two results of `nextvec eval` beside each other: refused unless they measure the same, else with a paired bootstrap.

Legend: C documents, R resamples, n order (and BrierLM as one figure more where it exists).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextvec.errors import ConfigError, DataError
from nextvec.files import read_json
from nextvec.scoring.brier import MAX_ORDER, BrierResult, DocumentSums, brier_lm_of, decimals

RESAMPLES = 10_000
CELLS = 1 << 22  # resamples times documents at a time: 32 MiB
# What two figures must share, and how a sentence calls it. Draws, estimator and seed change the error only.
SAME = {
    "name": "protocol",
    "tokenizer_hash": "tokenizer",
    "documents_hash": "documents",
    "documents": "number of documents",
    "context_tokens": "context",
    "positions": "positions",
    "stride": "stride",
    "decode": "decode rule",
}


@dataclass(frozen=True)
class Difference:
    """B minus A of one figure."""

    name: str  # Brier-1.. or BrierLM
    value: float
    stderr: float | None = None  # of the paired bootstrap; None: see Comparison.why_no_errors
    low: float | None = None  # 95 % interval, percentiles of the resamples
    high: float | None = None

    def __str__(self) -> str:
        def number(value: float, sign: str = "+") -> str:
            return f"{value:{sign}.3f}" if self.name == "BrierLM" else decimals(value, sign)

        text = f"{self.name}  {number(self.value)}"
        if self.stderr is None or self.low is None or self.high is None:
            return text
        return f"{text} ± {number(self.stderr, '')}, 95 % {number(self.low)} to {number(self.high)}"


@dataclass(frozen=True)
class Comparison:
    """Differences B - A with a bootstrap over documents, the same resample of documents for both."""

    differences: tuple[Difference, ...]
    documents: int
    resamples: int  # 0: no bootstrap
    notes: tuple[str, ...]  # what is missing, and why

    def __str__(self) -> str:
        lines = [str(difference) for difference in self.differences]
        if self.resamples:
            lines.append(f"paired bootstrap: {self.resamples:,} resamples of {self.documents:,} documents")
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_result(path: Path) -> BrierResult:
    """The Brier figures of a file that `nextvec eval --json` wrote. Raises DataError where it holds none."""
    data = read_json(path, "result")
    try:
        return BrierResult.from_dict(data["brier"])
    except KeyError as error:
        found = f"it is of kind {data['kind']}" if isinstance(data, dict) and "kind" in data else f"{error} is missing"
        raise DataError(
            f"{path} holds no Brier figures ({found}): compare results of `nextvec eval --json` of a CALM or a baseline"
        ) from None
    except (TypeError, ValueError, AttributeError):
        raise DataError(f"{path} is not a result of `nextvec eval --json`") from None


def check_same(a: BrierResult, b: BrierResult, names: tuple[str, str] = ("A", "B")) -> None:
    """Raises ConfigError, naming what differs, unless two results measure the same on the same text."""
    found = [
        f"{what} ({_short(getattr(a.protocol, field))} and {_short(getattr(b.protocol, field))})"
        for field, what in SAME.items()
        if getattr(a.protocol, field) != getattr(b.protocol, field)
    ]
    if len(a.brier) != len(b.brier):
        found.append(f"longest n-gram ({len(a.brier)} and {len(b.brier)})")
    if found:
        raise ConfigError(f"{names[0]} and {names[1]} do not compare, for they differ in {', '.join(found)}")


def compare(a: BrierResult, b: BrierResult, *, generator: torch.Generator, resamples: int = RESAMPLES) -> Comparison:
    """B minus A per order and of BrierLM, with a paired bootstrap by document where both results can give one.

    The document is the unit of sampling: each resample draws C of them with replacement, the same ones for A and B, and
    forms both models' ratios of sums again (Efron and Tibshirani, An Introduction to the Bootstrap, chapters 6 and 13).
    There is none with one document or for results without per-document sums, and none for BrierLM where a resample
    has an order that is not positive. Raises ConfigError (check_same), DataError when the positions disagree.
    """
    check_same(a, b)
    names = [f"Brier-{order + 1}" for order in range(len(a.brier))]
    values = [y - x for x, y in zip(a.brier, b.brier, strict=True)]
    notes = []
    if a.brier_lm is not None and b.brier_lm is not None:
        names.append("BrierLM")
        values.append(b.brier_lm - a.brier_lm)
    else:
        notes += [f"no BrierLM of {who}: {r.why_none()}" for who, r in (("A", a), ("B", b)) if r.brier_lm is None]
    if a.per_document is None or b.per_document is None or a.documents < 2:
        why = "there is one document" if a.documents < 2 else "a result was written without per-document sums"
        return Comparison(
            tuple(Difference(name, value) for name, value in zip(names, values, strict=True)),
            a.documents,
            0,
            (*notes, f"no paired bootstrap: {why}"),
        )
    gaps_RQ = _bootstrap(a.per_document, b.per_document, generator, resamples)[:, : len(names)]
    differences = []
    for name, value, gap_R in zip(names, values, gaps_RQ.T, strict=True):
        lost = int(gap_R.isnan().sum())
        if lost:
            notes.append(f"no error of {name}: it does not exist in {lost} of {resamples} resamples")
            differences.append(Difference(name, value))
        else:
            ends = torch.quantile(gap_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            differences.append(Difference(name, value, float(gap_R.std()), *ends))
    return Comparison(tuple(differences), a.documents, resamples, tuple(notes))


def _bootstrap(a: DocumentSums, b: DocumentSums, generator: torch.Generator, resamples: int) -> Tensor:
    """Differences of the resampled figures, (R, n), and of BrierLM in a last column where there are four orders."""
    if (a.document, a.positions) != (b.document, b.positions):
        raise DataError("the two results have one stamp and other positions: one of the files was changed")
    C = len(a.document)
    count_nC = torch.tensor(a.positions, dtype=torch.float64)
    sums = [torch.tensor(each.sums, dtype=torch.float64) for each in (a, b)]
    parts = []
    for rows in torch.arange(resamples).split(max(1, CELLS // C)):
        picked_RC = torch.randint(C, (len(rows), C), generator=generator, device=generator.device).cpu()
        times_RC = torch.zeros(len(rows), C, dtype=torch.float64)
        times_RC.scatter_add_(1, picked_RC, torch.ones_like(times_RC))
        count_Rn = times_RC @ count_nC.T  # 0 where all documents of a resample are too short for an order: nan
        means = [times_RC @ sum_nC.T / count_Rn for sum_nC in sums]
        gap_RQ = means[1] - means[0]
        if len(count_nC) == MAX_ORDER:
            gap_RQ = torch.cat([gap_RQ, (brier_lm_of(means[1]) - brier_lm_of(means[0]))[:, None]], dim=1)
        parts.append(gap_RQ)
    return torch.cat(parts)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a hash
