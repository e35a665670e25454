"""Muon in the precision that the device multiplies fast, over whole matrices and over sharded ones.

A sharded matrix is put together on one process for its Newton-Schulz iteration, and dealt out again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr

from nextvec.hardware import has_bf16

GRAM_ASPECT = 2.0  # from which side ratio on `_by_gram` takes fewer operations (1.6: equal)
Member = tuple[DTensor, Tensor, Tensor]  # a matrix, and the rows of its gradient and of its momentum that lie here


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose iteration runs in float32 where the device has no bf16 products.

    torch runs it in bf16 everywhere. A processor without such instructions emulates them 20 to 50 times slower than
    float32, and one update then takes longer than the step before it. Where bf16 is there, the bits are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            bad: Tensor | None = getattr(self, "found_inf", None)
            for parameter, gradient, buffer in self._members(group):
                if bad is not None:
                    _update_gated(group, parameter, gradient, buffer, bad > 0)
                    continue
                update = _momentum(group, gradient, buffer).to(iteration_dtype(parameter.device))
                _apply(group, parameter.shape, parameter, orthogonal(group, update))
        return loss

    def _members(self, group: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
        """Each matrix of the group that has a gradient, with the gradient and its momentum."""
        parameters: list[Any] = []
        gradients: list[Any] = []
        momenta: list[Any] = []
        self._init_group(group, parameters, gradients, momenta)
        return list(zip(parameters, gradients, momenta, strict=True))


@functools.cache
def iteration_dtype(device: torch.device) -> torch.dtype:
    """Of Newton-Schulz: bf16 as published where the hardware multiplies it, else float32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def orthogonal(group: dict[str, Any], update: Tensor) -> Tensor:
    """The update with its singular values near 1, by the quintic iteration of `torch.optim.Muon` in its own dtype.

    A long matrix goes through `_by_gram` where rounding allows it, with the same result but for that rounding.
    """
    a, b, c = group["ns_coefficients"]
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=group["eps"])
    if x.dtype != torch.bfloat16 and x.shape[1] >= GRAM_ASPECT * x.shape[0]:
        x = _by_gram(group, x)
    else:
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _by_gram(group: dict[str, Any], x: Tensor) -> Tensor:
    """The same iteration over x x^T alone, and x multiplied once, at the end.

    Each step multiplies x from the left with a polynomial of its x x^T. All of these are polynomials of the first, so they
    commute: their product is kept beside the x x^T that it makes, both n x n. Of an n x rn matrix 5 steps are 4r + 34
    products n^3 instead of 20r + 10. Rounding in float32 changes 2e-6 of the result for random matrices, as it does there, and
    2e-4 at a condition number of 1e6 (there 3e-6), where small singular values drown in their squares.
    """
    a, b, c = group["ns_coefficients"]
    gram, made = x @ x.T, None
    for left in reversed(range(group["ns_steps"])):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        made = step if made is None else made @ step
        if left:
            gram = gram @ step @ step
    return x if made is None else made @ x


def _momentum(group: dict[str, Any], gradient: Tensor, buffer: Tensor) -> Tensor:
    """What is orthogonalised: the momentum, with Nesterov's look ahead where the group has it."""
    buffer.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _apply(group: dict[str, Any], shape: torch.Size, rows: Tensor, direction: Tensor) -> None:
    """Decay and step of a matrix of `shape`, or of the rows of it that lie here."""
    rows.mul_(1 - group["lr"] * group["weight_decay"])
    rows.add_(direction, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], shape))


def _update_gated(group: dict[str, Any], matrix: Tensor, gradient: Tensor, buffer: Tensor, bad: Tensor) -> None:
    """The update of one matrix, of which nothing is done where `bad`; otherwise the same bits."""
    momentum, decay = group["momentum"], 1 - group["lr"] * group["weight_decay"]
    gradient = gradient.masked_fill(bad, 0.0)
    buffer.lerp_(gradient, torch.where(bad, 0.0, 1 - momentum).to(buffer.dtype))
    update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
    direction = orthogonal(group, update.to(iteration_dtype(matrix.device)))
    matrix.mul_(torch.where(bad, 1.0, decay).to(matrix.dtype))
    matrix.add_(direction.masked_fill(bad, 0.0), alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], matrix.shape))


class ShardedMuon(Muon):
    """`Muon` for matrices that are split by rows over processes (DTensor on a mesh of one dimension).

    Momentum and update are elementwise and stay where they are. The iteration is not: run on shards, its bf16 products are
    added up in another order, and a few steps end 6e-3 away (docs/log.md). So as many matrices as there are processes
    travel at once, in the iteration's dtype, which it begins with anyway; each process turns one whole matrix and sends the rows
    back. The same gradients give the bits of the unsharded step, each matrix is computed once, and a process
    holds one of them whole. A matrix travels twice, 4 bytes an element in bf16.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all matrices that have a gradient; every process of the mesh calls it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
    turned = _turned(group, [parameter for parameter, _, _ in members], updates)
    for (parameter, _, _), direction in zip(members, turned, strict=True):
        rows = parameter.to_local()
        _apply(group, parameter.shape, rows, direction.view_as(rows))


def _turned(group: dict[str, Any], matrices: Sequence[DTensor], updates: Sequence[Tensor]) -> Sequence[Tensor]:
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
        whole = orthogonal(group, whole.view(matrices[rank].shape)).flatten()
    return cast("Sequence[Tensor]", exchange(whole, got, given).split(given[: len(updates)]))
