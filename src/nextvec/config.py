"""Typed, frozen, validated settings. Every field has a unit and an origin; bad values fail at construction.

[P] paper (arXiv 2510.27688), [C] the authors' code, [D] chosen here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nextvec.errors import ConfigError

FORMAT = 1  # version of config.yaml in a run directory; a newer one is refused with one sentence

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
R = TypeVar("R", bound="ModelRun")


class Config(BaseModel):
    """Base of all settings: frozen, unknown keys refused with the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(unknown_key(str(key), list(cls.model_fields)))
        return data

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "config") -> Self:
        """Validate a plain dict (from YAML or JSON). Raises ConfigError in one sentence."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_sentence(error)}") from None

    def override(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).parse({**self.model_dump(), **changes}, type(self).__name__)


class AutoencoderConfig(Config):
    """Patch autoencoder: K tokens <-> one latent of `latent` dimensions (paper section 3.1, spec 1)."""

    vocab_size: Positive  # tokens
    patch_size: Positive = 4  # K, tokens per patch [P]
    width: Positive = 512  # d, hidden width [P]
    inner: Positive = 1280  # SwiGLU inner width [C]
    layers: Positive = 2  # blocks in the encoder, and again in the decoder: half per token, half per patch [C]
    latent: Positive = 128  # L, latent dimensions; the paper uses 32 per token [P]
    kl_weight: Annotated[float, Field(ge=0)] = 0.001  # beta [P]
    kl_clip: Annotated[float, Field(ge=0)] = 0.5  # nats per latent dimension [P]
    latent_dropout: Rate = 0.15  # probability, scaled as nn.Dropout [P]
    token_dropout: Rate = 0.15  # probability that an input token is replaced by mask_id [P]
    mask_id: Count = 0  # token id; 0 is what the authors' code writes [C]
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.layers % 2:
            raise ValueError(
                f"layers must be even (half before, half after the concatenation); got {self.layers}, try {self.layers + 1}"
            )
        if self.mask_id >= self.vocab_size:
            raise ValueError(f"mask_id must be below vocab_size {self.vocab_size}; got {self.mask_id}")
        return self


class BackboneConfig(Config):
    """Llama-style causal Transformer over patches (spec 2); over tokens for the baseline."""

    layers: Positive = 12  # blocks
    width: Positive = 768  # D
    inner: Positive = 2048  # SwiGLU inner width
    heads: Positive = 16  # attention heads
    kv_heads: Positive | None = None  # key/value heads; None: as many as heads
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.width % self.heads:
            near = [h for h in range(1, self.width + 1) if self.width % h == 0]
            best = min(near, key=lambda h: abs(h - self.heads))
            raise ValueError(f"heads must divide width {self.width}; got {self.heads}, nearest {best}")
        if (self.width // self.heads) % 2:
            raise ValueError(f"width / heads must be even for rotary positions; got {self.width}/{self.heads}")
        if self.heads % self.key_value_heads:
            raise ValueError(f"kv_heads must divide heads {self.heads}; got {self.kv_heads}")
        return self

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class EnergyHeadConfig(Config):
    """Energy head: one network pass per draw (spec 3)."""

    kind: Literal["energy"] = "energy"
    noise: Positive = 64  # dimensions of the uniform noise on [-0.5, 0.5] [C]
    blocks: Positive = 3  # residual blocks; the paper uses layers / 4 [P]


class CalmConfig(Config):
    """The whole model: frozen autoencoder, input compressor, backbone, head."""

    kind: Literal["calm"] = "calm"
    autoencoder: AutoencoderConfig
    backbone: BackboneConfig
    head: EnergyHeadConfig = EnergyHeadConfig()

    @property
    def patch_size(self) -> int:
        return self.autoencoder.patch_size

    @property
    def vocab_size(self) -> int:
        return self.autoencoder.vocab_size


class TokenLMConfig(Config):
    """Token-Transformer baseline on the same blocks (spec 7); input and output embeddings untied [D from the 281M count]."""

    kind: Literal["token_lm"] = "token_lm"
    vocab_size: Positive
    backbone: BackboneConfig

    @property
    def patch_size(self) -> int:
        return 1


ModelConfig: TypeAlias = AutoencoderConfig | CalmConfig | TokenLMConfig


class EnergySettings(Config):
    """Energy loss (spec 4)."""

    draws: Annotated[int, Field(ge=2)] = 8  # S, model draws per position [P]
    teacher: Literal["exact", "sampled"] = "exact"  # exact: closed form over the posterior [D]; sampled: the paper's
    teacher_draws: Positive = 100  # M, used by teacher="sampled" [P]
    alpha: Annotated[float, Field(gt=0, lt=2)] = 1.0  # exponent; strictly proper in (0, 2) [P]

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.teacher == "exact" and self.alpha != 1.0:
            raise ValueError(
                f'teacher "exact" is derived for alpha = 1; got alpha = {self.alpha}: use teacher "sampled"'
            )
        return self


class RecipeSettings(Config):
    """How CALM learns. `paper`: the energy loss alone. `fast`: with an auxiliary cross-entropy in training only."""

    name: Literal["paper", "fast"] = "fast"
    auxiliary_weight: Annotated[float, Field(ge=0)] = 1.0  # weight of the cross-entropy of the next K tokens, `fast`
    auxiliary_until: Annotated[float, Field(ge=0, le=1)] = 1.0  # fraction of training after which the weight is 0


class DataSettings(Config):
    """Where the tokens come from and how they are laid out."""

    path: str  # shard directory written by `nextvec prepare`
    packing: Literal["aligned", "packed"] | None = None  # None: as the manifest says
    context_tokens: Positive = 1024  # context length in tokens, a multiple of K
    rows: Positive = 4  # windows per step and process


class OptimSettings(Config):
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; and the rate schedule (spec 8)."""

    name: Literal["adamw", "muon"] = "muon"  # [D]: leaves the energy loss's plateau, docs/log.md; the paper: adamw
    lr: Annotated[float, Field(gt=0)] = 3e-3  # peak rate of AdamW [D]; the paper, with adamw for everything: 3e-4
    matrix_lr: Annotated[float, Field(gt=0)] = 0.02  # peak rate of Muon, used by name="muon"
    momentum: Rate = 0.95  # Nesterov momentum of Muon
    beta1: Rate = 0.9
    beta2: Rate = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  # on matrices only
    clip: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm
    warmup: Count = 100  # steps of linear warmup
    schedule: Literal["constant", "linear"] = "linear"  # linear: decay to zero at the last step [D]; constant: [P]


