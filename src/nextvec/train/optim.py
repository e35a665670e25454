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
from nextvec.train.muon import Muon, ShardedMuon

# Matrices with a vocabulary, latent, noise or time side: lookups and read-outs, which stay with AdamW (as Muon's author advises).
EDGES = ("embedding", "output", "noise_in", "to_latent", "from_latent", "head.out", "latent_in", "time_in", "net.out")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(groups for Muon, groups for AdamW). Everything with two or more dimensions is decayed, vectors are not [P].

    Parameters that need no gradient are left out. Each group keeps the names, in the order of the module, and its peak rate.
    """
    chosen: dict[str, list[tuple[str, nn.Parameter]]] = {"hidden": [], "edge": [], "vector": []}
    for name, parameter in named:
        if parameter.requires_grad:
            chosen[
                _role(name, parameter) if settings.name == "muon" else "edge" if parameter.ndim >= 2 else "vector"
            ].append((name, parameter))

    def group(role: str, rate: float, decay: float) -> list[dict[str, Any]]:
        members = chosen[role]
        if not members:
            return []
        names, parameters = [name for name, _ in members], [parameter for _, parameter in members]
        return [{"params": parameters, "param_names": names, "weight_decay": decay, "lr": rate, "peak_lr": rate}]

    decay = settings.weight_decay
    return group("hidden", settings.matrix_lr, decay), group("edge", settings.lr, decay) + group(
        "vector", settings.lr, 0.0
    )


def make_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimiser that `settings` names, over the trained parameters of `module`, whole or sharded, on its device.

    AdamW runs in one fused pass where torch has it for the device.
    """
    hidden, rest = parameter_groups(module.named_parameters(), settings)
    assert hidden or rest, "nothing to train: no parameter requires a gradient"
    device = next(p for p in module.parameters() if p.requires_grad).device.type
    fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device in ("cpu", "cuda", "mps")
    adamw = torch.optim.AdamW(
        rest, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=fused
    )
    if fused:
        adamw.register_step_post_hook(_count_step)
    if not hidden:
        return adamw
    muon = ShardedMuon if isinstance(hidden[0]["params"][0], DTensor) else Muon
    return MuonAdamW(muon(hidden, momentum=settings.momentum), adamw)


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused steps leave no trace in a parameter's version, by which tables made of it know that they are old."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version([p for p in group["params"] if not isinstance(p, DTensor)])


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024; `nextvec.train.muon`) and AdamW as one optimiser with one state and one list of groups."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimiser's groups and state."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
    parts: Sequence[Any] = optimizer.parts if isinstance(optimizer, MuonAdamW) else (optimizer,)
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


def _role(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "vector"
    layer = name.removesuffix(".weight")
    return "edge" if any(layer == edge or layer.endswith(f".{edge}") for edge in EDGES) else "hidden"
