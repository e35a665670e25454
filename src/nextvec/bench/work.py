"""What one arm of a benchmark does, as settings that another process can be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from nextvec.bench.sampling import Evaluation, Generation, PlainGeneration, held_out, load_trained
from nextvec.bench.steps import Arm, TrainStep, Work
from nextvec.config import Config, parse_run
from nextvec.hardware import Precision
from nextvec.sampling.settings import Sampling


class Spec(Config):
    """One unit of work. The first six fields hold for each kind, of the others only those of its own."""

    kind: Literal["training", "generate", "evaluate"]
    device: str
    precision: Precision
    threads: int
    text: str | None = None  # training: synthetic shards; evaluate: held-out text, None: beside the training shards
    tokens: int = 0  # generate: of one unit, at most; evaluate: of documents, each counted once

    arm: Arm = "ours"  # training, generate
    config: dict[str, Any] = Field(default_factory=dict)  # training: a RunConfig

    run: str = ""  # generate, evaluate: the trained run
    prompt: str = ""  # generate
    temperature: float = 1.0  # generate
    candidates: int = 200  # generate, below temperature 1
    draws: int = 8  # evaluate, per position


def make_work(spec: Spec) -> Work:
    """Builds models and reads text; raises UserError for what the user gave."""
    device = torch.device(spec.device)
    if spec.kind == "training":
        assert spec.text is not None
        return TrainStep(parse_run(spec.config, "config"), spec.arm, Path(spec.text), device, spec.precision)
    run = load_trained(Path(spec.run), device, spec.precision)
    if spec.kind == "generate":
        kind = PlainGeneration if spec.arm == "plain" else Generation
        return kind(run, spec.prompt, Sampling(spec.temperature, spec.candidates, spec.tokens))
    return Evaluation(run, held_out(run, spec.text, spec.tokens), spec.draws)
