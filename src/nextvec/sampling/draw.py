"""One patch per row from the model's states, at a temperature: from pools of draws, or from likelihoods where there are any.

Legend: B rows, K tokens per patch, D width, L latent, N candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from nextvec.model.interface import LanguageModel
from nextvec.sampling.pools import PlaceDecoder, choose_patch
from nextvec.sampling.settings import Law
from nextvec.sampling.temperature import Generators, batch_temperature, condition, count_equal, sample_logits


@runtime_checkable
class HasLogits(Protocol):
    """A model with likelihoods of the next token (the baseline): its temperature needs no pool of candidates."""

    def logits(self, state_ND: Tensor) -> Tensor: ...


@runtime_checkable
class HasLatents(Protocol):
    """A model that draws latents, which a decoder turns into patches: only those that matter need be decoded."""

    autoencoder: PlaceDecoder
    patch_size: int
    has_latents: bool  # false where the head draws tokens itself

    def draw_latents(self, state_ND: Tensor, draws: int, generator: Generators) -> Tensor: ...


class Given(NamedTuple):
    """Tokens (B, K) that the rows' next patches begin with, and how many of them count (B,)."""

    tokens: Tensor
    lengths: Tensor


class Drawn(NamedTuple):
    """patch (B, K); draws of the model behind each; copies (B, N) of each draw in its pool, 0 for one that does not agree
    with what is given, None where no pool was drawn. Of the draws themselves, as the model made them: latents (B, N, L) where
    it draws latents, tokens (B, N, K) where it draws tokens."""

    patch: Tensor
    draws: int
    copies: Tensor | None
    latents: Tensor | None = None
    tokens: Tensor | None = None


def draw_patches(
    model: LanguageModel, state_BD: Tensor, law: Law, generators: Sequence[torch.Generator], given: Given | None = None
) -> Drawn:
    """The next patch of every row by `law`, row i from generator i."""
    if isinstance(model, HasLogits):
        logits_BV = model.logits(state_BD)
        return Drawn(sample_logits(logits_BV, law.temperature, generators, law.top_k, law.top_p)[:, None], 1, None)
    single = law.temperature == 1 and given is None
    draws = 1 if single else law.candidates
    if given is None and isinstance(model, HasLatents) and model.has_latents:
        pool_BNL = model.draw_latents(state_BD, draws, generators).transpose(0, 1)
        choice = choose_patch(model.autoencoder, pool_BNL, model.patch_size, law.temperature, generators)
        return Drawn(choice.patch, draws, None if single else choice.copies, pool_BNL)
    latent_BNL: Tensor | None = None
    drawn_BNK: Tensor | None = None
    if isinstance(model, HasLatents) and model.has_latents:
        latents = [model.draw_latents(state_BD[row], draws, each) for row, each in enumerate(generators)]
        latent_BNL = torch.stack(latents)
        candidates_BNK = torch.stack([model.autoencoder.decode_tokens(each) for each in latents])
    else:
        drawn_BNK = torch.stack([model.draw_tokens(state_BD[row], draws, each) for row, each in enumerate(generators)])
        candidates_BNK = drawn_BNK
    if single:
        return Drawn(candidates_BNK[:, 0], 1, None, tokens=drawn_BNK)
    keep_BN = None
    if given is not None:
        candidates_BNK, keep_BN = condition(candidates_BNK, *given)
    patch_BK = batch_temperature(candidates_BNK, law.temperature, generators, keep_BN)
    return Drawn(patch_BK, draws, count_equal(candidates_BNK, keep_BN), latent_BNL, drawn_BNK)
