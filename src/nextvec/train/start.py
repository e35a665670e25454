"""Fine-tuning: a run that begins with the weights and the settings of another one (`nextvec train ... --from RUN`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nextvec.config import RunConfig
from nextvec.errors import ConfigError, DataError
from nextvec.rundir import Run
from nextvec.train import checkpoint, parts
from nextvec.train.objectives import Objective

OWN = ("path", "mixture", "packing", "latents")  # settings of `data` that belong to the text, not to the run
SECTIONS = ("data", "optim", "train", "energy", "recipe")


def settings_from(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, filled up with those of `run` but for its text. Raises ConfigError when `run` is of another kind."""
    if run.config.kind != settings["kind"]:
        raise ConfigError(f"--from needs a run of the kind {settings['kind']!r}; {run.path} is {run.config.kind!r}")
    before = run.config.model_dump(mode="json") if isinstance(run.config, RunConfig) else {}
    before["data"] = {name: value for name, value in (before.get("data") or {}).items() if name not in OWN}
    filled = {name: {**before[name], **(settings.get(name) or {})} for name in SECTIONS if before.get(name)}
    model = settings.get("model") or run.config.model.model_dump(mode="json")
    return {**settings, **filled, "model": model, "start": str(run.path)}


def begin_with(objective: Objective, run: Run, keep_autoencoder: bool) -> None:
    """Give `objective` the weights of `run`; with `keep_autoencoder` it keeps its own autoencoder, trained anew.

    Training-only parts (the auxiliary cross-entropy) are taken from the run's newest checkpoint, if it is there.
    Raises ConfigError when the models differ.
    """
    if objective.config.model != run.config.model:
        raise ConfigError(f"--from {run.path} goes with that run's own model: leave settings of the model out")
    weights = run.model.state_dict()
    if keep_autoencoder:
        weights |= {name: value for name, value in objective.model.state_dict().items() if _is_autoencoder(name)}
    objective.model.load_state_dict(weights)
    extra = {n: p for n, p in objective.module.named_parameters() if not n.startswith("model.")}
    stored = _checkpoint_tensors(run.path, extra) if extra else {}
    with torch.no_grad():
        for name, parameter in extra.items():
            if name in stored and stored[name].shape == parameter.shape:
                parameter.copy_(stored[name])


def _is_autoencoder(name: str) -> bool:
    return name.startswith("autoencoder.")


def _checkpoint_tensors(run: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    try:
        found = checkpoint.latest(run)
    except DataError:
        return {}
    if found is None:
        return {}
    return parts.read_module(found, names) if found.in_parts else load_file(found.path / checkpoint.MODULE)
