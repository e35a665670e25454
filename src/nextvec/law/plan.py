"""What a law recommends for a budget of operations: K, width and tokens, with the score to expect and how sure that is.

For each K the widths of its grid's shape, in steps of one attention head, from the narrowest measured up to REACH times the
parameters of the widest; what the autoencoder leaves of the budget is tokens. The best width is the law's own; in every
resample of the law it is looked for again, and the K that wins there is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nextvec.config import BackboneConfig, CalmRun, RunConfig, TokenLMRun
from nextvec.errors import ConfigError
from nextvec.law.fit import Law
from nextvec.law.points import Grid, Point, backbone_parameters, encoder_flops
from nextvec.report.words import count
from nextvec.sweep.plan import flops_per_token, tokens_per_step

REACH = 10.0  # times what was measured: up to here widths are looked at, and from here on extrapolation is said loudly
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Choice:
    """The best that the law knows for one K at the budget."""

    K: int
    token: bool  # whether it is the token Transformer and no CALM
    width: int
    backbone_parameters: float  # N
    tokens: float  # D
    encoder_flops: float
    score: float
    low: float  # 95 % of the resamples at this width and these tokens
    high: float
    wins: float  # share of the resamples in which this K is ahead
    edge: bool  # whether the width is the least or largest that was looked at


@dataclass(frozen=True)
class Plan:
    """Choices from best to worst, and what a reader must know of them."""

    flops: float
    score: str
    choices: tuple[Choice, ...]
    gap: float | None  # best less second, with the standard deviation of that over the resamples
    gap_error: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{'K':>3}{'width':>7}{'backbone':>10}{'tokens':>9}{'autoencoder':>13}  {self.score + ', 95 %':<28}{'wins':>6}"
        ]
        for each in self.choices:
            figure = f"{each.score:.2f} ({each.low:.2f} to {each.high:.2f})"
            share = f"{each.encoder_flops / self.flops:.0%}" if each.encoder_flops else "none"
            lines.append(
                f"{each.K:>3}{each.width:>7}{count(each.backbone_parameters):>10}{count(each.tokens):>9}{share:>13}  "
                f"{figure:<28}{each.wins:>6.0%}"
            )
        return "\n".join([*lines, "", self.sentence(), *self.warnings])

    def sentence(self) -> str:
        """The recommendation."""
        best = self.choices[0]
        name = f"K = {best.K}" + (", the token Transformer," if best.token else "")
        text = (
            f"Recommended for {self.flops:.3g} operations: {name} of width {best.width:,} on {count(best.tokens)} tokens; "
            f"the law expects {self.score} {best.score:.2f} ({best.low:.2f} to {best.high:.2f}), and this K wins in "
            f"{best.wins:.0%} of the resamples."
        )
        if self.gap is not None and self.gap_error is not None and self.gap <= self.gap_error:
            text += f" K = {self.choices[1].K} is within one standard error of it ({self.gap:.2f} ± {self.gap_error:.2f}): a tie."
        return text


def plan(grid: Grid, law: Law, flops: float) -> Plan:
    """The best K, width and tokens for a training budget, the autoencoder's operations in it.

    Raises ConfigError for a budget that is no number above zero, or of which no K has a step left.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise ConfigError(f"a budget is a number of operations above zero; got {flops:g}")
    top = REACH * max(point.parameters for point in grid.points)
    warnings, found = [], []
    for K in grid.sizes:
        points = grid.of(K)
        left = flops - encoder_flops(points[-1].encoder)
        runs = [run for run in _widths(points[-1], _backbone(points[0].run).width, top) if left >= _step(run)]
        if runs:
            found.append((K, points[-1], left, runs))
        else:
            what = ("its autoencoder and " if points[-1].encoder else "") + "one step of the narrowest model"
            warnings.append(f"K = {K} is left out: the budget does not pay for {what}.")
    if not found:
        raise ConfigError(f"a budget of {flops:.3g} operations does not pay for a step of any model of {grid.path}")
    best_RK, here_RK, choices = [], [], []
    for K, widest, left, runs in found:
        place_M3 = torch.tensor(
            [[backbone_parameters(run), left / flops_per_token(run), K] for run in runs], dtype=torch.float64
        )
        score_RM = law.solution.scores(place_M3)
        pick = int(score_RM[0].argmax())
        low, high = torch.quantile(score_RM[1:, pick], torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
        N, D, _ = place_M3[pick].tolist()
        best_RK.append(score_RM.max(dim=1).values)
        here_RK.append(score_RM[:, pick])
        choices.append(
            Choice(
                K=K,
                token=isinstance(widest.run, TokenLMRun),
                width=_backbone(runs[pick]).width,
                backbone_parameters=N,
                tokens=D,
                encoder_flops=encoder_flops(widest.encoder),
                score=float(score_RM[0, pick]),
                low=low,
                high=high,
                wins=0.0,
                edge=pick in (0, len(runs) - 1),
            )
        )
    return _ranked(grid, law, flops, choices, torch.stack(best_RK, 1), torch.stack(here_RK, 1), warnings)


def _ranked(
    grid: Grid, law: Law, flops: float, choices: Sequence[Choice], best_RK: Tensor, here_RK: Tensor, notes: list[str]
) -> Plan:
    winner_R = best_RK[1:].argmax(dim=1)
    wins = [float((winner_R == index).double().mean()) for index in range(len(choices))]
    order = sorted(range(len(choices)), key=lambda index: -choices[index].score)
    ranked = tuple(Choice(**{**asdict(choices[index]), "wins": wins[index]}) for index in order)
    gap = gap_error = None
    if len(order) > 1:
        gap_R = here_RK[:, order[0]] - here_RK[:, order[1]]
        gap, gap_error = float(gap_R[0]), float(gap_R[1:].std())
    return Plan(flops, law.score, ranked, gap, gap_error, (*_range(grid, flops, ranked[0]), *notes))


def _range(grid: Grid, flops: float, best: Choice) -> Iterator[str]:
    """Sentences on what lies outside of what was measured of the recommended K."""
    points = grid.of(best.K)
    measured = {
        "budget": (flops, [point.flops for point in points], "operations"),
        "recommended backbone": (best.backbone_parameters, [point.parameters for point in points], "parameters"),
        "recommended training": (best.tokens, [point.tokens for point in points], "tokens"),
    }
    for what, (value, known, unit) in measured.items():
        beyond = max(value / max(known), min(known) / value)
        if beyond <= 1.001:
            continue
        side = "above the largest" if value > max(known) else "below the smallest"
        text = (
            f"the {what} ({value:.3g} {unit}) is {beyond:.3g} times {side} row of K = {best.K} ({min(known):.3g} to "
            f"{max(known):.3g})"
        )
        if beyond > REACH:
            yield f"WARNING: {text}. The law says nothing reliable so far out: take this as a guess and measure."
        else:
            yield f"{text[0].upper()}{text[1:]}: an extrapolation."
    if best.edge:
        yield "The width is at the end of those looked at: the law has no best width inside of them."


def _widths(widest: Point, narrowest: int, top: float) -> Iterator[RunConfig]:
    """The run of the widest row at other widths, whole heads of its size, from the narrowest row's to `top` parameters."""
    shape = _backbone(widest.run)
    head = shape.width // shape.heads
    for heads in range(max(1, -(-narrowest // head)), 1 << 20):
        groups = None if shape.kv_heads is None else max(1, heads * shape.kv_heads // shape.heads)
        inner = max(8, 8 * round(shape.inner * heads / shape.heads / 8))
        backbone = shape.override(width=heads * head, inner=inner, heads=heads, kv_heads=groups)
        run = widest.run.override(model=widest.run.model.override(backbone=backbone))
        if backbone_parameters(run) > top:
            return
        yield run


def _backbone(run: RunConfig) -> BackboneConfig:
    assert isinstance(run, CalmRun | TokenLMRun), "points are of language models"
    return run.model.backbone


def _step(run: RunConfig) -> float:
    return tokens_per_step(run) * flops_per_token(run)
