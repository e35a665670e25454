"""The models of a server: run directories by the name that clients call them by, each with its engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nextvec.config import AutoencoderConfig
from nextvec.errors import ConfigError
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run, read_config
from nextvec.serve.chat import ChatTemplate, find_template
from nextvec.serve.metrics import Metrics
from nextvec.serve.settings import ServeSettings
from nextvec.serve.worker import Worker
from nextvec.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import torch

UNKNOWN_CONTEXT = 1024  # tokens, of converted weights, which do not say how long their windows were


@dataclass(frozen=True)
class Served:
    """A model that clients can ask for."""

    id: str
    model: Calm | TokenLM
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    worker: Worker
    context: int  # tokens of a prompt and its continuation
    created: int  # seconds since 1970

    @property
    def kind(self) -> str:
        return "calm" if isinstance(self.model, Calm) else "token_lm"

    @cached_property
    def longest_text(self) -> int:
        """Characters that a context of tokens has at most; one more for each, since some decoders drop a space."""
        decode = self.tokenizer.decode
        return self.context * (1 + max(len(decode([number], True)) for number in range(self.tokenizer.vocab_size)))

    @property
    def latent(self) -> int | None:
        """Dimensions of a latent; None where the model draws tokens."""
        has = isinstance(self.model, Calm) and self.model.has_latents
        return self.model.config.autoencoder.latent if has and isinstance(self.model, Calm) else None


def load_models(
    runs: Sequence[str], settings: ServeSettings, metrics: Metrics, device: torch.device, dtype: torch.dtype
) -> dict[str, Served]:
    """Load RUN or NAME=RUN each; a run's name is its folder's. Raises ConfigError and DataError before any weight is read."""
    named: dict[str, Path] = {}
    for run in runs:
        name, path = _name(run)
        if name in named:
            raise ConfigError(f"two runs are called {name!r}: give one of them as NAME={path}")
        if isinstance(read_config(path).model, AutoencoderConfig):
            raise ConfigError(f"{path} is an autoencoder, which draws no text: give the run of a calm or token_lm")
        named[name] = path
    if not named:
        raise ConfigError("nothing to serve: give at least one run directory")
    return {name: _load(name, path, settings, metrics, device, dtype) for name, path in named.items()}


def _name(run: str) -> tuple[str, Path]:
    name, equals, path = run.partition("=")
    if equals and not Path(run).exists():
        if not name:
            raise ConfigError(f"{run!r} has no name before its '=': give NAME=RUN")
        return name, Path(path)
    return Path(run).resolve().name, Path(run)


def _load(
    name: str, path: Path, settings: ServeSettings, metrics: Metrics, device: torch.device, dtype: torch.dtype
) -> Served:
    run = load_run(path, device, dtype)
    model, tokenizer = run.model, run.text_tokenizer
    assert isinstance(model, Calm | TokenLM)
    assert isinstance(tokenizer, TextTokenizer)
    context = settings.context_tokens or model.context_tokens or UNKNOWN_CONTEXT
    try:
        worker = Worker(name, model, tokenizer, settings, metrics, context)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        raise ConfigError(
            f"{name} does not fit into memory with room for {settings.slots:,} texts of {context:,} tokens: lower --slots or "
            "--context-tokens"
        ) from None
    return Served(name, model, tokenizer, find_template(path), worker, context, int(time.time()))
