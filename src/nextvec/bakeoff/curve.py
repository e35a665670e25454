"""Learning curves of two arms over seconds of training, and where they meet: a fit, and a bootstrap over documents and seeds.

Each arm's score is fitted by a + b log(seconds), least squares over the points from FIRST of the budget on; its autoencoder's
seconds count. The curves meet where the two lines do. Points on the way are measured at rates that have not decayed yet, in
both arms alike, while the last has: so what is extrapolated is a trend, and runs of other budgets are what settles it.

Legend: R resamples, E seeds, P points, C documents, n orders.
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

FIRST = 0.3  # of the last point's seconds: earlier points are of another phase of learning
FEWEST = 3  # points of a fit
REACH = 100.0  # times the budget: beyond it nothing is extrapolated
RESAMPLES = 1000
LOST = 0.01  # share of resamples without a BrierLM, from which on Brier-1 is fitted
State = Literal["ahead", "meets", "none", "open"]


@dataclass(frozen=True)
class Curve:
    """One arm: its points in seconds of training, the autoencoder's among them, and what documents contribute at each."""

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
    seconds: float | None = None
    low: float | None = None  # 16 and 84 % of the resamples; None: beyond REACH
    high: float | None = None
    beyond: float = 0.0  # share of resamples in which the curves do not meet within REACH
    gap: float | None = None  # of the fitted lines at the budget, CALM less rival
    slopes: tuple[float, float] | None = None  # score per doubling of seconds: CALM, rival


def curve_of(results: Sequence[Mapping[str, Any]], planned: Sequence[Planned]) -> Curve | None:
    """The points of one arm, by seed; None where a seed has none, or others than the first."""
    seconds: list[float] = []
    sums, counts = [], []
    for result, plan in zip(results, planned, strict=True):
        rows = [row for row in result["held_out"] if row.get("per_document") is not None]
        share = [plan.autoencoder_seconds + row["step"] / plan.steps * plan.seconds for row in rows]
        if not rows or (seconds and (len(share) != len(seconds))):
            return None
        seconds = seconds or share
        found = [DocumentSums.from_dict(row["per_document"]) for row in rows]
        sums.append(torch.tensor([each.sums for each in found], dtype=torch.float64).transpose(1, 2))
        counts.append(torch.tensor([each.positions for each in found], dtype=torch.float64).transpose(1, 2))
    if not seconds or any(part.shape != sums[0].shape for part in sums):
        return None
    return Curve(torch.tensor(seconds, dtype=torch.float64), torch.stack(sums), torch.stack(counts))


def break_even(calm: Curve | None, rival: Curve | None, budget: float, generator: torch.Generator) -> BreakEven:
    """Where the fitted curves meet, with 16 and 84 % of the resamples; the same documents and seeds for both arms.

    budget: seconds of training, up to which nothing is extrapolated.
    """
    if calm is None or rival is None or calm.sums.shape[::2] != rival.sums.shape[::2]:
        return BreakEven("open")
    late = [curve.seconds >= FIRST * curve.seconds[-1] for curve in (calm, rival)]
    E, _, C, _ = calm.sums.shape
    picked_RC = torch.randint(C, (RESAMPLES, C), generator=generator)
    times_RC = torch.zeros(RESAMPLES, C, dtype=torch.float64)
    times_RC.scatter_add_(1, picked_RC, torch.ones_like(times_RC))
    times_RC = torch.cat([torch.ones(1, C, dtype=torch.float64), times_RC])  # the first is what was measured
    seed_RE = torch.cat([torch.arange(E)[None], torch.randint(E, (RESAMPLES, E), generator=generator)])
    for name in ("BrierLM", "Brier-1"):
        scores = [
            curve.scores(times_RC, seed_RE, name)[:, keep] for curve, keep in zip((calm, rival), late, strict=True)
        ]
        if min(score.shape[1] for score in scores) < FEWEST:
            return BreakEven("open")
        good_R = torch.stack([score.isfinite().all(1) for score in scores]).all(0)
        if bool(good_R[0]) and float((~good_R).double().mean()) <= LOST:
            break
    else:
        return BreakEven("open")
    lines = [
        _fit(curve.seconds[keep].log(), score[good_R])
        for curve, keep, score in zip((calm, rival), late, scores, strict=True)
    ]
    (a_R, b_R), (c_R, d_R) = lines
    gap_R = a_R - c_R + (b_R - d_R) * math.log(budget)
    # nowhere where the slope of the gap has not the sign that closes it; already behind us where there is no gap
    log_R = torch.where((b_R > d_R) & (gap_R < 0), -gap_R / (b_R - d_R), torch.inf).where(gap_R < 0, 0.0)
    seconds_R = budget * log_R.clamp(max=math.log(REACH) + 1).exp()
    beyond_R = seconds_R > REACH * budget
    seconds_R = seconds_R.masked_fill(beyond_R, torch.inf)
    low, high = (_finite(seconds_R[1:].quantile(q, interpolation="nearest")) for q in (0.16, 0.84))
    first = float(seconds_R[0])
    doubling = math.log(2)
    state: State = "ahead" if float(gap_R[0]) >= 0 else "meets" if math.isfinite(first) else "none"
    return BreakEven(
        state,
        name,
        first if state == "meets" else None,
        low,
        high,
        float(beyond_R[1:].double().mean()),
        float(gap_R[0]),
        (doubling * float(b_R[0]), doubling * float(d_R[0])),
    )


def points(curve: Curve | None, name: str) -> tuple[list[float], list[float | None]]:
    """Seconds and the figure as measured, mean over seeds, for a picture."""
    if curve is None:
        return [], []
    E, _, C, _ = curve.sums.shape
    score_P = curve.scores(torch.ones(1, C, dtype=torch.float64), torch.arange(E)[None], name)[0]
    return curve.seconds.tolist(), [_finite(value) for value in score_P]


def _fit(x_P: Tensor, y_RP: Tensor) -> tuple[Tensor, Tensor]:
    """Intercept and slope (R,) of the least squares line."""
    middle = x_P.mean()
    slope_R = ((x_P - middle) * (y_RP - y_RP.mean(1, keepdim=True))).sum(1) / (x_P - middle).square().sum()
    return y_RP.mean(1) - slope_R * middle, slope_R


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
