"""Compressor: the tokens of a patch, its latent or both -> the backbone's input (paper section 3.3).

Legend: K tokens per patch, D width, L latent, V vocabulary, N any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextvec.config import CalmConfig

COMPRESSOR_EPS = 1e-6  # LayerNorm epsilon of the authors' code


class Compressor(nn.Module):
    """K token embeddings concatenated -> linear -> SiLU -> linear -> LayerNorm: (..., K) ids -> (..., D).

    Where latents are read, (..., L), they stand beside the embeddings or in their place: `latent_in` holds their columns of
    the first linear.
    """

    def __init__(self, config: CalmConfig) -> None:
        super().__init__()
        width, latent = config.backbone.width, config.autoencoder.latent
        tokens = config.input != "latents"
        self.embedding = nn.Embedding(config.vocab_size, width) if tokens else None
        self.project = nn.Sequential(
            nn.Linear(config.patch_size * width, 2 * width) if tokens else nn.Identity(),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width, eps=COMPRESSOR_EPS),
        )
        self.latent_in = nn.Linear(latent, 2 * width, bias=not tokens) if config.reads_latents else None

    def forward(self, ids_NK: Tensor, latent_NL: Tensor | None = None) -> Tensor:
        if self.latent_in is None:
            return self.project(self._embedded(ids_NK))
        assert latent_NL is not None, "this compressor reads latents"
        x = self.latent_in(latent_NL.to(self.latent_in.weight.dtype))
        of_tokens, *rest = self.project
        if self.embedding is not None:
            x = x + of_tokens(self._embedded(ids_NK))
        for layer in rest:
            x = layer(x)
        return x

    def _embedded(self, ids_NK: Tensor) -> Tensor:
        assert self.embedding is not None
        return self.embedding(ids_NK).flatten(-2)


class PlaceTables(nn.Module):
    """A table of all tokens for each place of a patch -> sum -> SiLU -> linear -> LayerNorm: (..., K) ids -> (..., D).

    What `Compressor` has before its SiLU is a sum over places of what each token gives there, by a product; here it is looked
    up. The tables hold K V D numbers, and a patch costs a quarter of the operations, or fewer.
    """

    def __init__(self, config: CalmConfig) -> None:
        super().__init__()
        width = config.backbone.width
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.patch_size * config.vocab_size, width)
        self.project = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width, eps=COMPRESSOR_EPS))

    def forward(self, ids_NK: Tensor, latent_NL: Tensor | None = None) -> Tensor:
        first_K = torch.arange(ids_NK.shape[-1], device=ids_NK.device) * self.vocab_size
        x_ND: Tensor = self.project(self.embedding(ids_NK + first_K).sum(-2))
        return x_ND


def build_compressor(config: CalmConfig) -> Compressor | PlaceTables:
    """What makes the backbone's input of a patch."""
    return PlaceTables(config) if config.input == "tables" else Compressor(config)
