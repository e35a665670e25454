"""What the demo measures of its models, and the files that it leaves: summary.json and details.json."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nextvec.demo import settings
from nextvec.demo.settings import Demo
from nextvec.demo.stages import Corpus, Models
from nextvec.evaluate.brier import evaluate_brier
from nextvec.evaluate.cost import calm_cost, token_lm_cost
from nextvec.evaluate.reconstruction import ReconstructionResult, evaluate_reconstruction
from nextvec.files import write_json
from nextvec.hardware import environment
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.sampling.draw import abilities
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling
from nextvec.sampling.stream import patch_texts
from nextvec.scoring.brier import BrierResult

PROMPTS = ("class Reader:\n    def read(self", "def ", "import ", "    def __init__(self, ")
SAMPLE_TOKENS, SPEED_TOKENS = 96, 160
# Of the texts shown: models of minutes go round in circles without a penalty on frequency, and at lower temperatures with one,
# too. Models without laws of tokens take no penalty, and the paper asks for at most 0.5 of them.
WARM, PENALTY, COLD = 0.7, 0.3, 0.5
NAMES = {"calm": "CALM", "baseline": "token Transformer"}


@dataclass(frozen=True)
class Found:
    """Everything measured after training; scores and speeds by model, "calm" and "baseline"."""

    reconstruction: ReconstructionResult
    scores: dict[str, BrierResult]
    speeds: dict[str, dict[str, float]]  # tokens/s at batch 1: t1, t05
    samples: list[dict[str, Any]]


def measure(demo: Demo, corpus: Corpus, models: Models) -> Found:
    """Reconstruction, Brier figures of both models at the same positions, samples and generation speed."""
    arms: dict[str, Calm | TokenLM] = {"calm": models.calm, "baseline": models.baseline}
    device = models.calm.device
    reconstruction = evaluate_reconstruction(
        models.autoencoder,
        corpus.held_out,
        generator=torch.Generator(device).manual_seed(demo.seed),
        tokenizer_hash=corpus.tokenizer.hash,
    )
    scores = {
        name: evaluate_brier(
            model,
            corpus.held_out,
            context_tokens=settings.SCORED_CONTEXT,
            stride=models.calm.patch_size,
            draws=settings.SCORED_DRAWS,
            generator=torch.Generator(device).manual_seed(demo.seed),
            tokenizer_hash=corpus.tokenizer.hash,
        )
        for name, model in arms.items()
    }
    samples = []
    for name, model in arms.items():
        for prompt in PROMPTS:
            samples.append(_sample(model, NAMES[name], prompt, demo.seed))
        samples.append(_sample(model, NAMES[name], PROMPTS[0], demo.seed, plain=True))
    speeds = {
        name: {"t1": _speed(model, 1.0, demo.seed), "t05": _speed(model, 0.5, demo.seed)}
        for name, model in arms.items()
    }
    return Found(reconstruction, scores, speeds, samples)


def _continue(model: Calm | TokenLM, prompt: str, sampling: Sampling) -> list[int]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    steps = generate(model, [tokenizer.encode(prompt)], sampling, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return [token for step in steps for token in step.tokens[0]]


def _sample(model: Calm | TokenLM, name: str, prompt: str, seed: int, plain: bool = False) -> dict[str, Any]:
    """A continuation; plain: at T = 1."""
    by_token = abilities(model).by_token and not plain
    temperature, penalty = 1.0 if plain else WARM if by_token else COLD, PENALTY if by_token else 0.0
    asked = Sampling(temperature, _candidates(model), SAMPLE_TOKENS, seed, frequency_penalty=penalty)
    ids = _continue(model, prompt, asked)
    assert model.tokenizer is not None
    start = len(model.tokenizer.encode(prompt)) % model.patch_size
    first = (model.patch_size - start) % model.patch_size  # the prompt's last, partial patch is completed first
    patches = patch_texts(model.tokenizer, ids[:first], model.patch_size) if first else []
    patches += patch_texts(model.tokenizer, ids[first:], model.patch_size)
    return {
        "model": name,
        "prompt": prompt,
        "temperature": temperature,
        "frequency_penalty": penalty,
        "patches": patches,
    }


def _candidates(model: Calm | TokenLM) -> int | None:
    """Of a pool, where a lower temperature needs one."""
    return None if abilities(model).by_token else settings.CANDIDATES


def _speed(model: Calm | TokenLM, temperature: float, seed: int) -> float:
    """Tokens per second of one text, batch 1, key/value cache; the best of seeds until enough tokens are seen."""
    tokens, seconds = 0, 0.0
    for turn in range(8):
        began = time.perf_counter()
        asked = Sampling(temperature, _candidates(model), SPEED_TOKENS, seed + turn)
        made = len(_continue(model, PROMPTS[0], asked))
        if turn:  # the first is a warm-up
            tokens, seconds = tokens + made, seconds + time.perf_counter() - began
        if tokens >= 2 * SPEED_TOKENS:
            break
    return tokens / max(seconds, 1e-9)


def write(demo: Demo, corpus: Corpus, models: Models, found: Found, seconds: float) -> None:
    """summary.json (the figures) and details.json (what the report shows beside them)."""
    accuracy = found.reconstruction.accuracy
    summary: dict[str, Any] = {
        "autoencoder": {
            "token_accuracy": accuracy["mean"].token,
            "token_accuracy_draw": accuracy["draw"].token,
            "token_accuracy_doubled": accuracy["doubled"].token,
            "sigma": found.reconstruction.sigma,
            "collapsed_dims": found.reconstruction.collapsed_dimensions,
        }
    }
    for name, score in found.scores.items():
        rate, tokens = _training(demo.out / name)
        summary[name] = {
            "brier": score.brier,
            "brier_stderr": score.brier_stderr,
            "brier_lm": score.brier_lm,
            "brier_lm_stderr": score.brier_lm_stderr,
            "train_tokens_per_s": rate,
            "train_tokens": tokens,
            "generate_tokens_per_s": found.speeds[name],
        }
    summary |= {
        "seconds": seconds,
        "minutes": demo.minutes,
        "K": models.calm.patch_size,
        "L": models.autoencoder.config.latent,
        "V": corpus.tokenizer.vocab_size,
        "N": _candidates(models.calm),
        "recipe": demo.recipe,
        "decode_rule": "argmax",
        "scored_tokens_per_file": demo.scored_length,
        "seed": demo.seed,
    }
    context = models.calm.context_tokens
    assert context is not None, "a trained run says how much it reads"
    patches = context // models.calm.patch_size
    calm, baseline = models.calm.config, models.baseline.config
    costs = {
        "calm": calm_cost(calm, context=patches),
        "baseline": token_lm_cost(baseline, "token Transformer", context=context),
    }
    if (candidates := _candidates(models.calm)) is not None:
        name = f"CALM, {candidates} candidates"
        costs["calm_pool"] = calm_cost(calm, name, context=patches, candidates=candidates)
    details = {
        "reconstruction": found.reconstruction.to_dict(),
        "samples": found.samples,
        "cost": {name: value.to_dict() for name, value in costs.items()},
        "protocol": asdict(found.scores["calm"].protocol),
        "machine": environment().to_dict(),
        "corpus": "the standard library of this Python",
    }
    write_json(demo.out / "summary.json", summary)
    write_json(demo.out / "details.json", details)


def _training(run: Path) -> tuple[float | None, int | None]:
    """Median tokens per second over the log lines, and tokens seen, from a run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    rates = sorted(row["tokens_per_s"] for row in steps if row.get("tokens_per_s"))
    return (rates[len(rates) // 2] if rates else None), (steps[-1]["tokens"] if steps else None)


def closing(demo: Demo, found: Found, report: Path, seconds: float) -> str:
    """What the terminal shows at the end: reconstruction, both scores, one sample each, where everything lies."""
    accuracy = found.reconstruction.accuracy["mean"].token
    lines = [
        "",
        f"Autoencoder: {accuracy:.2%} of held-out tokens right at the mean, sigma {found.reconstruction.sigma:.2f}",
    ]
    lines.append(
        f"Scores on the first {demo.scored_length:,} tokens of each of {found.scores['calm'].protocol.documents} held-out files:"
    )
    for name, score in found.scores.items():
        errors = score.brier_stderr or (float("nan"),) * len(score.brier)
        orders = "  ".join(f"{100 * b:.2f} ± {100 * e:.2f}" for b, e in zip(score.brier, errors, strict=True))
        whole = "not defined (an order is not positive)" if score.brier_lm is None else f"{score.brier_lm:.2f}"
        speed = found.speeds[name]
        lines.append(f"{NAMES[name]}: Brier-1..4 (x100) {orders}; BrierLM {whole}")
        lines.append(f"  generates {speed['t1']:,.0f} tokens/s at T = 1, {speed['t05']:,.0f} at T = 0.5")
    for name in NAMES.values():
        text = next(s for s in found.samples if s["model"] == name and s["temperature"] < 1)
        penalty = f", frequency penalty {text['frequency_penalty']:g}" if text["frequency_penalty"] else ""
        lines += [
            "",
            f"--- {name}, T = {text['temperature']:g}{penalty} ---",
            text["prompt"] + "".join(text["patches"]),
        ]
    lines += ["", f"{seconds:.0f} s. Report: {report}", f'Go on: nextvec generate {demo.out / "calm"} --prompt "def "']
    return "\n".join(lines)
