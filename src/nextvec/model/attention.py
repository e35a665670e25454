"""Causal attention with all scores of a block of queries at once, where that beats torch's tiled kernel.

Legend: B batch, P positions, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 2048  # positions up to which this pays, 1.4 to 3 times, with bfloat16 on a CPU (docs/performance.md)
BLOCK = 128  # query rows


class _WholeScores(torch.autograd.Function):
    """Query rows in blocks, each against the keys up to its end, so that at most half a block of scores is computed in vain."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape, scale = query.shape, query.shape[-1] ** -0.5
        query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
        mixed = torch.empty_like(query)
        saved = []
        for rows, seen in _blocks(shape[-2]):
            scores = (query[:, rows] @ key[:, seen].transpose(1, 2)).float()
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1 + rows.start)
            weights = scores.mul_(scale).masked_fill_(hidden, float("-inf")).softmax(-1).to(query.dtype)
            torch.bmm(weights, value[:, seen], out=mixed[:, rows])
            saved.append(weights)
        ctx.save_for_backward(query, key, value, mixed, *saved)
        return mixed.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, mixed, *saved = ctx.saved_tensors
        shape, scale = grad.shape, grad.shape[-1] ** -0.5
        grad = grad.reshape(mixed.shape)
        # Row sums of weights * slope, by way of what they mix to.
        sums = torch.linalg.vecdot(grad.float(), mixed.float()).unsqueeze(-1)
        for_query = torch.empty_like(query)
        for_key = torch.zeros(key.shape, dtype=torch.float32)
        for_value = torch.zeros(value.shape, dtype=torch.float32)
        for (rows, seen), weights in zip(_blocks(shape[-2]), saved, strict=True):
            for_value[:, seen] += weights.transpose(1, 2) @ grad[:, rows]
            slope = (grad[:, rows] @ value[:, seen].transpose(1, 2)).float()
            slope = slope.sub_(sums[:, rows]).mul_(weights).mul_(scale).to(query.dtype)
            torch.bmm(slope, key[:, seen], out=for_query[:, rows])
            for_key[:, seen] += slope.transpose(1, 2) @ query[:, rows]
        return for_query.view(shape), for_key.to(key.dtype).view(shape), for_value.to(value.dtype).view(shape)


def _blocks(positions: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, positions, BLOCK):
        end = min(start + BLOCK, positions)
        yield slice(start, end), slice(0, end)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v with each position seeing itself and those before: (B, H, P, E), keys (B, H_kv, P, E).

    bfloat16 on a CPU, up to WHOLE positions, as many key heads as heads: the whole matrix of weights, softmax in float32.
    Otherwise, and in compiled code, `F.scaled_dot_product_attention`, its slow twin.
    """
    whole = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[-2] <= WHOLE
    if not whole or query.shape != key.shape or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape != key.shape)
    return _WholeScores.apply(query, key, value)
