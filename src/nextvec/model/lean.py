"""RMSNorm and SwiGLU as autograd functions that keep less for the backward pass than the operations they are made of.

The forward passes are those operations, bit for bit; what is not kept costs less to make again than it costs to hold.
Legend: N any leading dimensions, D width, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row; torch's own on a CPU keeps three float32 tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _wide(x_ND)
        scale_N1 = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (wide * scale_N1).mul_(weight_D).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        grad = _wide(grad_ND)
        normed = _wide(x_ND) * scale_N1
        both = grad * normed
        for_weight = both.flatten(0, -2).sum(0).to(weight_D.dtype)
        mean_N1 = both.mul_(weight_D).mean(-1, keepdim=True)
        for_x = (grad * weight_D).addcmul_(normed, mean_N1, value=-1.0).mul_(scale_N1)
        return for_x.to(x_ND.dtype), for_weight, None


class _SwiGLUDown(torch.autograd.Function):
    """linear(silu(gate) * up): keeps gate and up, whose gradients are written side by side, where autograd would join copies."""

    @staticmethod
    def forward(ctx: Any, gate_up_NF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_NF, weight_DF)
        gate, up = gate_up_NF.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        gate_up, weight = ctx.saved_tensors
        for_weight = for_gate_up = None
        gate, up = gate_up.flatten(0, -2).chunk(2, dim=-1)
        grad, opened = grad_ND.flatten(0, -2), F.silu(gate)
        if ctx.needs_input_grad[1]:
            for_weight = grad.T @ (opened * up)
        if ctx.needs_input_grad[0]:
            slope = grad @ weight
            for_gate_up = torch.empty_like(gate_up)
            for_gate, for_up = for_gate_up.flatten(0, -2).chunk(2, dim=-1)
            torch.mul(slope, opened, out=for_up)
            torch.ops.aten.silu_backward.grad_input(slope.mul_(up), gate, grad_input=for_gate)
        return for_gate_up, for_weight


def keeps_for_backward() -> bool:
    """Whether anything is kept, and not by compiled code, which chooses by itself what it keeps."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension; x and weight of one dtype. Torch's kernel on a GPU keeps no more than this."""
    if x_ND.device.type == "cpu" and keeps_for_backward():
        return _RMSNorm.apply(x_ND, weight_D, eps)
    return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)


def swiglu_down(gate_up_NF: Tensor, weight_DF: Tensor) -> Tensor:
    """linear(silu(gate) * up) of (..., 2 F), gate first, and (D, F): (..., D)."""
    return _SwiGLUDown.apply(gate_up_NF, weight_DF.to(gate_up_NF.dtype))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
