"""Typed, frozen, validated settings. Every field has a unit and an origin; bad values fail at construction.

[P] paper (arXiv 2510.27688), [C] the authors' code, [D] chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

from pydantic import Field, model_validator

from nextvec import settings
from nextvec.errors import ConfigError
from nextvec.head_settings import HEADS as HEADS
from nextvec.head_settings import SOLVERS as SOLVERS
from nextvec.head_settings import TIMES as TIMES
from nextvec.head_settings import AutoregressiveHeadConfig as AutoregressiveHeadConfig
from nextvec.head_settings import CategoricalHeadConfig as CategoricalHeadConfig
from nextvec.head_settings import DiffusionHeadConfig as DiffusionHeadConfig
from nextvec.head_settings import EnergyHeadConfig as EnergyHeadConfig
from nextvec.head_settings import FlowHeadConfig as FlowHeadConfig
from nextvec.head_settings import HeadConfig as HeadConfig
from nextvec.head_settings import HeadKind as HeadKind
from nextvec.head_settings import MixtureHeadConfig as MixtureHeadConfig
from nextvec.head_settings import check_grams, leave_behind
from nextvec.settings import Config as Config
from nextvec.settings import Count, Positive, Rate
from nextvec.settings import dump_yaml as dump_yaml
from nextvec.settings import load_yaml as load_yaml
from nextvec.settings import unknown_key as unknown_key
from nextvec.settings import unknown_name as unknown_name
from nextvec.train_settings import CorpusPart as CorpusPart
from nextvec.train_settings import DataSettings as DataSettings
from nextvec.train_settings import EnergySettings as EnergySettings
from nextvec.train_settings import OptimSettings as OptimSettings
from nextvec.train_settings import RecipeSettings as RecipeSettings
from nextvec.train_settings import TrainSettings as TrainSettings

FORMAT = 1  # version of config.yaml in a run directory; a newer one is refused with one sentence

R = TypeVar("R", bound="ModelRun")


class AutoencoderConfig(Config):
    """Patch autoencoder: K tokens <-> one latent of `latent` dimensions (paper section 3.1, docs/method.md)."""

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
    variational: bool = True  # False: the latent is a point, without noise and KL; an ablation of the paper [P]
    attention: bool = False  # tokens of a patch attend to each other; reconstructs better, hurts downstream [P]
    factored: bool = False  # each token has latent / K dimensions of its own, which say nothing of the others [D]
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.layers % 2:
            raise ValueError(
                f"layers must be even (half before, half after the concatenation); got {self.layers}, try {self.layers + 1}"
            )
        if self.attention and self.width % 2:
            raise ValueError(f"width must be even for the rotary positions of attention; got {self.width}")
        if self.factored and self.latent % self.patch_size:
            rule = f"latent must be a multiple of patch_size {self.patch_size} where factored is true"
            raise ValueError(f"{rule}; got {self.latent}, try {self.latent - self.latent % -self.patch_size}")
        if self.factored and self.attention:
            raise ValueError("attention mixes the tokens of a patch, factored keeps them apart: leave one of them out")
        if self.mask_id >= self.vocab_size:
            raise ValueError(f"mask_id must be below vocab_size {self.vocab_size}; got {self.mask_id}")
        return self

    @property
    def span(self) -> int:
        """Tokens that share latent dimensions: K, or 1 where the autoencoder is factored."""
        return 1 if self.factored else self.patch_size

    @property
    def span_latent(self) -> int:
        """Latent dimensions of `span` tokens."""
        return self.latent * self.span // self.patch_size

    @property
    def attention_heads(self) -> int:
        """Of `attention`: as many as divide the width into even parts of at least 64."""
        return next(h for h in range(max(1, self.width // 64), 0, -1) if self.width % (2 * h) == 0)


class BackboneConfig(Config):
    """Llama-style causal Transformer over patches (docs/method.md); over tokens for the baseline."""

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


class CalmConfig(Config):
    """The whole model: frozen autoencoder, input compressor, backbone, head."""

    kind: Literal["calm"] = "calm"
    autoencoder: AutoencoderConfig
    backbone: BackboneConfig
    head: HeadConfig = EnergyHeadConfig()
    input: Literal["tokens", "tables", "latents", "both"] = "tokens"  # read of a patch [P]; tables: [D], docs/method.md

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if isinstance(self.head, CategoricalHeadConfig | MixtureHeadConfig) and not self.autoencoder.factored:
            raise ValueError(
                f"head.kind {self.head.kind} needs an autoencoder whose tokens have dimensions of their own, and "
                "autoencoder.factored is false: train one with model.factored=true"
            )
        return self

    @property
    def reads_latents(self) -> bool:
        """Whether the backbone's input holds the latents of the patches read."""
        return self.input in ("latents", "both")

    @property
    def uses_autoencoder(self) -> bool:
        """Whether the model draws or reads latents; else its autoencoder says K and V, and its weights do nothing."""
        return self.head.kind != "autoregressive" or self.reads_latents

    @property
    def patch_size(self) -> int:
        return self.autoencoder.patch_size

    @property
    def vocab_size(self) -> int:
        return self.autoencoder.vocab_size

    def with_solver(self, solver: str | None, steps: int | None) -> Self:
        """The same model with another solver or number of steps; None keeps its own. Raises ConfigError."""
        if solver is None and steps is None:
            return self
        if not isinstance(self.head, FlowHeadConfig | DiffusionHeadConfig | CategoricalHeadConfig):
            raise ConfigError(f"the {self.head.kind} head draws without a solver: leave out solver and steps")
        given = {"solver": solver, "steps": steps}
        changed = {**self.head.model_dump(), **{name: value for name, value in given.items() if value is not None}}
        return self.model_copy(update={"head": type(self.head).parse(changed, "head")})


