"""Learning curves of two arms over seconds of training, and where they meet: a fit, and a bootstrap over documents and seeds.

Each arm's score is fitted by a + b log(seconds of the model's own training), least squares over its last points; those of CALM
begin when its autoencoder is done. The curves meet where the two lines do, in seconds of the whole budget. From how early on
points count (FIRST) is not known, so it is drawn anew for each resample and its choice is part of the interval.

Points on the way are measured at rates that have not decayed yet, in both arms alike, while the last has: so what is extrapolated
is a trend, and runs of other budgets are what settles it. No line bends: the interval knows nothing of a plateau to come.

Legend: R resamples, E seeds, P points, C documents, n orders, G times on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nextvec.bakeoff.measure import Planned
from nextvec.scoring.brier import DocumentSums, brier_lm_of

FIRST = (
    0.3,
    0.45,
    0.6,
)  # of the model's seconds at the end: points before are of another phase; the first is the measured fit's
FEWEST = 3  # points of a fit
GRID = 600  # times between the budget and REACH times it at which the lines are compared
REACH = 100.0  # times the budget: beyond it nothing is extrapolated
RESAMPLES = 1000
LOST = 0.01  # share of resamples without a BrierLM, from which on Brier-1 is fitted
State = Literal["ahead", "meets", "none", "open"]


@dataclass(frozen=True)
class Curve:
    """One arm: its points in seconds of the model's training, and what documents contribute at each."""

    before: float  # seconds of its autoencoder
    seconds: Tensor  # (P,)
    sums: Tensor  # (E, P, C, n): of the values at each document's positions
    counts: Tensor  # (E, P, C, n): their number

    def scores(self, times_RC: Tensor, seed_RE: Tensor, name: str) -> Tensor:
        """The figure `name`, mean over seeds, of each resample, (R, P); nan where it does not exist."""
        sum_REPn = torch.einsum("rc,epcn->repn", times_RC, self.sums)
        count_REPn = torch.einsum("rc,epcn->repn", times_RC, self.counts)
        mean_REPn = (sum_REPn / count_REPn).gather(1, seed_RE[:, :, None, None].expand(-1, -1, *sum_REPn.shape[2:]))
        score_REP = brier_lm_of(mean_REPn) if name == "BrierLM" else 100 * mean_REPn[..., 0]
        return score_REP.mean(1)


@dataclass(frozen=True)
class BreakEven:
    """Where the curve of CALM meets a rival's. Seconds of training."""

    state: State  # ahead: at the budget already; meets: later; none: not within REACH; open: no curves to tell by
    figure: str = ""  # BrierLM or Brier-1
    seconds: float | None = None  # of the whole budget
    low: float | None = None  # 16 and 84 % of the resamples; None: beyond REACH
    high: float | None = None
    beyond: float = 0.0  # share of resamples in which the curves do not meet within REACH
    gap: float | None = None  # of the fitted lines at the budget, CALM less rival
    slopes: tuple[float, float] | None = None  # score per doubling of the model's seconds: CALM, rival


def curve_of(results: Sequence[Mapping[str, Any]], planned: Sequence[Planned]) -> Curve | None:
    """The points of one arm, by seed; None where a seed has none, or others than the first."""
    seconds: list[float] = []
    sums, counts = [], []
    for result, plan in zip(results, planned, strict=True):
        rows = [row for row in result["held_out"] if row.get("per_document") is not None]
        share = [row["step"] / plan.steps * plan.seconds for row in rows]
        if not rows or (seconds and (len(share) != len(seconds))):
            return None
        seconds = seconds or share
        found = [DocumentSums.from_dict(row["per_document"]) for row in rows]
        sums.append(torch.tensor([each.sums for each in found], dtype=torch.float64).transpose(1, 2))
        counts.append(torch.tensor([each.positions for each in found], dtype=torch.float64).transpose(1, 2))
    if not seconds or any(part.shape != sums[0].shape for part in sums):
        return None
    return Curve(
        planned[0].autoencoder_seconds,
        torch.tensor(seconds, dtype=torch.float64),
        torch.stack(sums),
        torch.stack(counts),
    )


