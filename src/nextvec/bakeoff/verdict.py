"""What follows from a bake-off's figures: who is ahead at this budget, how fast at matched quality, and whether to use CALM.

A difference within one standard error is a tie. Quality is BrierLM, or Brier-1 where that has no value or no error. The matched
quality of generation is accuracy at equal collision (nextvec.evaluate.collision), for the first token and for the first two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nextvec.bakeoff.curve import REACH, BreakEven
from nextvec.bakeoff.settings import ARMS
from nextvec.bakeoff.speed import CENTRED, ONE, POOLED, TOKENWISE
from nextvec.evaluate.collision import BATCH, CENTRE, FIGURES, TOKENS
from nextvec.report.words import duration, minus, plus_minus
from nextvec.scoring.clusters import cluster_ratio
from nextvec.sweep.tables import Figure, TableRow, decisive, mean

Standing = Literal["ahead", "tie", "behind", "open"]
WAYS: dict[str, tuple[str, float]] = {
    ONE: (BATCH, 1.0),
    TOKENWISE: (TOKENS, 0.5),
    CENTRED: (CENTRE, 8),
    POOLED: (BATCH, 0.5),
}
MILLION = 1e6
UNITS = {"token": "first token", "pair": "first two tokens"}
Points = Sequence[Mapping[str, Any]]
Speeds = Mapping[str, Mapping[str, Any]]  # of one arm, by sampler


@dataclass(frozen=True)
class Quality:
    """CALM less a rival in the figure that decides."""

    gap: Figure
    figure: str
    standing: Standing
    why: str = ""  # of an open one


@dataclass(frozen=True)
class Matched:
    """A way to generate with CALM that is as accurate as the rival at equal collision, the fastest; else the nearest to that."""

    way: str
    reached: bool
    gaps: Mapping[str, Figure]  # by unit: accuracy of CALM less the rival's, fractions
    outside: bool  # the rival has no temperature of this collision: its nearest was taken
    calm: float  # tokens a second
    rival: float
    operations: tuple[float, float]  # per generated token: CALM, rival
    together: tuple[int, float, float] | None = None  # so many texts at once: tokens a second, CALM and rival

    @property
    def ratio(self) -> float:
        return self.calm / self.rival

    @property
    def faster(self) -> str | None:
        """In words; None where CALM is as accurate at no higher speed, or not as accurate."""
        if not self.reached:
            return None
        if self.ratio > 1:
            return "generates faster"
        at_once = self.together is not None and self.together[1] > self.together[2]
        return "generates faster where several texts are written at once" if at_once else None


@dataclass(frozen=True)
class Duel:
    """CALM against one rival."""

    rival: str  # name of the arm
    quality: Quality
    matched: Matched | None  # None: not measured
    meeting: BreakEven

    @property
    def use(self) -> bool | None:
        """Whether CALM is the one to use at this budget; None: nothing tells."""
        if self.quality.standing == "open":
            return None
        if self.quality.standing == "tie":
            return self.matched is not None and self.matched.faster is not None
        return self.quality.standing == "ahead"


def quality(calm: TableRow, rival: TableRow) -> Quality:
    """From the results of both rows."""
    for row in (calm, rival):
        if row.failed:
            return Quality(Figure(None), "BrierLM", "open", f"{_name(row.name)} failed: {row.failed[0]}")
    gap, figure = decisive(rival, calm)
    if gap.value is None:
        return Quality(gap, figure, "open", "there is no seed that both have a score for")
    if gap.error is None:
        return Quality(gap, figure, "open", "the difference has no standard error: give more documents")
    if abs(gap.value) <= gap.error:
        return Quality(gap, figure, "tie")
    return Quality(gap, figure, "ahead" if gap.value > 0 else "behind")


def matched(calm: Sequence[Points], rival: Sequence[Points], speeds: Speeds, rival_speeds: Speeds) -> Matched | None:
    """From the points of both models by seed, and tokens a second of the first seed's. None where there are none."""
    found = []
    for way, at in WAYS.items():
        own = [point for points in calm for point in points if (point["method"], point["strength"]) == at]
        if way not in speeds or not calm or len(own) < len(calm):
            continue  # not measured of every seed
        gaps, outside = {}, False
        for unit in UNITS:
            each = [
                accuracy_gap(point, [other for other in others if other["method"] == TOKENS], unit)
                for point, others in zip(own, rival, strict=True)
            ]
            outside |= any(beyond for _, beyond in each)
            gaps[unit] = each[0][0] if len(each) == 1 else mean([gap.value for gap, _ in each if gap.value is not None])
        reached = all(gap.value is not None and gap.value >= -(gap.error or 0.0) for gap in gaps.values())
        mine, other = speeds[way], rival_speeds[ONE]
        spent = float(mine["operations"]), float(other["operations"])
        rates = [float(each["tokens_per_s"]) for each in (mine, other)]
        together = None
        if "together" in mine and "together" in other:
            at_once = [float(each["together"]["tokens_per_s"]) for each in (mine, other)]
            together = (int(mine["together"]["texts"]), at_once[0], at_once[1])
        found.append(Matched(way, reached, gaps, outside, rates[0], rates[1], spent, together))
    if not found:
        return None
    good = [each for each in found if each.reached]
    if good:
        return max(good, key=lambda each: each.calm)
    return max(found, key=lambda each: min(gap.value or 0.0 for gap in each.gaps.values()))


