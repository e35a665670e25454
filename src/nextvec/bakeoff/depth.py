"""How deep the backbone of each arm is: as many layers as the tokens that it reads in its seconds can feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nextvec.bakeoff.settings import Bakeoff, spec_of
from nextvec.files import read_json, write_json
from nextvec.law.points import backbone_parameters
from nextvec.recipes import AUTOENCODER_LEAST, autoencoder_steps
from nextvec.sweep.plan import Job, Rate, Vocabulary, make_jobs, tokens_per_step

FILE = "depth.json"
# Tokens of text for a parameter of the backbone: what a training with a fixed budget of operations spends best on both
# (Hoffmann et al. 2022, arXiv 2203.15556). Checked at 10 and 30 minutes of two cores for both arms (docs/recipe.md).
TOKENS = 20.0
MOST = 4  # layers, as many as were tried


@dataclass(frozen=True)
class Depth:
    """tokens: that the arm would read with so many layers; fed: parameters of the backbone for which they are enough."""

    layers: int
    tokens: float
    fed: float


def choose_depths(
    out: Path, asked: Bakeoff, vocabulary: Vocabulary, rate: Rate, in_turn: Callable[[Sequence[Job]], None]
) -> dict[str, Depth]:
    """Of the arms for which no layers are asked; kept in `out`, so that a bake-off goes on as it began.

    Steps of one layer and of MOST are timed, those between lie on a line. in_turn: measures the rates of jobs.
    """
    arms = [arm for arm in asked.arms if arm not in asked.layers]
    path = out / FILE
    known: dict[str, Any] = read_json(path, "depths of the arms") if path.is_file() else {}
    if any(arm not in known for arm in arms):
        few, many = (_jobs(asked, arms, layers, vocabulary) for layers in (1, MOST))
        in_turn([*few, *many])
        for arm, shallow, deep in zip(arms, few, many, strict=True):
            known[arm] = asdict(_depth(asked, shallow, deep, rate))
        write_json(path, known)
    return {arm: Depth(**known[arm]) for arm in arms}


def _jobs(asked: Bakeoff, arms: Sequence[str], layers: int, vocabulary: Vocabulary) -> list[Job]:
    """One of each arm."""
    asked = replace(asked, arms=tuple(arms), seeds=1, layers=dict.fromkeys(arms, layers))
    spec = spec_of(asked, vocabulary.vocab_size, AUTOENCODER_LEAST).override(budget=None)
    return make_jobs(spec, lambda run: 1.0, vocabulary)


def _depth(asked: Bakeoff, few: Job, many: Job, rate: Rate) -> Depth:
    seconds = asked.seconds
    if few.autoencoder is not None:
        step = rate(few.autoencoder)
        seconds -= autoencoder_steps(seconds, step) * step
    smallest, largest = (backbone_parameters(job.run) for job in (few, many))
    quickest, slowest = rate(few.run), rate(many.run)

    def tried(layers: int) -> Depth:
        share = (layers - 1) / (MOST - 1)
        tokens = max(seconds, 0.0) * tokens_per_step(few.run) / (quickest + share * (slowest - quickest))
        return Depth(layers, tokens, tokens / TOKENS)

    def fits(depth: Depth) -> bool:
        return depth.fed >= smallest + (depth.layers - 1) / (MOST - 1) * (largest - smallest)

    return next((depth for layers in range(MOST, 1, -1) if fits(depth := tried(layers))), tried(1))
