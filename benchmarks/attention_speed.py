"""Attention of bf16 on a CPU with the scores of many queries at once, beside torch's tiled kernel: forward and backward, in turn.

    OMP_NUM_THREADS=1 python benchmarks/attention_speed.py --heads 1 3 --positions 255 1020

Causal attention, as in the backbone and the token Transformer's recall; and that of a patch model's recall, where
4 queries each see the same whole patches of 4. Milliseconds, medians of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.model.attention import causal_attention, prefix_attention
from nextvec.process import keep_freed_memory

ROWS, DIM, PATCH = 4, 64, 4


def ways(inputs: list[Tensor], positions: int) -> dict[str, dict[str, Callable[[], Tensor]]]:
    seen = torch.arange(positions) // PATCH * PATCH + PATCH
    visible = torch.arange(positions) < seen[:, None]

    def prefix() -> Tensor:
        mixed = prefix_attention(*inputs, seen.clamp(max=positions))
        assert mixed is not None
        return mixed

    return {
        "causal": {
            "torch": lambda: F.scaled_dot_product_attention(*inputs, is_causal=True),
            "ours": lambda: causal_attention(*inputs),
        },
        "by patch": {"torch": lambda: F.scaled_dot_product_attention(*inputs, visible), "ours": prefix},
    }


def timed(way: Callable[[], Tensor], inputs: list[Tensor], slope: Tensor) -> float:
    start = time.perf_counter()
    way().backward(slope)
    taken = time.perf_counter() - start
    for each in inputs:
        each.grad = None
    return 1e3 * taken


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--positions", type=int, nargs="+", default=[255, 1020])
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    for heads in chosen.heads:
        for positions in chosen.positions:
            shape = (ROWS, heads, positions, DIM)
            inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
            slope = torch.randn(shape, generator=generator).bfloat16()
            for kind, pair in ways(inputs, positions).items():
                taken: dict[str, list[float]] = {name: [] for name in pair}
                for turn in range(chosen.repeats + 1):
                    for name, way in pair.items():
                        each = timed(way, inputs, slope)
                        if turn:
                            taken[name].append(each)
                theirs, ours = (statistics.median(taken[name]) for name in ("torch", "ours"))
                threads = torch.get_num_threads()
                print(
                    f"{kind}, {heads} heads, {positions} positions, {threads} threads: {theirs:.2f} ms and {ours:.2f} ms, "
                    f"{theirs / ours:.2f} times"
                )


if __name__ == "__main__":
    main()
