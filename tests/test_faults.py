"""Faults from outside while a run is being written: kills, a second process, a slow or failing disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nextvec.errors import ConfigError
from nextvec.lock import RUN_LOCK, held, run_lock
from nextvec.train import checkpoint
from test_train_loop import Fake, assert_same, config, run

HOLD = """
import sys, time
from pathlib import Path
from nextvec.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(run: Path) -> subprocess.Popen[str]:
    """Another process that holds a run directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock_behind(tmp_path: Path) -> None:
    run(tmp_path / "run", config(steps=2))
    with holder(tmp_path / "run") as other:
        before = (tmp_path / "run" / "config.yaml").read_bytes()
        with pytest.raises(
            ConfigError, match=rf"is being written by process {other.pid} on .*; wait for it or stop it"
        ):
            run(tmp_path / "run", config(steps=4), resume=True)
        assert (tmp_path / "run" / "config.yaml").read_bytes() == before
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / RUN_LOCK).read_text().startswith(f"{other.pid} ")
    assert run(tmp_path / "run", config(steps=4), resume=True).step == 4
    assert not (tmp_path / "run" / RUN_LOCK).exists()


def test_two_fresh_runs_of_one_directory(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as other:
        with pytest.raises(ConfigError, match="is being written by"):
            run(tmp_path / "run", config(steps=2))
        other.kill()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_LOCK]
    assert run(tmp_path / "run", config(steps=2)).step == 2


def test_without_locks_of_the_file_system_the_process_id_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with holder(tmp_path / "run") as other:
        monkeypatch.setattr("nextvec.lock.fcntl.flock", none)
        with pytest.raises(ConfigError, match=f"process {other.pid} on"), run_lock(tmp_path / "run"):
            pass
        other.kill()
        other.wait()
        with run_lock(tmp_path / "run"):
            assert (tmp_path / "run" / RUN_LOCK).read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize("known", [True, False], ids=["locks of the file system", "process ids"])
def test_who_waits_for_a_lock_has_it_when_its_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path, taken = tmp_path / "run" / RUN_LOCK, threading.Event()

    def wait() -> None:
        with held(path, wait=True) as mine:
            assert mine
            assert path.read_text().startswith(f"{os.getpid()} ")
            taken.set()

    with holder(tmp_path / "run") as other:
        if not known:
            monkeypatch.setattr("nextvec.lock.fcntl.flock", none)
            monkeypatch.setattr("nextvec.lock.POLL", 0.01)
        with held(path, wait=False) as mine:
            assert not mine
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not taken.wait(0.2)
        other.kill()
        other.wait()
        assert taken.wait(30)
        waiting.join()
    assert not path.exists()


def test_steps_do_not_wait_for_a_slow_disk_and_the_end_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = checkpoint.write
    during: list[int] = []

    def slow(*arguments: Any) -> Path:
        assert gate.wait(30)
        return real(*arguments)

    class Watching(Fake):
        def loss(self, *arguments: Any) -> Any:
            if self.calls > 6 and self.module.training:
                during.append(self.calls)
                if len(during) == 4:
                    assert not (
                        tmp_path / "run" / "checkpoints"
                    ).exists()  # four more steps, and nothing is written yet
                    gate.set()
            return super().loss(*arguments)

    monkeypatch.setattr("nextvec.train.checkpoint.write", slow)
    run(tmp_path / "run", config(save_every=6), Watching())
    assert len(during) == 4
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000010",
    ]
    monkeypatch.undo()
    run(tmp_path / "plain", config())
    assert_same(tmp_path / "plain", tmp_path / "run", 10)


def test_ctrl_c_waits_for_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.write

    def slow(*arguments: Any) -> Path:
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr("nextvec.train.checkpoint.write", slow)
    objective = Fake()
    objective.signal_at = 5
    result = run(tmp_path / "run", config(save_every=4), objective)
    assert result.interrupted
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.state.step == 5


@pytest.mark.slow
def test_killed_twice_and_resumed_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import kill_resume

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kill_resume.make_inputs(tmp_path / "inputs")
    kill_resume.killed_run(tmp_path / "inputs", tmp_path / "whole", 40, 1, 0, 0)
    at = kill_resume.killed_run(tmp_path / "inputs", tmp_path / "killed", 40, 1, 2, 0)
    assert len(at) == 2
    assert at[-1] < 40
    assert kill_resume.differences(tmp_path / "whole", tmp_path / "killed") == []
    assert kill_resume.differences(tmp_path / "whole", tmp_path / "inputs" / "ae")  # it can see a difference
