"""Checkpoints: RUN/checkpoints/step-XXXXXXXX/ with the module, the optimiser state and the position, nothing pickled.

    module.safetensors     trained parameters (auxiliary parts too) and persistent buffers, by name
    optimizer.safetensors  `<parameter>/<slot>` of AdamW, and `metrics/<name>` sums since the last log line
    state.json             position, precision, settings, and the SHA-256 of both files and of itself

That of a sharded run has one file of tensors from each process instead (parts.py), and format 2.

A checkpoint is written into a hidden folder, fsynced and renamed, so one that has its final name is whole. Frozen
parameters (the autoencoder of a CALM run) are not stored here but in kept.py's file; their digest is, so that others are
refused. Saving has two halves: `snapshot` copies the state to the host, `write` puts a copy on disk and may run on another
thread (writer.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nextvec.config import parse_run
from nextvec.errors import ConfigError, DataError, UserError
from nextvec.files import disk_error, fsync_folder, read_json, sha256, write_json, write_tensors
from nextvec.hardware import Precision
from nextvec.settings import differences

WHOLE, PARTS = 1, 2  # formats of state.json: all of a tensor in one file, or the part of each process in its own
FORMAT = PARTS  # newest that is read
KEEP = 2  # newest checkpoints kept in a run directory
MODULE, OPTIMIZER, STATE = "module.safetensors", "optimizer.safetensors", "state.json"
CONTINUED = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep_last",
    "train.keep_every",
    "train.skip_limit",
    "train.activation_checkpointing",
    "train.sharding",
    "data.path",
    "data.mixture",
    "start",
)  # free to change

Say = Callable[[str], None]


class TrainState(BaseModel):
    """Where training stands. Batches and noise are functions of (seed, step), so no generator state is needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = WHOLE
    step: int  # optimiser steps done
    tokens: int  # tokens trained on, pads included
    seconds: float  # training time over all sittings, without evaluation and saving
    cpu_seconds: float = 0.0  # of this process on all its threads in that time; 0 in checkpoints of before it was kept
    logged_step: int  # step of the last log line
    logged_seconds: float
    counts: dict[str, int]  # number of batches in each metric sum since the last log line
    precision: Precision
    config: dict[str, Any]  # the run's settings
    data: str  # digest of the training shards' manifest
    frozen: str  # digest of the parameters that are not trained
    skipped: int = 0  # steps whose loss or gradient was not finite, over all of training; they changed nothing
    skipped_in_a_row: int = 0  # of these, the last ones without a good step between


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: TrainState

    @property
    def in_parts(self) -> bool:
        """Whether its tensors lie in parts (parts.py)."""
        return self.state.format == PARTS


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint in host memory, nothing shared with what is being trained."""

    state: TrainState
    module: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def snapshot(
    state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor]
) -> Snapshot:
    """Copy what a checkpoint holds; training may go on as soon as this returns. Waits for the device."""
    return Snapshot(state, _copied(module_tensors(module)), _copied(_optimizer_tensors(optimizer, sums)))


def write(run: Path, taken: Snapshot, keep_last: int = KEEP, keep_every: int = 0) -> Path:
    """Write a checkpoint of `run` and remove all but the newest `keep_last` and those of every `keep_every` steps.

    Whatever goes wrong, the checkpoints that were there stay. Raises DataError when the disk is full, UserError for
    weights that are not finite.
    """
    check_finite(taken.module)
    with new_folder(run, taken.state.step) as partial:
        write_tensors(partial / MODULE, taken.module)
        write_tensors(partial / OPTIMIZER, taken.optimizer)
        final = complete(partial, taken.state, {name: sha256(partial / name) for name in (MODULE, OPTIMIZER)})
    thin_out(run, keep_last, keep_every)
    return final


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises UserError when a weight is not finite."""
    bad = next((name for name, tensor in weights.items() if not bool(tensor.isfinite().all())), None)
    if bad is not None:
        raise UserError(f"{bad} is not finite")


