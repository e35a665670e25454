"""How a run's module lives on its processes: whole in each (DDP), or with `train.sharding=full` split over them (FSDP2).

The loop asks the same of both: a module to call, gradients summed over the processes, an optimiser, and now and then the whole
module, to measure it on held-out text and to write it down.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nextvec.config import RunConfig
from nextvec.hardware import Precision
from nextvec.model.compressor import Compressor, PlaceTables
from nextvec.model.grams import Grams
from nextvec.train import checkpoint, parts
from nextvec.train.auxiliary import NextPatchTokens
from nextvec.train.checkpoint import Checkpoint, Snapshot, TrainState
from nextvec.train.compile import compile_regions_of
from nextvec.train.optim import clipped, gated, make_optimizer
from nextvec.train.outcomes import steps_behind
from nextvec.train.rows import sparse_gradients
from nextvec.train.world import World, make_accelerator


class Whole:
    """The module whole in every process; gradients are averaged by DDP where there are several."""

    def __init__(
        self,
        module: nn.Module,
        config: RunConfig,
        world: World,
        device: torch.device,
        precision: Precision,
        batches: int,
        found: Checkpoint | None,
    ) -> None:
        """batches: of this process in a step. found: the checkpoint to go on from, of either kind."""
        self.writes = world.first  # one process holds all there is
        self.behind = steps_behind(device)
        self.accelerator = make_accelerator(device, precision, config, batches)
        self.bare = module.to(device).train()
        self.optimizer = make_optimizer(self.bare, config.optim, alone=world.size == 1)
        self.parameters = clipped(self.optimizer)
        self.sums = _restored(found, self.bare, self.optimizer)
        self.running, self._stepper = self.accelerator.prepare(self.bare, self.optimizer)
        self.trial = self.bare  # for a step that counts for nothing: no process waits for another

    def batch(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one batch of a step."""
        return self.accelerator.accumulate(self.running)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> Tensor:
        """Clip the gradient of the whole model; returns its norm before, the same in all processes."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        assert isinstance(norm, Tensor)
        return norm

    def step(self, take: bool | Tensor) -> None:
        """Change the parameters, unless the step is not to be taken, and forget the gradient; see `Outcomes.add`."""
        if isinstance(take, Tensor):
            with gated(self.optimizer, take):
                self._stepper.step()
        elif take:
            self._stepper.step()
        self._stepper.zero_grad()

    def autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The caller's own module with its present parameters; every process enters."""
        yield self.bare

    def gather(self) -> None:
        """Give the caller's module its present parameters; every process calls it."""

    def snapshot(self, state: TrainState, sums: dict[str, Tensor]) -> Snapshot:
        return checkpoint.snapshot(state, self.bare, self.optimizer, sums)

    def write(self, run: Path, taken: Snapshot, keep_last: int, keep_every: int) -> None:
        """On the checkpoints' thread; see `checkpoint.write`."""
        checkpoint.write(run, taken, keep_last, keep_every)

    def close(self) -> nn.Module:
        """The caller's module as it was given, without what training wrapped around it."""
        sparse_gradients(self.bare, wanted=False)  # other optimisers do not take them
        self.accelerator.unwrap_model(self.running, keep_fp32_wrapper=False)
        return self.bare


