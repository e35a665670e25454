"""The latents of single tokens: what heads for a factored autoencoder know of it (docs/heads.md).

Legend: V vocabulary, E = L / K latent dimensions of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.model.autoencoder import Autoencoder
from nextvec.model.packed import Kept


class Codes(NamedTuple):
    """The posterior of every token of a factored autoencoder."""

    mean: Tensor  # (V, E)
    std: Tensor  # (V, E)
    square: Tensor  # (), mean of std^2


class CodeBook:
    """For heads to inherit: the codes of the model's autoencoder, which is no part of the head."""

    def __init__(self) -> None:
        self._autoencoder: tuple[Autoencoder, ...] = ()  # in a tuple, so that a module does not take it for its own
        self._codes, self._decoded = Kept[Codes](), Kept[Tensor]()

    def bind(self, autoencoder: Autoencoder) -> None:
        """Take the codes from this autoencoder, whatever weights it has or gets."""
        assert autoencoder.config.factored
        self._autoencoder = (autoencoder,)

    def codes(self) -> Codes:
        """Of the autoencoder's present weights; the same object as long as these are the same."""
        (autoencoder,) = self._autoencoder

        def make() -> Codes:
            ids = torch.arange(autoencoder.config.vocab_size, device=autoencoder.embedding.weight.device)
            mean, log_std = autoencoder.encode(ids[:, None])
            std = log_std.exp()
            return Codes(mean, std, std.square().mean())

        return self._codes.of((autoencoder.embedding.weight, autoencoder.to_latent.weight), make)

    def at_means(self, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Of codes (..., K): the latents of their means, (..., L), and what these decode to, (..., K); read once for all."""
        (autoencoder,) = self._autoencoder
        mean, weights = self.codes().mean, (autoencoder.from_latent.weight, autoencoder.decoder_norm.weight)

        def make() -> Tensor:
            size = autoencoder.config.patch_size
            patches = F.pad(mean, (0, 0, 0, -len(mean) % size)).view(-1, size * mean.shape[1])
            return autoencoder.decode_tokens(patches).flatten()[: len(mean)]

        return mean[ids_NK].flatten(-2), self._decoded.of((autoencoder.embedding.weight, *weights), make)[ids_NK]
