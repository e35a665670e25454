"""A few rows times a matrix as it lies and as `model/packed.py` lays it, by turns: from the processor's caches and from memory.

    OMP_NUM_THREADS=1 python benchmarks/matrix_layouts.py

One matrix that is used again and again lies in a cache; of --megabytes of them, each is read from memory. Microseconds of a
product, the best of several rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.hardware import DTYPES
from nextvec.model.packed import product_with

Product = Callable[[Tensor], Tensor]


def microseconds(x: Tensor, ways: Sequence[Sequence[Product]], rounds: int) -> list[float]:
    """Of one product by each way, a list of products each."""
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for index, products in enumerate(ways):
            began = time.perf_counter()
            for product in products:
                product(x)
            best[index] = min(best[index], (time.perf_counter() - began) / len(products) * 1e6)
    return best


def plain(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x192", "1024x192", "192x512", "4096x1024"], metavar="OUTxIN"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--precision", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--megabytes", type=int, default=64, help="of matrices, more than the caches hold")
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args(arguments)
    print(
        "| precision | OUT x IN | rows | in a cache: as it lies | laid | ratio | from memory: as it lies | laid | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for precision in chosen.precision:
        for shape in chosen.shapes:
            outputs, inputs = (int(size) for size in shape.split("x"))
            bytes_each = outputs * inputs * DTYPES[precision].itemsize
            many = max(2, (chosen.megabytes << 20) // bytes_each)
            matrices = [torch.randn(outputs, inputs).to(DTYPES[precision]) for _ in range(many)]
            for rows in chosen.rows:
                x = torch.randn(rows, inputs).to(DTYPES[precision])
                ways = [plain(each) for each in matrices], [product_with(each) for each in matrices]
                cached = microseconds(x, [way[:1] for way in ways], 10 * chosen.rounds)
                fetched = microseconds(x, ways, chosen.rounds)
                cells = [f"{a:.1f} | {b:.1f} | {a / b:.2f}" for a, b in (cached, fetched)]
                print(f"| {precision} | {outputs} x {inputs} | {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