class TokenLMConfig(Config):
    """Token-Transformer baseline on the same blocks; input and output embeddings untied [D from the 281M count]."""

    kind: Literal["token_lm"] = "token_lm"
    vocab_size: Positive
    backbone: BackboneConfig
    embedding_norm: bool = (
        False  # bring embeddings to unit size: learns faster in short trainings (docs/recipe-history.md) [D]
    )
    recall: Count = 0  # attention heads that look up what followed the last two tokens earlier in the text [D]
    grams: Count = 0  # rows of each table of hashed n-grams, of two and of three tokens; needs recall [D]
    _check_grams = model_validator(mode="after")(check_grams)

    @property
    def patch_size(self) -> int:
        return 1


ModelConfig: TypeAlias = AutoencoderConfig | CalmConfig | TokenLMConfig


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
    start: str | None = None  # run directory whose weights training began with (`--from`); None: fresh ones


class AutoencoderRun(RunConfig):
    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderConfig


class CalmRun(RunConfig):
    kind: Literal["calm"] = "calm"
    model: CalmConfig
    energy: EnergySettings = EnergySettings()  # used by the energy head
    recipe: RecipeSettings = RecipeSettings()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.model.head.kind != "energy" and self.energy != EnergySettings():
            raise ValueError(
                f"energy is for the energy head, and model.head.kind is {self.model.head.kind}: leave it out"
            )
        return self

    @property
    def draws(self) -> int:
        """S: draws per position in training, the model's or (flow, diffusion) the teacher's; 1 where nothing is drawn."""
        head = self.model.head
        return self.energy.draws if head.kind == "energy" else getattr(head, "teacher_draws", 1)


class TokenLMRun(RunConfig):
    kind: Literal["token_lm"] = "token_lm"
    model: TokenLMConfig


class ImportSettings(Config):
    """Where converted weights came from (`nextvec convert`)."""

    source: str  # directory or hub id, as given
    revision: str | None = None  # commit on the hub
    autoencoder: str | None = None  # directory or hub id that replaced the autoencoder of `source`
    settings: dict[str, Any] = Field(
        default_factory=dict
    )  # keys of the published config.json that `model` has no place for


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


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`settings.apply_overrides`; a new `model.head.kind` leaves behind what only other heads have settings for."""
    for item in overrides:
        key, _, kind = item.partition("=")
        if key == "model.head.kind":
            data = leave_behind(data, {key: kind})
    return settings.apply_overrides(data, overrides)


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
