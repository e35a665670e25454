"""Fused linear cross-entropy: the vocabulary logits of all rows never exist at once.

Legend: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # logits in one chunk: 8 MiB in float32, small enough for a shared cache
GPU_ELEMENTS = (
    1 << 27
)  # on a GPU, 512 MiB: small chunks would be launches and passes over the weight's gradient, little else
LEAST_ROWS = 128  # of a chunk: each passes once over the weight's gradient, which is large where the vocabulary is


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the loss and, chunk by chunk, both gradients, so no logits are kept for backward."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, weight_N: Tensor) -> Any:
        compute = hidden_ND.dtype
        if torch.is_autocast_enabled(hidden_ND.device.type):
            compute = torch.get_autocast_dtype(hidden_ND.device.type)
        wide = torch.float64 if compute == torch.float64 else torch.float32
        grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.autocast(hidden_ND.device.type, enabled=False), torch.no_grad():
            hidden, weight = hidden_ND.to(compute), weight_VD.to(compute)
            rows = chunk_rows(weight)
            loss = torch.zeros((), dtype=wide, device=hidden.device)
            correct = torch.zeros((), dtype=wide, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if grad else None
            grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if grad else None
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                logits = (hidden[part] @ weight.T).to(wide)
                target = target_N[part, None]
                row_weight = weight_N[part, None].to(wide)
                picked = logits.gather(1, target)
                top = logits.amax(1, keepdim=True)
                logits.sub_(top).exp_()  # now unnormalised probabilities
                total = logits.sum(1, keepdim=True)
                loss += ((total.log() + top - picked) * row_weight).sum()
                correct += ((picked >= top) * row_weight).sum()
                if grad_hidden is not None and grad_weight is not None:
                    logits.mul_(row_weight / total)
                    logits.scatter_add_(1, target, -row_weight)
                    slope = logits.to(compute)
                    grad_hidden[part] = slope @ weight
                    grad_weight += (slope.T @ hidden[part]).to(wide)
        ctx.save_for_backward(*(t for t in (grad_hidden, grad_weight) if t is not None))
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (grad_hidden * grad_loss).to(hidden_dtype), (grad_weight * grad_loss).to(weight_dtype), None, None


def chunk_rows(weight_VD: Tensor) -> int:
    """Rows whose logits exist at once."""
    elements = GPU_ELEMENTS if weight_VD.device.type == "cuda" else CHUNK_ELEMENTS
    return max(LEAST_ROWS, elements // weight_VD.shape[0])


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, keep_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean over rows of -log softmax(hidden @ weight^T)[target] in nats, and the share of rows whose argmax is right.

    hidden (N, D), weight (V, D), target (N,) int64, keep (N,) bool: rows that count (all by default). Products run in the
    autocast dtype; log-sum-exp in float32. Only the loss is differentiable. Same value and gradients as
    `F.cross_entropy(hidden @ weight.T, target)`; peak memory is one chunk of logits instead of N x V.
    """
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    if keep_N is None:
        weight_N = torch.full(
            (hidden_ND.shape[0],), 1.0 / max(1, hidden_ND.shape[0]), dtype=wide, device=hidden_ND.device
        )
    else:
        weight_N = keep_N.to(wide) / keep_N.sum().clamp(min=1)
    if not torch.is_grad_enabled():  # else parameters would have their gradients computed, and thrown away
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    loss, correct = _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, weight_N)
    return loss, correct
