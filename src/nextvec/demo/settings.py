"""What the demo trains and for how long. What was tried to find these settings is in docs/log.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextvec.config import (
    AutoencoderConfig,
    AutoencoderRun,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    EnergyHeadConfig,
    EnergySettings,
    OptimSettings,
    RecipeSettings,
    TokenLMConfig,
    TokenLMRun,
    TrainSettings,
)
from nextvec.errors import ConfigError

MINUTES = 8.0
VOCABULARY, PATCH, LATENT = 2048, 4, 128
VALID_FRACTION = 0.05  # about 40 files of the standard library
BACKBONE = BackboneConfig(layers=4, width=192, inner=512, heads=3)
CONTEXT = 1024  # tokens of a training window
SCORED_CONTEXT, SCORED_DRAWS = 512, 4  # documents-512
SCORED_LENGTH, PROBED_LENGTH = 2048, 512  # first tokens of each held-out file, at the end and during training
SHORT = 4.0  # minutes; a shorter demo scores only the first PROBED_LENGTH tokens at the end, too
CANDIDATES = 100  # N of the batch temperature sampler
STAGES = {"autoencoder": 0.18, "calm": 0.62, "baseline": 0.20}  # in order, with shares of the training time
STEPS = 1_000_000  # not reached: the time budget ends training, but for the autoencoder:
AUTOENCODER_STEPS = 500  # 2M tokens are enough, and with many more its std outgrows what decodes at twice the std


@dataclass(frozen=True)
class Demo:
    """What is asked for. `minutes`: wall-clock time for everything; `seed`: draws all parameters and noise."""

    out: Path = Path("runs/demo")
    minutes: float = MINUTES
    seed: int = 0
    recipe: Literal["fast", "paper"] = "fast"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0.5 <= self.minutes <= 1440:
            raise ConfigError(f"minutes must be between 0.5 and 1440; got {self.minutes:g}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in [0, 2^63); got {self.seed}")
        if self.recipe not in ("fast", "paper"):
            raise ConfigError(f"recipe must be fast or paper; got {self.recipe!r}")

    @property
    def scored_length(self) -> int:
        """Tokens of each held-out file that the final figures are measured on."""
        return SCORED_LENGTH if self.minutes >= SHORT else PROBED_LENGTH

    def seconds_for(self, stage: str, spent: float) -> float:
        """Training seconds of a stage that starts `spent` seconds after the demo: its share of what is left.

        Time for scoring, samples and the report is kept; what an earlier stage left over goes to the later ones.
        """
        names = list(STAGES)
        left = sum(STAGES[name] for name in names[names.index(stage) :])
        reserve = min(90.0, 12.0 + 7.0 * self.minutes)
        return max(3.0, STAGES[stage] / left * (self.minutes * 60.0 - spent - reserve))


OPTIM = OptimSettings(warmup=30)


def _train(demo: Demo, steps: int = STEPS) -> TrainSettings:
    return TrainSettings(steps=steps, seed=demo.seed, log_every=20, eval_every=100)


def autoencoder_run(demo: Demo, data: str, vocab_size: int, mask_id: int) -> AutoencoderRun:
    """Stage 1: patches of K tokens, 1,024 a step."""
    return AutoencoderRun(
        model=AutoencoderConfig(
            vocab_size=vocab_size, patch_size=PATCH, width=128, inner=320, latent=LATENT, mask_id=mask_id
        ),
        data=DataSettings(path=data, context_tokens=CONTEXT, rows=4),
        optim=OPTIM,
        train=_train(demo, AUTOENCODER_STEPS),
    )


def calm_run(demo: Demo, data: str, autoencoder: AutoencoderConfig) -> CalmRun:
    """Stage 2."""
    return CalmRun(
        model=CalmConfig(autoencoder=autoencoder, backbone=BACKBONE, head=EnergyHeadConfig(blocks=2)),
        energy=EnergySettings(draws=8, teacher="exact"),
        recipe=RecipeSettings(name=demo.recipe),
        data=DataSettings(path=data, context_tokens=CONTEXT, rows=4),
        optim=OPTIM,
        train=_train(demo),
    )


def baseline_run(demo: Demo, data: str, vocab_size: int) -> TokenLMRun:
    """The rival: the same blocks over tokens, the same optimiser and tokens per step."""
    return TokenLMRun(
        model=TokenLMConfig(vocab_size=vocab_size, backbone=BACKBONE),
        data=DataSettings(path=data, context_tokens=CONTEXT, rows=4),
        optim=OPTIM,
        train=_train(demo),
    )