@contextmanager
def new_folder(run: Path, step: int) -> Iterator[Path]:
    """The hidden folder that `complete` makes a checkpoint of; what else is left of it at the end is removed.

    Raises DataError when the disk is full.
    """
    folder = Path(run) / "checkpoints"
    partial = folder / f".step-{step:08d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        partial.mkdir()
        yield partial
    except OSError as error:
        raise disk_error(error, _final(partial)) from error
    finally:
        _remove_partial(folder)


def complete(partial: Path, state: TrainState, sums: Mapping[str, str]) -> Path:
    """Write state.json beside the files whose SHA-256 are given, and give the folder its final name."""
    content = state.model_dump(mode="json") | {"sha256": dict(sums)}
    write_json(partial / STATE, content | {"digest": _digest(content)})
    final = _final(partial)
    if final.exists():
        final.rename(partial.with_name(f".{final.name}.old.tmp"))
    partial.rename(final)
    fsync_folder(final.parent)
    return final


def thin_out(run: Path, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of every `keep_every` steps."""
    for old in folders(run)[keep_last:]:
        if not keep_every or _step_of(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)


def latest(run: Path, say: Say | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of `run`; None when there is none at all.

    A damaged one is passed over with one line to `say` if an older one is whole. Raises DataError, naming the damaged
    file, when no checkpoint is whole, and ConfigError for one written by a newer nextvec.
    """
    problem: str | None = None
    for path in folders(run):
        try:
            found = _verify(path)
        except DataError as error:
            problem = problem or str(error)
            continue
        if problem is not None and say is not None:
            say(f"{problem}; going on from the older checkpoint {path}")
        return found
    if problem is not None:
        raise DataError(f"{problem}, and no older checkpoint is whole; train again into a new directory")
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint in this folder. Raises DataError, naming the damaged file, and ConfigError as `latest`."""
    return _verify(Path(path))


def begun(run: Path) -> bool:
    """Whether `run` has a checkpoint, whole or not."""
    return bool(folders(run))


def drop_newer(run: Path, step: int) -> None:
    """Move checkpoints beyond `step` (passed over as damaged) out of the way of the ones to be written."""
    for path in folders(run):
        if _step_of(path) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Load a checkpoint into the module and the optimiser; returns the metric sums since the last log line.

    Raises DataError when the module has other parameters or shapes than the checkpoint.
    """
    stored = load_file(checkpoint.path / MODULE)
    wanted = module_tensors(module)
    check_fits(checkpoint, wanted, {name: tensor.shape for name, tensor in stored.items()})
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])

    return put_back(optimizer, load_file(checkpoint.path / OPTIMIZER))


def check_fits(checkpoint: Checkpoint, wanted: Mapping[str, Tensor], stored: Mapping[str, torch.Size]) -> None:
    """Raises DataError when the module has other tensors than the checkpoint."""
    different = sorted(
        n for n in wanted.keys() | stored.keys() if n not in wanted or n not in stored or wanted[n].shape != stored[n]
    )
    if different:
        raise DataError(f"checkpoint {checkpoint.path} does not fit this model: {', '.join(different[:3])} differ")


