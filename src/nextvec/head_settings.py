"""Settings of the heads, one kind chosen by `model.head.kind`, and which solvers draw from which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from nextvec.settings import CHOICE, Config, Count, Positive, Rate, layered


class EnergyHeadConfig(Config):
    """Energy head: one network pass per draw (docs/method.md)."""

    kind: Literal["energy"] = "energy"
    noise: Positive = 64  # dimensions of the uniform noise on [-0.5, 0.5] [C]
    blocks: Positive = 3  # residual blocks; the paper uses layers / 4 [P]


class FlowHeadConfig(Config):
    """Flow-matching head: a velocity field, integrated from noise to a latent (docs/method.md)."""

    kind: Literal["flow"] = "flow"
    predicts: Literal["velocity", "latent"] = "velocity"  # velocity [C]; latent [D, docs/recipe-history.md]
    blocks: Positive = 3  # residual blocks; the paper uses layers / 4 [P]
    teacher_draws: Positive = 8  # per position in training, each with a time and a noise of its own [C]
    solver: str = "midpoint"  # of SOLVERS["flow"] [C]
    steps: Positive = 10  # solver steps per draw; midpoint and heun evaluate the network twice in each [C]

    @model_validator(mode="after")
    def _rules(self) -> Self:
        check_solver(self.kind, self.solver, self.steps)
        return self

    @property
    def evaluations(self) -> int:
        """Network passes per draw; the last step of heun is one of euler where the network predicts the latent."""
        if self.solver == "euler":
            return self.steps
        return 2 * self.steps - (self.solver == "heun" and self.predicts == "latent")


class DiffusionHeadConfig(Config):
    """Diffusion head: predicts the noise and a variance at TIMES steps of the cosine schedule (docs/method.md)."""

    kind: Literal["diffusion"] = "diffusion"
    blocks: Positive = 3  # residual blocks; the paper uses layers / 4 [P]
    teacher_draws: Positive = 8  # per position in training, each with a step and a noise of its own [C]
    solver: str = "dpm++"  # of SOLVERS["diffusion"] [D, docs/heads.md]; the authors' code: ddpm
    steps: Positive = 25  # solver steps per draw, one network pass each [D]; 100 [C]

    @model_validator(mode="after")
    def _rules(self) -> Self:
        check_solver(self.kind, self.solver, self.steps)
        return self

    @property
    def evaluations(self) -> int:
        """Network passes per draw."""
        return self.steps


class CategoricalHeadConfig(Config):
    """Categorical head: a flow whose network predicts tokens; for a factored autoencoder (docs/heads.md) [D]."""

    kind: Literal["categorical"] = "categorical"
    blocks: Positive = 2  # residual blocks of what the places of a patch say of each other
    teacher_draws: Positive = 1  # per position in training, each with a time and a noise of its own
    clean: Rate = 0.5  # share of the times in training that are 0: nothing is known of the patch
    until: Annotated[float, Field(gt=0, lt=1)] = 0.5  # time after which a draw goes straight to its expected latent
    solver: str = "euler"  # of SOLVERS["categorical"]
    steps: Annotated[int, Field(ge=2)] = (
        6  # solver steps per draw, one network pass each; one step draws one latent only
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        check_solver(self.kind, self.solver, self.steps)
        return self

    @property
    def evaluations(self) -> int:
        """Network passes per draw."""
        return self.steps


C = TypeVar("C", bound=Config)


def check_grams(config: C) -> C:
    """For settings to take as a validator. Raises ValueError for n-grams without what keeps a text at hand."""
    grams, recall = (getattr(config, name) for name in ("grams", "recall"))
    if grams and not recall:
        raise ValueError(
            f"grams = {grams} needs recall, which keeps the tokens of the text at hand: give recall = 1, or grams = 0"
        )
    return config


class MixtureHeadConfig(Config):
    """Mixture head: place after place, one of V Gaussians; for a factored autoencoder (docs/heads.md) [D]."""

    kind: Literal["mixture"] = "mixture"
    blocks: Count = 1  # residual blocks of the backbone's width, run at every place; 0 for none
    inner: Positive | None = None  # their inner width; None: the backbone's width
    recall: Count = (
        0  # attention heads that look up what followed the last two tokens earlier in the text (docs/recipe-history.md)
    )
    grams: Count = (
        0  # rows of each table of hashed n-grams, of two and of three tokens; needs recall (docs/recipe-history.md)
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.inner is not None and not self.blocks:
            raise ValueError("inner is the inner width of blocks, and blocks is 0: leave it out, or give blocks")
        return self

    _check_grams = model_validator(mode="after")(check_grams)


class AutoregressiveHeadConfig(Config):
    """A causal decoder over the K tokens of the next patch, given the state: tokens with likelihoods, no latent [D]."""

    kind: Literal["autoregressive"] = "autoregressive"
    blocks: Positive = 1  # Transformer blocks of the backbone's width, inner width and heads
    embedding_norm: bool = (
        False  # bring embeddings to unit size: learns faster in short trainings (docs/recipe-history.md)
    )
    recall: Count = (
        0  # attention heads that look up what followed the last two tokens earlier in the text (docs/recipe-history.md)
    )
    grams: Count = (
        0  # rows of each table of hashed n-grams, of two and of three tokens; needs recall (docs/recipe-history.md)
    )
    _check_grams = model_validator(mode="after")(check_grams)


HeadKind: TypeAlias = (
    EnergyHeadConfig
    | FlowHeadConfig
    | DiffusionHeadConfig
    | CategoricalHeadConfig
    | MixtureHeadConfig
    | AutoregressiveHeadConfig
)
HEADS: dict[str, type[HeadKind]] = {
    "energy": EnergyHeadConfig,
    "flow": FlowHeadConfig,
    "diffusion": DiffusionHeadConfig,
    "categorical": CategoricalHeadConfig,
    "mixture": MixtureHeadConfig,
    "autoregressive": AutoregressiveHeadConfig,
}
SOLVERS = {"flow": ("midpoint", "heun", "euler"), "diffusion": ("ddpm", "ddim", "dpm++"), "categorical": ("euler",)}
TIMES = 1000  # times that the flow and diffusion heads tell apart [C]


def leave_behind(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of a run without what only other heads have, where `changes` ask for another `model.head.kind`."""
    kind, head = _inner(layered({}, changes), "kind"), _inner(settings)
    if not isinstance(kind, str) or kind not in HEADS or not isinstance(head, Mapping) or head.get("kind") == kind:
        return dict(settings)
    foreign = {name for of in HEADS.values() for name in of.model_fields} - HEADS[kind].model_fields.keys()
    kept = {name: value for name, value in head.items() if name not in foreign}
    return {**settings, "model": {**settings["model"], "head": kept}}


