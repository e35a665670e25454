"""Solvers of a diffusion: from noise to a latent, given what the network predicts at each step.

`ddpm` is the published one: a random step back through each kept step, with the learned variance. `ddim` (Song et al.) and
`dpm++` (DPM-Solver++ 2M, Lu et al.) follow the ODE that has the same law: no noise but the first, few steps. dpm++ is exact
where the clean latent's prediction is linear in the log signal-to-noise ratio, so its error is of order 2 in the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nextvec.config import TIMES
from nextvec.model.heads.schedule import cosine_schedule, spaced

Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x, step) -> (noise, variance position), each as x
LEAST = -3.0  # log(signal / noise) at the first step of the ODE solvers [D], docs/heads.md


def denoise(predict: Predict, fresh: Callable[[], Tensor], solver: str, steps: int) -> Tensor:
    """A draw by `solver` in `steps` evaluations of `predict`; `fresh` gives standard normal noise of the draw's shape."""
    if solver == "ddpm":
        return ddpm(predict, fresh, steps)
    assert solver in ("ddim", "dpm++")
    count = min(steps, first_time() + 1)
    times = spaced(count, first_time()) if solver == "ddim" else evenly_in_signal(count)
    return follow(predict, fresh(), times, order=1 if solver == "ddim" else 2)


def ddpm(predict: Predict, fresh: Callable[[], Tensor], steps: int) -> Tensor:
    """x_{i-1} ~ N(posterior mean at the predicted clean latent, learned variance), back through the kept steps."""
    schedule = cosine_schedule(steps)
    tables = [[float(value) for value in table] for table in schedule.all]
    x = fresh()
    for i in reversed(range(steps)):
        _, _, inverse, ratio, from_clean, from_noisy, log_variance, log_beta = (table[i] for table in tables)
        eps, position = predict(x, schedule.times[i])
        x = from_clean * (inverse * x - ratio * eps) + from_noisy * x
        if i:
            share = (position + 1.0) / 2.0
            x = x + (0.5 * (share * log_beta + (1.0 - share) * log_variance)).exp() * fresh()
    return x


def follow(predict: Predict, x: Tensor, times: Sequence[int], order: int) -> Tensor:
    """The ODE's solution at the clean end from noise x, through ascending `times`: DDIM (order 1), DPM-Solver++ 2M (2).

    With l = log(signal / noise), and z the predicted clean latent, one step is
    x' = noise' / noise x - signal' (exp(l - l') - 1) z, where 2M extrapolates z from the last two steps to the middle of
    this one. The last step, to noise 0, is x' = z.
    """
    kept = [float(cosine_schedule(TIMES).kept[time]) for time in times]
    clean = last = torch.empty(0)
    before = 0.0  # size of the last step in l
    for i in reversed(range(len(times))):
        signal, spread = math.sqrt(kept[i]), math.sqrt(1.0 - kept[i])
        eps, _ = predict(x, times[i])
        last, clean = clean, (x - spread * eps) / signal
        if i == 0:
            break
        next_signal, next_spread = math.sqrt(kept[i - 1]), math.sqrt(1.0 - kept[i - 1])
        size = math.log(next_signal / next_spread) - math.log(signal / spread)
        ahead = clean if order == 1 or not before else clean + 0.5 * size / before * (clean - last)
        x = next_spread / spread * x - next_signal * math.expm1(-size) * ahead
        before = size
    return clean


@functools.cache
def first_time() -> int:
    """The step at which the ODE solvers begin: the last with log(signal / noise) of at least LEAST, 967 of 0 .. 999.

    An error of the predicted noise is divided by the signal's share, which is 5e-5 at step 999, and the result would be the
    draw. To begin where it is 0.05 takes a latent that is all noise for one that is a 20th signal: the draw is then off
    by a 20th of the latent's mean times its own conditional standard deviation, which is less than that.
    """
    kept = cosine_schedule(TIMES).kept
    return int((0.5 * (kept / (1.0 - kept)).log() >= LEAST).nonzero()[-1])


def evenly_in_signal(count: int) -> tuple[int, ...]:
    """`count` different steps from 0 to `first_time`, as evenly in log(signal / noise) as whole steps allow.

    A second-order step extrapolates by the ratio of two steps in that quantity: evenly in time the ratio would be up to 6 at
    the ends, and 10 steps worse than DDIM's (docs/heads.md).
    """
    last = first_time()
    if count == 1:
        return (last,)
    kept = cosine_schedule(TIMES).kept[: last + 1]
    ratio = 0.5 * (kept / (1.0 - kept)).log()
    wanted = torch.linspace(float(ratio[0]), float(ratio[last]), count, dtype=torch.float64)
    times = (ratio[None] - wanted[:, None]).abs().argmin(1).tolist()
    for j in range(1, count):  # apart from each other, upwards from 0 ..
        times[j] = max(times[j], times[j - 1] + 1)
    times[-1] = last
    for j in reversed(range(count - 1)):  # .. and downwards from the last
        times[j] = min(times[j], times[j + 1] - 1)
    return tuple(times)
