"""Figures of a finished row beside its Brier scores: bits per byte, and accuracy against collision of what it writes.

They lie in figures.json beside result.json; each is computed once, so that an interrupted bake-off goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextvec.evaluate.bound import evaluate_likelihood
from nextvec.evaluate.collision import collision_curve, contexts
from nextvec.files import read_json, write_json
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sweep.plan import Job, Rate, tokens_per_step
from nextvec.sweep.run import Corpus, Say

FIGURES = "figures.json"
SEED = 0  # the same draws and places for every row
BOUND_DRAWS, BOUND_PATCHES = 64, 300  # S of the bound, patches of text that it is taken on
PLACES, LONGEST = 200, 256  # contexts of generated patches, tokens of one at most


@dataclass(frozen=True)
class Planned:
    """What a row's budget was turned into, by the rates measured for it."""

    steps: int
    seconds: float  # of the model's own steps
    autoencoder_steps: int
    autoencoder_seconds: float
    tokens_per_step: int


def planned(job: Job, rate: Rate) -> Planned:
    """Of one job, from the rates that its steps come from."""
    encoder = job.autoencoder
    steps = encoder.train.steps if encoder is not None else 0
    taken = steps * rate(encoder) if encoder is not None else 0.0
    own = job.run.train.steps
    return Planned(own, own * rate(job.run), steps, taken, tokens_per_step(job.run))


def measure(
    folder: Path, stride: int, context_tokens: int, corpus: Corpus, device: torch.device, say: Say
) -> dict[str, Any]:
    """The figures of the row in `folder`, made now where they are not there yet. `stride`: K of the comparison."""
    found: dict[str, Any] = read_json(folder / FIGURES, "figures") if (folder / FIGURES).is_file() else {}
    model: Calm | TokenLM | None = None
    for name, make in (("likelihood", _likelihood), ("collision", _collision)):
        if name in found:
            continue
        model = model or load_model(folder, device)
        say(f"  {name} of {folder}")
        found[name] = make(model, stride, context_tokens, corpus)
        write_json(folder / FIGURES, found)
    return found


def load_model(folder: Path, device: torch.device) -> Calm | TokenLM:
    model = load_run(folder, device).model
    assert not isinstance(model, Autoencoder), "no arm is an autoencoder"
    return model


def _likelihood(model: Calm | TokenLM, stride: int, context_tokens: int, corpus: Corpus) -> dict[str, Any]:
    """Bits per byte: exact where tokens are drawn, from above where latents are."""
    bounded = isinstance(model, Calm) and model.has_latents
    found = evaluate_likelihood(
        model if isinstance(model, Calm) and bounded else None,
        None if bounded else model,
        corpus.held_out,
        corpus.tokenizer,
        context_tokens=context_tokens,
        generator=torch.Generator(model.device).manual_seed(SEED),
        patch_size=stride,
        draws=BOUND_DRAWS,
        patches=BOUND_PATCHES,
    )
    return found.to_dict()


def _collision(model: Calm | TokenLM, stride: int, context_tokens: int, corpus: Corpus) -> list[dict[str, Any]]:
    longest = min(LONGEST, context_tokens)
    places = contexts(corpus.held_out, stride, PLACES, SEED, longest=longest, after=stride)
    tokenizer = corpus.tokenizer
    return collision_curve(model, places, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, seed=SEED)