def break_even(calm: Curve | None, rival: Curve | None, budget: float, generator: torch.Generator) -> BreakEven:
    """Where the fitted curves meet, with 16 and 84 % of the resamples; the same documents and seeds for both arms.

    budget: seconds of training, up to which nothing is extrapolated.
    """
    if calm is None or rival is None or calm.sums.shape[::2] != rival.sums.shape[::2]:
        return BreakEven("open")
    E, _, C, _ = calm.sums.shape
    picked_RC = torch.randint(C, (RESAMPLES, C), generator=generator)
    times_RC = torch.zeros(RESAMPLES, C, dtype=torch.float64)
    times_RC.scatter_add_(1, picked_RC, torch.ones_like(times_RC))
    times_RC = torch.cat([torch.ones(1, C, dtype=torch.float64), times_RC])  # the first is what was measured
    seed_RE = torch.cat([torch.arange(E)[None], torch.randint(E, (RESAMPLES, E), generator=generator)])
    first_R = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.randint(len(FIRST), (RESAMPLES,), generator=generator)]
    )
    for name in ("BrierLM", "Brier-1"):
        lines = [_lines(curve, curve.scores(times_RC, seed_RE, name), first_R) for curve in (calm, rival)]
        if any(line is None for line in lines):
            continue
        (a_R, b_R), (c_R, d_R) = (line for line in lines if line is not None)
        good_R = torch.stack([part.isfinite() for part in (a_R, b_R, c_R, d_R)]).all(0)
        if bool(good_R[0]) and float((~good_R).double().mean()) <= LOST:
            break
    else:
        return BreakEven("open")
    time_G = budget * torch.linspace(0, math.log(REACH), GRID, dtype=torch.float64).exp()
    mine_RG = a_R[good_R, None] + b_R[good_R, None] * (time_G - calm.before).log()
    theirs_RG = c_R[good_R, None] + d_R[good_R, None] * (time_G - rival.before).log()
    gap_RG = mine_RG - theirs_RG
    seconds_R = _crossing(time_G, gap_RG)
    low, high = (_finite(seconds_R[1:].quantile(q, interpolation="nearest")) for q in (0.16, 0.84))
    first, doubling = _finite(seconds_R[0]), math.log(2)
    state: State = "ahead" if float(gap_RG[0, 0]) >= 0 else "none" if first is None else "meets"
    return BreakEven(
        state,
        name,
        first if state == "meets" else None,
        low,
        high,
        float(seconds_R[1:].isinf().double().mean()),
        float(gap_RG[0, 0]),
        (doubling * float(b_R[0]), doubling * float(d_R[0])),
    )


def _lines(curve: Curve, score_RP: Tensor, first_R: Tensor) -> tuple[Tensor, Tensor] | None:
    """Intercepts and slopes (R,), each fitted from its own first point on; None where too few points have a score above 0.

    A score of 0 is that of a model that knows nothing: until then a curve says nothing of what comes after.
    """
    above_P = score_RP[0] > 0  # false for one that does not exist
    if not bool(above_P[-1]):
        return None
    found = []
    for share in FIRST:
        keep_P = above_P & (curve.seconds >= share * curve.seconds[-1])
        if int(keep_P.sum()) < FEWEST:
            keep_P = above_P & (torch.arange(len(above_P)) >= len(above_P) - FEWEST)
        if int(keep_P.sum()) < FEWEST:
            return None
        found.append(torch.stack(_fit(curve.seconds[keep_P].log(), score_RP[:, keep_P])))
    a_R, b_R = torch.stack(found)[first_R, :, torch.arange(len(first_R))].unbind(-1)
    return a_R, b_R


def _crossing(time_G: Tensor, gap_RG: Tensor) -> Tensor:
    """The first time at which a gap is not below 0, (R,), on straight lines between the times; inf where there is none."""
    met_RG = gap_RG >= 0
    at_R = met_RG.double().argmax(1).clamp(min=1)
    before_R, after_R = (gap_RG.gather(1, at[:, None])[:, 0] for at in (at_R - 1, at_R))
    share_R = (before_R / (before_R - after_R)).clamp(0, 1)
    seconds_R = time_G[at_R - 1] + share_R * (time_G[at_R] - time_G[at_R - 1])
    return seconds_R.where(met_RG.any(1), torch.inf).where(~met_RG[:, 0], time_G[0])


def points(curve: Curve | None, name: str) -> tuple[list[float], list[float | None]]:
    """Seconds of the whole budget and the figure as measured, mean over seeds, for a picture."""
    if curve is None:
        return [], []
    E, _, C, _ = curve.sums.shape
    score_P = curve.scores(torch.ones(1, C, dtype=torch.float64), torch.arange(E)[None], name)[0]
    return (curve.before + curve.seconds).tolist(), [_finite(value) for value in score_P]


def _fit(x_P: Tensor, y_RP: Tensor) -> tuple[Tensor, Tensor]:
    """Intercept and slope (R,) of the least squares line."""
    middle = x_P.mean()
    slope_R = ((x_P - middle) * (y_RP - y_RP.mean(1, keepdim=True))).sum(1) / (x_P - middle).square().sum()
    return y_RP.mean(1) - slope_R * middle, slope_R


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
