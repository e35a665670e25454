"""Tokens a second of finished models, of one text and of several at once, all in turn; and what a token costs in operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nextvec.evaluate.cost import cost
from nextvec.evaluate.windows import Document
from nextvec.hardware import synchronize
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.sampling.draw import abilities
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling
from nextvec.sampling.temperature import sharpener
from nextvec.sweep.estimate import busy
from nextvec.text.tokenizer import TextTokenizer

REPEATS = 5  # after one for warm-up
TOKENS, PROMPT = 128, 32  # of a text, and before it
TEXTS = 4  # of a repeat at most, one after the other, where texts end early
TOGETHER = 16  # texts that are written at once, as a server or a batch does
ONE = "T = 1"
TOKENWISE, CENTRED, POOLED = (
    "T = 0.5, token by token",
    "centre of 8",
    "T = 0.5, 200 candidates",
)  # the fast samplers that docs/sampling.md recommends, with and without laws of tokens; the published one


def samplers(model: Calm | TokenLM) -> dict[str, Sampling]:
    """Ways to draw whose speed is measured. A head of tokens and a token model are as fast at a lower temperature as at 1."""
    found = {ONE: Sampling(1.0, max_tokens=TOKENS)}
    if isinstance(model, Calm) and model.has_latents:
        if model.by_token:
            found[TOKENWISE] = Sampling(0.5, method="token", max_tokens=TOKENS)
        found[CENTRED] = Sampling(candidates=8, method="centre", max_tokens=TOKENS)
        found[POOLED] = Sampling(0.5, candidates=200, max_tokens=TOKENS)
    return found


def operations(model: Calm | TokenLM, sampling: Sampling, context_tokens: int) -> float:
    """Floating-point operations per generated token, counted as `nextvec flops` does, the head split."""
    settings: dict[str, Any] = {"context": context_tokens // model.patch_size}
    if isinstance(model, Calm):
        law = sampling.for_model(abilities(model)).law
        settings["candidates"] = 1 if law.single else law.candidates
        sharpened = sharpener(law.temperature, law.top_k, law.top_p) is not None
        if law.method == "centre":
            settings["decoded"] = 1
        elif law.method == "token" and model.has_latents and sharpened:
            settings["decoded"] = 0  # what means decode to is known
    return cost(model.config, **settings).inference_split.total


def measure_speeds(
    models: Mapping[str, Calm | TokenLM],
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    context_tokens: int,
    repeats: int = REPEATS,
) -> dict[str, dict[str, Any]]:
    """By model and sampler: tokens_per_s (median of the repeats), low and high among them, operations per token, and how; of
    ways that draw once a patch also `together`, the same three of TOGETHER texts at once.

    Repeats of all go in turn. On a CPU with more to do than it can, seconds are those of the processor over its threads.
    """
    prompts = [document[:PROMPT].tolist() for document in documents if len(document) > PROMPT] or [[]]
    arms = [(name, way, sampling) for name, model in models.items() for way, sampling in samplers(model).items()]
    runs = [(*arm, texts) for arm in arms for texts in ((1, TOGETHER) if arm[1] in (ONE, TOKENWISE) else (1,))]
    rates: dict[tuple[str, str, int], list[float]] = {(name, way, texts): [] for name, way, _, texts in runs}
    by_processor = next(iter(models.values())).device.type == "cpu" and busy()
    for turn in range(repeats + 1):
        for name, way, sampling, texts in runs:
            rate = _rate(models[name], sampling, prompts, turn, texts, tokenizer, by_processor)
            if turn:
                rates[name, way, texts].append(rate)
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for name, way, sampling in arms:
        found[name][way] = {
            **_of_repeats(rates[name, way, 1]),
            "operations": operations(models[name], sampling, context_tokens),
            "how": "processor time over threads" if by_processor else "clock",
        }
        if (name, way, TOGETHER) in rates:
            found[name][way]["together"] = {"texts": TOGETHER, **_of_repeats(rates[name, way, TOGETHER])}
    return found


def _of_repeats(rates: Sequence[float]) -> dict[str, float]:
    return {"tokens_per_s": statistics.median(rates), "low": min(rates), "high": max(rates)}


def _rate(
    model: Calm | TokenLM,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    turn: int,
    texts: int,
    tokenizer: TextTokenizer,
    by_processor: bool,
) -> float:
    """Tokens a second of one repeat: so many texts at once until there are TOKENS of each."""
    made, text = 0, 0
    synchronize(model.device)
    began = time.perf_counter(), time.process_time()
    while made < texts * TOKENS and text < TEXTS:
        of_these = [prompts[((turn * TEXTS + text) * texts + row) % len(prompts)] for row in range(texts)]
        asked = replace(sampling, seed=turn * TEXTS + text)
        eos_id, pad_id = tokenizer.eos_id, tokenizer.pad_id
        for step in generate(model, of_these, asked, eos_id=eos_id, pad_id=pad_id, packed=model.packed, slots=texts):
            made += sum(map(len, step.tokens))
        made += step.finished.count("eos")  # end-of-text is a token, too
        text += 1
    synchronize(model.device)
    seconds = time.perf_counter() - began[0]
    if by_processor:
        seconds = (time.process_time() - began[1]) / torch.get_num_threads()
    return made / max(seconds, 1e-9)
