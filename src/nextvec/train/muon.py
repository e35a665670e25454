"""Muon over whole matrices and over sharded ones, in the precision that the device multiplies fast.

A sharded matrix is put together on one process to be made orthogonal, and dealt out again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from nextvec.hardware import has_bf16
from nextvec.train.polar import orthogonal

Member = tuple[DTensor, Tensor, Tensor]  # a matrix, and the rows of its gradient and of its momentum that lie here


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the orthogonal factor of the momentum, with Nesterov's look ahead.

    Decay and the size of a step are those of `torch.optim.Muon`: lr, times the root of the aspect of a tall matrix. The factor is
    made by `polar.orthogonal`, where torch takes five steps in bf16 on every device; in float32 here where that is
    faster: a processor without bf16 products emulates them 20 to 50 times slower.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            bad: Tensor | None = getattr(self, "found_inf", None)
            for parameter, gradient, buffer in self._members(group):
                if bad is not None:
                    _update_gated(group, parameter, gradient, buffer, bad > 0)
                    continue
                update = _momentum(group, gradient, buffer).to(iteration_dtype(parameter.device))
                _apply(group, parameter.shape, parameter, orthogonal(update))
        return loss

    def _members(self, group: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
        """Each matrix of the group that has a gradient, with the gradient and its momentum."""
        members = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            members.append((parameter, parameter.grad, state["momentum_buffer"]))
        return members


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What the `closure` of an optimiser's step gives, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@functools.cache
def iteration_dtype(device: torch.device) -> torch.dtype:
    """Of the orthogonal factor: bf16 where the hardware multiplies it, else float32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def _momentum(group: dict[str, Any], gradient: Tensor, buffer: Tensor) -> Tensor:
    """What is made orthogonal: the momentum, with Nesterov's look ahead."""
    buffer.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(buffer, group["momentum"])


def _apply(group: dict[str, Any], shape: torch.Size, rows: Tensor, direction: Tensor) -> None:
    """Decay and step of a matrix of `shape`, or of the rows of it that lie here."""
    rows.mul_(1 - group["lr"] * group["weight_decay"])
    rows.add_(direction, alpha=-_rate(group, shape))


def _rate(group: dict[str, Any], shape: torch.Size) -> float:
    rate: float = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
    return rate


def _update_gated(group: dict[str, Any], matrix: Tensor, gradient: Tensor, buffer: Tensor, bad: Tensor) -> None:
    """The update of one matrix, of which nothing is done where `bad`; otherwise the same bits."""
    momentum, decay = group["momentum"], 1 - group["lr"] * group["weight_decay"]
    gradient = gradient.masked_fill(bad, 0.0)
    buffer.lerp_(gradient, torch.where(bad, 0.0, 1 - momentum).to(buffer.dtype))
    update = gradient.lerp(buffer, momentum)
    direction = orthogonal(update.to(iteration_dtype(matrix.device)))
    matrix.mul_(torch.where(bad, 1.0, decay).to(matrix.dtype))
    matrix.add_(direction.masked_fill(bad, 0.0), alpha=-_rate(group, matrix.shape))


class ShardedMuon(Muon):
    """`Muon` for matrices that are split by rows over processes (DTensor on a mesh of one dimension).

    Momentum and update are elementwise and stay where they are. The orthogonal factor is not: made of shards, its bf16 products
    are added up in another order, and a few steps end 6e-3 away (docs/log.md). So as many matrices as there are processes
    travel at once, in the dtype of the factor, which begins with it anyway; each process turns one whole matrix and sends the
    rows back. The same gradients give the bits of the unsharded step, each matrix is computed once, and a process
    holds one of them whole. A matrix travels twice, 4 bytes an element in bf16.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all matrices that have a gradient; every process of the mesh calls it."""
        loss = loss_of(closure)
        for group in self.param_groups:
            local = [
                (parameter, gradient.to_local(), momentum.to_local())
                for parameter, gradient, momentum in self._members(group)
            ]
            local.sort(key=lambda member: tuple(member[0].shape))  # equal ones together, so that nobody waits
            size = local[0][0].device_mesh.size() if local else 1
            for first in range(0, len(local), size):
                _update(group, local[first : first + size])
        return loss


def _update(group: dict[str, Any], members: Sequence[Member]) -> None:
    """One update of at most as many matrices as there are processes."""
    updates = [_momentum(group, gradient, buffer).to(iteration_dtype(buffer.device)) for _, gradient, buffer in members]
    turned = _turned([parameter for parameter, _, _ in members], updates)
    for (parameter, _, _), direction in zip(members, turned, strict=True):
        rows = parameter.to_local()
        _apply(group, parameter.shape, rows, direction.view_as(rows))


def _turned(matrices: Sequence[DTensor], updates: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each matrix's orthogonalised update that lie here, flat, from the rows of the update."""
    mesh = matrices[0].device_mesh
    rank, size, processes = mesh.get_local_rank(), mesh.size(), mesh.get_group()
    given = [update.numel() for update in updates]
    given += [0] * (size - len(given))
    got = [0] * size  # of my matrix, from each process
    if rank < len(matrices):
        height, width = matrices[rank].shape
        most = -(-height // size)  # rows of a process; the last ones may have fewer, or none
        got = [width * min(most, max(0, height - process * most)) for process in range(size)]

    def exchange(sent: Tensor, counts: list[int], received: list[int]) -> Tensor:
        result = sent.new_empty(sum(received))
        bytes_in, bytes_out = ([sent.element_size() * count for count in each] for each in (received, counts))
        dist.all_to_all_single(result.view(torch.uint8), sent.view(torch.uint8), bytes_in, bytes_out, group=processes)
        return result

    whole = exchange(torch.cat([update.flatten() for update in updates]), given, got)
    if rank < len(matrices):
        whole = orthogonal(whole.view(matrices[rank].shape)).flatten()
    return cast("Sequence[Tensor]", exchange(whole, got, given).split(given[: len(updates)]))
