"""Optimisers, their parameter groups, and the rate schedule as a pure function (docs/method.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nextvec.config import OptimSettings
from nextvec.train.muon import Muon, ShardedMuon, loss_of
from nextvec.train.rows import RowAdagrad, sparse_gradients

# Matrices with a vocabulary, latent, noise or time side: lookups and read-outs, which stay with AdamW (as Muon's author advises).
EDGES = ("embedding", "output", "noise_in", "to_latent", "from_latent", "head.out", "latent_in", "time_in", "net.out")
ROWS = "grams.embedding"  # tables of which a step touches few rows


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for Muon, AdamW and RowAdagrad. What the first two have of two or more dimensions is decayed, vectors are not [P].

    Parameters that need no gradient are left out. Each group keeps the names, in the order of the module, and its peak rate.
    """
    chosen: dict[str, list[tuple[str, nn.Parameter]]] = {"hidden": [], "edge": [], "vector": [], "rows": []}
    for name, parameter in named:
        if parameter.requires_grad:
            chosen[_role(name, parameter, settings)].append((name, parameter))

    def group(role: str, rate: float, decay: float) -> list[dict[str, Any]]:
        members = chosen[role]
        if not members:
            return []
        names, parameters = [name for name, _ in members], [parameter for _, parameter in members]
        return [{"params": parameters, "param_names": names, "weight_decay": decay, "lr": rate, "peak_lr": rate}]

    decay = settings.weight_decay
    adamw = group("edge", settings.lr, decay) + group("vector", settings.lr, 0.0)
    return group("hidden", settings.matrix_lr, decay), adamw, group("rows", settings.rows_lr or 0.0, 0.0)


def make_optimizer(module: nn.Module, settings: OptimSettings, alone: bool = False) -> torch.optim.Optimizer:
    """The optimiser that `settings` names, over the trained parameters of `module`, whole or sharded, on its device.

    AdamW runs in one fused pass where torch has it for the device. alone: no other process has a part in the gradient, so that
    on a CPU those of tables with `rows_lr` may be sparse.
    """
    hidden, rest, rows = parameter_groups(module.named_parameters(), settings)
    assert hidden or rest, "nothing to train: no parameter but tables requires a gradient"
    device = next(p for p in module.parameters() if p.requires_grad).device.type
    fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device in ("cpu", "cuda", "mps")
    adamw = torch.optim.AdamW(
        rest, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=fused
    )
    if fused:
        adamw.register_step_post_hook(_count_step)
    parts: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        muon = ShardedMuon if isinstance(hidden[0]["params"][0], DTensor) else Muon
        parts.insert(0, muon(hidden, momentum=settings.momentum))
    sparse_gradients(module, wanted=bool(rows) and alone and device == "cpu")
    if rows:  # first, so that the last group's rate, which is shown, is AdamW's
        parts.insert(0, RowAdagrad(rows))
    return parts[0] if len(parts) == 1 else Combined(parts)


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused steps leave no trace in a parameter's version, by which tables made of it know that they are old."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version([p for p in group["params"] if not isinstance(p, DTensor)])


class Combined(torch.optim.Optimizer):
    """Several as one, with one state and one list of groups: Muon (Jordan et al. 2024; muon.py), AdamW, RowAdagrad (rows.py)."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let all parts work on this optimiser's groups and state."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = loss_of(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


@contextmanager
def gated(optimizer: torch.optim.Optimizer, good: Tensor) -> Iterator[None]:
    """Inside, a step of `optimizer` changes nothing if `good`, a 0-dim bool on its device, is false: the device looks.

    By the attribute that torch's fused kernels read for gradient scaling, and `Muon` as well.
    """
    parts: Sequence[Any] = optimizer.parts if isinstance(optimizer, Combined) else (optimizer,)
    bad = good.logical_not().float()
    for part in parts:
        part.found_inf = bad
    try:
        yield
    finally:
        for part in parts:
            del part.found_inf


def rate_factor(step: int, progress: float, steps: int, settings: OptimSettings) -> float:
    """The learning rate of optimiser step `step` (from 0) as a fraction of its peak, in (0, 1].

    min(warm-up, decay). Warm-up rises linearly from 1/warmup to 1 over the first `warmup` steps; decay is 1, or for
    `linear` a line from 1 at the end of the warm-up to 0 at progress 1, which is one step after the last.

    `progress` in [0, 1) is step / steps, or the larger share of time used when training has a time budget.
    """
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant" or settings.warmup >= steps:
        return warm
    return min(warm, (1.0 - progress) / (1.0 - settings.warmup / steps))


def clipped(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What a limit on the gradient's norm is for: all but what RowAdagrad has, which divides by the size of gradients."""
    parts = optimizer.parts if isinstance(optimizer, Combined) else (optimizer,)
    return [
        p for part in parts if not isinstance(part, RowAdagrad) for group in part.param_groups for p in group["params"]
    ]


def _role(name: str, parameter: nn.Parameter, settings: OptimSettings) -> str:
    layer = name.removesuffix(".weight")
    if settings.rows_lr is not None and layer.endswith(ROWS):
        return "rows"
    if parameter.ndim < 2:
        return "vector"
    edge = settings.name == "adamw" or any(layer == each or layer.endswith(f".{each}") for each in EDGES)
    return "edge" if edge else "hidden"
