"""Pools of latents, and no more of them decoded than the choice of a patch needs.

The batch sampler's choice depends on how many copies each draw has in its pool, not on its tokens. So the places of a patch
are decoded one after the other, and a draw that agrees with no other draw so far is not decoded further: it has one copy,
whatever its other tokens are. The counts, and with the same random number the patch chosen, are those of full decoding
(`batch_temperature`); at K = 4 and 200 candidates about 40 % of the decoding remains (docs/sampling.md). Likewise a draw that
is to begin with the rest of a prompt is decoded no further than it does.

Legend: B rows, N candidates of a row's pool, M = B * N, L latent, D width, K tokens per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nextvec.sampling.temperature import Generators, check_pool, count_equal, pick, uniforms, weigh_counts


class PlaceDecoder(Protocol):
    """A decoder whose places can be decoded one by one; `nextvec.model.autoencoder.Autoencoder` is one."""

    def decode_tokens(self, z_NL: Tensor) -> Tensor: ...

    def decode_stem(self, z_NL: Tensor) -> Tensor: ...

    def decode_place(self, stem_ND: Tensor, place: int) -> Tensor: ...


class Choice(NamedTuple):
    """patch (B, K) chosen; copies (B, N) of each draw in its pool."""

    patch: Tensor
    copies: Tensor


def choose_patch(
    decoder: PlaceDecoder, latent_BNL: Tensor, patch_size: int, temperature: float, generator: Generators
) -> Choice:
    """The patch of `batch_temperature(decoder.decode_tokens(latents), temperature, generator)`, and the pool's counts.

    On a GPU, where finding out what is left to decode would wait for the device, everything is decoded. Raises as
    `batch_temperature`.
    """
    rows, candidates = latent_BNL.shape[:2]
    check_pool(temperature, candidates)
    if temperature == 1:
        patch_BK = decoder.decode_tokens(latent_BNL[:, 0])
        return Choice(patch_BK, torch.ones(rows, 1, dtype=torch.int64, device=latent_BNL.device))
    everything = latent_BNL.device.type != "cpu"
    if everything:
        token_BNK = decoder.decode_tokens(latent_BNL)
        count_BN = count_equal(token_BNK)
    else:
        count_BN, token_BNK = count_latents(decoder, latent_BNL, patch_size)
    probability_BN = weigh_counts(count_BN, temperature)
    index_B = pick(probability_BN, uniforms(generator, probability_BN))
    row_B = torch.arange(rows, device=index_B.device)
    patch_BK = token_BNK[row_B, index_B]
    if not everything and bool((patch_BK < 0).any()):
        patch_BK = decoder.decode_tokens(latent_BNL[row_B, index_B])
    return Choice(patch_BK, count_BN)


def count_latents(decoder: PlaceDecoder, latent_BNL: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """How many draws of its row decode to the same patch as each, (B, N), and the tokens decoded for it, (B, N, K).

    Tokens that were not needed are -1.
    """
    rows, candidates = latent_BNL.shape[:2]
    device = latent_BNL.device
    stem_MD = decoder.decode_stem(latent_BNL.flatten(0, 1))
    token_MK = torch.full((rows * candidates, patch_size), -1, dtype=torch.int64, device=device)
    count_M = torch.ones(rows * candidates, dtype=torch.int64, device=device)
    alive = torch.arange(rows * candidates, device=device)
    group = alive // candidates  # draws of one group are of one row and agree so far
    for place in range(patch_size):
        token = decoder.decode_place(stem_MD if len(alive) == len(stem_MD) else stem_MD[alive], place)
        token_MK[alive, place] = token
        # Groups number fewer than draws and tokens fewer than 2^32, so no two pairs have one key.
        _, group, copies = torch.unique((group << 32) + token, return_inverse=True, return_counts=True)
        copies = copies[group]
        if place == patch_size - 1:
            count_M[alive] = copies
            break
        together = copies > 1
        alive, group = alive[together], group[together]
        if not len(alive):
            break
    return count_M.view(rows, candidates), token_MK.view(rows, candidates, patch_size)


def decode_beginning(decoder: PlaceDecoder, latent_NL: Tensor, patch_size: int, rest: Sequence[int]) -> Tensor:
    """`decoder.decode_tokens(latents)`, (N, K), of draws that begin with `rest`; of others -1 after the first token that differs.

    On a GPU everything is decoded, as in `choose_patch`.
    """
    if not rest or latent_NL.device.type != "cpu":
        return decoder.decode_tokens(latent_NL)
    stem_ND = decoder.decode_stem(latent_NL)
    token_NK = torch.full((len(latent_NL), patch_size), -1, dtype=torch.int64)
    alive = torch.arange(len(latent_NL))
    for place in range(patch_size):
        token = decoder.decode_place(stem_ND if len(alive) == len(stem_ND) else stem_ND[alive], place)
        token_NK[alive, place] = token
        if place < len(rest):
            alive = alive[token == rest[place]]
            if not len(alive):
                break
    return token_NK
