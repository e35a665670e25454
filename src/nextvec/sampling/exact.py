"""Exact temperature without likelihoods: draws of P^(1/T) from nothing but draws of P, 0 < T <= 1 (paper, Algorithm 1).

Legend: N draws, K tokens per patch, m groups or draws looked at together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nextvec.errors import UserError
from nextvec.sampling.temperature import check_temperature, count_equal, split_exponent


class BudgetError(UserError):
    """The exact sampler used up its budget.

    draws: draws used; restarts: rejected attempts; normaliser: lower and upper end of what Z = sum_x P(x)^(1/T) is by the
    equal draws among them (see `estimate_normaliser`), None where 1/T allows no estimate.
    """

    def __init__(self, message: str, draws: int, restarts: int, normaliser: tuple[float, float] | None) -> None:
        super().__init__(message)
        self.draws = draws
        self.restarts = restarts
        self.normaliser = normaliser


def exact_temperature(
    draw: Callable[[int], Tensor], temperature: float, generator: torch.Generator, budget: int, batch: int = 256
) -> Tensor:
    """One exact draw (K,) of P^(1/T) from a black-box sampler of P: the paper's Algorithm 1, any T in (0, 1].

    `draw(m)` returns m independent draws (m, K); it is called with `batch` or fewer, so up to `batch` - 1 draws may go unused.
    Expected draws used: (n + [a > 0] sum_x P^(1/T - 1)) / sum_x P^(1/T). Raises BudgetError after `budget` draws, UserError for
    a bad temperature or a budget below n.
    """
    check_temperature(temperature)
    whole, rest = split_exponent(temperature)
    if budget < whole:
        raise UserError(f"the budget must allow at least 1 / temperature = {whole} draws; got {budget}: raise it")
    source = _Draws(draw, budget, max(batch, whole))
    restarts = 0
    while True:
        block_mNK = source.peek(whole)
        if block_mNK is None:
            raise _exhausted(temperature, source, restarts)
        unanimous = (block_mNK == block_mNK[:, :1]).flatten(1).all(dim=1).nonzero()
        if not len(unanimous):
            source.take(len(block_mNK) * whole)
            restarts += len(block_mNK)
            continue
        first = int(unanimous[0])
        source.take((first + 1) * whole)
        restarts += first
        winner_K = block_mNK[first, 0]
        accepted = True if rest == 0 else _accept(source, winner_K, rest, generator)
        if accepted:
            return winner_K
        if accepted is not None:
            restarts += 1


def estimate_normaliser(draws_NK: Tensor, temperature: float) -> tuple[float, float] | None:
    """Lower and upper end of Z = sum_x P(x)^(1/T), estimated from independent draws (N, K) by how many are equal.

    sum_x P(x)^m is the chance that m draws agree; the share of all groups of m among the N that do, sum_x C(c_x, m) / C(N, m), is
    unbiased for it. At 1/T = n both ends are this for m = n; else Z lies between m = n + 1 and m = n. None where T is in
    (1/2, 1), where equal draws say nothing of the upper end, and where N < n. At T = 1 it is (1, 1).
    """
    whole, rest = split_exponent(temperature)
    if len(draws_NK) < whole or (whole == 1 and rest > 0):
        return None
    upper = _agreement(draws_NK, whole)
    if rest == 0:
        return upper, upper
    return (_agreement(draws_NK, whole + 1) if len(draws_NK) > whole else 0.0), upper


def _agreement(draws_NK: Tensor, together: int) -> float:
    """Share of the groups of `together` draws that agree."""
    counts = count_equal(draws_NK[None])[0].tolist()
    equal = sum(math.comb(count, together) / count for count in counts)  # each value is met once per copy
    return equal / math.comb(len(counts), together)


def _accept(source: _Draws, winner_K: Tensor, rest: float, generator: torch.Generator) -> bool | None:
    """Second phase of Algorithm 1: true with probability P(winner)^a, by a race of draws against a/1, a/2, ...

    None where the draws end before the race does: the caller finds the budget spent as well.
    """
    failures = 0
    while True:
        block_m1K = source.peek(1)
        if block_m1K is None:
            return None
        match_m = (block_m1K[:, 0] == winner_K).all(dim=-1)
        step_m = torch.arange(1, len(match_m) + 1, device=match_m.device) + failures
        uniform_m = torch.rand(len(match_m), generator=generator, device=generator.device).to(match_m.device)
        ended = (match_m | (uniform_m < rest / step_m)).nonzero()
        if len(ended):
            index = int(ended[0])
            source.take(index + 1)
            return bool(match_m[index])
        source.take(len(match_m))
        failures += len(match_m)


class _Draws:
    """Draws fetched in batches and used one after the other, so that batching never changes the law."""

    def __init__(self, draw: Callable[[int], Tensor], budget: int, batch: int) -> None:
        self._draw, self._budget, self._batch = draw, budget, batch
        self._held: Tensor | None = None
        self.fetched: list[Tensor] = []  # all of them, for the estimate of Z
        self.used = 0

    def peek(self, group: int) -> Tensor | None:
        """The next draws in whole groups, (m, group, K) with m >= 1; None when the budget has no whole group left."""
        held = 0 if self._held is None else len(self._held)
        if held < group:
            fetch = min(self._batch, self._budget - self.used - held)
            if held + fetch < group:
                return None
            fresh = self._draw(fetch)
            self.fetched.append(fresh)
            self._held = fresh if self._held is None else torch.cat((self._held, fresh))
        assert self._held is not None
        whole = len(self._held) // group * group
        return self._held[:whole].unflatten(0, (-1, group))

    def take(self, count: int) -> None:
        """Count the next draws as used."""
        assert self._held is not None
        self._held = self._held[count:]
        self.used += count


def _exhausted(temperature: float, source: _Draws, restarts: int) -> BudgetError:
    whole, rest = split_exponent(temperature)
    draws_NK = torch.cat(source.fetched)
    normaliser = estimate_normaliser(draws_NK, temperature)
    found = ""
    if normaliser is not None and normaliser[1] == 0:
        found = f"; no {whole} of them are equal, so Z = sum P^(1/T) is too small to estimate"
    elif normaliser is not None:
        low, high = normaliser
        about = f"about {high:.2g}" if rest == 0 else f"between {low:.2g} and {high:.2g}"
        found = f"; by the equal ones among them Z = sum P^(1/T) is {about}, and a patch takes "
        found += f"about {whole / high:,.0f} draws" if rest == 0 else f"at least {whole / high:,.0f} draws"
    if 0.5 < temperature < 1:
        remedy = (
            "here the cost grows like the number of possible patches to the power 2 - 1/T; take temperature 1, one of at "
            "most 0.5, or the batch sampler"
        )
    else:
        remedy = "raise the budget, take a higher temperature, or the batch sampler"
    return BudgetError(
        f"the exact sampler at temperature {temperature:g} found no patch within its budget: {source.used} draws used, "
        f"{restarts} restarts{found}: {remedy}",
        source.used,
        restarts,
        normaliser,
    )
