"""What `--deterministic` costs, and that it holds: a text alone against the same among 31 others (docs/serve.md).

    OMP_NUM_THREADS=1 python benchmarks/deterministic.py runs/demo/calm --patches 10000 --json deterministic.json
    OMP_NUM_THREADS=1 python benchmarks/deterministic.py runs/demo/calm --patches 1 --rows 16 --rows 8 --rows 1

Texts of --tokens tokens, each with its own seed, are drawn 32 at a time with others that join and leave between patches (their
prompts and lengths differ), and then each alone. Token for token they must agree. The first --rounds times 64 texts are drawn
in the usual mode too, where products are batched: how many of them differ from those alone, and how much CPU time the mode
costs. --rows: of a tile; 1 runs every product for one text alone. --wide: head and decoder in float32.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from nextvec.files import write_json
from nextvec.hardware import DTYPES
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sampling import tiles
from nextvec.sampling.engine import Engine, inputs_needed
from nextvec.sampling.settings import Method, Sampling

SLOTS = 32
WORDS = "def read(self, path):\n    return [line for line in open(path) if line.startswith('#')]\n"
Job = tuple[list[int], Sampling]


class Drawer:
    """Draws jobs by one model; CPU seconds and patches are counted by name."""

    def __init__(self, model: Calm | TokenLM, eos: int, pad: int) -> None:
        self._model, self._eos, self._pad = model, eos, pad
        self.seconds: dict[str, float] = {}
        self.patches: dict[str, int] = {}

    def draw(self, name: str, jobs: Sequence[Job], slots: int, rows: int | None) -> list[list[int]]:
        """Token ids of each job; jobs queue for `slots`. rows: of a tile, None for the usual mode."""
        longest = max(inputs_needed(len(prompt), each.max_tokens, self._model.patch_size) for prompt, each in jobs)
        tiles.ROWS = rows or tiles.ROWS
        engine = Engine(
            self._model,
            eos_id=self._eos,
            pad_id=self._pad,
            slots=slots,
            capacity=max(2, longest),
            packed=self._model.packed,
            deterministic=rows is not None,
        )
        numbers = {engine.add(prompt, settings)[0]: index for index, (prompt, settings) in enumerate(jobs)}
        texts: list[list[int]] = [[] for _ in jobs]
        begin, patches = time.process_time(), 0
        while len(engine):
            for event in engine.step():
                texts[numbers[event.row]].extend(event.tokens)
                patches += 1
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin
        self.patches[name] = self.patches.get(name, 0) + patches
        return texts

    def alone(self, name: str, jobs: Sequence[Job], rows: int | None) -> list[list[int]]:
        """Each job by itself."""
        return [self.draw(name, [job], 1, rows)[0] for job in jobs]

    def per_patch(self) -> dict[str, float]:
        return {name: self.seconds[name] / self.patches[name] for name in self.seconds}


def different(texts: list[list[int]], others: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(texts, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--patches", type=int, default=10_000, help="compared, at least")
    parser.add_argument("--rounds", type=int, default=1, help="of 64 texts, drawn in every mode, in turn")
    parser.add_argument("--rows", type=int, action="append", default=[], help="of a tile; all but the first cost only")
    parser.add_argument("--tokens", type=int, default=256, help="of a text, at most")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--method", choices=get_args(Method), default="auto")
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--wide", action="store_true", help="head and decoder in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = load_run(options.run, "cpu", DTYPES[options.precision])
    model, tokenizer = run.model, run.text_tokenizer
    assert isinstance(model, Calm | TokenLM)
    if options.wide:
        assert isinstance(model, Calm), "a token model has neither"
        model.head.float()
        model.autoencoder.float()
    method: Method = options.method
    candidates, sizes = options.candidates, options.rows or [tiles.ROWS]
    drawer, words = Drawer(model, tokenizer.eos_id, tokenizer.pad_id), tokenizer.encode(WORDS)
    number, choice = options.seed, random.Random(options.seed)
    found: dict[str, Any] = {"compared": 0, "different": 0, "texts": 0, "usual_texts_different": 0, "usual_texts": 0}
    while found["compared"] < options.patches or found["usual_texts"] < 2 * SLOTS * options.rounds:
        jobs: list[Job] = []
        for _ in range(2 * SLOTS):
            length = choice.randrange(options.tokens // 4, options.tokens)
            settings = Sampling(options.temperature, candidates, length, number, method=method)
            jobs.append((words[: choice.randrange(len(words))], settings))
            number += 1
        together = drawer.draw(f"{sizes[0]} rows", jobs, SLOTS, sizes[0])
        alone = drawer.alone(f"{sizes[0]} rows, alone", jobs, sizes[0])
        if found["usual_texts"] < 2 * SLOTS * options.rounds:
            usual = drawer.draw("usual", jobs, SLOTS, None)
            drawer.alone("usual, alone", jobs[:8], None)
            found["usual_texts_different"] += different(alone, usual)
            found["usual_texts"] += len(jobs)
            for rows in sizes[1:]:
                drawer.draw(f"{rows} rows", jobs, SLOTS, rows)
                drawer.alone(f"{rows} rows, alone", jobs[:8], rows)
        found["compared"] = drawer.patches[f"{sizes[0]} rows"]
        found["texts"] += len(jobs)
        found["different"] += different(alone, together)
    per_patch = drawer.per_patch()
    found |= {"cpu_seconds_per_patch": per_patch, "cost": per_patch[f"{sizes[0]} rows"] / per_patch["usual"]}
    print(
        f"{found['compared']:,} patches of {found['texts']} texts in {options.precision}, 32 at a time against alone: "
        f"{found['different']} texts differ; in the usual mode {found['usual_texts_different']} of {found['usual_texts']}"
    )
    print("; ".join(f"{name} {1000 * value:.2f} ms" for name, value in per_patch.items()), "of CPU time a patch")
    print(f"the deterministic mode takes {found['cost']:.2f} times the time of the usual one for 32 texts")
    if options.json:
        write_json(options.json, found)
    if found["different"]:
        sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
