"""What test_distributed.py starts under torchrun: runs of the small objective of test_train_loop.py, one after the other.

torchrun --standalone --nproc-per-node 2 --max-restarts 1 tests/distributed_runs.py FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from nextvec.config import AutoencoderRun, DataSettings
from nextvec.process import leave
from nextvec.train.data import Data
from nextvec.train.loop import TrainResult, train
from nextvec.train.world import open_world, rank, restarted
from test_train_loop import CONTEXT, VOCAB, Fake, Source, config

ROWS = 4
STEPS, ACCUMULATE = 12, 4


class Rows:
    """Batches that can be shared by rows."""

    def batch(self, index: int, part: int = 0, parts: int = 1) -> Tensor:
        ids_BT = torch.randint(VOCAB, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(index))
        return ids_BT.chunk(parts)[part]


class Quiet(Fake):
    """Without noise, so that it does not matter who draws it."""

    def __init__(self) -> None:
        super().__init__()
        self.module.noise = 0.0


def settings(**changes: Any) -> AutoencoderRun:
    return config(**{"steps": STEPS, "accumulate": ACCUMULATE, "log_every": 1, **changes})


def run(out: Path, objective: Fake, resume: bool = False, **changes: Any) -> TrainResult:
    data = Data(Source(0), "digest", Source(1), 2)
    return train(settings(**changes), objective, out, data=data, device="cpu", show=False, resume=resume)


def run_rows(out: Path) -> TrainResult:
    """One batch a step, its rows shared."""
    shared = settings(accumulate=1, eval_every=0).override(
        data=DataSettings(path="shards", context_tokens=CONTEXT, rows=ROWS)
    )
    return train(shared, Quiet(), out, data=Data(Rows(), "digest"), device="cpu", show=False)


def main(folder: Path) -> None:
    world = open_world(torch.device("cpu"))
    assert world.owned  # one group for all of the runs

    class Killed(Fake):
        def loss(self, *arguments: Any) -> Any:
            if self.calls == 9 and rank() == 1 and not restarted():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().loss(*arguments)

    run(folder / "killed", Killed(), resume=restarted(), save_every=1, keep_last=3)
    run(folder / "even", Fake())
    run_rows(folder / "rows")

    stopped = Fake()
    if rank() == 1:
        stopped.signal_at = 5 * ACCUMULATE // dist.get_world_size()
    result = run(folder / "stopped", stopped)
    (folder / f"stopped-{rank()}").write_text(f"{result.interrupted} {result.step}")

    broken = Fake()
    if rank() == 1:
        broken.break_at = (2 * ACCUMULATE // dist.get_world_size(),)
    run(folder / "broken", broken)
    run(folder / "begun", Fake(), resume=True)
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
