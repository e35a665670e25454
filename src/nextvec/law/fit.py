"""The law: held-out score as a function of N (backbone parameters), D (tokens) and K, by least squares in four families.

With err = 1 - score / 100, x = ln N and y = ln D about their means, k = log2 K about its mean:

logarithmic    ln err = E_K + a x + b y                         the same, slopes by K: a + a' k for a, b + b' k for b
power          err = E_K + A exp(-a x) + B exp(-b y)            the same, by K: A + A' k for A, B + B' k for B

Power laws in N and D with a floor are those of Hoffmann et al. 2022 (arXiv 2203.15556), there of a loss. The family is the
one with the least leave-one-out error. Uncertainty: in each resample documents are drawn with replacement, the same for
all rows, and rows get exponential weights (the Bayesian bootstrap, Rubin 1981), which no K can drop out of; the family
stays.

Legend: R resamples, I points, P coefficients, C documents, n order, M places to predict at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nextvec.errors import ConfigError
from nextvec.law.points import Grid
from nextvec.scoring.brier import brier_lm_of

Score = Literal["BrierLM", "Brier-1"]
EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)  # of the power families, tried for N and for D
SPARE = 3  # points beyond the coefficients (exponents count) that a family needs
RESAMPLES = 1000


@dataclass(frozen=True)
class Family:
    """A form of the law; see the module's docstring."""

    power: bool
    by_size: bool  # whether the effect of N and D depends on K

    def __str__(self) -> str:
        form = "power laws in N and D" if self.power else "logarithmic in N and D"
        return form + (", their weights by K" if self.by_size else ", an offset by K")

    def coefficients(self, sizes: int) -> int:
        return sizes + 2 + 2 * self.by_size + 2 * self.power


FAMILIES = tuple(Family(power, by_size) for power in (False, True) for by_size in (False, True))


@dataclass(frozen=True)
class Frame:
    """Where x, y and k are counted from, and the K that have an offset."""

    x: float
    y: float
    k: float
    sizes: tuple[int, ...]

    def design(self, family: Family, place_M3: Tensor, exponents: tuple[float, float]) -> Tensor:
        """(M, P) of places (N, D, K)."""
        x_M, y_M = place_M3[:, 0].log() - self.x, place_M3[:, 1].log() - self.y
        if family.power:
            x_M, y_M = (-exponents[0] * x_M).exp(), (-exponents[1] * y_M).exp()
        k_M = place_M3[:, 2].log2() - self.k
        columns = [(place_M3[:, 2] == K).double() for K in self.sizes] + [x_M, y_M]
        return torch.stack(columns + [k_M * x_M, k_M * y_M] * family.by_size, dim=1)


@dataclass(frozen=True)
class Solution:
    """One family fitted under R sets of weights."""

    family: Family
    frame: Frame
    coefficients: Tensor  # (R, P)
    exponents: Tensor  # (R,) indices of EXPONENTS x EXPONENTS; 0 for a logarithmic family

    def scores(self, place_M3: Tensor) -> Tensor:
        """(R, M) scores at places (N, D, K), on the scale that ends at 100."""
        found_RM = torch.empty(len(self.coefficients), len(place_M3), dtype=torch.float64)
        for index, pair in enumerate(_pairs(self.family)):
            mine_R = self.exponents == index
            found_RM[mine_R] = self.coefficients[mine_R] @ self.frame.design(self.family, place_M3, pair).T
        return (100 * (1 - (found_RM if self.family.power else found_RM.exp()))).clamp(-100, 100)


@dataclass(frozen=True)
class Law:
    """The chosen family: row 0 is the fit to all that was measured, the others are its resamples."""

    score: Score
    solution: Solution
    errors: tuple[tuple[Family, float], ...]  # leave-one-out, root mean square in points of the score
    residual: float  # root mean square of the fit itself, in points of the score
    points: int  # rows times seeds that it stands on


