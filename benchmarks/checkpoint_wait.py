"""How long a training step waits for a checkpoint: copied and written beside training, against written on the spot.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_wait.py --json checkpoint_wait.json

Square layers with AdamW, so many parameters in all. Measured: the copy (what training waits for), the write with its fsync and
checksums (what it would wait for), and a step alone and while the writing thread works. Medians, wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from nextvec.config import OptimSettings
from nextvec.files import check_target, write_json
from nextvec.train import checkpoint
from nextvec.train.optim import make_optimizer
from nextvec.train.writer import Writer

WIDTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_target(options.json)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(options.layers)))
    optimizer = make_optimizer(module, OptimSettings(name="adamw"))
    x = torch.randn(64, WIDTH)
    times: dict[str, list[float]] = {"copy": [], "write": [], "step alone": [], "step while writing": []}

    def step(kind: str) -> None:
        began = time.perf_counter()
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times[kind].append(time.perf_counter() - began)

    def state(number: int) -> checkpoint.TrainState:
        return checkpoint.TrainState(
            step=number, tokens=0, seconds=0, logged_step=0, logged_seconds=0, counts={}, precision="fp32", config={}, data="",
            frozen="",
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), 2, 0, lambda: None, print)
        step("step alone")
        times["step alone"].clear()
        for repeat in range(options.repeats):
            for _ in range(4):
                step("step alone")
            began = time.perf_counter()
            taken = checkpoint.snapshot(state(repeat), module, optimizer, {})
            times["copy"].append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.begin(taken)
            while writer.newest != writer.saved:
                step("step while writing")
                writer.settle(wait=False)
            times["write"].append(time.perf_counter() - began)
        writer.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    size = 3 * sum(p.numel() for p in module.parameters()) * 4 / 2**20
    print(f"checkpoint of {size:,.0f} MiB: " + ", ".join(f"{name} {value:.3f} s" for name, value in medians.items()))
    if options.json is not None:
        write_json(options.json, {"mebibytes": size, **medians})


if __name__ == "__main__":
    main()
