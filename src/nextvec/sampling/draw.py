"""One patch per row from the model's states, at a temperature: from pools of draws, or from likelihoods where there are any.

Legend: B rows, K tokens per patch, D width, L latent, N candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from nextvec.config import CalmConfig, TokenLMConfig
from nextvec.model.heads import head_class
from nextvec.model.heads.interface import Sharpen
from nextvec.model.interface import LanguageModel
from nextvec.model.text_states import States
from nextvec.sampling.approximate import centre
from nextvec.sampling.penalties import law_of
from nextvec.sampling.pools import PlaceDecoder, choose_patch, decode_beginning
from nextvec.sampling.settings import Abilities, Law
from nextvec.sampling.temperature import (
    Generators,
    batch_temperature,
    condition,
    count_equal,
    sample_by,
)


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

    def draw_latents(self, state_ND: States, draws: int, generator: Generators) -> Tensor: ...


@runtime_checkable
class HasTokenLaws(Protocol):
    """A model of patches that may know the law of each of their tokens given those before it."""

    by_token: bool

    def draw_by_token(
        self, state_ND: States, generator: Generators, sharpen: Sharpen | None, given: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]: ...


ENOUGH = 8  # draws that begin with the rest of a prompt, at which its pool stops growing
MOST_POOLS = 4  # times N draws, at most, behind the patch that begins with the rest of a prompt


class Drawn(NamedTuple):
    """patch (B, K); draws of the model behind each; copies (B, N) of each draw in its pool, 0 for one that does not agree
    with the rest of a prompt, None where no pool was drawn. Of the draws themselves, as the model made them: latents
    (B, N, L) where it draws latents, tokens (B, N, K) where it draws tokens."""

    patch: Tensor
    draws: int
    copies: Tensor | None
    latents: Tensor | None = None
    tokens: Tensor | None = None


def draw_patches(
    model: LanguageModel,
    state_BD: States,
    law: Law,
    generators: Sequence[torch.Generator],
    counts_BV: Tensor | None = None,
) -> Drawn:
    """The next patch of every row by `law`, row i from generator i.

    counts: of a law with penalties, how often the text of each row has each token (float), taken over.
    """
    if isinstance(model, HasLogits):
        return Drawn(sample_by(model.logits(state_BD), _sharpen(law, counts_BV), generators)[:, None], 1, None)
    if law.method == "token":
        return _draw_by_token(model, state_BD, law, generators, counts_BV)
    draws = 1 if law.single else law.candidates
    if isinstance(model, HasLatents) and model.has_latents:
        latent_BNL = model.draw_latents(state_BD, draws, generators).transpose(0, 1)
        if law.method == "centre":
            return Drawn(model.autoencoder.decode_tokens(centre(latent_BNL)), draws, None, latent_BNL)
        choice = choose_patch(model.autoencoder, latent_BNL, model.patch_size, law.temperature, generators)
        return Drawn(choice.patch, draws, None if law.single else choice.copies, latent_BNL)
    token_BNK = torch.stack([model.draw_tokens(state_BD[row], draws, each) for row, each in enumerate(generators)])
    if law.single:
        return Drawn(token_BNK[:, 0], 1, None, tokens=token_BNK)
    patch_BK = batch_temperature(token_BNK, law.temperature, generators)
    return Drawn(patch_BK, draws, count_equal(token_BNK), tokens=token_BNK)


def _sharpen(law: Law, counts_BV: Tensor | None) -> Sharpen | None:
    return law_of(law.temperature, law.top_k, law.top_p, law.presence, law.frequency, counts_BV)


def _draw_by_token(
    model: LanguageModel,
    state_BD: States,
    law: Law,
    generators: Sequence[torch.Generator],
    counts_BV: Tensor | None,
    given: Sequence[int] = (),
) -> Drawn:
    laws = cast(HasTokenLaws, model)  # settings were checked for the model
    patch_BK, latent_BL = laws.draw_by_token(state_BD, generators, _sharpen(law, counts_BV), given)
    if latent_BL is None:
        return Drawn(patch_BK, 1, None, tokens=patch_BK[:, None])
    return Drawn(patch_BK, 1, None, latent_BL[:, None])


def complete_patch(
    model: LanguageModel,
    state_D: States,
    law: Law,
    generator: torch.Generator,
    rest: Sequence[int],
    counts_1V: Tensor | None = None,
) -> Drawn | None:
    """The next patch (1, K) of one row, which begins with the rest of its prompt, 1 .. K - 1 tokens; None where that cannot be.

    Of a pool the draws that begin with them are kept (`temperature.condition`): exact draws of the conditional law. The pool
    grows by N draws until ENOUGH agree, at most MOST_POOLS times. Where the law of each token is known, one draw is enough. A
    mean of latents has no draws to keep.
    """
    if law.method == "centre":
        return None
    if law.method == "token":
        return _draw_by_token(model, state_D[None], law, [generator], counts_1V, rest)
    pool = grow_pool(model, state_D, law.candidates, generator, rest)
    if not pool.agreeing:
        return None
    token_1NK, keep_1N = condition(pool.tokens[None], *prefix(rest, model.patch_size, state_D.device))
    patch_1K = batch_temperature(token_1NK, law.temperature, [generator], keep_1N)
    copies_1N = count_equal(token_1NK, keep_1N)
    if pool.latents is not None:
        return Drawn(patch_1K, len(pool.tokens), copies_1N, pool.latents[None])
    return Drawn(patch_1K, len(pool.tokens), copies_1N, tokens=pool.tokens[None])


class Grown(NamedTuple):
    """Draws of one patch: tokens (N, K), latents (N, L) of a model that has them, how many begin with what is given.

    Tokens of a draw that does not begin so may be -1 behind the first that differs.
    """

    tokens: Tensor
    latents: Tensor | None
    agreeing: int


def has_latents(model: LanguageModel) -> bool:
    """Whether the model draws latents, which a decoder turns into patches."""
    return isinstance(model, HasLatents) and model.has_latents


def abilities(model: LanguageModel) -> Abilities:
    """What the model can be drawn by."""
    tokens = isinstance(model, HasLogits)
    by_token = tokens or (isinstance(model, HasTokenLaws) and model.by_token)
    return Abilities(tokens, has_latents(model), by_token)


def abilities_of(config: CalmConfig | TokenLMConfig) -> Abilities:
    """The same, before a model is loaded."""
    if isinstance(config, TokenLMConfig):
        return Abilities(tokens=True, latents=False, by_token=True)
    head = head_class(config)
    return Abilities(tokens=False, latents=head.latents, by_token=head.by_token)


def grow_pool(
    model: LanguageModel, state_D: States, candidates: int, generator: torch.Generator, rest: Sequence[int]
) -> Grown:
    """As many draws as `complete_patch` needs; `candidates` where nothing is left over."""
    rest_K = torch.tensor(rest, dtype=torch.int64, device=state_D.device)
    latents: list[Tensor] = []
    pools: list[Tensor] = []
    agreeing = 0
    while agreeing < (ENOUGH if rest else 1) and len(pools) < MOST_POOLS:
        if isinstance(model, HasLatents) and model.has_latents:
            latents.append(model.draw_latents(state_D, candidates, generator))
            pools.append(decode_beginning(model.autoencoder, latents[-1], model.patch_size, rest))
        else:
            pools.append(model.draw_tokens(state_D, candidates, generator))
        agreeing += int((pools[-1][:, : len(rest)] == rest_K).all(1).sum()) if rest else len(pools[-1])
    return Grown(torch.cat(pools), torch.cat(latents) if latents else None, agreeing)


def prefix(rest: Sequence[int], patch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rest of one prompt as `temperature.condition` takes it: tokens (1, K) and how many count (1,)."""
    tokens = list(rest) + [0] * (patch_size - len(rest))
    return torch.tensor([tokens], device=device), torch.tensor([len(rest)], device=device)
