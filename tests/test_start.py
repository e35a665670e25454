"""`nextvec train --from RUN`: the weights of a trained run go on, on other text, with its own tokenizer only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nextvec.rundir import load_run
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer
from nextvec.train.metrics import read_metrics
from nextvec.train.start import load_start
from test_cli_train import BACKBONE, command, refused
from test_kept import interrupted

LM = [f"model.backbone.{name}={value}" for name, value in BACKBONE.items()]
TRAIN = ["train.steps=30", "train.log_every=1", "optim.warmup=3", "data.rows=2", "data.context_tokens=32"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, an autoencoder and a language model trained on the first."""
    work = tmp_path_factory.mktemp("start")
    for name, text in (("first", "abcdefgh " * 30), ("second", "hgfedcba " * 30)):
        (work / f"{name}.text").mkdir()
        for number in range(12):
            (work / f"{name}.text" / f"{number}.txt").write_text(text + str(number))
        prepare([str(work / f"{name}.text")], byte_tokenizer(), work / name, valid_fraction=0.2, workers=1)
    small = ["model.patch_size=2", "model.width=16", "model.inner=24", "model.latent=8"]
    with pytest.MonkeyPatch.context() as patch:
        for out in ("ae", "ae2"):
            more = [*TRAIN, *small, f"train.seed={len(out)}"]
            assert command(patch, *train("autoencoder", work / "first", work / out, *more)) == 0
        head = ["model.head.noise=4", "model.head.blocks=1", "--autoencoder", str(work / "ae")]
        assert command(patch, *train("lm", work / "first", work / "lm", *TRAIN, *LM, *head)) == 0
    return work


def train(verb: str, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", verb, "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def test_it_begins_where_the_other_run_ended(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = train("lm", work / "first", tmp_path / "run", "--from", str(work / "lm"), "train.steps=4")
    assert command(monkeypatch, *words) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    before = yaml.safe_load((work / "lm" / "config.yaml").read_text())
    assert config["model"] == before["model"]
    assert config["data"]["context_tokens"] == 32
    assert (config["data"]["path"], config["start"]) == (str(work / "first"), str(work / "lm"))
    begun, fresh = (read_metrics(run)[0] for run in (tmp_path / "run", work / "lm"))
    assert begun["auxiliary"] < 0.7 * fresh["auxiliary"]  # the head that only training has was taken over as well
    old, new = load_run(work / "lm").model, load_run(tmp_path / "run").model
    for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b) == name.startswith("autoencoder."), name
        assert (a - b).abs().max() < 0.5, name
    # goes on by itself, without --from: the checkpoint has all but the autoencoder, and the settings say where that is
    assert command(monkeypatch, "train", "lm", "--out", str(tmp_path / "run"), "--resume", "train.steps=6") == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6


def test_with_an_autoencoder_trained_anew(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--from", str(work / "lm"), "--autoencoder", str(work / "ae2"), "train.steps=1"]
    assert command(monkeypatch, *train("lm", work / "second", tmp_path / "run", *more)) == 0
    new, own = (load_file(run / "model.safetensors") for run in (tmp_path / "run", work / "ae2"))
    assert all(torch.equal(new[f"autoencoder.{name}"], value) for name, value in own.items())


def test_what_does_not_fit_is_one_sentence(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([str(work / "second.text")], train_tokenizer(["hgfedcba " * 9], 270), tmp_path / "other", workers=1)

    def line(verb: str, *more: str, data: Path = work / "second") -> str:
        return refused(monkeypatch, capsys, *train(verb, data, tmp_path / "run", *more))

    origin = ["--from", str(work / "lm")]
    told = line("lm", *origin, data=tmp_path / "other")
    assert f"the tokenizer of {work / 'lm'} does not match the shards in {tmp_path / 'other' / 'train'}; " in told
    assert told.endswith(f"prepare that text again with --tokenizer {work / 'lm'}")
    assert "--from needs a run of the kind 'token_lm'" in line("baseline", *origin)
    assert "leave settings of the model out" in line("lm", *origin, "model.backbone.inner=16")
    assert "give --autoencoder RUN, or --from RUN" in line("lm")
    assert not (tmp_path / "run").exists()


def test_it_begins_at_a_checkpoint_or_where_an_unfinished_run_stands(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["train.keep_every=2", "train.save_every=2", "train.keep_last=1"]
    head = ["model.head.noise=4", "model.head.blocks=1", "--autoencoder", str(work / "ae")]
    old = tmp_path / "old"
    assert command(monkeypatch, *train("lm", work / "first", old, *TRAIN, *LM, *head, *keep, "train.steps=6")) == 0
    found = {step: load_start(old / "checkpoints" / f"step-{step:08d}") for step in (2, 4, 6)}
    whole = load_run(old).model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in found[6].model.state_dict().items())
    two, four = (found[step].model.state_dict() for step in (2, 4))
    changed = {name for name in two if not torch.equal(two[name], four[name])}
    assert "backbone.blocks.0.mlp.gate_up.weight" in changed, changed
    assert not any(name.startswith("autoencoder.") for name in changed)

    def begun(source: Path, out: str, *more: str) -> None:
        words = train("lm", work / "second", tmp_path / out, "--from", str(source), "train.steps=1", *more)
        assert command(monkeypatch, *words) == 0

    begun(old / "checkpoints" / "step-00000004", "at-4")
    assert yaml.safe_load((tmp_path / "at-4" / "config.yaml").read_text())["start"].endswith("step-00000004")
    shutil.copytree(old, tmp_path / "open")
    (tmp_path / "open" / "model.safetensors").unlink()  # it stopped at step 6, not finished
    begun(tmp_path / "open", "again", "--autoencoder", str(work / "ae"))
    line = refused(
        monkeypatch, capsys, *train("lm", work / "second", tmp_path / "no", "--from", str(tmp_path / "open"))
    )
    assert "give the autoencoder that the run began with, --autoencoder RUN" in line
    shutil.rmtree(tmp_path / "open" / "checkpoints")
    line = refused(
        monkeypatch, capsys, *train("lm", work / "second", tmp_path / "no", "--from", str(tmp_path / "open"))
    )
    assert "has neither model.safetensors nor a checkpoint: nothing of it was saved yet" in line
    module = old / "checkpoints" / "step-00000002" / "module.safetensors"
    module.write_bytes(module.read_bytes()[:-1])
    line = refused(monkeypatch, capsys, *train("lm", work / "second", tmp_path / "no", "--from", str(module.parent)))
    assert f"{module} is damaged" in line
    assert not (tmp_path / "no").exists()


def test_an_interrupted_run_has_all_that_another_one_begins_with(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ["model.head.noise=4", "model.head.blocks=1", "--autoencoder", str(work / "ae")]
    interrupted(train("lm", work / "first", tmp_path / "old", *TRAIN, *LM, *head), after=3)
    again = train("lm", work / "second", tmp_path / "run", "--from", str(tmp_path / "old"), "train.steps=1")
    assert command(monkeypatch, *again) == 0
    new, own = (load_file(run / "model.safetensors") for run in (tmp_path / "run", work / "ae"))
    assert all(torch.equal(new[f"autoencoder.{name}"], value) for name, value in own.items())
    kept = load_file(tmp_path / "old" / "frozen.safetensors")
    save_file({name: value + 1 for name, value in kept.items()}, tmp_path / "old" / "frozen.safetensors")
    line = refused(monkeypatch, capsys, *train("lm", work / "second", tmp_path / "no", "--from", str(tmp_path / "old")))
    assert "is not the one that" in line
    assert "was trained with: give that one, --autoencoder RUN" in line