def fit(grid: Grid, generator: torch.Generator, score: Score | None = None, resamples: int = RESAMPLES) -> Law:
    """Fit every family, take the one with the least leave-one-out error, resample it.

    score: None is BrierLM where every point has it, else Brier-1. Raises ConfigError where BrierLM is asked for and
    a point has none, or where there are too few points for the smallest family.
    """
    lacking = [point.row for point in grid.points if point.brier.brier_lm is None]
    if score == "BrierLM" and lacking:
        raise ConfigError(f"{len(lacking)} of {len(grid.points)} rows have no BrierLM ({lacking[0]}): take Brier-1")
    score = score or ("Brier-1" if lacking else "BrierLM")
    place_I3 = torch.tensor([[point.parameters, point.tokens, point.K] for point in grid.points], dtype=torch.float64)
    frame = Frame(
        float(place_I3[:, 0].log().mean()),
        float(place_I3[:, 1].log().mean()),
        float(place_I3[:, 2].log2().mean()),
        tuple(grid.sizes),
    )
    plain_1I, resampled_RI = _scores(grid, score, generator, resamples)
    count = len(grid.points)
    errors = []
    for family in FAMILIES:
        if count >= family.coefficients(len(frame.sizes)) + SPARE:
            left_out = solve(
                family, frame, place_I3, plain_1I.expand(count, count), 1 - torch.eye(count, dtype=torch.float64)
            )
            gap_I = left_out.scores(place_I3).diagonal() - plain_1I[0]
            errors.append((family, float(gap_I.square().mean().sqrt())))
    if not errors:
        need = FAMILIES[0].coefficients(len(frame.sizes)) + SPARE
        raise ConfigError(
            f"{grid.path} has {count} finished rows that can be used, and a law of {len(frame.sizes)} sizes of patch takes "
            f"{need}: go on with `nextvec sweep law --out {grid.path}`"
        )
    family = min(errors, key=lambda item: item[1])[0]
    weight_RI = torch.empty(resamples, count, dtype=torch.float64).exponential_(generator=generator)
    weight_RI = torch.cat([torch.ones(1, count, dtype=torch.float64), weight_RI])
    solution = solve(family, frame, place_I3, torch.cat([plain_1I, resampled_RI]), weight_RI)
    residual = float((solution.scores(place_I3)[0] - plain_1I[0]).square().mean().sqrt())
    return Law(score, solution, tuple(errors), residual, count)


def solve(family: Family, frame: Frame, place_I3: Tensor, score_RI: Tensor, weight_RI: Tensor) -> Solution:
    """Weighted least squares in the family's own scale; exponents by search. A score that is nan has no weight."""
    known_RI = score_RI.isfinite()
    error_RI = 1 - score_RI.where(known_RI, torch.zeros_like(score_RI)) / 100
    target_RI = error_RI if family.power else error_RI.log()
    root_RI = (weight_RI * known_RI).sqrt()
    best_R = torch.full((len(score_RI),), torch.inf, dtype=torch.float64)
    chosen_R = torch.zeros(len(score_RI), dtype=torch.long)
    coefficients_RP = torch.zeros(len(score_RI), 0, dtype=torch.float64)
    for index, pair in enumerate(_pairs(family)):
        design_IP = frame.design(family, place_I3, pair)
        if index == 0:
            coefficients_RP = torch.zeros(len(score_RI), design_IP.shape[1], dtype=torch.float64)
        found_RP = torch.linalg.lstsq(
            root_RI[:, :, None] * design_IP, (root_RI * target_RI)[:, :, None], driver="gelsd"
        ).solution[:, :, 0]
        loss_R = (root_RI * (found_RP @ design_IP.T - target_RI)).square().sum(dim=1)
        better_R = loss_R < best_R
        best_R = torch.where(better_R, loss_R, best_R)
        chosen_R[better_R] = index
        coefficients_RP[better_R] = found_RP[better_R]
    return Solution(family, frame, coefficients_RP, chosen_R)


def _pairs(family: Family) -> Sequence[tuple[float, float]]:
    return list(itertools.product(EXPONENTS, EXPONENTS)) if family.power else [(0.0, 0.0)]


def _scores(grid: Grid, score: Score, generator: torch.Generator, resamples: int) -> tuple[Tensor, Tensor]:
    """What was measured, (1, I), and with resampled documents, (R, I); BrierLM is nan where an order is not positive."""
    per_document = [point.brier.per_document for point in grid.points]
    sums_InC = torch.tensor([each.sums for each in per_document if each is not None], dtype=torch.float64)
    count_InC = torch.tensor([each.positions for each in per_document if each is not None], dtype=torch.float64)
    C = sums_InC.shape[-1]
    picked_RC = torch.randint(C, (resamples, C), generator=generator)
    times_RC = torch.zeros(resamples, C, dtype=torch.float64).scatter_add_(
        1, picked_RC, torch.ones(resamples, C, dtype=torch.float64)
    )

    def figures(times_RC: Tensor) -> Tensor:
        mean_RIn = torch.einsum("rc,inc->rin", times_RC, sums_InC) / torch.einsum("rc,inc->rin", times_RC, count_InC)
        return 100 * mean_RIn[..., 0] if score == "Brier-1" else brier_lm_of(mean_RIn)

    return figures(torch.ones(1, C, dtype=torch.float64)), figures(times_RC)


__all__ = ["FAMILIES", "RESAMPLES", "Family", "Law", "Score", "Solution", "fit", "solve"]