def accuracy_gap(point: Mapping[str, Any], others: Points, unit: str) -> tuple[Figure, bool]:
    """Accuracy of a point less that of a curve at the point's collision, on straight lines between the curve's points.

    The second value says that the curve does not reach that collision; its nearest end was taken. The error is over documents,
    paired where both were measured in the same places.
    """
    at, value = f"{unit}_collision", f"{unit}_accuracy"
    line = sorted(others, key=lambda other: float(other[at]))
    where = float(point[at])
    shares = _shares([float(other[at]) for other in line], where)
    outside = not line[0][at] <= where <= line[-1][at]
    gap = float(point[value]) - sum(share * float(line[index][value]) for index, share in shares.items())
    mine, column = point["per_document"], FIGURES.index(value)
    same = all(line[index]["per_document"][key] == mine[key] for index in shares for key in ("document", "contexts"))
    if not same:
        return Figure(gap), outside
    sums = torch.tensor(mine["sums"][column], dtype=torch.float64)
    for index, share in shares.items():
        sums = sums - share * torch.tensor(line[index]["per_document"]["sums"][column], dtype=torch.float64)
    documents = torch.tensor(mine["document"])
    ratio = cluster_ratio(
        sums[:, None],
        torch.ones(len(sums), 1, dtype=torch.bool),
        documents,
        torch.tensor(mine["contexts"], dtype=torch.float64),
    )
    if ratio.covariance is None:
        return Figure(gap), outside
    return Figure(gap, float(ratio.covariance[0, 0].clamp_min(0).sqrt()), "documents"), outside


def _shares(places: Sequence[float], where: float) -> dict[int, float]:
    """Of the points beside `where`, or of the nearest end; they add up to 1."""
    if where <= places[0]:
        return {0: 1.0}
    if where >= places[-1]:
        return {len(places) - 1: 1.0}
    right = next(index for index, place in enumerate(places) if place >= where)
    share = (where - places[right - 1]) / (places[right] - places[right - 1])
    return {right - 1: 1 - share, right: share}


def sentences(duel: Duel, minutes: float) -> list[str]:
    """The verdict in plain words: quality, generation, break-even."""
    found, rival = duel.quality, _name(duel.rival)
    lines = [f"{_advice(duel)}"]
    if found.standing == "open":
        return [*lines, f"Against {rival} nothing is decided at {minutes:g} minutes: {found.why}."]
    assert found.gap.value is not None
    gap = minus(f"{found.gap.value:+.2f}") + f" ± {found.gap.error or 0.0:.2f}"
    over = "over seeds" if found.gap.over == "seeds" else "over held-out documents; one seed says nothing about another"
    scale = "" if found.figure == "BrierLM" else " x 100, for BrierLM has no value or no error"
    words = {"ahead": "is ahead of", "tie": "ties with", "behind": "is behind"}[found.standing]
    lines.append(
        f"Quality: after {minutes:g} minutes of training each CALM {words} {rival}: {gap} {found.figure}{scale} "
        f"(standard error {over})."
    )
    if duel.matched is not None:
        lines += [_generation(duel.matched, rival), _cost(duel.matched, rival)]
    lines.append(_meeting(duel.meeting, found.standing, rival, minutes))
    return lines


