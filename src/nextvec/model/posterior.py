"""The teacher: what the autoencoder says of a patch's latent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLLAPSED = 0.01  # nats: a dimension that carries less has collapsed to the prior


class Posterior(NamedTuple):
    """A diagonal normal over latents, both (..., L) in float32 (float64 for a float64 model)."""

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw mean + std * eps, (..., L)."""
        return self.samples(1, generator)[0]

    def samples(self, draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, (draws, ..., L)."""
        shape = (draws, *self.mean.shape)
        eps = torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.log_std.exp() * eps


def gaussian_kl(posterior: Posterior) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) per dimension in nats, (..., L)."""
    mean, log_std = posterior
    return 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std)
