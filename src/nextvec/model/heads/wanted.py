"""Draws that go no further than they are wanted, and share what they have in common: of a mixture head, for Brier scores.

A Brier score asks whether a draw equals the target and whether two draws are equal (docs/brierlm.md). Place after place the draws
of a state that picked the same Gaussians so far read one and the same law, which is made once; and a draw that has parted from
the target and from all others is left where it is.

Legend: S draws, M states, R draws still wanted, of all states, G groups of them that share a law, K tokens per patch, D width,
C what a place reads of those before it, E latent dimensions of a token, V vocabulary, n draws of the largest group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextvec.model.heads.recalling import Asking, and_then
from nextvec.model.interface import Wanted

if TYPE_CHECKING:
    from nextvec.model.heads.mixture import MixtureHead


def walk(
    head: MixtureHead, state_MX: Tensor, asking: Asking | None, share_SMK: Tensor, eps_SMKE: Tensor, wanted: Wanted
) -> Tensor:
    """Decoded patches (S, M, K) of the draws with these random numbers; 0 where a draw was not wanted any more.

    What is not 0 is what `MixtureHead.draw` gives with the same numbers, decoded. `wanted` counts the M states from 0.
    """
    draws, states, size = share_SMK.shape
    codes, device = head.codes(), share_SMK.device
    patch_SMK = torch.zeros(draws, states, size, dtype=torch.int64, device=device)
    state_R = torch.arange(states, device=device).repeat_interleave(draws)
    draw_R = torch.arange(draws, device=device).repeat(states)
    group_R, state_G = state_R, torch.arange(states, device=device)
    line_GKC = head.line(state_MX, asking)
    last_G3 = None if asking is None else asking.tail
    for place in range(size):
        hidden_GD = head.read_line(line_GKC[:, 0], asking, state_G, last_G3)
        ids_R = _pick(head, hidden_GD, group_R, share_SMK[draw_R, state_R, place])
        latent_RE = codes.mean[ids_R] + codes.std[ids_R] * eps_SMKE[draw_R, state_R, place].to(codes.std.dtype)
        patch_SMK[draw_R, state_R, place] = head.decode_codes(latent_RE.to(state_MX.dtype))
        if place == size - 1:
            break
        kept_R = wanted(state_R, patch_SMK[draw_R, state_R, : place + 1])
        state_R, draw_R, group_R, ids_R = (each[kept_R] for each in (state_R, draw_R, group_R, ids_R))
        if not len(state_R):
            break
        key_G, group_R = (group_R * head.output.out_features + ids_R).unique(return_inverse=True)
        parent_G, id_G = key_G // head.output.out_features, key_G % head.output.out_features
        line_GKC = line_GKC[parent_G, 1:] + head.tells(id_G)[:, : size - place - 1]
        state_G = state_G[parent_G]
        last_G3 = None if last_G3 is None else and_then(last_G3[parent_G], id_G)
    return patch_SMK


def _pick(head: MixtureHead, hidden_GD: Tensor, group_R: Tensor, share_R: Tensor) -> Tensor:
    """Gaussians (R,) by the law of each draw's group and its share of it."""
    order_R = group_R.argsort(stable=True)
    count_G = group_R.bincount(minlength=len(hidden_GD))
    sorted_R = group_R[order_R]
    place_R = torch.arange(len(group_R), device=group_R.device) - (count_G.cumsum(0) - count_G)[sorted_R]
    share_Gn = share_R.new_zeros(len(hidden_GD), int(count_G.max()))
    share_Gn[sorted_R, place_R] = share_R[order_R]
    ids_R = torch.empty_like(group_R)
    ids_R[order_R] = head.picked(hidden_GD, share_Gn)[sorted_R, place_R]
    return ids_R
