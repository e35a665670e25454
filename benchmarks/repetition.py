"""How far models go round in circles, by temperature and penalty: the share of 4-grams of a text that it has had before.

    python benchmarks/repetition.py RUN [RUN...] --data SHARDS/valid

Continues the first 32 tokens of held-out documents by 192; also of the documents' own 192. Texts shorter than 64 tokens are left
out. For models that know the laws of single tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling
from nextvec.text.shards import TokenShards

PROMPT, TOKENS, LEAST, ORDER = 32, 192, 64, 4
SETTINGS = [  # temperature, presence, frequency
    (1.0, 0.0, 0.0), (0.7, 0.0, 0.0), (0.7, 0.0, 0.1), (0.7, 0.0, 0.2), (0.5, 0.0, 0.0), (0.5, 0.3, 0.0), (0.5, 0.6, 0.0),
    (0.5, 0.0, 0.1), (0.5, 0.0, 0.2), (0.5, 0.0, 0.4),
]  # fmt: skip


def repeated(ids: Sequence[int]) -> float:
    """Share of the 4-grams that stand earlier in the text as well."""
    grams = [tuple(ids[start : start + ORDER]) for start in range(len(ids) - ORDER + 1)]
    return 1 - len(set(grams)) / len(grams)


def told(texts: Sequence[Sequence[int]]) -> str:
    long = [text for text in texts if len(text) >= LEAST]
    if not long:
        return "no text of so many tokens"
    distinct = fmean(len(set(text)) for text in long)
    return f"{100 * fmean(map(repeated, long)):.1f} % of 4-grams repeated, {distinct:.0f} different tokens, {len(long)} texts"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="held-out shards of the same tokenizer")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    shards = TokenShards.open(chosen.data)
    documents = [shards.document(at).tolist() for at in range(shards.manifest.documents)]
    documents = [ids for ids in documents if len(ids) >= PROMPT + TOKENS][: chosen.texts]
    print(f"the documents themselves: {told([ids[PROMPT : PROMPT + TOKENS] for ids in documents])}")
    for run in chosen.runs:
        loaded = load_run(run, torch.device("cpu"), torch.float32)
        model, tokenizer = loaded.model, loaded.text_tokenizer
        assert isinstance(model, Calm | TokenLM)
        shards.check_tokenizer(tokenizer)
        for temperature, presence, frequency in SETTINGS:
            asked = Sampling(
                temperature,
                max_tokens=TOKENS,
                seed=chosen.seed,
                presence_penalty=presence,
                frequency_penalty=frequency,
            )
            texts: list[list[int]] = [[] for _ in documents]
            prompts = [ids[:PROMPT] for ids in documents]
            ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "packed": model.packed}
            for step in generate(model, prompts, asked, **ids):
                for text, tokens in zip(texts, step.tokens, strict=True):
                    text += tokens
            print(f"{run}, T = {temperature}, presence {presence}, frequency {frequency}: {told(texts)}", flush=True)


if __name__ == "__main__":
    main()
