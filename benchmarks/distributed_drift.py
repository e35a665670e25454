"""How far training on 2 and 4 processes drifts from one process on the same global batch.

    OMP_NUM_THREADS=1 python benchmarks/distributed_drift.py --json distributed_drift.json

A tiny CALM on bytes, fp32, 8 batches a step, started by torchrun with gloo; one run is begun by 2 processes and goes on with
4. Then the same with the model split over the processes (train.sharding=full), with Muon and with AdamW alone, and one such
run from 2 to 4 to 1. Drift of a step is |loss - loss of one process| / loss of one process; printed are the largest and the
mean over steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from kill_resume import command, make_inputs, rows
from nextvec.files import check_target, write_json

SHARED = "train.accumulate=8"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if row["kind"] == "train"]


def drift(one: Path, many: Path) -> dict[str, float]:
    """Largest and mean relative difference of the losses of two runs, step by step."""
    each = [abs(a - b) / a for a, b in zip(losses(one), losses(many), strict=True)]
    return {"max": max(each), "mean": sum(each) / len(each), "steps": len(each)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_target(options.json)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder / "inputs")

        def train(out: str, processes: int, *more: str, stop: int | None = None) -> Path:
            words = [*command(folder / "inputs", folder / out, options.steps, processes, 0), SHARED, *more]
            words += [f"train.steps={stop}"] if stop else []
            subprocess.run(words, check=True, capture_output=True)
            return folder / out

        constant = "optim.schedule=constant"  # so that a run may be begun with fewer steps
        one = train("one", 1, constant)
        for processes in (2, 4):
            found[f"{processes} processes"] = drift(one, train(str(processes), processes, constant))
        train("moved", 2, constant, stop=options.steps // 2)
        found["2 processes, then 4"] = drift(one, train("moved", 4, constant, "--resume"))
        sharded = (constant, "train.sharding=full")
        for processes in (2, 4):
            found[f"{processes} sharded"] = drift(one, train(f"sharded-{processes}", processes, *sharded))
        train("wandered", 2, *sharded, stop=options.steps // 3)
        train("wandered", 4, *sharded, "--resume", stop=2 * options.steps // 3)
        found["2 sharded, then 4, then 1"] = drift(one, train("wandered", 1, *sharded, "--resume"))
        adamw = train("one-adamw", 1, constant, "optim.name=adamw")
        found["4 sharded, AdamW"] = drift(adamw, train("sharded-adamw", 4, *sharded, "optim.name=adamw"))
    for name, figures in found.items():
        print(f"{name:26}  max {figures['max']:.1e}  mean {figures['mean']:.1e}  over {figures['steps']} steps")
    if options.json is not None:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
