"""One update of Muon, torch's against ours, on the matrices of a model at the shipped settings: milliseconds, in turn.

OMP_NUM_THREADS=2 python benchmarks/muon_speed.py --arm calm --layers 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from nextvec.config import OptimSettings
from nextvec.process import keep_freed_memory
from nextvec.rundir import build_model
from nextvec.train.muon import Muon
from nextvec.train.optim import parameter_groups
from nextvec.train.polar import orthogonal
from step_variants import run_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=("calm", "token"), default="calm")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args(arguments)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in ("torch", "ours"):
        torch.manual_seed(0)  # what torch's modules begin with
        model = build_model(
            run_of(asked.arm, asked.layers, "")
        )  # untrained: an update takes as long whatever the numbers
        (hidden,), _, _ = parameter_groups(model.named_parameters(), OptimSettings(name="muon"))
        for parameter in hidden["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        group = {"params": hidden["params"], "lr": 0.02}
        optimizers[name] = torch.optim.Muon([group]) if name == "torch" else Muon([group])
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(asked.repeats + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    matrices = [p.grad for p in hidden["params"]]
    print(f"{asked.arm}, {asked.layers} layers: {len(matrices)} matrices, {torch.get_num_threads()} threads")
    for name, each in times.items():
        print(f"  {name:6} {statistics.median(each):7.1f} ms an update (least {min(each):.1f})")
    values = torch.cat([torch.linalg.svdvals(orthogonal(each.bfloat16()).float()) for each in matrices])
    low, high = values.quantile(0.05), values.max()
    print(f"  singular values that ours makes of random matrices in bf16: 95 % from {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