class TrainSettings(Config):
    """The loop."""

    init_std: Annotated[float, Field(gt=0)] | None = None  # of fresh matrices; None: 0.8 / sqrt(width) [D]; 0.02 [C]
    steps: Positive = 1000  # optimiser steps
    accumulate: Positive = 1  # batches per optimiser step
    seed: Seed = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where measured faster
    compile: bool = False  # torch.compile of the repeated blocks
    log_every: Positive = 10  # steps
    eval_every: Count = 0  # steps; 0: only at the end
    save_every: Count = 0  # steps; 0: by the clock alone, at the end and on Ctrl-C
    save_minutes: Annotated[float, Field(gt=0)] = 10.0  # of wall-clock time, at most, between two checkpoints


class ModelRun(Config):
    """What config.yaml says of every run directory: the model, and by its subclass how it came about."""

    format: int = FORMAT
    kind: str
    model: ModelConfig


class RunConfig(ModelRun):
    """What `nextvec train` does, kept as config.yaml in the run directory."""

    data: DataSettings
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()


class AutoencoderRun(RunConfig):
    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderConfig


class CalmRun(RunConfig):
    kind: Literal["calm"] = "calm"
    model: CalmConfig
    energy: EnergySettings = EnergySettings()
    recipe: RecipeSettings = RecipeSettings()


class TokenLMRun(RunConfig):
    kind: Literal["token_lm"] = "token_lm"
    model: TokenLMConfig


class ImportSettings(Config):
    """Where converted weights came from (`nextvec convert`)."""

    source: str  # directory or hub id, as given
    revision: str | None = None  # commit on the hub
    autoencoder: str | None = None  # directory or hub id that replaced the autoencoder of `source`
    settings: dict[str, Any] = {}  # keys of the published config.json that `model` has no place for


class ImportedRun(ModelRun):
    """A run directory of converted weights: they were trained elsewhere, so there are no training settings."""

    imported: ImportSettings


class ImportedAutoencoder(ImportedRun):
    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderConfig


class ImportedCalm(ImportedRun):
    kind: Literal["calm"] = "calm"
    model: CalmConfig


RUN_KINDS: dict[str, type[RunConfig]] = {"autoencoder": AutoencoderRun, "calm": CalmRun, "token_lm": TokenLMRun}
IMPORTED_KINDS: dict[str, type[ImportedRun]] = {"autoencoder": ImportedAutoencoder, "calm": ImportedCalm}


def parse_run(data: Any, source: str) -> RunConfig:
    """Settings of a training run. Raises ConfigError for a newer format or an unknown kind."""
    return _parse_kind(data, source, RUN_KINDS)


def parse_any_run(data: Any, source: str) -> ModelRun:
    """Settings of a run directory, trained or converted. Raises ConfigError as `parse_run`."""
    if isinstance(data, dict) and "imported" in data:
        return _parse_kind(data, source, IMPORTED_KINDS)
    return parse_run(data, source)


def _parse_kind(data: Any, source: str, kinds: Mapping[str, type[R]]) -> R:
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, got {type(data).__name__}")
    found = data.get("format", FORMAT)
    if not isinstance(found, int) or found > FORMAT:
        raise ConfigError(f"{source}: format {found} is newer than this nextvec reads ({FORMAT}); upgrade nextvec")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{source}: kind must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind].parse(data, source)


def load_yaml(path: Path) -> Any:
    """Read a YAML file. Raises ConfigError in one sentence when missing or malformed."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} cannot be read: {reason}") from None


def dump_yaml(config: Config) -> str:
    """Settings as YAML text, in field order."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `data` with dotted `key.sub=value` overrides; values are read as YAML."""
    result: dict[str, Any] = {k: (dict(v) if isinstance(v, dict) else v) for k, v in data.items()}
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"an override is written key=value, for instance optim.lr=1e-3; got {item!r}")
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            child = dict(child) if isinstance(child, dict) else {}
            node[parent] = child
            node = child
        node[leaf] = _yaml_value(key, value)
    return result


def unknown_key(key: str, known: list[str]) -> str:
    """One sentence for an unknown key, with the nearest known name."""
    return unknown_name("key", key, known)


def unknown_name(what: str, name: str, known: list[str]) -> str:
    """One sentence for an unknown `what`, with the nearest known name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known {what}s are {', '.join(known)}"
    return f"unknown {what} {name!r}{hint}"


def _yaml_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: the value {text!r} cannot be read; quote text that YAML would take apart") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sentence(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = "is required"
        elif item["type"] != "value_error":
            message = f"{message}; got {item['input']!r}"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
