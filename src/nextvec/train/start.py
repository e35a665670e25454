"""Fine-tuning: a run that begins with the weights and the settings of another one (`nextvec train ... --from RUN`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nextvec.config import ModelRun, RunConfig, parse_run
from nextvec.errors import ConfigError, DataError
from nextvec.model.calm import Calm
from nextvec.rundir import CONFIG, TOKENIZER, WEIGHTS, Run, build_model, load_run
from nextvec.text.tokenizer import load_tokenizer
from nextvec.train import checkpoint, parts
from nextvec.train.kept import kept_autoencoder
from nextvec.train.objectives import Objective

OWN = ("path", "mixture", "packing", "latents")  # settings of `data` that belong to the text, not to the run
SECTIONS = ("data", "optim", "train", "energy", "recipe")


def load_start(path: Path, *, needs_autoencoder: bool = True) -> Run:
    """The run at `path`: a finished one, one of its checkpoints (RUN/checkpoints/step-N), or of one that is not finished
    its newest checkpoint.

    needs_autoencoder: a CALM's own; without it, one that the run holds no more is left untrained.
    Raises DataError or ConfigError in one sentence for what is damaged or missing.
    """
    path = Path(path)
    if (path / checkpoint.STATE).is_file():
        return _run_of(path, holder(path), checkpoint.read(path), needs_autoencoder)
    if (path / CONFIG).is_file() and not (path / WEIGHTS).is_file():
        found = checkpoint.latest(path)
        if found is None:
            raise DataError(f"{path} has neither {WEIGHTS} nor a checkpoint: nothing of it was saved yet")
        return _run_of(path, path, found, needs_autoencoder)
    return load_run(path)


def holder(path: Path) -> Path:
    """The run directory, with its tokenizer, of what --from names."""
    return Path(os.path.abspath(path)).parents[1] if (path / checkpoint.STATE).is_file() else path


def settings_from(path: Path | str, config: ModelRun, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, filled up with those of the run at `path` but for its text. Raises ConfigError for another kind."""
    if config.kind != settings["kind"]:
        raise ConfigError(f"--from needs a run of the kind {settings['kind']!r}; {path} is {config.kind!r}")
    before = config.model_dump(mode="json") if isinstance(config, RunConfig) else {}
    before["data"] = {name: value for name, value in (before.get("data") or {}).items() if name not in OWN}
    filled = {name: {**before[name], **(settings.get(name) or {})} for name in SECTIONS if before.get(name)}
    model = settings.get("model") or config.model.model_dump(mode="json")
    return {**settings, **filled, "model": model, "start": str(path)}


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


def _run_of(path: Path, run: Path, found: checkpoint.Checkpoint, needs_autoencoder: bool) -> Run:
    """The model of a checkpoint of `run`, with the settings that were saved with it."""
    config = parse_run(checkpoint.with_defaults(found.state.config), str(found.path / checkpoint.STATE))
    model = build_model(config)
    if isinstance(model, Calm):
        _put_autoencoder(model, run, found, needs_autoencoder)
    wanted = {f"model.{name}": tensor for name, tensor in checkpoint.module_tensors(model).items()}
    stored = _stored(found, wanted)
    checkpoint.check_fits(found, wanted, {name: each.shape for name, each in stored.items() if name in wanted})
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    model.eval().requires_grad_(False)
    return Run(path, config, model, load_tokenizer(run) if (run / TOKENIZER).is_file() else None)


def _put_autoencoder(model: Calm, run: Path, found: checkpoint.Checkpoint, needed: bool) -> None:
    """Give `model` the frozen autoencoder that `run` keeps. Raises DataError where it has another one, or none."""
    kept = kept_autoencoder(run) if needed else None
    if kept is None:
        if needed and model.config.uses_autoencoder:
            raise DataError(f"{run} does not hold the autoencoder of its checkpoints: give it, --autoencoder RUN")
        return
    model.autoencoder.load_state_dict(kept.state_dict())
    frozen = ((f"model.{name}", each) for name, each in model.named_parameters() if not each.requires_grad)
    if checkpoint.parameters_digest(frozen) != found.state.frozen:
        raise DataError(
            f"the autoencoder in {run} is not the one that {found.path} was trained with: give that one, --autoencoder RUN"
        )


def _is_autoencoder(name: str) -> bool:
    return name.startswith("autoencoder.")


def _checkpoint_tensors(run: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    try:
        found = checkpoint.read(run) if (run / checkpoint.STATE).is_file() else checkpoint.latest(run)
    except DataError:
        return {}
    return {} if found is None else _stored(found, names)


def _stored(found: checkpoint.Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of the module in a checkpoint of either kind, those of `names` at least."""
    return parts.read_module(found, names) if found.in_parts else load_file(found.path / checkpoint.MODULE)
