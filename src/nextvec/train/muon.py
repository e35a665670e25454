"""Muon over sharded matrices: each is put together on one process for its Newton-Schulz iteration, and dealt out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

Member = tuple[DTensor, Tensor, Tensor]  # a matrix, and the rows of its gradient and of its momentum that lie here


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` for matrices that are split by rows over processes (DTensor on a mesh of one dimension).

    Momentum and update are elementwise and stay where they are. The iteration is not: run on shards, its bf16 products are
    added up in another order, and a few steps end 6e-3 away (docs/log.md). So as many matrices as there are processes
    travel at once, in bf16, which the iteration begins with anyway; each process turns one whole matrix and sends the rows
    back. The same gradients give the bits of the unsharded step, each matrix is computed once, and a process
    holds one of them whole. A matrix travels twice, 4 bytes an element.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all matrices that have a gradient; every process of the mesh calls it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Any] = []
            gradients: list[Any] = []
            momenta: list[Any] = []
            self._init_group(group, parameters, gradients, momenta)
            local = [
                (parameter, gradient.to_local(), momentum.to_local())
                for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True)
            ]
            local.sort(key=lambda member: tuple(member[0].shape))  # equal ones together, so that nobody waits
            size = parameters[0].device_mesh.size() if parameters else 1
            for first in range(0, len(local), size):
                _update(group, local[first : first + size])
        return loss


def _update(group: dict[str, Any], members: Sequence[Member]) -> None:
    """One update of at most as many matrices as there are processes."""
    rate, momentum = group["lr"], group["momentum"]
    updates = []
    for _, gradient, buffer in members:
        buffer.lerp_(gradient, 1 - momentum)
        updates.append((gradient.lerp(buffer, momentum) if group["nesterov"] else buffer).bfloat16())
    turned = _orthogonal(group, [parameter for parameter, _, _ in members], updates)
    for (parameter, _, _), direction in zip(members, turned, strict=True):
        rows = parameter.to_local()
        rows.mul_(1 - rate * group["weight_decay"])
        rows.add_(direction.view_as(rows), alpha=-_adjust_lr(rate, group["adjust_lr_fn"], parameter.shape))


def _orthogonal(group: dict[str, Any], matrices: Sequence[DTensor], updates: Sequence[Tensor]) -> Sequence[Tensor]:
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
        bytes_in, bytes_out = ([2 * count for count in each] for each in (received, counts))
        dist.all_to_all_single(result.view(torch.uint8), sent.view(torch.uint8), bytes_in, bytes_out, group=processes)
        return result

    whole = exchange(torch.cat([update.flatten() for update in updates]), given, got)
    if rank < len(matrices):
        whole = _zeropower_via_newtonschulz(
            whole.view(matrices[rank].shape), group["ns_coefficients"], group["ns_steps"], group["eps"]
        ).flatten()
    return cast("Sequence[Tensor]", exchange(whole, got, given).split(given[: len(updates)]))