def _inner(settings: Any, *more: str) -> Any:
    """What stands at model.head, or further in; None where nothing does."""
    for name in ("model", "head", *more):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def check_solver(head: str, solver: str, steps: int) -> None:
    """Raises ValueError in one sentence for a solver that the head does not know, or more steps than there are times."""
    if solver not in SOLVERS[head]:
        raise ValueError(f"the {head} head knows the solvers {', '.join(SOLVERS[head])}; got {solver!r}")
    if steps > TIMES:
        raise ValueError(f"steps must be at most {TIMES}, the times of the {head} head's schedule; got {steps}")


def _head_kind(data: Any) -> str:
    kind = data.get("kind", "energy") if isinstance(data, Mapping) else getattr(data, "kind", "energy")
    return f"{CHOICE}{kind}"


HeadConfig: TypeAlias = Annotated[
    Annotated[EnergyHeadConfig, Tag(f"{CHOICE}energy")]
    | Annotated[FlowHeadConfig, Tag(f"{CHOICE}flow")]
    | Annotated[DiffusionHeadConfig, Tag(f"{CHOICE}diffusion")]
    | Annotated[CategoricalHeadConfig, Tag(f"{CHOICE}categorical")]
    | Annotated[MixtureHeadConfig, Tag(f"{CHOICE}mixture")]
    | Annotated[AutoregressiveHeadConfig, Tag(f"{CHOICE}autoregressive")],
    Discriminator(
        _head_kind, custom_error_type="head_kind", custom_error_message=f"kind must be one of {', '.join(HEADS)}"
    ),
]
