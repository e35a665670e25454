"""A run is a directory: config.yaml, model.safetensors, tokenizer.json, metrics.jsonl, README.md; self-contained, movable.

Only safetensors are read; unknown or missing tensors are an error that lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import nn

from nextvec.config import CalmConfig, ModelRun, RunConfig, TokenLMConfig, dump_yaml, load_yaml, parse_any_run
from nextvec.errors import ConfigError, DataError
from nextvec.files import atomic_open, sha256, write_tensors

if TYPE_CHECKING:
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.text.tokenizer import Tokenizer

    Model: TypeAlias = Autoencoder | Calm | TokenLM

CONFIG, WEIGHTS, CARD, TOKENIZER = "config.yaml", "model.safetensors", "README.md", "tokenizer.json"
SUM = "model.sha256"  # of the weights, as `sha256sum` writes it; a run without one is taken as it is
_MEND = "restore it, or write it again: nextvec train ... --resume, or, of converted weights, delete it and run nextvec convert"
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Run:
    """A loaded run directory; the model is in evaluation mode."""

    path: Path
    config: ModelRun
    model: Model
    tokenizer: Tokenizer | None  # None: converted without one; see `text_tokenizer`

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DataError where the run has none, so that it cannot read or write text."""
        if self.tokenizer is None:
            raise DataError(
                f"{self.path} has no {TOKENIZER}, which text needs: convert it again with --tokenizer, or put the "
                f"{TOKENIZER} that its model was trained with into it"
            )
        return self.tokenizer


def build_model(config: ModelRun, generator: torch.Generator | None = None) -> Model:
    """The bare model of a run's configuration; parameters are initialised from `generator` when given."""
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm
    from nextvec.model.init import initialise
    from nextvec.model.token_lm import TokenLM

    model: Model
    if isinstance(config.model, CalmConfig):
        autoencoder = Autoencoder(config.model.autoencoder)
        if generator is not None:
            initialise(autoencoder, generator)
        model = Calm(config.model, autoencoder)
    elif isinstance(config.model, TokenLMConfig):
        model = TokenLM(config.model)
    else:
        model = Autoencoder(config.model)
    if generator is not None:
        initialise(model, generator)
    return model


def save_run(path: Path, config: ModelRun, model: nn.Module, tokenizer: Tokenizer, card: str | None = None) -> None:
    """Write config.yaml, tokenizer.json, the model card, model.safetensors and its sum; each file whole or nothing."""
    describe_run(path, config, tokenizer, card)
    weights = Path(path) / WEIGHTS
    write_tensors(weights, {name: tensor.cpu() for name, tensor in model.state_dict().items()})
    write_sum(path)


def describe_run(path: Path, config: ModelRun, tokenizer: Tokenizer | None, card: str | None) -> None:
    """Write all of a run directory but its weights; their sum goes, which new ones would not have."""
    path = Path(path)
    (path / SUM).unlink(missing_ok=True)
    with atomic_open(path / CONFIG) as handle:
        handle.write(dump_yaml(config))
    if tokenizer is not None:
        tokenizer.save(path)
    if card is not None:
        with atomic_open(path / CARD) as handle:
            handle.write(card)


def read_config(path: str | Path) -> ModelRun:
    """The configuration of a run directory. Raises DataError when `path` is none, ConfigError when it is damaged."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise DataError(f"{path} is not a run directory: it has no {CONFIG}")
    return parse_any_run(load_yaml(path / CONFIG), str(path / CONFIG))


def load_run(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Run:
    """Load configuration, weights and tokenizer, if there is one. Raises DataError or ConfigError in one sentence."""
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.text.tokenizer import load_tokenizer

    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = build_model(config)
    _load_weights(model, path / WEIGHTS, device, dtype)
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(path) if (path / TOKENIZER).is_file() else None
    if tokenizer is not None and tokenizer.vocab_size != config.model.vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.model.vocab_size}"
        )
    if not isinstance(model, Autoencoder):
        model.tokenizer = tokenizer
        model.packed = isinstance(config, RunConfig) and config.data.packing == "packed" and model.patch_size > 1
        model.context_tokens = config.data.context_tokens if isinstance(config, RunConfig) else None
    return Run(path, config, model, tokenizer)


def load_model(path: str | Path, kind: type[M], device: str | torch.device, dtype: torch.dtype) -> M:
    """`load_run(path).model`, which must be a `kind`."""
    model = load_run(path, device, dtype).model
    if not isinstance(model, kind):
        raise ConfigError(f"{path} holds a {type(model).__name__}, not a {kind.__name__}")
    return model


def load_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> tuple[Autoencoder, Tokenizer]:
    """The autoencoder of an autoencoder run, or the one inside a CALM run; the run must have a tokenizer."""
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm

    run = load_run(path, device)
    model = run.model.autoencoder if isinstance(run.model, Calm) else run.model
    if not isinstance(model, Autoencoder):
        raise ConfigError(f"{path} holds a {type(run.model).__name__}, which has no autoencoder")
    return model, run.text_tokenizer


def write_sum(run: Path) -> None:
    """Of weights that were just written."""
    with atomic_open(Path(run) / SUM) as handle:
        handle.write(f"{sha256(Path(run) / WEIGHTS)}  {WEIGHTS}\n")


def check_sum(run: Path) -> None:
    """Raises DataError when the weights of `run` are not those that its sum was taken of; without a sum, nothing is said."""
    try:
        wanted = (run / SUM).read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError:
        return
    if not wanted or sha256(run / WEIGHTS) != wanted[0]:
        raise DataError(
            f"{run / WEIGHTS} is damaged: it does not have the SHA-256 in {SUM}; {_MEND} (if you changed it yourself, "
            f"remove {SUM})"
        )


def _load_weights(model: nn.Module, path: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"{path} does not exist: the run was not finished; resume it or use another run")
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); {_MEND}") from None
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
    check_sum(path.parent)
    # copied, because in a mapped file they lie at any address: products may round by it, and a resumed run must not differ
    mapped = torch.device(device).type == "cpu"
    model.load_state_dict({name: t.to(dtype, copy=mapped) for name, t in tensors.items()}, assign=True)


__all__ = [
    "Run",
    "build_model",
    "check_sum",
    "load_autoencoder",
    "load_model",
    "load_run",
    "read_config",
    "save_run",
]
