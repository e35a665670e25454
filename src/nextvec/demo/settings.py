"""How long the demo trains what, and how it scores. The models' own settings are those of the arena (nextvec.recipes)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nextvec.config import AutoencoderConfig, AutoencoderRun, CalmRun, TokenLMRun
from nextvec.errors import ConfigError
from nextvec.recipes import MIXED_STEPS, Kind, arena, autoencoder_bounds
from nextvec.train.settings import Vocabulary, complete_run

MINUTES = 8.0
VOCABULARY = 2048
VALID_FRACTION = 0.05  # about 40 files of the standard library
SCORED_CONTEXT, SCORED_DRAWS = 512, 4  # documents-512
SCORED_LENGTH, PROBED_LENGTH = 2048, 512  # first tokens of each held-out file, at the end and during training
SHORT = 4.0  # minutes; a shorter demo scores only the first PROBED_LENGTH tokens at the end, too
CANDIDATES = 100  # N of the batch temperature sampler
STAGES = {"autoencoder": 0.06, "calm": 0.44, "baseline": 0.50}  # in order, with shares of the training time
PAPER_STAGES = {"autoencoder": 0.18, "calm": 0.52, "baseline": 0.30}  # of the recipe `paper`, whose models learn later
STEPS = 1_000_000  # not reached: the time budget ends training, but for the autoencoder's


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
        stages = PAPER_STAGES if self.recipe == "paper" else STAGES
        names = list(stages)
        left = sum(stages[name] for name in names[names.index(stage) :])
        reserve = min(90.0, 12.0 + 7.0 * self.minutes)
        return max(3.0, stages[stage] / left * (self.minutes * 60.0 - spent - reserve))


def autoencoder_run(demo: Demo, data: str, vocabulary: Vocabulary) -> AutoencoderRun:
    """Stage 1."""
    paper = demo.recipe == "paper"
    kind: Kind = "mixed-autoencoder" if paper else "autoencoder"
    steps = MIXED_STEPS if paper else autoencoder_bounds(vocabulary.vocab_size)[1]
    found = complete_run(_settings(demo, kind, data, steps), vocabulary, None, "demo")
    assert isinstance(found, AutoencoderRun)
    return found


def calm_run(demo: Demo, data: str, vocabulary: Vocabulary, autoencoder: AutoencoderConfig) -> CalmRun:
    """Stage 2; recipe `paper` is the paper's head with the energy loss alone."""
    settings = _settings(demo, "energy" if demo.recipe == "paper" else "calm", data, STEPS)
    settings["recipe"] = {**settings.get("recipe", {}), "name": "paper"}
    found = complete_run(settings, vocabulary, autoencoder, "demo")
    assert isinstance(found, CalmRun)
    return found


def baseline_run(demo: Demo, data: str, vocabulary: Vocabulary) -> TokenLMRun:
    """The rival: the same blocks over tokens, the same optimiser and tokens per step."""
    found = complete_run(_settings(demo, "token", data, STEPS), vocabulary, None, "demo")
    assert isinstance(found, TokenLMRun)
    return found


def _settings(demo: Demo, kind: Kind, data: str, steps: int) -> dict[str, Any]:
    """The arena's, with the demo's text, steps, seed and rhythm."""
    settings = arena(kind, VOCABULARY, demo.minutes)
    own = {"steps": steps, "seed": demo.seed, "log_every": 20, "eval_every": 100}
    kinds = {"calm": "calm", "energy": "calm", "token": "token_lm"}
    return {
        **settings,
        "kind": kinds.get(kind, "autoencoder"),
        "data": {**settings["data"], "path": data},
        "train": {**settings.get("train", {}), **own},
    }
