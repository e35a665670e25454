"""`nextvec train --from RUN`: the weights of a trained run go on, on other text, with its own tokenizer only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nextvec.rundir import load_run
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer
from nextvec.train.metrics import read_metrics
from test_cli_train import BACKBONE, command, refused

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
    assert "does not match the shards in" in line("lm", *origin, data=tmp_path / "other")
    assert "--from needs a run of the kind 'token_lm'" in line("baseline", *origin)
    assert "leave settings of the model out" in line("lm", *origin, "model.backbone.inner=16")
    assert "give --autoencoder RUN, or --from RUN" in line("lm")
    assert not (tmp_path / "run").exists()
