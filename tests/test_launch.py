"""`nextvec train` itself under torchrun and accelerate launch: two processes, and what a restart may go on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextvec.train.launch import MARK, REFUSED
from nextvec.train.metrics import read_metrics
from test_cli_train import arguments, command, refused, work  # noqa: F401  (a fixture)

NEXTVEC = [sys.executable, "-c", "from nextvec.cli import main; main()"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "2",
]
TORCHRUN += ["--monitor-interval", "0.1", "--no-python"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--multi_gpu",
    "--num_processes",
    "2",
]
ACCELERATE += ["--main_process_port", "0", "--no_python"]


def launched(launcher: list[str], words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *NEXTVEC, *words], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def contents(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_by_the_same_command(work: Path, tmp_path: Path, launcher: list[str]) -> None:  # noqa: F811
    words = arguments(work, "baseline", tmp_path / "run", "train.steps=3", "train.log_every=1", "train.precision=fp32")
    done = launched(launcher, words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 steps, 384 tokens") == 1  # one of the two speaks
    two = [row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    with pytest.MonkeyPatch.context() as patch:
        words[words.index(str(tmp_path / "run"))] = str(tmp_path / "one")
        assert command(patch, *words) == 0
    one = [row["loss"] for row in read_metrics(tmp_path / "one") if row["kind"] == "train"]
    assert two == pytest.approx(one, rel=1e-4)
    assert len(two) == 3


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_refused_run_directory_is_left_alone_by_every_restart(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: bool,
) -> None:
    run = tmp_path / "old"
    assert command(monkeypatch, *arguments(work, "baseline", run, "train.steps=2")) == 0
    if not checkpoints:
        for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (run / "checkpoints").rmdir()
    before = contents(run)
    done = launched(TORCHRUN, arguments(work, "baseline", run, "train.steps=4"))
    assert done.returncode != 0
    assert "already holds a run (config.yaml)" in done.stderr
    assert "training starts at step 0" not in done.stderr
    assert contents(run) == before


def restarted(patch: pytest.MonkeyPatch, folder: Path, attempt: int, launch: str = "a") -> None:
    """This process as torchrun starts it."""
    files = folder / "attempt_0" / "0"
    files.mkdir(parents=True, exist_ok=True)
    patch.setenv("TORCHELASTIC_ERROR_FILE", str(files / "error.json"))
    patch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    patch.setenv("TORCHELASTIC_RUN_ID", launch)


@pytest.mark.parametrize(("name", "other"), [("a", "b"), ("a", "a"), ("none", "none")])
def test_a_restart_goes_on_with_what_its_launch_began_and_nothing_else(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    other: str,
) -> None:
    words = arguments(work, "baseline", tmp_path / "run", "train.steps=2")
    restarted(monkeypatch, tmp_path / "first", 0, name)
    assert command(monkeypatch, *words) == 0
    assert (tmp_path / "run" / MARK).is_file()
    restarted(monkeypatch, tmp_path / "first", 1, name)
    assert command(monkeypatch, *words) == 0  # of the same launch, and finished: there is nothing left to do
    before = contents(tmp_path / "run")
    longer = [*words, "train.steps=4"]
    for attempt in (0, 1, 2):  # of another one
        restarted(monkeypatch, tmp_path / "second", attempt, other)
        assert "already holds a run" in refused(monkeypatch, capsys, *longer)
    assert contents(tmp_path / "run") == before


def test_a_launch_that_was_refused_says_the_same_at_once(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments(work, "baseline", tmp_path / "run", "optim.lr=fast")
    restarted(monkeypatch, tmp_path / "launch", 0)
    first = refused(monkeypatch, capsys, *words)
    assert (tmp_path / "launch" / REFUSED).is_file()
    restarted(monkeypatch, tmp_path / "launch", 1)
    monkeypatch.setattr("nextvec.cli.train._train_once", lambda *given: pytest.fail("it tried again"))
    assert refused(monkeypatch, capsys, *words) == first
    restarted(monkeypatch, tmp_path / "another", 0)
    with pytest.raises(pytest.fail.Exception):
        command(monkeypatch, *words)
