"""Preparation by tasks of datatrove: the bytes of the ordinary one, whatever the number of tasks, and the same sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextvec.errors import ConfigError, DataError
from nextvec.lock import RUN_LOCK, run_lock
from nextvec.text import cluster
from nextvec.text.cluster import prepare_by_tasks
from nextvec.text.prepare import prepare
from nextvec.text.shards import TokenShards
from test_prepare import TOKENIZER, command, digests

SETTINGS: dict[str, Any] = {"valid_fraction": 0.2, "shard_tokens": 400, "skip_bad": True}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eleven files of different sizes and kinds, with documents that are empty or bad, first, last and between."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"file {number}\n" + "lorem ipsum " * (number * 7 % 23))
    (folder / "5.txt").write_text("")
    (folder / "a.jsonl").write_text(
        'not json\n{"text": ""}\n' + "".join(f'{{"text": "line {n} {"x" * (n % 40)}"}}\n' for n in range(36)) + "{}\n"
    )
    (folder / "z.jsonl").write_text('{"text": ""}\nbad\n')
    return folder


def shards(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(out).items() if not name.startswith("executor/")}


@pytest.mark.parametrize(
    ("tasks", "workers"), [(1, 1), (3, 1), (None, 1), (12, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_tasks_write_the_bytes_of_the_ordinary_preparation(
    tmp_path: Path, texts: Path, tasks: int | None, workers: int
) -> None:
    plain = prepare([str(texts)], TOKENIZER, tmp_path / "plain", workers=1, **SETTINGS)
    found = prepare_by_tasks(
        "local", [str(texts)], TOKENIZER, tmp_path / "out", tasks=tasks, workers=workers, **SETTINGS
    )
    assert shards(tmp_path / "out") == shards(tmp_path / "plain")
    assert len([name for name in shards(tmp_path / "out") if name.startswith("train/tokens")]) > 2
    assert TokenShards.open(tmp_path / "out" / "train", verify=True).documents > 20
    assert found is not None
    assert (found.documents, found.valid_documents, found.tokens) == (
        plain.documents,
        plain.valid_documents,
        plain.tokens,
    )
    assert (found.skipped, found.empty, found.messages) == (plain.skipped, plain.empty, plain.messages)
    assert (found.skipped, found.empty) == (3, 3)


@pytest.mark.parametrize("target", [1, 40, 10**6])
def test_groups_of_any_size(tmp_path: Path, texts: Path, target: int) -> None:
    """One document each; some that end with a piece; one group for all."""
    settings = {**SETTINGS, "shard_tokens": target}
    prepare([str(texts)], TOKENIZER, tmp_path / "plain", workers=1, **settings)
    prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out", tasks=5, workers=1, **settings)
    assert shards(tmp_path / "out") == shards(tmp_path / "plain")


def test_pieces_that_are_whole_are_kept(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round fails; the same command encodes nothing again and ends in the same bytes."""
    real = cluster.write_groups

    def failing(*arguments: Any) -> None:
        raise DataError("no more")

    monkeypatch.setattr(cluster, "write_groups", failing)
    with pytest.raises(DataError, match="no more"):
        prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out", tasks=3, workers=1, **SETTINGS)
    monkeypatch.setattr(cluster, "write_groups", real)
    (notes,) = (sorted(folder.glob("*.bin")) for folder in (tmp_path / "out").glob(".pieces-*"))
    before = [path.stat().st_mtime_ns for path in notes]
    assert len(before) == 3
    monkeypatch.setattr(cluster.shutil, "rmtree", lambda folder: None)
    prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out", tasks=3, workers=1, **SETTINGS)
    assert [path.stat().st_mtime_ns for path in notes] == before
    prepare([str(texts)], TOKENIZER, tmp_path / "plain", workers=1, **SETTINGS)
    kept = {name: digest for name, digest in shards(tmp_path / "out").items() if not name.startswith(".pieces")}
    assert kept == shards(tmp_path / "plain")


def test_a_finished_preparation_is_left_alone(tmp_path: Path, texts: Path) -> None:
    prepare([str(texts)], TOKENIZER, tmp_path / "out", workers=1, **SETTINGS)
    before = shards(tmp_path / "out")
    found = prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out", **SETTINGS)
    assert found is not None
    assert found.resumed == found.documents
    assert shards(tmp_path / "out") == before


def test_a_bad_document_stops_all_in_one_sentence(tmp_path: Path, texts: Path) -> None:
    settings = {**SETTINGS, "skip_bad": False}
    with pytest.raises(DataError) as plain:
        prepare([str(texts)], TOKENIZER, tmp_path / "plain", workers=1, **settings)
    with pytest.raises(DataError) as found:
        prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out", tasks=3, workers=1, **settings)
    assert str(found.value) == str(plain.value)
    assert not (tmp_path / "out" / "train").exists()
    (texts / "a.jsonl").write_text('{"text": "mended"}\n')
    (texts / "z.jsonl").write_text('{"text": "mended"}\n')
    assert prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out", tasks=3, workers=1, **settings)


