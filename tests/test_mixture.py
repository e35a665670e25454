"""Mixtures of corpora: exact shares, every window once an epoch, the same whatever shares a batch; and by the command line."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nextvec.cli import main
from nextvec.config import DataSettings
from nextvec.errors import ConfigError
from nextvec.text.batches import Batches
from nextvec.text.layout import Stream
from nextvec.text.mixture import BLOCK, Mixture, shares
from nextvec.text.prepare import prepare
from nextvec.text.shards import TokenShards
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer

WORDS = {"a": 40, "b": 90}  # documents of each corpus; its letter is all that it holds


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for letter, count in WORDS.items():
        (folder / f"{letter}.text").mkdir()
        for number in range(count):
            (folder / f"{letter}.text" / f"{number}.txt").write_text(letter * (60 + number))
        prepare([str(folder / f"{letter}.text")], byte_tokenizer(), folder / letter, valid_fraction=0.2, workers=1)
    return folder


def parts(folder: Path, rows: int = 4) -> list[Batches]:
    return [
        Batches(Stream(TokenShards.open(folder / letter / "train"), 1), rows, 8, seed)
        for seed, letter in enumerate(WORDS)
    ]


def test_every_block_has_the_exact_shares_and_no_window_is_left_out(corpora: Path) -> None:
    mixture = Mixture(parts(corpora), [3.0, 1.0], seed=5)
    assert mixture.shares == [3072, 1024]
    for block in range(2):
        places = [mixture.place(block * BLOCK + n) for n in range(BLOCK)]
        assert Counter(corpus for corpus, _ in places) == {0: 3072, 1: 1024}
        for corpus, share in enumerate(mixture.shares):
            own = sorted(window for at, window in places if at == corpus)
            assert own == list(range(block * share, (block + 1) * share))
    first = [mixture.place(n)[0] for n in range(400)]
    assert abs(sum(first) / 400 - 0.25) < 0.11  # 5 standard errors: the order is shuffled
    assert first != [Mixture(parts(corpora), [3.0, 1.0], seed=6).place(n)[0] for n in range(400)]


def test_batches_hold_the_text_of_their_corpus_and_do_not_depend_on_who_reads_them(corpora: Path) -> None:
    one, other = Mixture(parts(corpora), [1.0, 2.0], 0), Mixture(parts(corpora), [1.0, 2.0], 0)
    tokenizer = byte_tokenizer()
    for index in (7, 0, 10**9):
        batch = one.batch(index)
        assert torch.equal(batch, other.batch(index))
        assert torch.equal(batch, torch.cat([one.batch(index, part, 2) for part in range(2)]))
        for row, ids in enumerate(batch):
            letter = "ab"[one.place(index * 4 + row)[0]]
            assert set(tokenizer.decode(ids.tolist(), skip_special=True)) <= {letter}
    assert one.digest != Mixture(parts(corpora), [1.0, 3.0], 0).digest


@pytest.mark.parametrize("weights", [[1.0], [0.1, 0.2, 0.7], [5.0, 3.0, 1.0, 1e-3], list(np.arange(1, 30.0))])
def test_shares_are_whole_and_nearest(weights: list[float]) -> None:
    found = shares(weights)
    assert sum(found) == BLOCK
    assert all(abs(share - BLOCK * weight / sum(weights)) < 1 for share, weight in zip(found, weights, strict=True))


def test_settings_name_one_corpus_or_several(corpora: Path) -> None:
    with pytest.raises(ConfigError, match="data: path is required: a shard directory; or mixture"):
        DataSettings.parse({}, "data")
    with pytest.raises(ConfigError, match="give either path or mixture, not both"):
        DataSettings.parse({"path": "a", "mixture": [{"path": "b"}]}, "data")
    with pytest.raises(ConfigError, match=r"mixture\.0\.weight: Input should be greater than 0; got 0"):
        DataSettings.parse({"mixture": [{"path": "b", "weight": 0}]}, "data")
    with pytest.raises(ConfigError, match="is less than one window in 4096; give it more, or leave it out"):
        Mixture(parts(corpora), [1.0, 1e-6], 0)


def test_a_mixture_trains_resumes_and_refuses_what_does_not_fit(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["nextvec", "train", "baseline", "--device", "cpu", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    mixture = [{"path": str(corpora / "a"), "weight": 3}, {"path": str(corpora / "b")}]
    backbone = {"layers": 1, "width": 16, "inner": 16, "heads": 2}
    settings = {"data": {"mixture": mixture, "rows": 2, "context_tokens": 16}, "model": {"backbone": backbone}}
    file = tmp_path / "mix.yaml"
    file.write_text(yaml.safe_dump(settings))
    out = str(tmp_path / "run")
    assert run("--config", str(file), "--out", out, "train.steps=2", "optim.schedule=constant") == 0
    assert "held out:" in capsys.readouterr().out
    assert f"{corpora / 'a'} (75 %), {corpora / 'b'} (25 %)" in (tmp_path / "run" / "README.md").read_text()
    assert run("--out", out, "--resume", "train.steps=4") == 0
    mixture[0]["weight"] = 2
    file.write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    assert run("--config", str(file), "--out", out, "--resume", "optim.schedule=constant", "train.steps=6") == 2
    assert "the weights of data.mixture were 3, 1 and are now 2, 1; set them back" in capsys.readouterr().err

    prepare([str(corpora / "b.text")], train_tokenizer(["abab"], 260), tmp_path / "b", valid_fraction=0, workers=1)
    mixture[1]["path"] = str(tmp_path / "b")
    file.write_text(yaml.safe_dump(settings))
    assert run("--config", str(file), "--out", str(tmp_path / "other")) == 2
    first, second = corpora / "a" / "train", tmp_path / "b" / "train"
    line = f"the tokenizer of {first} does not match the shards in {second}; prepare that text again with --tokenizer {first}"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
