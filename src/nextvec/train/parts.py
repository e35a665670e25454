"""Checkpoints of a sharded run: each process writes its part, through torch.distributed.checkpoint; any number of them reads.

    shard-NNNNN-model-00001-of-00001.safetensors   of process N - 1: rows of parameters by name, of `<parameter>/<slot>`, and
                                                   where they begin; the first one has `metrics/<name>` and counters as well
    state.json                                     as checkpoint.py, format 2

The library's format of safetensors is used, nothing pickled. A checkpoint gets its name only when every process has
written, fsynced and summed its file; if one fails, none keeps it, and all say the same.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from nextvec.errors import UserError
from nextvec.files import sha256
from nextvec.train import checkpoint
from nextvec.train.checkpoint import Checkpoint, Snapshot

T = TypeVar("T")


def write(run: Path, taken: Snapshot, group: dist.ProcessGroup, keep_last: int, keep_every: int) -> None:
    """Write a checkpoint of `run` from the parts of all processes of `group`, each of which calls this.

    Whatever goes wrong, the checkpoints that were there stay. In every process raises what went wrong in one: DataError
    when the disk is full, UserError for weights that are not finite.
    """
    first = dist.get_rank(group) == 0
    _together(group, lambda: checkpoint.check_finite({n: _local(t) for n, t in taken.module.items()}))
    with _shared_folder(run, taken.state.step, group, first) as partial:
        tensors = {n: t for n, t in (taken.module | taken.optimizer).items() if _local(t).numel()}
        try:
            save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                process_group=group,
            )
        except CheckpointException as failed:
            raise _cause(failed) from None
        own = f"shard-{dist.get_rank(group) + 1:05d}-"
        sums = _together(group, lambda: {path.name: _settled(path) for path in sorted(partial.glob(f"{own}*"))})
        state = taken.state.model_copy(update={"format": checkpoint.PARTS})
        files = {name: value for each in sums for name, value in each.items()}
        _together(group, lambda: checkpoint.complete(partial, state, files) if first else None)
    if first:
        checkpoint.thin_out(run, keep_last, keep_every)


def restore(found: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """As `checkpoint.restore`, from a checkpoint of either kind into a module of either kind; a process reads its own rows."""
    wanted = checkpoint.module_tensors(module)
    stored = contents(found)
    checkpoint.check_fits(found, wanted, {name: each.size for name, each in stored.items() if "/" not in name})
    tensors = {name: tensor.detach() for name, tensor in wanted.items()}
    for key, each in stored.items():
        name, slash, _ = key.rpartition("/")
        if slash:
            like, dtype = wanted.get(name), each.properties.dtype
            if like is not None and like.shape == each.size:  # sharded as its parameter is
                tensors[key] = torch.zeros_like(like, dtype=dtype)
            elif like is not None and like.dim() == 2 and each.size == (len(like), 1):  # a number of each of its rows
                tensors[key] = torch.zeros_like(like.detach()[:, :1], dtype=dtype)
            else:
                tensors[key] = torch.zeros(each.size, dtype=dtype)
    _read(found, tensors)
    return checkpoint.put_back(optimizer, {name: tensor for name, tensor in tensors.items() if "/" in name})


def read_module(found: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors of the module by name, those of `names` that the checkpoint has."""
    stored = contents(found)
    kept = {n: torch.zeros(stored[n].size, dtype=stored[n].properties.dtype) for n in names if n in stored}
    _read(found, kept)
    return kept


def contents(found: Checkpoint) -> Mapping[str, TensorStorageMetadata]:
    """Name, shape and kind of every tensor in a checkpoint of either kind."""
    metadata = HuggingFaceStorageReader(str(found.path)).read_metadata().state_dict_metadata
    return cast("Mapping[str, TensorStorageMetadata]", metadata)


def _read(found: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, or what of them lies here."""
    here = {name: tensor for name, tensor in tensors.items() if _local(tensor).numel()}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled", UserWarning
        )  # no one needs to wait for another
        load(cast("dict[str, Any]", here), storage_reader=HuggingFaceStorageReader(str(found.path)), no_dist=True)


def _together(group: dist.ProcessGroup, work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process. Raises in all of them what it raises in one."""
    try:
        mine: tuple[T | None, Exception | None] = work(), None
    except Exception as error:
        mine = None, error
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    failed = next((error for _, error in everyone if error is not None), None)
    if failed is not None:
        raise failed
    return [value for value, _ in everyone]


@contextmanager
def _shared_folder(run: Path, step: int, group: dist.ProcessGroup, first: bool) -> Iterator[Path]:
    """`checkpoint.new_folder` of process 0 for all; none goes on before it is there."""
    with ExitStack() as stack:
        made = _together(group, lambda: stack.enter_context(checkpoint.new_folder(run, step)) if first else None)
        assert made[0] is not None
        yield made[0]


def _settled(path: Path) -> str:
    """Make a file durable; returns its SHA-256."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())
    return sha256(path)


def _cause(failed: CheckpointException) -> Exception:
    """The error of one process in the library's collection of them."""
    errors = [error for error, _ in failed.failures.values()]
    found = next((error for error in errors if isinstance(error, OSError | UserError)), errors[0])
    return found if isinstance(found, Exception) else RuntimeError(str(found))


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
