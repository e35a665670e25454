"""Floating-point operations of a piece of work, counted from the products that it really runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]


def _forward(query: Shape, key: Shape, value: Shape, *rest: object, **more: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *rest: object, **more: object) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


_ATEN = torch.ops.aten
_CPU_ATTENTION = {  # torch counts the GPU's fused attention but not the CPU's
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _forward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products in one eager call of `work`, backward passes included; a multiply-add is 2.

    Attention counts as dense (the causal half is not taken off), as in docs/cost.md.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())
