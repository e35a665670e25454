"""What a bake-off is asked for, checked, and the sweep that it is: an arm is a row, a result a row's at one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextvec.errors import ConfigError
from nextvec.recipes import arena
from nextvec.settings import unknown_name
from nextvec.sweep.spec import Stage, SweepSpec

ARMS: dict[str, tuple[Stage, str]] = {  # by the name of the row: what is trained, and how a sentence calls it
    "calm": ("lm", "CALM"),
    "token": ("baseline", "the token Transformer"),
    "multi-token": ("lm", "the multi-token Transformer"),
}
NAME = "bakeoff"  # of the sweep
MOST_MINUTES = 1440.0
VOCABULARY = 2048
PATCH_SIZES = (2, 4, 8, 16)  # that divide the windows of training and scoring
LATENT = 32  # dimensions of a token of a patch [P]
CONTEXT, DRAWS = 512, 4  # documents-512
DOCUMENTS, LENGTH = 64, 1024  # held-out documents scored, first tokens of each
CURVE = 6  # points of training at which held-out figures are measured, for the break-even


@dataclass(frozen=True)
class Bakeoff:
    """What is asked for. Raises ConfigError in one sentence for what cannot be."""

    data: tuple[str, ...] = ()  # sources, as `nextvec prepare` reads
    minutes: float = 10.0  # of training, for each arm; CALM's autoencoder counts
    out: Path = Path("runs/bakeoff")
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = 1
    vocab_size: int = VOCABULARY
    tokenizer: str | None = None
    shards: str | None = None  # what `nextvec prepare` wrote, instead of sources
    valid_fraction: float = 0.05  # of the documents
    text_key: str = "text"
    device: str = "auto"
    layers: Mapping[str, int] = field(default_factory=dict)  # of backbones, by arm; of others the budget's (depth.py)
    patch_size: int | None = None  # K, of the arms that have patches; None: the arena's

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= MOST_MINUTES:
            raise ConfigError(f"minutes must be above 0 and at most {MOST_MINUTES:g}; got {self.minutes:g}")
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1; got {self.seeds}")
        if bool(self.data) == (self.shards is not None):
            raise ConfigError("a bake-off needs text: give either --data SRC or --shards DIR")
        if self.shards is not None and self.tokenizer is not None:
            raise ConfigError("shards have their tokenizer: leave --tokenizer out")
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(f"valid-fraction must be above 0 and below 1; got {self.valid_fraction:g}")
        if self.patch_size is not None and self.patch_size not in PATCH_SIZES:
            sizes = ", ".join(map(str, PATCH_SIZES[:-1]))
            raise ConfigError(f"patch-size must be {sizes} or {PATCH_SIZES[-1]} tokens; got {self.patch_size}")
        if self.patch_size is not None and not {"calm", "multi-token"} & set(self.arms):
            raise ConfigError("patch-size is for calm and multi-token, and neither is among the arms: leave it out")
        if not self.arms:
            raise ConfigError(f"give at least one arm of {', '.join(ARMS)}")
        for arm in self.arms:
            if arm not in ARMS:
                raise ConfigError(unknown_name("arm", arm, list(ARMS)))
        for arm, layers in self.layers.items():
            if arm not in ARMS:
                raise ConfigError(unknown_name("arm in --layers", arm, list(ARMS)))
            if arm not in self.arms:
                raise ConfigError(
                    f"--layers names {arm}, which is not among the arms: add it to --arms, or leave it out"
                )
            if layers < 1:
                raise ConfigError(f"a backbone has at least 1 layer; got --layers {arm}={layers}")
        if len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"an arm is given twice: {', '.join(self.arms)}")

    @property
    def seconds(self) -> float:
        return 60.0 * self.minutes

    @property
    def source(self) -> str:
        """How a sentence calls the text."""
        return ", ".join(self.data) or str(self.shards)


def spec_of(asked: Bakeoff, vocab_size: int, autoencoder_steps: int) -> SweepSpec:
    """The sweep: every arm with the arena's settings, at equal seconds. `vocab_size`: of the tokenizer, as far as it is known."""
    encoder = arena("autoencoder", vocab_size, asked.minutes)
    if asked.patch_size is not None:
        patches = {"patch_size": asked.patch_size, "latent": LATENT * asked.patch_size}
        encoder = encoder | {"model": encoder["model"] | patches}
    data: dict[str, Any] = {"valid_fraction": asked.valid_fraction, "text_key": asked.text_key}
    if asked.shards is not None:
        data |= {"shards": asked.shards}
    else:
        data |= {"source": list(asked.data), "tokenizer": asked.tokenizer, "vocab_size": asked.vocab_size}
    return SweepSpec.parse(
        {
            "name": NAME,
            "about": f"CALM and token Transformers at {asked.minutes:g} minutes of training each.",
            "data": data,
            "base": {"autoencoder": {**encoder, "train": {**encoder.get("train", {}), "steps": autoencoder_steps}}},
            "rows": [_row(arm, arena(arm, vocab_size, asked.minutes), asked.layers.get(arm)) for arm in asked.arms],
            "seeds": list(range(asked.seeds)),
            "budget": {"seconds": asked.seconds, "autoencoder": True},
            "evaluate": {
                "context_tokens": CONTEXT,
                "draws": DRAWS,
                "documents": DOCUMENTS,
                "document_tokens": LENGTH,
                "curve": CURVE,
            },
        },
        "bake-off",
    )


def patch_size_of(spec: SweepSpec) -> int:
    """K of the arms that have patches."""
    return int(spec.base["autoencoder"]["model"]["patch_size"])


def layers_of(asked: str, arms: Sequence[str]) -> dict[str, int]:
    """By arm, of words like "2" (every arm), "calm=2,token=3", "2,token=3". Raises ConfigError for others."""
    every: dict[str, int] = {}
    named: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in asked.split(","))):
        arm, equals, number = (word.strip() for word in part.rpartition("="))
        if not number.isdecimal() or (equals and not arm) or (arm in named if equals else bool(every)):
            raise ConfigError(f"--layers takes a number, or ARM=N once for an arm, as calm=2,token=3; got {asked!r}")
        if equals:
            named[arm] = int(number)
        else:
            every = dict.fromkeys(arms, int(number))
    return every | named


def _row(arm: str, settings: dict[str, Any], layers: int | None) -> dict[str, Any]:
    stage = ARMS[arm][0]
    if layers is not None:
        backbone = settings["model"]["backbone"] | {"layers": layers}
        settings = settings | {"model": settings["model"] | {"backbone": backbone}}
    return {"name": arm, "stage": stage, **{f"{stage}.{section}": value for section, value in settings.items()}}
