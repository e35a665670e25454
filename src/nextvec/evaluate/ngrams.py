"""Draws of n-grams that follow a context, at many positions of a text at once.

Legend: S draws, B rows, T tokens, P patches (T = P * K), K tokens per patch, Q starts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextvec.errors import ConfigError
from nextvec.model.interface import LanguageModel


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
    reads the text once, and each further patch of each draw costs one pass over all positions together.

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
    chains = []
    for head_BQK in heads_SBQK:
        parts, grown = [head_BQK], trunk
        while K * len(parts) < order:
            drawn_BPK = torch.zeros_like(ids_BPK)  # positions that start no n-gram are computed and not used
            drawn_BPK[:, at_Q] = parts[-1]
            state_BPD, grown = model.branch(drawn_BPK, grown)
            parts.append(model.draw_tokens(state_BPD[:, at_Q], 1, generator)[0])
        chains.append(torch.cat(parts, dim=-1)[..., :order])
    return torch.stack(chains)


def check_stride(stride: int, patch_size: int) -> None:
    """Raises ConfigError unless starts every `stride` tokens are patch starts of the model."""
    if stride < 1 or stride % patch_size:
        raise ConfigError(
            f"stride must be a multiple of the model's patch size {patch_size}; got {stride}: "
            f"use {max(1, round(stride / patch_size)) * patch_size}"
        )
