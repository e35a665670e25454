"""The processes that train together, as `torchrun` or `accelerate launch` started them, and what each reads of a step.

Without such a launcher there is one process, and nothing here talks to anyone.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nextvec.config import CalmRun, RunConfig
from nextvec.errors import ConfigError
from nextvec.hardware import Precision
from nextvec.process import run_beside_others

T = TypeVar("T")


def rank() -> int:
    """Number of this process among all, from the launcher's environment; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def restarted() -> bool:
    """Whether torchrun started this process anew after another one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@dataclass(frozen=True)
class Part:
    """What one process reads of a step: whole batches, or its rows of them where several processes share one."""

    batches: tuple[int, ...]  # numbers within the step
    part: int  # of `parts` equal ones, by rows
    parts: int


@dataclass(frozen=True)
class World:
    """This process among `size`; process 0 speaks and writes for all."""

    rank: int = 0
    size: int = 1
    owned: bool = False  # whether the process group was made here, and is taken down here

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, accumulate: int, rows: int) -> Part:
        """The share of this process in a step of `accumulate` batches of `rows` windows, the same whatever the number of
        processes: batches are dealt out first, then the rows of each. Raises ConfigError when it cannot be shared equally.
        """
        groups = math.gcd(accumulate, self.size)
        parts = self.size // groups
        if rows % parts:
            raise ConfigError(
                f"a step has {accumulate} x {rows} windows (train.accumulate x data.rows), which {self.size} processes cannot "
                f"share equally; set train.accumulate to a multiple of {self.size}, or data.rows to a multiple of {parts}"
            )
        group, part = divmod(self.rank, parts)
        return Part(tuple(range(group, accumulate, groups)), part, parts)

    def share(self, value: T) -> T:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def total(self, values: Tensor) -> Tensor:
        """Sums over all processes; every process calls it with values of the same meaning, and gets the same bits."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Wait for the others and leave."""
        if self.owned and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def open_world(device: torch.device) -> World:
    """Join the other processes; each takes its own GPU of the machine."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    run_beside_others()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    owned = not dist.is_initialized()
    if owned:
        # torchrun keeps its store over a restart, and with it the addresses of processes that are gone.
        store, rank_, size = next(rendezvous("env://"))
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank_, world_size=size)
    return World(dist.get_rank(), size, owned)


def lost_process(error: RuntimeError, world: World) -> bool:
    """Whether a failure in the middle of a step is that another process has gone, as the transport words it."""
    words = ("connection closed", "connection reset", "connection refused", "broken pipe", "nccl", "timed out")
    return world.size > 1 and (isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words))


def make_accelerator(device: torch.device, precision: Precision, config: RunConfig, batches: int) -> Accelerator:
    """A fresh Accelerator: its state is shared by the whole process, and each run may choose anew.

    batches: per step of this process. Where an auxiliary loss ends before training does, its parameters then get no
    gradient, which DDP must expect.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unused = isinstance(config, CalmRun) and config.recipe.name == "fast" and config.recipe.auxiliary_until < 1.0
    ddp = DistributedDataParallelKwargs(find_unused_parameters=unused)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=batches,
        kwargs_handlers=[ddp],
    )
