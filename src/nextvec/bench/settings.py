"""What a benchmark of training runs: the reference configurations, presets by name, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextvec.config import (
    AutoencoderConfig,
    CalmConfig,
    ModelConfig,
    RunConfig,
    TokenLMConfig,
    apply_overrides,
    load_yaml,
    parse_run,
)
from nextvec.errors import ConfigError
from nextvec.presets import PRESETS, autoencoder_reference, calm_reference, preset, transformer_reference

REFERENCE = "reference"
KINDS = {"train": "calm", "autoencoder": "autoencoder", "baseline": "token_lm"}  # what is benched: kind of run
CONTEXT = 1024  # tokens
ROWS = {"train": 4, "baseline": 4, "autoencoder": 16}
AUTOENCODER_VOCAB = 4096  # tokens
PATH = "synthetic"  # stands in data.path: benchmarks write their own text


def training_config(what: str, source: str, overrides: list[str]) -> RunConfig:
    """The run that `nextvec bench WHAT --config SOURCE [KEY=VALUE]...` measures; its data.path is not used.

    SOURCE: "reference"; the name of a preset; or a YAML file as `nextvec train` takes. From a name, rows and context are
    those of the reference, the optimiser is AdamW and the recipe `paper` (the energy loss alone), as the plain arm and
    the authors' code have them; overrides change that. Raises ConfigError in one sentence.
    """
    kind = KINDS[what]
    if source == REFERENCE or source in PRESETS:
        data: Any = _named(what, source)
    elif not Path(source).exists():
        raise ConfigError(
            f"--config must be {REFERENCE}, a preset ({', '.join(PRESETS)}) or an existing YAML file; got {source!r}"
        )
    else:
        data = load_yaml(Path(source))
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected a mapping of settings, got {type(data).__name__}")
        if "imported" in data:
            raise ConfigError(f"{source} describes converted weights, which have no training settings to measure")
    found = data.get("kind", kind)
    if found != kind:
        other = next((name for name, of in KINDS.items() if of == found), None)
        hint = f"; use: nextvec bench {other}" if other else ""
        raise ConfigError(f"{source} has kind {found!r}, and bench {what} measures {kind!r}{hint}")
    settings = data.get("data")
    data = {**data, "kind": kind, "data": {**(settings if isinstance(settings, dict) else {}), "path": PATH}}
    return parse_run(apply_overrides(data, overrides), source)


def _named(what: str, name: str) -> dict[str, Any]:
    model: ModelConfig
    if name != REFERENCE:
        model = preset(name)
    elif what == "train":
        model = calm_reference()
    elif what == "baseline":
        model = transformer_reference()
    else:
        model = autoencoder_reference(AUTOENCODER_VOCAB)
    kinds = {CalmConfig: "calm", TokenLMConfig: "token_lm", AutoencoderConfig: "autoencoder"}
    data: dict[str, Any] = {"kind": kinds[type(model)], "model": model.model_dump(mode="json")}
    if isinstance(model, CalmConfig):
        data["recipe"] = {"name": "paper"}
    return {**data, "optim": {"name": "adamw"}, "data": {"rows": ROWS[what], "context_tokens": CONTEXT}}
