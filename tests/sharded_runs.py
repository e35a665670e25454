"""What test_sharding.py starts under torchrun: runs of small models with `train.sharding=full`, one after the other.

torchrun --standalone --nproc-per-node 2 tests/sharded_runs.py FOLDER PART
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nextvec.config import parse_run
from nextvec.model.autoencoder import Autoencoder
from nextvec.process import leave
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train import parts
from nextvec.train.data import Data
from nextvec.train.loop import TrainResult, train
from nextvec.train.muon import Muon, ShardedMuon
from nextvec.train.objectives import Objective, build_objective
from nextvec.train.world import open_world, rank
from test_train_loop import Source

STEPS, ACCUMULATE = 12, 4
# Sizes that neither 2 nor 4 processes can share equally, and a latent of which one of 4 gets nothing.
AUTOENCODER = {"vocab_size": byte_tokenizer().vocab_size, "patch_size": 2, "width": 10, "inner": 9, "latent": 3}
BACKBONE = {"layers": 2, "width": 10, "inner": 9, "heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "autoencoder": AUTOENCODER,
    "calm": {"autoencoder": AUTOENCODER, "backbone": BACKBONE, "head": {"noise": 5, "blocks": 2}},
    "token_lm": {"vocab_size": AUTOENCODER["vocab_size"], "backbone": BACKBONE},
}
FACTORED = AUTOENCODER | {"latent": 6, "factored": True}
KINDS: dict[str, dict[str, Any]] = {  # the other kinds of run, shorter
    "autoencoder": {"kind": "autoencoder", "steps": 3},
    "token_lm": {"kind": "token_lm", "steps": 3, "optim": {"name": "adamw"}},
    "flow": {"kind": "calm", "model": {"head": {"kind": "flow", "blocks": 2}}, "steps": 3},
    "categorical": {"kind": "calm", "model": {"autoencoder": FACTORED, "head": {"kind": "categorical"}}, "steps": 3},
    "mixture": {
        "kind": "calm",
        "model": {
            "autoencoder": FACTORED,
            "head": {"kind": "mixture", "blocks": 1, "recall": 1, "grams": 9},
            "input": "tables",
        },
        "optim": {"rows_lr": 0.3},
        "steps": 8,
    },
    "latents read": {"kind": "calm", "model": {"input": "both"}, "steps": 3},
    "bf16": {"kind": "calm", "optim": {"name": "adamw"}, "precision": "bf16"},
}


def objective_of(
    kind: str = "calm", model: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, **train: Any
) -> Objective:
    """The training of a small model, the same in every process."""
    settings = {"steps": STEPS, "accumulate": ACCUMULATE, "log_every": 1, "precision": "fp32", "sharding": "full"}
    config = parse_run(
        {
            "kind": kind,
            "data": {"path": "x", "rows": 3, "context_tokens": 8},
            "model": MODELS[kind] | (model or {}),
            "optim": {"warmup": 3, "schedule": "constant", **(optim or {})},
            "train": settings | train,
        },
        "test",
    )
    autoencoder = Autoencoder(config.model.autoencoder) if kind == "calm" else None
    for parameter in autoencoder.parameters() if autoencoder is not None else ():
        nn.init.normal_(parameter, 0, 0.3, torch.Generator().manual_seed(parameter.numel()))
    return build_objective(config, byte_tokenizer(), autoencoder)


class Disturbed:
    """An objective that signals its process, or spoils a loss, in the last batch of a step."""

    def __init__(self, objective: Objective, step: int, signal_it: bool = False) -> None:
        self._objective, self._calls, self._signal = objective, 0, signal_it
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self._last = step * ACCUMULATE // world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    @property
    def module(self) -> Any:
        return self._objective.module

    @module.setter
    def module(self, module: Any) -> None:
        self._objective.module = module

    def loss(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._objective.loss(*arguments)
        if self._calls == self._last:  # the first call counts operations
            if self._signal:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                loss = loss * float("nan")
        self._calls += 1
        return loss, metrics


def run(out: Path, objective: Any, resume: bool = False) -> TrainResult:
    data = Data(Source(0), "digest", Source(1), 2)
    return train(objective.config, objective, out, data=data, device="cpu", show=False, resume=resume)


def part_run(out: Path, step: int, resume: bool = False, **train: Any) -> TrainResult:
    """The main run until a signal reaches the last process in `step`, counted from the start of this sitting."""
    objective: Any = objective_of(**train)
    if rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        objective = Disturbed(objective, step, signal_it=True)
    return run(out, objective, resume)


def muon_is_exact() -> None:
    """Six steps on sharded matrices against the whole ones, bit for bit, with a matrix that some processes have no row of."""
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 4), (4, 9), (1, 5), (7, 4), (6, 6)]
    whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    split = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    settings = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.9}
    reference, sharded = Muon(whole, **settings), ShardedMuon(split, **settings)
    for step in range(6):
        for number, (a, b) in enumerate(zip(whole, split, strict=True)):
            absent = (step, number) == (2, 3)
            a.grad = None if absent else torch.randn(a.shape, generator=generator)
            b.grad = None if a.grad is None else distribute_tensor(a.grad, mesh, [Shard(0)])
        reference.step()
        sharded.step()
    for a, b in zip(whole, split, strict=True):
        assert torch.equal(a.detach(), b.detach().full_tensor())
        momentum = sharded.state[b]["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        assert torch.equal(reference.state[a]["momentum_buffer"], momentum.full_tensor())


def full_disk(out: Path) -> None:
    """The last process cannot write its part of the first checkpoint."""
    real, calls = parts._settled, 0

    def settled(path: Path) -> str:
        nonlocal calls
        calls += 1
        if calls == 1 and rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    with mock.patch.object(parts, "_settled", settled):
        run(out, objective_of(steps=6, save_every=2, keep_last=9))


def main(folder: Path, part: str) -> None:
    world = open_world(torch.device("cpu"))
    assert world.owned  # one group for all of the runs
    muon_is_exact()
    run(folder / "even", objective_of(eval_every=6, activation_checkpointing=True, save_every=4, keep_last=1))
    if part == "all":
        for name, settings in KINDS.items():
            run(folder / name, objective_of(**settings))
        assert part_run(folder / "stopped", 5).step == 5
        run(folder / "stopped", objective_of(), resume=True)
        run(folder / "begun", objective_of(), resume=True)
        by_clock = objective_of(steps=4, save_minutes=1e-9, keep_last=9)
        run(folder / "broken", Disturbed(by_clock, 2) if rank() == 0 else by_clock)
        full_disk(folder / "full")
        part_run(folder / "moved", 4)
    else:
        part_run(folder / "moved", 4, resume=True)
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave(0)
