"""From the settings that a user gives to a complete run: what the tokenizer and the autoencoder fix is filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from nextvec.config import AutoencoderConfig, RunConfig, parse_run
from nextvec.errors import ConfigError


class Vocabulary(Protocol):
    """What a run takes from its tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def mask_id(self) -> int: ...


def complete_run(
    settings: Mapping[str, Any], vocabulary: Vocabulary, autoencoder: AutoencoderConfig | None, source: str
) -> RunConfig:
    """The validated run of `settings`, which name their `kind`. `autoencoder`: of the trained one, for kind calm; None where
    the model uses none.

    Raises ConfigError in one sentence that begins with `source`.
    """
    model = settings.get("model") or {}
    if isinstance(model, dict):
        model = dict(model)
        if autoencoder is not None:
            fixed = autoencoder.model_dump(mode="json")
            if model.setdefault("autoencoder", fixed) != fixed:
                raise ConfigError(
                    f"{source}: model.autoencoder differs from the settings of the trained autoencoder; leave it out"
                )
        elif settings["kind"] == "calm":
            fixed = {"vocab_size": vocabulary.vocab_size, "mask_id": vocabulary.mask_id}
            model["autoencoder"] = {**fixed, **(model.get("autoencoder") or {})}
        else:
            model.setdefault("vocab_size", vocabulary.vocab_size)
        if settings["kind"] == "autoencoder":
            model.setdefault("mask_id", vocabulary.mask_id)
        else:
            model.setdefault("backbone", {})
    return parse_run({**settings, "model": model}, source)
