"""A run is a directory: config.yaml, model.safetensors, tokenizer.json, metrics.jsonl, README.md; self-contained, movable.

Only safetensors are read; unknown or missing tensors are an error that lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import nn

from nextvec.config import AutoencoderRun, CalmRun, RunConfig, TokenLMRun, dump_yaml, load_yaml, parse_run
from nextvec.errors import ConfigError, DataError
from nextvec.files import atomic_open, write_tensors

if TYPE_CHECKING:
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.text.tokenizer import Tokenizer

    Model: TypeAlias = Autoencoder | Calm | TokenLM

CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Run:
    """A loaded run directory; the model is in evaluation mode."""

    path: Path
    config: RunConfig
    model: Model
    tokenizer: Tokenizer


def build_model(config: RunConfig, generator: torch.Generator | None = None) -> Model:
    """The bare model of a run's configuration; parameters are initialised from `generator` when given."""
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm
    from nextvec.model.init import initialise
    from nextvec.model.token_lm import TokenLM

    if isinstance(config, CalmRun):
        return Calm(config.model, generator=generator)
    if isinstance(config, TokenLMRun):
        return TokenLM(config.model, generator=generator)
    assert isinstance(config, AutoencoderRun)
    model = Autoencoder(config.model)
    if generator is not None:
        initialise(model, generator)
    return model


def save_run(path: Path, config: RunConfig, model: nn.Module, tokenizer: Tokenizer, card: str | None = None) -> None:
    """Write config.yaml, tokenizer.json, the model card and last model.safetensors; each file whole or nothing."""
    path = Path(path)
    with atomic_open(path / CONFIG) as handle:
        handle.write(dump_yaml(config))
    tokenizer.save(path)
    if card is not None:
        with atomic_open(path / CARD) as handle:
            handle.write(card)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(path / WEIGHTS, tensors)


def read_config(path: str | Path) -> RunConfig:
    """The configuration of a run directory. Raises DataError when `path` is none, ConfigError when it is damaged."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise DataError(f"{path} is not a run directory: it has no {CONFIG}")
    return parse_run(load_yaml(path / CONFIG), str(path / CONFIG))


def load_run(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Run:
    """Load configuration, weights and tokenizer. Raises DataError or ConfigError in one sentence."""
    from nextvec.text.tokenizer import load_tokenizer

    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = build_model(config)
    _load_weights(model, path / WEIGHTS, device, dtype)
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(path)
    expected = config.model.vocab_size  # type: ignore[attr-defined]
    if tokenizer.vocab_size != expected:
        raise DataError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {expected}")
    if not isinstance(config, AutoencoderRun):
        model.tokenizer = tokenizer
    return Run(path, config, model, tokenizer)


def load_model(path: str | Path, kind: type[M], device: str | torch.device, dtype: torch.dtype) -> M:
    """`load_run(path).model`, which must be a `kind`."""
    model = load_run(path, device, dtype).model
    if not isinstance(model, kind):
        raise ConfigError(f"{path} holds a {type(model).__name__}, not a {kind.__name__}")
    return model


def load_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> tuple[Autoencoder, Tokenizer]:
    """The autoencoder of an autoencoder run, or the one inside a CALM run."""
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm

    run = load_run(path, device)
    model = run.model.autoencoder if isinstance(run.model, Calm) else run.model
    if not isinstance(model, Autoencoder):
        raise ConfigError(f"{path} holds a {type(run.model).__name__}, which has no autoencoder")
    return model, run.tokenizer


def _load_weights(model: nn.Module, path: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"{path} does not exist: the run was not finished; resume it or use another run")
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); restore it or export it again from a checkpoint") from None
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        raise DataError(
            f"{path} does not match its config.yaml: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise DataError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.yaml needs {tuple(wanted[name].shape)}"
            )
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, assign=True)


__all__ = ["Run", "build_model", "load_autoencoder", "load_model", "load_run", "read_config", "save_run"]
