"""What a model makes of a text: its patches as latents, and the vote on the next one.

Legend: P patches, K tokens per patch, L latent, N candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.text_states import States
from nextvec.sampling.draw import grow_pool, prefix
from nextvec.sampling.settings import row_generator
from nextvec.sampling.temperature import condition, pool_probabilities


@dataclass(frozen=True)
class LatentPatch:
    """ids (K) of a patch; sigma: mean standard deviation of its posterior; decoded: ids that the posterior's mean decodes to."""

    ids: tuple[int, ...]
    sigma: float
    decoded: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A patch that draws decoded to. ids: without those that the text gives. votes: draws; probability: of being chosen."""

    ids: tuple[int, ...]
    votes: int
    probability: float


@dataclass(frozen=True)
class Vote:
    """The pool behind the next patch. draws: all; kept: those that begin with the rest of the text; matched: how many of its
    tokens these begin with, 0 where no draw did and the text was read padded on its left. candidates: the most likely to be
    chosen first."""

    draws: int
    kept: int
    matched: int
    candidates: tuple[Candidate, ...]


@torch.inference_mode()
def latent_patches(autoencoder: Autoencoder, ids: Sequence[int]) -> list[LatentPatch]:
    """The whole patches of a text."""
    size = autoencoder.config.patch_size
    whole = len(ids) // size * size
    if not whole:
        return []
    ids_PK = torch.tensor(ids[:whole], device=autoencoder.embedding.weight.device).view(-1, size)
    posterior = autoencoder.encode(ids_PK)
    sigma_P = posterior.log_std.exp().mean(-1)
    decoded_PK = autoencoder.decode_tokens(posterior.mean)
    rows = zip(ids_PK.tolist(), sigma_P.tolist(), decoded_PK.tolist(), strict=True)
    return [LatentPatch(tuple(patch), sigma, tuple(decoded)) for patch, sigma, decoded in rows]


@torch.inference_mode()
def next_patch(
    model: Calm, ids: Sequence[int], temperature: float, candidates: int, seed: int, *, eos_id: int, pad_id: int
) -> Vote:
    """The vote on the patch that follows a text, as method pool holds it (the same draws as row 0 of the same seed).

    Raises UserError for fewer candidates than the temperature needs.
    """
    size, generator = model.patch_size, row_generator(seed, 0, model.device)
    whole = len(ids) // size * size
    rest = list(ids[whole:])
    boundary = [] if model.packed and whole else [eos_id] + [pad_id] * (size - 1)
    state_D = _state(model, boundary + list(ids[:whole]))
    pool = grow_pool(model, state_D, candidates, generator, rest)
    if not pool.agreeing:
        pads = [pad_id] * (size - len(rest))
        boundary, rest = [] if model.packed else boundary, []
        pool = grow_pool(model, _state(model, boundary + pads + list(ids)), candidates, generator, rest)
    return hold_vote(pool.tokens, rest, temperature)


def _state(model: Calm, ids: list[int]) -> States:
    """The state (D,) after whole patches."""
    return model.states(torch.tensor(ids, device=model.device).view(1, -1, model.patch_size))[0, -1]


def hold_vote(pool_NK: Tensor, rest: Sequence[int], temperature: float) -> Vote:
    """What a pool of draws (N, K) says of a patch that begins with `rest`, fewer than K ids."""
    given_1NK, keep_1N = condition(pool_NK[None], *prefix(rest, pool_NK.shape[1], pool_NK.device))
    probability_N = pool_probabilities(given_1NK, temperature, keep_1N)[0].tolist()
    kept = [index for index, keep in enumerate(keep_1N[0].tolist()) if keep]
    patches = [tuple(patch) for patch in given_1NK[0].tolist()]
    votes = Counter(patches[index] for index in kept)
    chances: Counter[tuple[int, ...]] = Counter()
    for index in kept:
        chances[patches[index]] += probability_N[index]
    agreed = [a == b for a, b in zip(pool_NK[kept[0]].tolist(), rest, strict=False)] + [False]
    found = [Candidate(patch[len(rest) :], votes[patch], chances[patch]) for patch in votes]
    ordered = sorted(found, key=lambda each: (-each.probability, -each.votes))
    return Vote(len(pool_NK), len(kept), agreed.index(False), tuple(ordered))
