"""The frozen autoencoder of a CALM run, kept in its directory until model.safetensors holds it: a run goes on by itself.

RUN/frozen.safetensors     parameters that are not trained, by name; every checkpoint has their digest
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nextvec.config import CalmConfig
from nextvec.errors import DataError
from nextvec.files import write_tensors
from nextvec.rundir import CONFIG, WEIGHTS, load_autoencoder, read_config
from nextvec.train.checkpoint import begun

if TYPE_CHECKING:
    from nextvec.model.autoencoder import Autoencoder

FROZEN = "frozen.safetensors"
PREFIX = "model.autoencoder."  # of its parameters in the module that is trained


def keep_frozen(run: Path, module: nn.Module) -> None:
    """Write the parameters of `module` that are not trained, unless they are there. Raises DataError when the disk is full."""
    frozen = {name: each.detach().cpu() for name, each in module.named_parameters() if not each.requires_grad}
    if not frozen:
        return
    held = _read(run / FROZEN) or {}
    if held.keys() != frozen.keys() or not all(torch.equal(held[name], value) for name, value in frozen.items()):
        write_tensors(run / FROZEN, frozen)


def let_go(run: Path) -> None:
    """Remove what model.safetensors holds now."""
    if (run / WEIGHTS).is_file():
        (run / FROZEN).unlink(missing_ok=True)


def kept_autoencoder(run: Path) -> Autoencoder | None:
    """The autoencoder that `run` began with; None where it holds none. Raises DataError for a file that is damaged."""
    from nextvec.model.autoencoder import Autoencoder

    config = read_config(run).model if (run / CONFIG).is_file() else None
    if not isinstance(config, CalmConfig):
        return None
    if not (run / FROZEN).is_file():
        return _exported(run, config.uses_autoencoder)
    held = _read(run / FROZEN)
    autoencoder = Autoencoder(config.autoencoder)
    wanted = autoencoder.state_dict()
    found = {name.removeprefix(PREFIX): value for name, value in (held or {}).items()}
    if found.keys() != wanted.keys() or any(found[name].shape != wanted[name].shape for name in wanted):
        raise DataError(f"{run / FROZEN} is damaged: give the autoencoder that the run began with, --autoencoder RUN")
    autoencoder.load_state_dict(found)
    return autoencoder.eval().requires_grad_(False)


def _exported(run: Path, needed: bool) -> Autoencoder | None:
    """The one inside a finished run's weights. Raises DataError where a run with checkpoints holds it no more."""
    give = "give the autoencoder that the run began with, --autoencoder RUN"
    if not (run / WEIGHTS).is_file():
        if needed and begun(run):
            raise DataError(f"{run} has neither {WEIGHTS} nor {FROZEN} any more: {give}")
        return None
    try:
        return load_autoencoder(run)[0]
    except DataError as error:
        if not begun(run):
            raise
        what = str(error).partition(";")[0]
        raise DataError(f"{what}, and {FROZEN} went when that was written: {give}") from None


def _read(path: Path) -> dict[str, Tensor] | None:
    """Its tensors; None where there are none that can be read."""
    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError):
        return None


__all__ = ["keep_frozen", "kept_autoencoder", "let_go"]
