"""Flipped bits on disk: `nextvec verify` reads shards, weights and checkpoints again; loading checks the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nextvec.errors import DataError
from nextvec.rundir import SUM, WEIGHTS, load_run
from published import FIXTURES
from test_cli_train import arguments, command, refused, work  # noqa: F401  (a fixture)


def flip(path: Path) -> None:
    """The lowest bit of the last byte; a second time puts it back."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_all_that_is_whole_is_said_and_the_first_damaged_file_is_named(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, shards = tmp_path / "run", work / "shards"
    assert command(monkeypatch, *arguments(work, "baseline", run, "train.steps=2", "train.save_every=1")) == 0
    capsys.readouterr()
    assert command(monkeypatch, "verify", str(shards), str(run)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{shards / 'train'}: 1 shards, ")
    assert lines[1].startswith(f"{shards / 'valid'}: 1 shards, ")
    folders = [run / "checkpoints" / f"step-0000000{step}" for step in (2, 1)]
    assert lines[2:] == [f"{path}: as it was written" for path in (run / WEIGHTS, *folders)]
    for file in (
        shards / "train" / "tokens-00000.bin",
        shards / "valid" / "documents-00000.npy",
        run / WEIGHTS,
        folders[1] / "optimizer.safetensors",
    ):
        flip(file)
        assert f"{file} " in refused(monkeypatch, capsys, "verify", str(shards), str(run))
        flip(file)
    assert command(monkeypatch, "verify", str(shards), str(run)) == 0
    assert "neither a run directory nor what" in refused(monkeypatch, capsys, "verify", str(tmp_path))
    (run / SUM).unlink()  # as of a run written before there was one
    capsys.readouterr()
    assert command(monkeypatch, "verify", str(run)) == 0
    assert f"not known, there is no {SUM}" in capsys.readouterr().out


def test_weights_with_a_flipped_bit_are_refused_and_written_again_from_the_checkpoint(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert command(monkeypatch, *arguments(work, "baseline", run, "train.steps=2")) == 0
    whole = (run / WEIGHTS).read_bytes()
    assert (run / SUM).read_text() == f"{hashlib.sha256(whole).hexdigest()}  {WEIGHTS}\n"
    flip(run / WEIGHTS)
    begin = ["train", "baseline", "--from", str(run), "--data", str(work / "shards"), "--out", str(tmp_path / "new")]
    line = refused(monkeypatch, capsys, *begin)
    assert f"{run / WEIGHTS} is damaged: it does not have the SHA-256 in {SUM}; restore it, or write it again" in line
    assert command(monkeypatch, "train", "baseline", "--out", str(run), "--resume", "--device", "cpu") == 0
    assert (run / WEIGHTS).read_bytes() == whole
    load_run(run)
    (run / SUM).write_text("")
    with pytest.raises(DataError, match="does not have the SHA-256"):
        load_run(run)
    (run / SUM).unlink()
    load_run(run)


def test_converted_weights_have_a_sum_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = FIXTURES / "k4" / "autoencoder", tmp_path / "run"
    assert command(monkeypatch, "convert", str(source), str(run)) == 0
    assert (run / SUM).read_text() == f"{hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()}  {WEIGHTS}\n"
    flip(run / WEIGHTS)
    line = refused(monkeypatch, capsys, "verify", str(run))
    assert f"{run / WEIGHTS} is damaged" in line
    assert "or, of converted weights, delete it and run nextvec convert" in line
    assert "is damaged" in refused(
        monkeypatch, capsys, "convert", str(run), str(tmp_path / "back"), "--to", "reference"
    )
    (run / WEIGHTS).unlink()
    assert command(monkeypatch, "convert", str(source), str(run)) == 0
    assert command(monkeypatch, "verify", str(run)) == 0
    assert f"{run / WEIGHTS}: as it was written" in capsys.readouterr().out
