"""Two and four processes train as one does on the same global batch; a killed one is started again by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_runs as runs
from nextvec.config import TrainSettings
from nextvec.errors import ConfigError
from nextvec.train.interrupt import Interrupt
from nextvec.train.metrics import read_metrics
from nextvec.train.world import Part, World
from test_train_loop import Fake, Module, config, rows, run, tensors

SCRIPT = Path(__file__).with_name("distributed_runs.py")


def assert_close(one: Path, many: Path) -> None:
    """The same rows and the same last checkpoint, within the rounding of sums in another order."""
    losses, others = ([row["loss"] for row in rows(path) if row["kind"] == "train"] for path in (one, many))
    assert len(losses) == runs.STEPS
    drift = [abs(a - b) / a for a, b in zip(losses, others, strict=True)]
    assert max(drift) < 1e-5
    assert sum(drift) / len(drift) < 2e-6
    left, right = tensors(one, runs.STEPS), tensors(many, runs.STEPS)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(left["out.weight"], Module().out.weight)
    for a, b in zip(rows(one), rows(many), strict=True):
        assert a.keys() == b.keys()
        assert a["cross_entropy"] == pytest.approx(b["cross_entropy"], rel=1e-4)
        assert (a["tokens"], a.get("early")) == (b["tokens"], b.get("early"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one(tmp_path: Path, processes: int) -> None:
    begun = Fake()
    begun.signal_at = 5 * runs.ACCUMULATE
    assert runs.run(tmp_path / "begun", begun).interrupted  # by one process; all of them go on with it
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    launcher += ["--monitor-interval=0.1", f"--nproc-per-node={processes}", str(SCRIPT), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]

    one = tmp_path / "one"
    runs.run(one, Fake())
    assert_close(one, tmp_path / "even")
    assert_close(one, tmp_path / "begun")
    assert_close(one, tmp_path / "killed")  # no batch was lost or repeated
    assert rows(tmp_path / "killed") == rows(tmp_path / "even") or processes > 2
    runs.run_rows(tmp_path / "one-rows")
    assert_close(tmp_path / "one-rows", tmp_path / "rows")

    told = [(tmp_path / f"stopped-{rank}").read_text() for rank in range(processes)]
    assert told == ["True 5"] * processes  # the signal reached one of them
    assert (tmp_path / "stopped" / "checkpoints" / "step-00000005").is_dir()
    broken = [row for row in read_metrics(tmp_path / "broken") if row["kind"] == "train"]
    assert [row["step"] for row in broken] == [1, *range(3, runs.STEPS + 1)]  # step 2 was skipped by all
    assert {row["skipped"] for row in broken[1:]} == {1}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_every_row_of_a_step_is_read_once(size: int) -> None:
    accumulate, count = 6, 4
    seen: list[tuple[int, int]] = []
    for rank in range(size):
        mine = World(rank, size).part(accumulate, count)
        width = count // mine.parts
        seen += [(batch, mine.part * width + row) for batch in mine.batches for row in range(width)]
    assert sorted(seen) == [(batch, row) for batch in range(accumulate) for row in range(count)]


def test_a_batch_that_cannot_be_shared_is_one_sentence() -> None:
    assert World(3, 4).part(8, 3) == Part((3, 7), 0, 1)
    with pytest.raises(
        ConfigError,
        match=r"a step has 2 x 3 windows .* 4 processes cannot share equally; set train.accumulate to a multiple of 4, "
        "or data.rows to a multiple of 2",
    ):
        World(0, 4).part(2, 3)


def test_a_step_that_cannot_be_shared_leaves_no_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextvec.train.loop.open_world", lambda device: World(0, 7))
    monkeypatch.setattr(World, "share", lambda self, value: value)
    with pytest.raises(ConfigError, match="7 processes cannot share equally"):
        run(tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_blocks_are_compiled_or_split_not_both() -> None:
    with pytest.raises(ConfigError, match="compile is for blocks that are whole in a process, and sharding is full"):
        TrainSettings.parse({"compile": True, "sharding": "full"})


def test_under_a_launcher_a_second_signal_changes_nothing() -> None:
    with Interrupt(patient=True) as patient:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert patient.requested
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
