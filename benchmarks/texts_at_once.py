"""Tokens a second of several texts written side by side, two models in turn: as a server writes them, well into their context.

    OMP_NUM_THREADS=1 python benchmarks/texts_at_once.py CALM TOKEN --data SHARDS/valid --texts 1 16 64

Each text goes on from the first --prompt tokens of a held-out document (documents joined where they are shorter) for --tokens
tokens or to its end, and another takes its place. T = 0.5, token by token where a model can. Processor seconds of this process;
ratios are of neighbouring repeats. For models that know the laws of single tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nextvec.files import write_json
from nextvec.hardware import DTYPES, environment
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.process import keep_freed_memory
from nextvec.rundir import load_run
from nextvec.sampling.engine import Engine, inputs_needed
from nextvec.sampling.settings import Sampling
from nextvec.text.shards import TokenShards


class Writer:
    """Texts of one model side by side; `seconds_for` continues them."""

    def __init__(self, model: Calm | TokenLM, shards: TokenShards, texts: int, prompt: int, tokens: int) -> None:
        line = [token for at in range(shards.manifest.documents) for token in shards.document(at).tolist()]
        starts = range(0, len(line) - prompt, max(1, (len(line) - prompt) // (4 * texts)))
        self._prompts = [line[start : start + prompt] for start in starts]
        self._texts, self._tokens, self._added = texts, tokens, 0
        eos_id, pad_id = shards.manifest.eos_id, shards.manifest.pad_id
        capacity = inputs_needed(prompt, tokens, model.patch_size)
        self._engine = Engine(model, eos_id=eos_id, pad_id=pad_id, slots=texts, capacity=capacity, packed=model.packed)

    def rate(self, tokens: int) -> float:
        """Tokens per processor second over so many steps of a text."""
        made, began = 0, time.process_time()
        while made < tokens * self._texts:
            while len(self._engine) < self._texts:
                prompt = self._prompts[self._added % len(self._prompts)]
                self._engine.add(prompt, Sampling(0.5, max_tokens=self._tokens, seed=self._added))
                self._added += 1
            made += sum(max(1, len(event.tokens)) for event in self._engine.step())
        return made / (time.process_time() - began)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, help="held-out shards of the same tokenizer")
    parser.add_argument("--texts", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=500, help="tokens")
    parser.add_argument("--tokens", type=int, default=500, help="of a continuation")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--each", type=int, default=64, help="tokens of each text in a repeat")
    parser.add_argument("--json", type=Path, help="file for all repeats")
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    shards = TokenShards.open(chosen.data)
    models = [load_run(run, torch.device("cpu"), DTYPES[chosen.precision]).model for run in chosen.runs]
    found = []
    for texts in chosen.texts:
        writers = []
        for model in models:
            assert isinstance(model, Calm | TokenLM)
            writers.append(Writer(model, shards, texts, chosen.prompt, chosen.tokens))
        for writer in writers:
            writer.rate(chosen.each)
        rates = [[writer.rate(chosen.each) for writer in writers] for _ in range(chosen.repeats)]
        middle = [statistics.median(each) for each in zip(*rates, strict=True)]
        ratios = [first / second for first, second in rates]
        found.append({"texts": texts, "tokens_per_processor_second": rates, "ratio": statistics.median(ratios)})
        print(
            f"{texts} texts, {chosen.precision}, {torch.get_num_threads()} threads: {middle[0]:,.0f} and {middle[1]:,.0f} tokens "
            f"per processor second, {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    if chosen.json is not None:
        settings = {name: getattr(chosen, name) for name in ("prompt", "tokens", "each", "precision")}
        write_json(chosen.json, {"machine": environment().to_dict(), **settings, "found": found})


if __name__ == "__main__":
    main()
