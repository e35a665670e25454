"""AdamW, its parameter groups, and the rate schedule as a pure function (spec 8)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from nextvec.config import OptimSettings


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: everything with two or more dimensions is decayed, vectors (norms, biases) are not [P].

    Parameters that need no gradient are left out. Each group keeps the names, in the order of the module.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: list[dict[str, object]] = []
    for matrices in (True, False):
        chosen = [(name, parameter) for name, parameter in trained if (parameter.ndim >= 2) is matrices]
        if chosen:
            groups.append(
                {
                    "params": [parameter for _, parameter in chosen],
                    "param_names": [name for name, _ in chosen],
                    "weight_decay": weight_decay if matrices else 0.0,
                }
            )
    return groups


def adamw(module: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `module`, in one fused pass where torch has it for their device.

    The module must already be on its device.
    """
    groups = parameter_groups(module.named_parameters(), settings.weight_decay)
    assert groups, "nothing to train: no parameter requires a gradient"
    device = next(p for p in module.parameters() if p.requires_grad).device.type
    fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=fused
    )


def rate_factor(step: int, progress: float, steps: int, settings: OptimSettings) -> float:
    """The learning rate of optimiser step `step` (from 0) as a fraction of `settings.lr`, in (0, 1].

    min(warm-up, decay). Warm-up rises linearly from 1/warmup to 1 over the first `warmup` steps; decay is 1, or for
    `linear` a line from 1 at the end of the warm-up to 0 at progress 1, which is one step after the last.

    `progress` in [0, 1) is step / steps, or the larger share of time used when training has a time budget.
    """
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant" or settings.warmup >= steps:
        return warm
    return min(warm, (1.0 - progress) / (1.0 - settings.warmup / steps))
