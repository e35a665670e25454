"""What recall costs: a training step and a text's tokens per second with and without it, no n-grams, all in turn in one process.

    python benchmarks/recall_speed.py [--repeats 16] [--threads 1]

Models of the shipped fast settings with fresh weights, so that a text never depends on what was learnt; processor time of a
forward and backward pass on 4 x 1,024 random tokens, and of 256 tokens after a prompt of 64. Least and median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from nextvec.model.calm import Calm
from nextvec.model.cross_entropy import linear_cross_entropy
from nextvec.model.init import initialise
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import build_model
from nextvec.sampling.engine import Engine
from nextvec.sampling.settings import Sampling
from nextvec.train.objectives import INIT_GAIN
from step_variants import VOCABULARY, run_of

ROWS, CONTEXT = 4, 1024
PROMPT, NEW = 64, 256


def model(arm: str, recall: int) -> Calm | TokenLM:
    where = "model.head" if arm == "calm" else "model"
    found = build_model(run_of(arm, None, f"{where}.recall={recall} {where}.grams=0"))
    assert isinstance(found, Calm | TokenLM)
    initialise(found, torch.Generator().manual_seed(0), INIT_GAIN / found.config.backbone.width**0.5)
    return found


def step(of: Calm | TokenLM, ids_BT: torch.Tensor) -> float:
    """Processor seconds of a forward and backward pass."""
    start = time.process_time()
    if isinstance(of, Calm):
        ids = ids_BT.unflatten(1, (-1, of.patch_size))
        loss, _ = of.loss(of.states(ids[:, :-1]), ids[:, 1:], None)
    else:
        state = of.states(ids_BT[:, :-1, None])
        loss, _ = linear_cross_entropy(state.flatten(0, 1), of.output.weight, ids_BT[:, 1:].reshape(-1))
    loss.backward()
    taken = time.process_time() - start
    of.zero_grad()
    return taken


def text(of: Calm | TokenLM, new: int) -> float:
    """Processor seconds a token at T = 1."""
    engine = Engine(of.eval(), eos_id=VOCABULARY - 1, pad_id=0, slots=1, capacity=2 * (PROMPT + new))
    engine.add(range(100, 100 + PROMPT), Sampling(1.0, max_tokens=new))
    tokens, start = 0, time.process_time()
    while len(engine):
        tokens += sum(len(event.tokens) for event in engine.step())
    of.train()
    return (time.process_time() - start) / max(1, tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what recall costs")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a window of the step")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of a text")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    models = {(arm, recall): model(arm, recall) for arm in ("calm", "token") for recall in (0, 1)}
    ids_BT = torch.randint(VOCABULARY, (ROWS, chosen.context), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[Calm | TokenLM], float]] = {
        "s a step": lambda of: step(of, ids_BT),
        "s a token of text": lambda of: text(of, chosen.new),
    }
    for name, way in ways.items():
        taken: dict[tuple[str, int], list[float]] = {key: [] for key in models}
        for _ in range(chosen.repeats):
            for key, of in models.items():
                taken[key].append(way(of))
        for arm in ("calm", "token"):
            least, median = ([summary(taken[arm, recall]) for recall in (0, 1)] for summary in (min, statistics.median))
            print(
                f"{name}, {arm}: least {least[0]:.4f} without, {least[1]:.4f} with, {least[1] / least[0]:.2f} times; "
                f"medians {median[0]:.4f} and {median[1]:.4f}, {median[1] / median[0]:.2f} times"
            )


if __name__ == "__main__":
    main()
