"""Attention to the first positions of a text with the scores of many queries at once, where that beats torch's tiled kernel.

Legend: B batch, P positions, Q queries, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = (
    2048  # queries and positions up to which this pays, 1.4 to 3 times, with bfloat16 on a CPU (docs/performance.md)
)
BLOCK = 128  # query rows


class _WholeScores(torch.autograd.Function):
    """Query rows in blocks, each against the keys that one of them sees, so that few scores are computed in vain."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen_Q: Tensor) -> Tensor:
        shape, key_shape, scale = query.shape, key.shape, query.shape[-1] ** -0.5
        query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
        mixed, scaled = torch.empty_like(query), query * scale
        saved = []
        for rows, seen, all_see in _blocks(seen_Q):
            scores = scaled[:, rows] @ key[:, seen].transpose(1, 2)
            hidden = torch.arange(all_see, seen.stop) >= seen_Q[rows, None]
            scores[..., all_see:].masked_fill_(hidden, float("-inf"))
            weights = scores.softmax(-1)  # in float32 inside
            torch.bmm(weights, value[:, seen], out=mixed[:, rows])
            saved.append(weights)
        ctx.save_for_backward(scaled, key, value, seen_Q, *saved)
        ctx.shapes, ctx.scale = (shape, key_shape), scale
        return mixed.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scaled, key, value, seen_Q, *saved = ctx.saved_tensors
        shape, key_shape = ctx.shapes
        grad = grad.reshape(scaled.shape)
        for_query = torch.empty_like(scaled)
        for_key = torch.zeros(key.shape, dtype=torch.float32)
        for_value = torch.zeros(value.shape, dtype=torch.float32)
        for (rows, seen, _), weights in zip(_blocks(seen_Q), saved, strict=True):
            for_value[:, seen] += weights.transpose(1, 2) @ grad[:, rows]
            slope = grad[:, rows] @ value[:, seen].transpose(1, 2)
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, slope.dtype)
            torch.bmm(slope, key[:, seen], out=for_query[:, rows])
            for_key[:, seen] += slope.transpose(1, 2) @ scaled[:, rows]
        for_key, for_value = (x.to(key.dtype).view(key_shape) for x in (for_key, for_value))
        return for_query.mul_(ctx.scale).view(shape), for_key, for_value, None


def _blocks(seen_Q: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Rows of queries, the positions that some of them see, and how many all see."""
    for start in range(0, len(seen_Q), BLOCK):
        rows = slice(start, min(start + BLOCK, len(seen_Q)))
        least, most = seen_Q[rows].aminmax()
        yield rows, slice(0, int(most)), int(least)


def _pays(query: Tensor, key: Tensor) -> bool:
    """As many key heads as heads, bfloat16 on a CPU, not too long, and not in compiled code."""
    fits = query.shape[1] == key.shape[1] and max(query.shape[-2], key.shape[-2]) <= WHOLE
    return fits and query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.compiler.is_compiling()


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v with each position seeing itself and those before: (B, H, P, E), keys (B, H_kv, P, E).

    bfloat16 on a CPU, up to WHOLE positions, as many key heads as heads: the whole matrix of weights, softmax in float32.
    Otherwise, and in compiled code, `F.scaled_dot_product_attention`, its slow twin.
    """
    if query.shape != key.shape or not _pays(query, key):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape != key.shape)
    return _WholeScores.apply(query, key, value, torch.arange(1, query.shape[-2] + 1))


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, seen_Q: Tensor) -> Tensor | None:
    """softmax(q k^T / sqrt(E)) v, query q of (B, H, Q, E) over the first seen[q] >= 1 of keys (B, H, P, E).

    As `causal_attention` where that has the whole matrix of weights; None elsewhere.
    """
    return _WholeScores.apply(query, key, value, seen_Q) if _pays(query, key) else None
