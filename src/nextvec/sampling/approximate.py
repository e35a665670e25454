"""Cheaper substitutes for the batch sampler, which do not draw from P^(1/T): what they do is measured in docs/sampling.md.

* `scaled_noise`: the energy head fed with less noise. One draw per patch, decoded once. (The head normalises its noise after
  a first linear layer, so that a scale acts only against the biases there.)
* `medoid`, `centre`: the one of n latents nearest to the others, or their mean, decoded once: the answers of least expected
  distance and squared distance (minimum Bayes risk). n takes the part of the temperature.
* `shrunk`: one latent moved towards the mean of n, decoded once.
* `adaptive_patch`: the batch sampler with a pool that stops growing once its winner is certain, with a stated error.

Legend: B rows, N draws, K tokens per patch, D width, L latent, S draws of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nextvec.errors import UserError
from nextvec.model.heads.energy import EnergyHead
from nextvec.model.heads.interface import Generators, noise
from nextvec.sampling.temperature import batch_temperature, check_pool, count_equal

BLOCK = 25  # draws between two looks at a growing pool


def scaled_noise(head: EnergyHead, state_ND: Tensor, draws: int, generator: Generators | None, scale: float) -> Tensor:
    """S draws (S, ..., L) of the head with its noise multiplied by `scale`; 1 is the head's own law, 0 a single latent.

    Raises UserError for a scale outside [0, 1].
    """
    if not 0 <= scale <= 1:
        raise UserError(f"the noise scale must be in [0, 1]; got {scale:g}: 1 keeps the model's own law")
    dtype = head.noise_in.weight.dtype
    uniform = noise("uniform", state_ND, draws, head.config.noise, generator, dtype)
    return head.forward(state_ND.to(dtype), scale * (uniform - 0.5))


def medoid(latent_BNL: Tensor) -> Tensor:
    """Of each row's N latents the one with the least sum of distances to the others, (B, L); the first of equals."""
    wide = latent_BNL.float() if latent_BNL.dtype in (torch.bfloat16, torch.float16) else latent_BNL
    total_BN = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").sum(-1)
    return latent_BNL[torch.arange(len(latent_BNL), device=latent_BNL.device), total_BN.argmin(-1)]


def centre(latent_BNL: Tensor) -> Tensor:
    """Mean of each row's latents, (B, L)."""
    return latent_BNL.mean(1)


def shrunk(latent_BNL: Tensor, scale: float) -> Tensor:
    """Each row's first latent, its distance from the mean of all multiplied by `scale`, (B, L): 0 the mean, 1 the latent."""
    middle_BL = centre(latent_BNL)
    return middle_BL + scale * (latent_BNL[:, 0] - middle_BL)


def adaptive_patch(
    draw: Callable[[int], Tensor],
    temperature: float,
    candidates: int,
    error: float,
    generator: torch.Generator,
    block: int = BLOCK,
) -> tuple[Tensor, int]:
    """A patch (K,) of the batch sampler, from a pool that stops growing when its winner is certain; and the draws used.

    `draw(m)` gives m patches (m, K). After every `block` draws the most frequent patch is returned if, but for a chance of
    error / 2 over all looks, its probability p is so large that P^(1/T) gives it at least 1 - error / 2, which
    p^b / (p^b + (1 - p)^b) with b = 1 / T guarantees. So where the pool stops early the result is within `error`, in total
    variation, of exact draws of P^(1/T); where it does not, it is that of `batch_temperature` from `candidates` draws.
    Raises UserError for a bad temperature, too few candidates, or an error outside (0, 1).
    """
    check_pool(temperature, candidates)
    if not 0 < error < 1:
        raise UserError(f"the error of an adaptive pool must be in (0, 1); got {error:g}")
    looks = -(-candidates // block)
    needed = _needed(temperature, error / 2)
    pool_NK = draw(min(block, candidates))
    while True:
        count_N = count_equal(pool_NK[None])[0]
        size, most = len(pool_NK), int(count_N.max())
        # at most two patches can have a probability near the bound, which is above 1/2: hence the 2
        if size < candidates and lower_bound(most, size, error / (4 * looks)) >= needed:
            return pool_NK[int(count_N.argmax())], size
        if size == candidates:
            return batch_temperature(pool_NK[None], temperature, [generator])[0], size
        pool_NK = torch.cat((pool_NK, draw(min(block, candidates - size))))


def lower_bound(seen: int, draws: int, chance: float) -> float:
    """The smallest probability under which `seen` or more of `draws` still have Chernoff's bound of at least `chance`."""
    share, low, high = seen / draws, 0.0, seen / draws
    for _ in range(50):
        middle = (low + high) / 2
        if draws * _divergence(share, middle) >= -math.log(chance):
            low = middle
        else:
            high = middle
    return low


def _divergence(p: float, q: float) -> float:
    """KL divergence of coins, in nats."""
    if q == 0:
        return math.inf if p > 0 else 0.0
    return (p * math.log(p / q) if p else 0.0) + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)


def _needed(temperature: float, error: float) -> float:
    """The probability from which on P^(1/T) leaves no more than `error` to all other patches, and at least 1/2."""
    ratio = (error / (1 - error)) ** temperature  # (1 - p) / p
    return max(0.5, 1 / (1 + ratio))