def _advice(duel: Duel) -> str:
    rival, faster = _name(duel.rival), duel.matched and duel.matched.faster
    if duel.use is None:
        return f"No verdict between CALM and {rival}."
    if duel.quality.standing == "ahead":
        return f"Use CALM here, not {rival}: it is better at this budget" + (f" and {faster}." if faster else ".")
    if duel.quality.standing == "tie":
        if duel.use:
            return f"Use CALM here, for its speed: its quality ties with {rival} and it {faster}."
        return f"Do not use CALM here: it is no better than {rival} and generates no faster at matched quality."
    return f"Do not use CALM here: {rival} is better at this budget." + (
        f" CALM {faster} at matched accuracy, if that is worth more than the score." if faster else ""
    )


def _generation(one: Matched, rival: str) -> str:
    gaps = ", ".join(
        f"{plus_minus(100 * gap.value, None if gap.error is None else 100 * gap.error)} points for the {UNITS[unit]}"
        for unit, gap in one.gaps.items()
        if gap.value is not None
    )
    speed = f"{one.calm:,.0f} tokens/s against {one.rival:,.0f}, {one.ratio:.2f} times"
    if one.together is not None:
        texts, calm, other = one.together
        speed += f" ({texts} texts at once: {calm:,.0f} against {other:,.0f}, {calm / other:.2f} times)"
    edge = f" ({rival} has no temperature with so many or so few repeats: its nearest was taken)" if one.outside else ""
    if one.reached:
        return (
            f"Generation at matched quality: CALM, {one.way}, {speed}; accuracy at equal collision less that of {rival}: "
            f"{gaps}{edge}."
        )
    return (
        f"Generation: no way of drawing from CALM is as accurate as {rival} at equal collision; the nearest, {one.way}, has "
        f"{speed}, and in accuracy {gaps}{edge}."
    )


def _cost(one: Matched, rival: str) -> str:
    calm, other = (duration(MILLION / rate) for rate in (one.calm, one.rival))
    return (
        f"A million generated tokens: {calm} of this machine and {MILLION * one.operations[0]:.2g} operations with CALM "
        f"({one.way}), {other} and {MILLION * one.operations[1]:.2g} with {rival}."
    )


def _meeting(found: BreakEven, standing: Standing, rival: str, minutes: float) -> str:
    if found.state == "open":
        return "Break-even: the curves have too few points with a score above 0 to tell."
    scale = "" if found.figure == "BrierLM" else " x 100"
    assert found.slopes is not None
    slopes = " and ".join(minus(f"{slope:+.2f}") for slope in found.slopes)
    trend = f"{found.figure}{scale} grows by {slopes} with each doubling of a model's time, CALM and {rival}"
    if standing == "ahead":
        later = found.slopes[0] < found.slopes[1]
        return f"Break-even: CALM is past it at this budget ({trend}{': the rival is catching up' if later else ''})."
    if found.state == "ahead":
        return f"Break-even: about here; the fitted curves have met, which the scores do not confirm ({trend})."
    if found.state == "none":
        return f"Break-even: none in sight within {REACH:g} times this budget ({trend})."
    assert found.seconds is not None
    ends = [f"beyond {REACH:g} times this budget" if end is None else duration(end) for end in (found.low, found.high)]
    return (
        f"Break-even: the fitted curves meet at about {duration(found.seconds)} of training (16 to 84 % of the resamples: "
        f"{ends[0]} to {ends[1]}; in {found.beyond:.0%} they do not meet within {REACH:g} times this budget). "
        f"An extrapolation, not a measurement ({trend})."
    )


def _name(arm: str) -> str:
    return ARMS[arm][1] if arm in ARMS else arm