@pytest.mark.slow
def test_slurm_gets_three_jobs_that_wait_for_each_other(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a `sbatch` that keeps the scripts; then each task is run as its script says, in another process."""
    tools, told = tmp_path / "bin", tmp_path / "told"
    tools.mkdir()
    told.mkdir()
    (tools / "sbatch").write_text(
        f"#!/bin/sh\nn=$(ls {told} | wc -l)\nfor file; do :; done\n"
        f'(echo "$@"; cat "$file") > {told}/$n\necho Submitted batch job $((100 + n))\n'
    )
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    out = tmp_path / "out"
    words = ["prepare", str(texts), "--tokenizer", "bytes", "--out", str(out), "--valid-fraction", "0.2", "--skip-bad"]
    more = ["--executor", "slurm", "--tasks", "2", "--shard-tokens", "400"]
    code, _, error = command(monkeypatch, capsys, *words, *more)
    assert code == 2
    assert "needs --executor-option time=... and --executor-option partition=..." in error
    more += ["--executor-option", "partition=cpu", "--executor-option", "time=14:00:00"]
    more += ["--executor-option", "sbatch_args={account: a7}", "--executor-option", "cpus_per_task=3"]
    code, said, _ = command(monkeypatch, capsys, *words, *more)
    assert code == 0
    assert "Slurm has the jobs" in said
    scripts = [script.read_text() for script in sorted(told.iterdir())]
    stages = [script for script in scripts if "launch_pickled_pipeline" in script]
    assert [("--partition=cpu" in script, "--time=14:00:00" in script) for script in stages] == [(True, True)] * 3
    assert all("--account=a7\n" in script and "--cpus-per-task=3\n" in script for script in stages)
    assert ["dependency=afterok:10" in script.splitlines()[0] for script in stages] == [False, True, True]
    for name, count in (("encode", 2), ("write", 2), ("finish", 1)):
        for task in range(count):
            environment = {"PATH": path, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost"}
            job = ["launch_pickled_pipeline", str(out / "executor" / name / "executor.pik")]
            subprocess.run(job, check=True, capture_output=True, env=environment)
    prepare([str(texts)], TOKENIZER, tmp_path / "plain", workers=1, **SETTINGS)
    assert shards(out) == shards(tmp_path / "plain")


def test_bad_words_on_the_command_line(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["prepare", str(texts), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    for more, sentence in (
        (["--tasks", "2"], "--tasks and --executor-option are for --executor local, slurm or ray"),
        (["--executor", "local", "--tasks", "0"], "tasks must be at least 1; got 0"),
        (["--executor", "local", "--executor-option", "speed=9"], "--executor local has no option 'speed'"),
        (["--executor", "local", "--executor-option", "speed"], "is written key=value, for instance partition=cpu"),
        (["--executor", "local", "--latents", "run"], "--latents is not for --executor"),
        (["--executor", "slurm"], "submits jobs with sbatch, which is not here: run the command where it is"),
        (["--executor", "local", "--executor-option", "start_method=bogus"], "start_method must be one of fork, spawn"),
        (["--executor", "ray"], "--executor ray needs a package that is not installed: pip install ray"),
    ):
        code, _, error = command(monkeypatch, capsys, *words, *more)
        assert (code, sentence in error) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_a_job_that_sbatch_refuses_is_a_sentence(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["prepare", str(texts), "--tokenizer", "bytes", "--out", str(tmp_path / "out"), "--executor", "slurm"]
    options = ["--executor-option", "partition=x", "--executor-option", "time=1:00:00"]
    code, _, error = command(monkeypatch, capsys, *words, *options)
    assert code == 2
    assert "sbatch refused a job (exit status 1; what it said is above): mend --executor-option" in error


def test_small_files_share_a_task(texts: Path) -> None:
    """Starting a task takes longer than encoding a small file."""
    sizes = [path.stat().st_size for path in texts.iterdir()]
    assert [cluster.usual_tasks(sizes, at_once) for at_once in (-1, 2, 100)] == [1, 2, 11]
    assert cluster.usual_tasks([1 << 26] * 5000, -1) == 1000
    assert cluster.usual_tasks([1 << 26] * 9, -1) == 9
    assert cluster.usual_tasks([], 2) == 1


def test_without_the_extra(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.executor.local", None)
    with pytest.raises(ConfigError, match=r"pip install 'nextvec\[datatrove\]'"):
        prepare_by_tasks("local", [str(texts)], TOKENIZER, tmp_path / "out")


def test_a_second_preparation_of_one_folder_is_refused(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    with run_lock(out):
        with pytest.raises(ConfigError, match="is being written by process"):
            prepare_by_tasks("local", [str(texts)], TOKENIZER, out, tasks=1, workers=1, **SETTINGS)
        assert [path.name for path in out.iterdir()] == [RUN_LOCK]


def test_what_datatrove_says_is_in_a_file(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    words = ["prepare", str(texts), "--tokenizer", "bytes", "--out", str(out), "--skip-bad", "--executor", "local"]
    done = subprocess.run(
        [sys.executable, "-c", "from nextvec.cli import main; main()", *words, "--tasks", "2", "--workers", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        0,
        f"nextvec: what the tasks of datatrove say goes to {out / 'executor'}\n",
    )
    assert "Launching pipeline" in (out / "executor" / cluster.LOG).read_text()
