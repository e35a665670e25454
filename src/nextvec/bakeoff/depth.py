"""How deep the backbone of each arm is: as many layers as the positions that it reads in its seconds can feed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextvec.bakeoff.settings import Bakeoff, patch_size_of, spec_of
from nextvec.errors import DataError
from nextvec.files import read_json, write_json
from nextvec.law.points import backbone_parameters
from nextvec.sweep.folder import JOB
from nextvec.sweep.plan import Job, Rate, Vocabulary, make_jobs, tokens_per_step

FILE = "depth.json"
# Positions of the backbone, tokens of a token Transformer and patches of a CALM, for each of its parameters (Hoffmann et al.
# 2022, arXiv 2203.15556, who count all parameters of larger models); how it fits the depths that were tried: docs/recipe.md.
POSITIONS = 20.0
PASSES = 4  # over the same text, of which a token counts as a new one (Muennighoff et al. 2023, arXiv 2305.16264)
MOST = 4  # layers, as many as were tried


@dataclass(frozen=True)
class Depth:
    """Layers of an arm's backbone. parameters: that it then has; tokens: that it then reads, about; fed: parameters for which
    the positions that these make are enough."""

    layers: int
    parameters: float
    tokens: float
    fed: float


def begun_layers(out: Path, arms: Sequence[str]) -> dict[str, int]:
    """Of the arms that have a row in `out` already, which goes on as it began. Raises DataError where a row is damaged."""
    found = {}
    for arm in arms:
        for path in sorted(out.glob(f"rows/*/{arm}/*/{JOB}")):
            try:
                stage = path.parents[2].name
                found[arm] = int(read_json(path, "begun row")["identity"][stage]["model"]["backbone"]["layers"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path} is damaged: it does not say how deep its model is; remove its folder"
                ) from error
    return found


def choose_depths(
    out: Path,
    asked: Bakeoff,
    vocabulary: Vocabulary,
    text_tokens: int,
    rate: Rate,
    in_turn: Callable[[Sequence[Job]], None],
    encoder_seconds: Callable[[float], float],
) -> dict[str, Depth]:
    """Of the arms for which no layers are asked. Kept in `out`, so that another process at the same bake-off takes the same.

    Steps of one layer and of MOST are timed; those between lie on a line. text_tokens: in the text; in_turn: times the steps
    of jobs; rate: seconds of a step; encoder_seconds: of CALM's autoencoder, by the seconds of one of its steps. Raises what
    that raises, ConfigError for settings that are no model, and DataError for a damaged depth.json.
    """
    arms = [arm for arm in asked.arms if arm not in asked.layers]
    of: dict[str, Any] = {"seconds": asked.seconds, "vocabulary": vocabulary.vocab_size, "device": asked.device}
    of["patch_size"] = patch_size_of(spec_of(asked, vocabulary.vocab_size, 1))
    depths = _kept(out / FILE, of)
    new = [arm for arm in arms if arm not in depths]
    if new:
        few, many = (_jobs(asked, new, layers, vocabulary) for layers in (1, MOST))
        in_turn([*few, *many])
        for arm, shallow, deep in zip(new, few, many, strict=True):
            depths[arm] = _depth(asked, shallow, deep, PASSES * text_tokens, rate, encoder_seconds)
        write_json(out / FILE, {"of": of, "depths": {arm: vars(depth) for arm, depth in depths.items()}})
    return {arm: depths[arm] for arm in arms}


def _kept(path: Path, of: Mapping[str, Any]) -> dict[str, Depth]:
    """What was chosen before for the same budget (`of`); nothing where there is none or it was for another."""
    if not path.is_file():
        return {}
    try:
        found = read_json(path, "depths of the arms")
        depths = {str(arm): Depth(**depth) for arm, depth in found["depths"].items()}
        return depths if found["of"] == of else {}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove it, and depths are chosen again") from error


def _jobs(asked: Bakeoff, arms: Sequence[str], layers: int, vocabulary: Vocabulary) -> list[Job]:
    """One of each arm."""
    asked = replace(asked, arms=tuple(arms), seeds=1, layers=dict.fromkeys(arms, layers))
    spec = spec_of(asked, vocabulary.vocab_size, 1).override(budget=None)
    return make_jobs(spec, lambda run: 1.0, vocabulary)


def _depth(
    asked: Bakeoff, few: Job, many: Job, most_tokens: float, rate: Rate, encoder_seconds: Callable[[float], float]
) -> Depth:
    left = asked.seconds - (encoder_seconds(rate(few.autoencoder)) if few.autoencoder is not None else 0.0)

    def between(one: float, most: float, layers: int) -> float:
        return one + (layers - 1) / (MOST - 1) * (most - one)

    def tried(layers: int) -> Depth:
        tokens = left * tokens_per_step(few.run) / between(rate(few.run), rate(many.run), layers)
        parameters = between(backbone_parameters(few.run), backbone_parameters(many.run), layers)
        positions = min(tokens, most_tokens) / few.run.model.patch_size
        return Depth(layers, parameters, tokens, positions / POSITIONS)

    depths = [tried(layers) for layers in range(MOST, 0, -1)]
    return next((depth for depth in depths if depth.fed >= depth.parameters), depths[-1])
