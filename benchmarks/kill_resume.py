"""kill -9 at random moments of a training run, resumed each time: does it end in the same bits as a run left alone?

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 20 --json kill_resume.json
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 20 --processes 2 --json kill_resume_2.json
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 20 --processes 2 --sharding full --json kill_resume_sharded.json

A tiny CALM on bytes. The step to kill at is random, and so is the moment within it, so some kills hit a checkpoint being
written. With one process the command is started again with --resume. With more, `torchrun --max-restarts` runs the same
command, one random process is killed, and torchrun alone brings all of them back.

Compared at the end: the bits of the last checkpoint (parameters, optimiser state, sums of metrics), the exported weights,
and the metrics of every step, times left out; these tell of every batch and every draw of noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from nextvec.cli import app
from nextvec.cli import commands as commands  # registers the verbs
from nextvec.files import check_target, write_json
from nextvec.hardware import environment
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train.metrics import read_metrics

TIMES = ("seconds", "cpu_seconds", "tokens_per_s", "share", "memory_bytes")
TRAIN = ("train.log_every=1", "train.save_every=4", "train.accumulate=2", "train.precision=fp32", "data.rows=2")
SMALL = ("data.context_tokens=64", "optim.warmup=4")
AUTOENCODER = ("model.patch_size=2", "model.width=32", "model.inner=48", "model.latent=16")
BACKBONE = tuple(f"model.backbone.{name}" for name in ("layers=1", "width=32", "inner=48", "heads=2"))
HEAD = ("model.head.noise=8", "model.head.blocks=1")


def make_inputs(folder: Path) -> None:
    """Shards of a little text and a trained autoencoder in `folder`."""
    text = folder / "text"
    text.mkdir(parents=True)
    for index in range(40):
        (text / f"{index}.txt").write_text("".join(f"line {n} of text {index}, {n * index}\n" for n in range(60)))
    prepare([str(text)], byte_tokenizer(), folder / "shards", valid_fraction=0.1, workers=1)
    words = ["train", "autoencoder", "--data", folder / "shards", "--out", folder / "ae", *TRAIN, *SMALL, *AUTOENCODER]
    app([*map(str, words), "train.steps=3"], standalone_mode=False)


def nextvec(verb: str) -> list[str]:
    return [sys.executable, "-c", "from nextvec.cli import main; main()", "train", verb]


def command(inputs: Path, out: Path, steps: int, processes: int, restarts: int, *more: str) -> list[str]:
    """The command that trains the language model into `out`; `more`: settings."""
    options = ["--data", inputs / "shards", "--autoencoder", inputs / "ae", "--out", out, "--device", "cpu"]
    words = [*options, *TRAIN, *SMALL, *BACKBONE, *HEAD, f"train.steps={steps}", *more]
    if processes == 1:
        return [str(word) for word in [*nextvec("lm"), *words]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.2", "--no-python"]
    return [str(word) for word in [*launcher, *nextvec("lm"), *words]]


def steps_done(out: Path) -> int:
    """The newest step in the run's metrics."""
    return max((row["step"] for row in read_metrics(out)), default=0)


def wait_for(out: Path, step: int, process: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    """Until `step` is in the metrics. Raises RuntimeError when the process ends or `seconds` pass first."""
    limit = time.monotonic() + seconds
    while steps_done(out) < step:
        if process.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"training did not reach step {step}: see {out.with_suffix('.log')}")
        time.sleep(0.005)


def killed_run(inputs: Path, out: Path, steps: int, processes: int, kills: int, seed: int, *settings: str) -> list[int]:
    """Train to the end in spite of `kills` kills; returns the newest step in the metrics at each."""
    choose = random.Random(seed)
    at: list[int] = []
    with open(out.with_suffix(".log"), "wb") as log:

        def start() -> subprocess.Popen[bytes]:
            more = ["--resume"] if processes == 1 and at else []
            words = command(inputs, out, steps, processes, kills, *settings)
            return subprocess.Popen([*words, *more], stdout=log, stderr=log)

        running = start()
        for number in range(kills):
            first = at[-1] if at else 0
            last = steps * (number + 1) // (kills + 1)
            wait_for(out, choose.randint(min(first + 1, last), last), running)
            time.sleep(choose.random() * 0.1)  # anywhere in a step, or in a checkpoint being written
            at.append(steps_done(out))
            if processes == 1:
                running.kill()
                running.wait()
                running = start()
            else:
                workers = sorted(
                    (child for child in psutil.Process(running.pid).children() if "--out" in child.cmdline()),
                    key=lambda child: child.pid,
                )
                choose.choice(workers).send_signal(signal.SIGKILL)
                psutil.wait_procs(workers, timeout=60)  # torchrun ends the others; then it starts new ones
        if running.wait() != 0:
            raise RuntimeError(f"the last sitting failed: see {out.with_suffix('.log')}")
    return at


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs; nothing where both ended in the same bits."""
    found = []
    last = sorted((a / "checkpoints").glob("step-*"))[-1].name
    names = {path.name for run in (a, b) for path in (run / "checkpoints" / last).glob("*.safetensors")}
    for name in (*(f"checkpoints/{last}/{name}" for name in sorted(names)), "model.safetensors"):
        if not (b / name).is_file() or tensors(a / name) != tensors(b / name):
            found.append(name)
    if rows(a) != rows(b):
        found.append("metrics.jsonl")
    return found


def tensors(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor in a file; of a file as a whole the order of its notes may differ."""
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def rows(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sharding", choices=["none", "full"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_target(options.json)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    steps, processes, seed, sharding = (
        options.steps,
        options.processes,
        options.seed,
        f"train.sharding={options.sharding}",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder / "inputs")
        killed_run(folder / "inputs", folder / "whole", steps, processes, 0, seed, sharding)
        began = time.monotonic()
        at = killed_run(folder / "inputs", folder / "killed", steps, processes, options.kills, seed, sharding)
        found = differences(folder / "whole", folder / "killed")
        seconds = time.monotonic() - began
    print(f"{len(at)} kills of a run of {steps} steps on {processes} processes, {sharding}, {seconds:.0f} s")
    print(f"killed after steps {', '.join(map(str, at))}")
    print(f"differs from the run left alone in: {', '.join(found) or 'nothing, bit for bit'}")
    if options.json is not None:
        settings = {"steps": steps, "processes": processes, "sharding": options.sharding, "seed": seed}
        machine = json.loads(json.dumps(environment().__dict__, default=str))
        write_json(options.json, {**settings, "killed_after": at, "differences": found, "machine": machine})
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