class Sharded:
    """Parameters, gradients and optimiser state in equal parts, one to a process; the frozen autoencoder whole in each.

    A repeated block is put together when it runs, forward and backward, and let go of; a gradient is added up and dealt out
    batch by batch, so that no process holds all of it. What is put together is float32, as in `Whole`, and products run under
    autocast: the run is the unsharded one up to the order of additions. The caller's module is not sharded but a
    copy of it, and holds no trained parameter except inside `whole` and after `gather`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: RunConfig,
        world: World,
        device: torch.device,
        precision: Precision,
        batches: int,
        found: Checkpoint | None,
    ) -> None:
        """As `Whole`; every process gives a module with the same parameters."""
        self.writes, self.behind = True, 0
        self._batches, self._device, self._precision = batches, device, precision
        self._group = dist.new_group(backend="gloo")  # checkpoints are written beside training, which has its own
        self.bare = module.train()
        trained = [name for name, p in self.bare.named_parameters() if p.requires_grad]
        self.running: Any = _sharded_copy(self.bare, device)
        if precision == "bf16":
            self.running.forward = self.autocast()(self.running.forward)
        self.optimizer = make_optimizer(self.running, config.optim)
        self.parameters = clipped(self.optimizer)
        ours, theirs = dict(self.running.named_parameters()), dict(self.bare.named_parameters())
        self._pairs = [(theirs[name], ours[name]) for name in trained]
        self.sums = _restored(found, self.running, self.optimizer)
        self.trial = self.running

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss / self._batches).backward()

    def clip(self, limit: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, take: bool | Tensor) -> None:
        assert isinstance(take, bool), "the host waits for each step"
        if take:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def autocast(self) -> torch.autocast:
        """Without its cache, which would keep a bf16 copy of every block until the end of the pass."""
        wanted = self._precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        self.gather()
        try:
            yield self.bare
        finally:
            for whole, _ in self._pairs:
                whole.data = whole.data.new_empty(0)

    @torch.no_grad()
    def gather(self) -> None:
        for whole, part in self._pairs:
            assert isinstance(part, DTensor)
            whole.data = part.full_tensor()
            torch.autograd.graph.increment_version(whole)  # memory may be where the last ones lay (`packed.version`)

    def snapshot(self, state: TrainState, sums: dict[str, Tensor]) -> Snapshot:
        """What of the checkpoint lies here."""
        return checkpoint.snapshot(state, self.running, self.optimizer, sums)

    def write(self, run: Path, taken: Snapshot, keep_last: int, keep_every: int) -> None:
        """On the checkpoints' thread of every process; see `parts.write`."""
        parts.write(run, taken, self._group, keep_last, keep_every)

    def close(self) -> nn.Module:
        if dist.is_initialized():
            dist.destroy_process_group(self._group)
        return self.bare


def place(config: RunConfig, world: World) -> type[Whole] | type[Sharded]:
    """How the settings want the module to live; one process has nothing to share."""
    return Sharded if config.train.sharding == "full" and world.size > 1 else Whole


def _restored(found: Checkpoint | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Load a checkpoint of either kind; returns the metric sums in it."""
    if found is None:
        return {}
    sharded = found.in_parts or any(isinstance(p, DTensor) for p in module.parameters())
    restore = parts.restore if sharded else checkpoint.restore
    return {name: float(value) for name, value in restore(found, module, optimizer).items()}


def _sharded_copy(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `module` whose trained parameters are sharded over all processes; what is not trained, both share.

    The trained parameters of `module` itself are let go of: block by block they move to the device, and a part of them stays.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    values = [p.data for p in trained]
    for parameter in trained:
        parameter.data = parameter.data.new_empty(0)
    module.to(device)
    frozen = {p for p in module.parameters() if not p.requires_grad}
    same: dict[int, Any] = {id(p): nn.Parameter(value) for p, value in zip(trained, values, strict=True)}
    sharded = copy.deepcopy(module, same | {id(each): each for each in (*frozen, *module.buffers())})
    del values, same  # the copy alone holds them, so that each goes as soon as its block is sharded
    everyone = dist.group.WORLD
    assert everyone is not None
    mesh = DeviceMesh.from_group(everyone, device.type)
    for unit in _units(sharded):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    return sharded


def _units(module: nn.Module) -> list[nn.Module]:
    """What is put together at a time, beside the rest: a repeated block, or a part that holds a large table."""
    return [
        *compile_regions_of(module),
        *(p for p in module.modules() if isinstance(p, Compressor | PlaceTables | Grams | NextPatchTokens)),
    ]
