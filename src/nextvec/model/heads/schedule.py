"""The cosine noise schedule of the diffusion head: tables by step (Nichol and Dhariwal, Improved DDPM; docs/method.md)."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.config import TIMES

OFFSET = 0.008  # keeps the first step's noise from vanishing
MOST = 0.999  # beta at most


class Tables(NamedTuple):
    """Figures of a step. x_i = signal z + noise eps, mean of q(x_{i-1} | x_i, z) = from_clean z + from_noisy x_i."""

    signal: Tensor
    noise: Tensor
    inverse_signal: Tensor  # z = inverse_signal x_i - noise_to_signal eps
    noise_to_signal: Tensor
    from_clean: Tensor
    from_noisy: Tensor
    log_variance: Tensor  # of q(x_{i-1} | x_i, z); that of step 0, which is 0, is replaced by step 1's
    log_beta: Tensor


@dataclass(frozen=True)
class Schedule:
    """A schedule over some of the 1000 steps, in ascending order: what lies between two of them is one step."""

    times: tuple[int, ...]  # the steps that are kept, as the network knows them
    betas: Tensor  # (steps,) float64
    kept: Tensor  # (steps,) float64: prod (1 - beta), the squared share of the signal

    @functools.cached_property
    def all(self) -> Tables:
        """Every table, (steps,) float64."""
        kept, betas = self.kept, self.betas
        before = torch.cat((torch.ones(1, dtype=torch.float64), kept[:-1]))
        variance = betas * (1.0 - before) / (1.0 - kept)
        variance = torch.cat((variance[1:2] if len(variance) > 1 else betas, variance[1:]))
        return Tables(
            signal=kept.sqrt(),
            noise=(1.0 - kept).sqrt(),
            inverse_signal=(1.0 / kept).sqrt(),
            noise_to_signal=(1.0 / kept - 1.0).sqrt(),
            from_clean=betas * before.sqrt() / (1.0 - kept),
            from_noisy=(1.0 - before) * (1.0 - betas).sqrt() / (1.0 - kept),
            log_variance=variance.log(),
            log_beta=betas.log(),
        )

    def tables(self, step_N: Tensor, dtype: torch.dtype) -> Tables:
        """The tables at steps (...), each (..., 1); rounded to float32 first, as in the published code."""
        return Tables(*(table.to(step_N.device)[step_N].float().to(dtype)[..., None] for table in self.all))


@functools.cache
def cosine_schedule(steps: int) -> Schedule:
    """The 1000 steps of the cosine schedule, or `steps` of them evenly spaced from the first to the last."""
    share = [math.cos((i / TIMES + OFFSET) / (1.0 + OFFSET) * math.pi / 2.0) ** 2 for i in range(TIMES + 1)]
    betas = torch.tensor(
        [min(1.0 - after / before, MOST) for before, after in itertools.pairwise(share)],
        dtype=torch.float64,
    )
    kept = (1.0 - betas).cumprod(0)
    times = spaced(steps, TIMES - 1)
    chosen = kept[list(times)]
    before = torch.cat((torch.ones(1, dtype=torch.float64), chosen[:-1]))
    return Schedule(times, betas if steps == TIMES else 1.0 - chosen / before, chosen)


def spaced(count: int, last: int) -> tuple[int, ...]:
    """`count` of the steps 0 .. last, evenly, both ends among them (the last alone where one is asked for).

    >>> spaced(5, 8), spaced(1, 8)
    ((0, 2, 4, 6, 8), (8,))
    """
    assert 1 <= count <= last + 1
    if count == 1:
        return (last,)
    stride, at, found = last / (count - 1), 0.0, []
    for _ in range(count):
        found.append(round(at))
        at += stride  # added up, not multiplied, as in the published code, whose rounding differs
    return tuple(found)
