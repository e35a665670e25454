"""A training step of the shipped fast settings beside steps with some of them changed, all in turn in one process.

    OMP_NUM_THREADS=1 python benchmarks/step_variants.py calm "" "model.head.grams=16384 optim.rows_lr=null" --layers 1

Each variant is its `KEY=VALUE ...` in quotes, "" the settings as they are. Batch, forward and backward pass, clipping and update
on text of no meaning; processor seconds over threads, least and median of the repeats, and the median of the ratios to the first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextvec.config import RunConfig, apply_overrides, parse_run
from nextvec.process import keep_freed_memory
from nextvec.recipes import arena
from nextvec.sweep.estimate import TimedStep

VOCABULARY = 2048
KINDS = {"calm": "calm", "multi-token": "calm", "token": "token_lm", "autoencoder": "autoencoder"}


def run_of(arm: str, layers: int | None, changes: str) -> RunConfig:
    settings: dict[str, Any] = {"kind": KINDS[arm], **arena(arm, VOCABULARY, 10.0), "train": {"steps": 100}}
    settings["data"] = {**settings["data"], "path": "unused"}
    if arm == "calm":
        autoencoder = {**arena("autoencoder", VOCABULARY, 10.0)["model"], "vocab_size": VOCABULARY}
        settings["model"]["autoencoder"] = autoencoder
    elif arm == "multi-token":
        settings["model"]["autoencoder"] = {"patch_size": 4, "vocab_size": VOCABULARY}
    else:
        settings["model"]["vocab_size"] = VOCABULARY
    if layers is not None:
        settings["model"]["backbone"]["layers"] = layers
    return parse_run(apply_overrides(settings, changes.split()), arm)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=KINDS)
    parser.add_argument("variants", nargs="+", help='KEY=VALUE ... in quotes; "" for the shipped settings')
    parser.add_argument("--layers", type=int, help="of the backbone")
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    runs = [run_of(chosen.arm, chosen.layers, changes) for changes in chosen.variants]
    print(f"{chosen.arm}, {torch.get_num_threads()} threads")
    with TemporaryDirectory() as folder:
        steps = [TimedStep(run, Path(folder) / str(at), torch.device("cpu")) for at, run in enumerate(runs)]
        for _ in range(chosen.repeats):
            for step in steps:
                step()
    first = steps[0].cpu
    for changes, step in zip(chosen.variants, steps, strict=True):
        ratio = statistics.median(one / other for one, other in zip(step.cpu, first, strict=True))
        least, median = min(step.cpu), statistics.median(step.cpu)
        print(f"  least {least:.4f} s, median {median:.4f} s, {ratio:.3f} times: {changes or 'as shipped'}")


if __name__ == "__main__":
    main()
