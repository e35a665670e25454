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

TOGETHER = 16  # codes that are decoded at once, at least


class Codes(NamedTuple):
    """The posterior of every token of a factored autoencoder."""

    mean: Tensor  # (V, E)
    std: Tensor  # (V, E)
    square: Tensor  # (), mean of std^2


class CodeBook:
    """For heads to inherit: the codes of the model's autoencoder, which is no part of the head."""

    def __init__(self) -> None:
        self._autoencoder: tuple[Autoencoder, ...] = ()  # in a tuple, so that a module does not take it for its own
        self._codes, self._decoded = Kept[Codes](), Kept[_Decoded]()

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

    def decode_codes(self, latent_ME: Tensor) -> Tensor:
        """Most likely tokens (M,) of the latents of single tokens (M, E)."""
        return _decode(self._autoencoder[0], latent_ME)

    def at_means(self, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Of codes (..., K): the latents of their means, (..., L), and what these decode to, (..., K)."""
        (autoencoder,) = self._autoencoder
        mean_VE = self.codes().mean
        parts = (autoencoder.to_latent, autoencoder.from_latent, autoencoder.expand, autoencoder.decoder_norm)
        made_of = [autoencoder.embedding.weight, *(part.weight for part in parts)]
        decoded = self._decoded.of(made_of, lambda: _Decoded(autoencoder, mean_VE))
        return mean_VE[ids_NK].flatten(-2), decoded(ids_NK)


@torch.no_grad()
def _decode(autoencoder: Autoencoder, latent_ME: Tensor) -> Tensor:
    """Tokens (M,) of the latents of single tokens (M, E), side by side in patches, the last filled up."""
    size = autoencoder.config.patch_size
    patches = F.pad(latent_ME, (0, 0, 0, -len(latent_ME) % size)).view(-1, size * latent_ME.shape[1])
    with torch.autocast(latent_ME.device.type, enabled=False):
        return autoencoder.decode_tokens(patches).flatten()[: len(latent_ME)]


class _Decoded:
    """What the mean of each code decodes to, found out when it is first asked for: for all codes it takes V^2 products.

    A code is decoded together with its neighbours in the vocabulary, always the same ones, so that it has the same bits whatever
    was asked for before. On a GPU, which would have to be waited for, all are at once.
    """

    def __init__(self, autoencoder: Autoencoder, mean_VE: Tensor) -> None:
        self._autoencoder, self._mean = autoencoder, mean_VE
        size = autoencoder.config.patch_size
        self._together = -(-TOGETHER // size) * size
        self._token = torch.full_like(mean_VE[:, 0], -1, dtype=torch.int64)
        self._lazy = mean_VE.device.type == "cpu"
        if not self._lazy:
            self._token = _decode(autoencoder, mean_VE)

    def __call__(self, ids_NK: Tensor) -> Tensor:
        token_NK = self._token[ids_NK]
        if not self._lazy or not bool((token_NK < 0).any()):
            return token_NK
        for start in (ids_NK[token_NK < 0] // self._together * self._together).unique().tolist():
            mean = self._mean[start : start + self._together]
            ids = torch.arange(start, start + len(mean))
            # not in place: it may be an inference tensor
            self._token = self._token.index_copy(0, ids, _decode(self._autoencoder, mean))
        return self._token[ids_NK]
