"""The latents of single tokens: what heads for a factored autoencoder know of it (docs/heads.md).

Legend: V vocabulary, E = L / K latent dimensions of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.model.autoencoder import Autoencoder
from nextvec.model.packed import version


class Codes(NamedTuple):
    """The posterior of every token of a factored autoencoder."""

    mean: Tensor  # (V, E)
    std: Tensor  # (V, E)
    square: Tensor  # (), mean of std^2


class CodeBook:
    """For heads to inherit: the codes of the model's autoencoder, which is no part of the head."""

    def __init__(self) -> None:
        self._autoencoder: tuple[Autoencoder, ...] = ()  # in a tuple, so that a module does not take it for its own
        self._codes: tuple[object, Codes] | None = None

    def bind(self, autoencoder: Autoencoder) -> None:
        """Take the codes from this autoencoder, whatever weights it has or gets."""
        assert autoencoder.config.factored
        self._autoencoder = (autoencoder,)

    @torch.no_grad()
    def codes(self) -> Codes:
        """Of the autoencoder's present weights; the same object as long as these are the same."""
        (autoencoder,) = self._autoencoder
        weights = autoencoder.embedding.weight, autoencoder.to_latent.weight
        state = tuple((version(weight), weight.dtype, weight.device) for weight in weights)
        if self._codes is None or self._codes[0] != state:
            with torch.autocast(weights[0].device.type, enabled=False):
                ids = torch.arange(autoencoder.config.vocab_size, device=weights[0].device)
                mean, log_std = autoencoder.encode(ids[:, None])
            std = log_std.exp()
            self._codes = (state, Codes(mean, std, std.square().mean()))
        return self._codes[1]
