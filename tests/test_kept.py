"""An interrupted CALM run goes on by itself: the frozen autoencoder that it began with is kept in its own directory."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextvec.text.batches import Batches
from nextvec.train import checkpoint
from nextvec.train.metrics import read_metrics
from test_cli_train import arguments, command, refused, work  # noqa: F401  (a fixture)


def interrupted(words: list[str], after: int) -> None:
    """Train until Ctrl-C in batch `after`."""
    original = Batches.batch

    def batch(self: Batches, index: int) -> torch.Tensor:
        if index == after:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", batch)
        assert command(patch, *words) == 130


def go_on(run: Path, *more: str) -> list[str]:
    return ["train", "lm", "--out", str(run), "--resume", "--device", "cpu", *more]


def test_it_goes_on_when_the_autoencoders_run_is_gone(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autoencoder, run = tmp_path / "ae", tmp_path / "run"
    shutil.copytree(work / "ae", autoencoder)
    words = [autoencoder if word == str(work / "ae") else word for word in arguments(work, "lm", run)]
    interrupted([str(word) for word in words], after=27)
    shutil.rmtree(autoencoder)
    run.rename(tmp_path / "moved")
    assert command(monkeypatch, *go_on(tmp_path / "moved")) == 0
    assert read_metrics(tmp_path / "moved")[-1]["step"] == 20
    assert not (tmp_path / "moved" / "frozen.safetensors").exists(), "model.safetensors holds it"
    assert command(monkeypatch, *go_on(tmp_path / "moved", "train.steps=22")) == 0
    model, own = load_file(tmp_path / "moved" / "model.safetensors"), load_file(work / "ae" / "model.safetensors")
    assert all(torch.equal(model[f"autoencoder.{name}"], value) for name, value in own.items())


def test_a_damaged_one_is_named_and_can_be_given_again(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    interrupted(arguments(work, "lm", run), after=27)
    kept = run / "frozen.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    line = refused(monkeypatch, capsys, *go_on(run))
    assert line.endswith(f"{kept} is damaged: give the autoencoder that the run began with, --autoencoder RUN")
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    line = refused(monkeypatch, capsys, *go_on(run))
    assert line.endswith("its weights differ now; give it with --autoencoder RUN")
    assert command(monkeypatch, *go_on(run, "--autoencoder", str(work / "ae"), "train.steps=21")) == 0


def test_a_run_begun_from_another_needs_that_one_only_until_its_first_checkpoint(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, run, other = tmp_path / "start", tmp_path / "run", tmp_path / "whole"
    assert command(monkeypatch, *arguments(work, "lm", start, "train.steps=8", "train.precision=fp32")) == 0
    begin = ["train", "lm", "--data", str(work / "shards"), "--from", str(start), "--device", "cpu", "train.steps=12"]
    assert command(monkeypatch, *begin, "--out", str(other)) == 0
    interrupted([*begin, "--out", str(run)], after=9)
    shutil.copytree(run, tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "checkpoints")  # as if it had been killed before the first one
    assert command(monkeypatch, *go_on(tmp_path / "early")) == 0
    start.rename(tmp_path / "elsewhere")
    assert command(monkeypatch, *go_on(run)) == 0
    for each in (run, tmp_path / "early"):
        found, wanted = (checkpoint.latest(path) for path in (each, other))
        assert found is not None
        assert wanted is not None
        a, b = (load_file(one.path / checkpoint.MODULE) for one in (found, wanted))
        assert all(torch.equal(a[name], b[name]) for name in b)
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    assert "is not a run directory" in refused(monkeypatch, capsys, *go_on(run))


def test_the_copy_goes_on_where_the_run_that_is_named_again_has_gone(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As torchrun, Slurm and Kubernetes give the same command again."""
    autoencoder, run = tmp_path / "ae", tmp_path / "run"
    shutil.copytree(work / "ae", autoencoder)
    words = [str(autoencoder) if word == str(work / "ae") else word for word in arguments(work, "lm", run)]
    interrupted(words, after=27)
    shutil.rmtree(autoencoder)
    capsys.readouterr()
    assert command(monkeypatch, *words, "--resume") == 0
    assert f"{autoencoder} is gone: going on with the autoencoder kept in {run}" in capsys.readouterr().err
    fresh = [str(tmp_path / "fresh") if word == str(run) else word for word in words]
    assert f"{autoencoder} is not a run directory" in refused(monkeypatch, capsys, *fresh)


def test_it_goes_on_by_itself_when_the_autoencoder_was_trained_anew(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    autoencoder, run = tmp_path / "ae", tmp_path / "run"
    shutil.copytree(work / "ae", autoencoder)
    words = [str(autoencoder) if word == str(work / "ae") else word for word in arguments(work, "lm", run)]
    interrupted(words, after=27)
    own = load_file(autoencoder / "model.safetensors")
    save_file({name: value + 1 for name, value in own.items()}, autoencoder / "model.safetensors")
    (autoencoder / "model.sha256").unlink()
    assert "its weights differ now; give it with" in refused(monkeypatch, capsys, *words, "--resume")
    assert command(monkeypatch, *go_on(run)) == 0
    model = load_file(run / "model.safetensors")
    assert all(torch.equal(model[f"autoencoder.{name}"], value) for name, value in own.items())


def test_a_run_that_began_from_another_goes_on_by_the_same_command_when_that_has_gone(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    assert command(monkeypatch, *arguments(work, "baseline", start, "train.steps=2")) == 0
    (tmp_path / "more.yaml").write_text("train: {steps: 4}\n")
    begin = ["train", "baseline", "--config", str(tmp_path / "more.yaml"), "--data", str(work / "shards")]
    begin += ["--from", str(start), "--out", str(run), "--device", "cpu"]
    interrupted(begin, after=5)
    start.rename(tmp_path / "elsewhere")
    assert command(monkeypatch, *begin, "--resume") == 0
    assert read_metrics(run)[-1]["step"] == 4


def test_weights_that_are_lost_are_written_again_with_the_autoencoder_given(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert command(monkeypatch, *arguments(work, "lm", run, "train.steps=2")) == 0
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    give = "give the autoencoder that the run began with, --autoencoder RUN"
    weights.write_bytes(whole[: len(whole) // 2])
    line = refused(monkeypatch, capsys, *go_on(run))
    assert f"{weights} is damaged" in line
    assert line.endswith(f"and frozen.safetensors went when that was written: {give}")
    weights.unlink()
    line = refused(monkeypatch, capsys, *go_on(run))
    assert line.endswith(f"{run} has neither model.safetensors nor frozen.safetensors any more: {give}")
    assert command(monkeypatch, *go_on(run, "--autoencoder", str(work / "ae"))) == 0
    assert weights.read_bytes() == whole
