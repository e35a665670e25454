"""What `--deterministic` costs, and that it holds: a text alone against the same among 31 others (docs/serve.md).

    OMP_NUM_THREADS=1 python benchmarks/deterministic.py runs/demo/calm --patches 10000 --json deterministic.json

Texts of --tokens tokens, each with its own seed, are drawn 32 at a time with others that join and leave between patches (their
prompts and lengths differ), and then each alone. Token for token they must agree. The first 64 texts are drawn in the usual
mode too, where products are batched: how many of them differ from those alone, and how much CPU time the mode costs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nextvec.files import write_json
from nextvec.hardware import DTYPES
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sampling.engine import Engine, inputs_needed
from nextvec.sampling.settings import Sampling

SLOTS = 32
Job = tuple[list[int], Sampling]


def draw(
    model: Calm | TokenLM, eos: int, pad: int, jobs: list[Job], slots: int, deterministic: bool
) -> tuple[list[list[int]], float, int]:
    """Token ids of each job, CPU seconds and patches drawn; jobs queue for `slots`."""
    longest = max(inputs_needed(len(prompt), settings.max_tokens, model.patch_size) for prompt, settings in jobs)
    engine = Engine(
        model,
        eos_id=eos,
        pad_id=pad,
        slots=slots,
        capacity=max(2, longest),
        packed=model.packed,
        deterministic=deterministic,
    )
    rows = {engine.add(prompt, settings)[0]: index for index, (prompt, settings) in enumerate(jobs)}
    texts: list[list[int]] = [[] for _ in jobs]
    begin, patches = time.process_time(), 0
    while len(engine):
        for event in engine.step():
            texts[rows[event.row]].extend(event.tokens)
            patches += 1
    return texts, time.process_time() - begin, patches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--patches", type=int, default=10_000, help="compared, at least")
    parser.add_argument("--tokens", type=int, default=256, help="of a text, at most")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = load_run(options.run, "cpu", DTYPES[options.precision])
    model, tokenizer = run.model, run.text_tokenizer
    assert isinstance(model, Calm | TokenLM)
    ids = (tokenizer.eos_id, tokenizer.pad_id)
    words = tokenizer.encode(
        "def read(self, path):\n    return [line for line in open(path) if line.startswith('#')]\n"
    )
    number, choice = options.seed, random.Random(options.seed)
    found: dict[str, Any] = {"compared": 0, "different": 0, "texts": 0, "usual_texts_different": 0}
    seconds = {"alone": 0.0, "together": 0.0, "usual": 0.0, "usual_alone": 0.0}
    patches = dict.fromkeys(seconds, 0)
    while found["compared"] < options.patches:
        jobs: list[Job] = []
        for _ in range(2 * SLOTS):
            settings = Sampling(
                options.temperature, options.candidates, choice.randrange(options.tokens // 4, options.tokens), number
            )
            jobs.append((words[: choice.randrange(len(words))], settings))
            number += 1
        together, seconds_together, count = draw(model, *ids, jobs, SLOTS, True)
        alone = []
        for job in jobs:
            texts, spent, drawn = draw(model, *ids, [job], 1, True)
            alone += texts
            seconds["alone"] += spent
            patches["alone"] += drawn
        seconds["together"] += seconds_together
        patches["together"] += count
        if not found["texts"]:  # the first round is enough for the comparison with the usual mode
            usual, seconds["usual"], patches["usual"] = draw(model, *ids, jobs, SLOTS, False)
            _, seconds["usual_alone"], patches["usual_alone"] = draw(model, *ids, jobs[:8], 1, False)
            found["usual_texts_different"] = sum(a != b for a, b in zip(alone, usual, strict=True))
        found["compared"] += count
        found["texts"] += len(jobs)
        found["different"] += sum(a != b for a, b in zip(alone, together, strict=True))
    per_patch = {name: seconds[name] / patches[name] for name in seconds}
    found |= {"cpu_seconds_per_patch": per_patch, "cost": per_patch["together"] / per_patch["usual"]}
    print(
        f"{found['compared']:,} patches of {found['texts']} texts in {options.precision}, 32 at a time against alone: "
        f"{found['different']} texts differ; in the usual mode {found['usual_texts_different']} of {2 * SLOTS}"
    )
    print(
        ", ".join(f"{name.replace('_', ' ')} {1000 * value:.2f} ms" for name, value in per_patch.items()),
        "of CPU time a patch",
    )
    print(f"the deterministic mode takes {found['cost']:.2f} times the time of the usual one for 32 texts")
    if options.json:
        write_json(options.json, found)
    if found["different"]:
        sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