def put_back(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the optimiser its state from `<parameter>/<slot>`; returns what is stored as `metrics/<name>`."""
    slots: dict[str, dict[str, Tensor]] = {}
    sums: dict[str, Tensor] = {}
    for key, value in stored.items():
        name, _, slot = key.rpartition("/")
        if name == "metrics":
            sums[slot] = value
        else:
            slots.setdefault(name, {})[slot] = value
    current = optimizer.state_dict()
    names = [name for group in current["param_groups"] for name in group["param_names"]]
    current["state"] = {index: slots[name] for index, name in enumerate(names) if name in slots}
    optimizer.load_state_dict(current)
    return sums


def frozen_digest(module: nn.Module) -> str:
    """SHA-256 over names and values of the parameters that are not trained."""
    return parameters_digest((name, each) for name, each in module.named_parameters() if not each.requires_grad)


def parameters_digest(named: Iterable[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same_run(checkpoint: Checkpoint, config: Mapping[str, Any], data: str, frozen: str) -> None:
    """Refuse to go on with other settings, data or frozen weights. Raises DataError naming what changed.

    The number of steps, what is logged, evaluated, saved and kept may change, and the shards may have moved. A setting
    that the checkpoint does not know, written by an older nextvec, counts as its default.
    """
    found = differences(with_defaults(checkpoint.state.config), config)
    changed = [f"{key} was {before} and is now {now}" for key, before, now in sorted(found) if key not in CONTINUED]
    if changed:
        raise DataError(
            f"--resume needs the settings that the run began with: {', '.join(changed)}; "
            f"set {'it' if len(changed) == 1 else 'them'} back, or train into a new directory"
        )
    before, now = (_weights(settings) for settings in (checkpoint.state.config, config))
    if checkpoint.state.data != data and before != now:
        raise DataError(
            f"--resume needs the mixture that the run began with: the weights of data.mixture were {before} and are now "
            f"{now}; set them back, or train into a new directory"
        )
    if checkpoint.state.data != data:
        raise DataError("--resume needs the shards that the run began with: data.path holds other tokens now")
    if checkpoint.state.frozen != frozen:
        raise DataError(
            "--resume needs the autoencoder that the run began with: its weights differ now; give it with --autoencoder RUN"
        )


def _weights(config: Mapping[str, Any]) -> str:
    """The weights of a run's corpora, as its settings name them."""
    mixture = (config.get("data") or {}).get("mixture") or ()
    return ", ".join(f"{part['weight']:g}" for part in mixture) or "none"


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run as this version writes them, those that an older one did not know at their defaults."""
    try:
        return parse_run(config, "checkpoint").model_dump(mode="json")
    except (ConfigError, KeyError):  # not the settings of a run that this version knows: compare what is there
        return config


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() if t.device.type == "cpu" else t.detach().cpu() for name, t in tensors.items()}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters (tied ones once) and persistent buffers, sharing memory with the module."""
    persistent = module.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return tensors | {n: b for n, b in module.named_buffers() if n in persistent}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    slots = {f"{names[index]}/{slot}": value for index, of in state["state"].items() for slot, value in of.items()}
    return slots | {f"metrics/{name}": value for name, value in sums.items()}


def _verify(path: Path) -> Checkpoint:
    """Check sizes and sums. Raises DataError naming the damaged file."""
    content = read_json(path / STATE, "checkpoint file")
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise ConfigError(f"checkpoint {path} has format {content['format']}, newer than this nextvec reads ({FORMAT})")
    try:
        if content.pop("digest") != _digest(content):
            raise DataError(f"checkpoint file {path / STATE} is damaged: its content does not match its digest")
        for name, wanted in content.pop("sha256").items():
            if not (path / name).is_file():
                raise DataError(f"checkpoint file {path / name} is missing")
            if sha256(path / name) != wanted:
                raise DataError(
                    f"checkpoint file {path / name} is damaged: its SHA-256 differs from the one in {STATE}"
                )
        return Checkpoint(path, TrainState.model_validate(content))
    except (AttributeError, KeyError, TypeError, ValidationError):
        raise DataError(f"checkpoint file {path / STATE} is damaged: it lacks what a checkpoint holds") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"checkpoint {path} cannot be read: {error}") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _final(partial: Path) -> Path:
    """The name that a hidden folder gets."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".tmp"))


def folders(run: Path) -> list[Path]:
    """All checkpoints of `run`, whole or not, newest first."""
    found = [path for path in (Path(run) / "checkpoints").glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


__all__ = [
    "Checkpoint",
    "Snapshot",
    "TrainState",
    "begun",
    "check_same_run",
    "drop_newer",
    "folders",
    "frozen_digest",
    "latest",
    "parameters_digest",
    "read",
    "restore",
    "snapshot",
    "write",
]
