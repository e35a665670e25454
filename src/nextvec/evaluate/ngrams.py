"""Draws of n-grams that follow a context, at many positions of a text at once.

Legend: S draws, B rows, T tokens, P patches (T = P * K), K tokens per patch, Q starts, N chains, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextvec.errors import ConfigError
from nextvec.model.interface import LanguageModel

BRANCHES = 2048  # chains grown in one pass: bounds memory, and fastest on 2 cores


@torch.no_grad()
def draw_ngrams(
    model: LanguageModel,
    ids_BT: Tensor,
    draws: int,
    order: int,
    generator: torch.Generator,
    *,
    stride: int,
    first: int | None = None,
) -> Tensor:
    """S independent n-grams of `order` tokens after each context ids[:, :s], s = first, first + stride, .., T.

    Every model is asked at the same starts, whatever its patch size: `stride` is the K of the comparison. Where one
    patch is shorter than the n-gram, patches are chained, each drawn given the previous drawn one (spec 5): the model
    reads the text once, and each further patch of each draw costs one pass over all starts together.

    Args: ids (B, T) int64, T a multiple of `stride`; first: the first start, default `stride` (the second patch).
    Returns (S, B, Q, order) int64. Raises ConfigError when the stride does not fit the model or the text.
    """
    K, T = model.patch_size, ids_BT.shape[1]
    first = stride if first is None else first
    check_stride(stride, K)
    for name, value in (("the context", T), ("the first start", first)):
        if value % stride or value < stride:
            raise ConfigError(f"{name} must be a positive multiple of the stride {stride}; got {value} tokens")
    ids_BPK = ids_BT.unflatten(1, (T // K, K))
    at_Q = torch.arange(first, T + 1, stride, device=ids_BT.device) // K - 1
    if order <= K:
        return model.draw_tokens(model.states(ids_BPK)[:, at_Q], draws, generator)[..., :order]
    state_BPD, trunk = model.trunk(ids_BPK)
    heads_SBQK = model.draw_tokens(state_BPD[:, at_Q], draws, generator)
    together = max(1, BRANCHES // (len(ids_BT) * len(at_Q)))
    chains = []
    for heads_sBQK in heads_SBQK.split(together):
        at_N = at_Q.repeat(len(heads_sBQK))  # N: the starts of one draw, then those of the next
        parts_BNK, grown = [heads_sBQK.transpose(0, 1).flatten(1, 2)], trunk
        while K * len(parts_BNK) < order:
            state_BND, grown = model.branch(parts_BNK[-1], grown, at_N)
            parts_BNK.append(model.draw_tokens(state_BND, 1, generator)[0])
        chain_BNn = torch.cat(parts_BNK, dim=-1)[..., :order]
        chains.append(chain_BNn.unflatten(1, (len(heads_sBQK), -1)).transpose(0, 1))
    return torch.cat(chains)


def check_stride(stride: int, patch_size: int) -> None:
    """Raises ConfigError unless starts every `stride` tokens are patch starts of the model."""
    if stride < 1 or stride % patch_size:
        raise ConfigError(
            f"stride must be a multiple of the model's patch size {patch_size}; got {stride}: "
            f"use {max(1, round(stride / patch_size)) * patch_size}"
        )
