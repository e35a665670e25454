"""The teacher stored beside the tokens: what is read is what the autoencoder says, and training hardly notices the rounding."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from nextvec.cli import main
from nextvec.errors import ConfigError, DataError
from nextvec.model.autoencoder import Autoencoder, Posterior
from nextvec.rundir import load_autoencoder
from nextvec.text.batches import Batches
from nextvec.text.layout import Stream
from nextvec.text.shards import TokenShards
from nextvec.train import latents
from nextvec.train.latents import EncodedBatches, latents_folder, write_latents
from nextvec.train.metrics import read_metrics

SETTINGS = {
    "data": {"context_tokens": 30, "rows": 3},
    "optim": {"lr": 0.003, "warmup": 2},
    "train": {"steps": 6, "log_every": 2, "precision": "fp32"},
}
MODELS = {
    "autoencoder": {"patch_size": 2, "width": 16, "inner": 24, "latent": 8},
    "lm": {"backbone": {"layers": 1, "width": 16, "inner": 32, "heads": 2}, "head": {"noise": 4, "blocks": 1}},
    "baseline": {"backbone": {"layers": 1, "width": 16, "inner": 32, "heads": 2}},
}


def command(patch: pytest.MonkeyPatch, *words: object) -> int:
    patch.setattr("sys.argv", ["nextvec", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, shards and a trained autoencoder, all by commands."""
    work = tmp_path_factory.mktemp("latents")
    (work / "text").mkdir()
    for index in range(20):
        (work / "text" / f"{index}.md").write_text("".join(f"{n} times {index} is {n * index}.\n" for n in range(9)))
    for verb, model in MODELS.items():
        (work / f"{verb}.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": model}))
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, *prepare(work)) == 0
        assert command(patch, *train(work, "autoencoder", work / "ae")) == 0
    return work


def prepare(work: Path) -> list[object]:
    return ["prepare", work / "text", "--tokenizer", "bytes", "--out", work / "shards", "--workers", 1]


def train(work: Path, verb: str, out: Path, *more: object) -> list[object]:
    teacher = ["--autoencoder", work / "ae"] if verb == "lm" else []
    place = ["--data", work / "shards", "--out", out, "--device", "cpu"]
    return ["train", verb, "--config", work / f"{verb}.yaml", *place, *teacher, *more]


def opened(work: Path) -> tuple[Stream, Autoencoder]:
    autoencoder, _ = load_autoencoder(work / "ae")
    return Stream(TokenShards.open(work / "shards" / "train"), 2), autoencoder


def test_what_is_read_is_what_the_autoencoder_says(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every window of two epochs, with many files and passes."""
    monkeypatch.setattr(latents, "FILE_PATCHES", 100)
    monkeypatch.setattr(latents, "PASS_TOKENS", 70)
    stream, autoencoder = opened(work)
    with torch.no_grad():
        autoencoder.embedding.weight.mul_(1.5)  # latents of its own
    done: list[float] = []
    folder = write_latents(stream, autoencoder, done.append)
    assert len(list(folder.glob("*.npy"))) == -(-stream.length // 200) > 3
    assert done == sorted(done)
    assert done[-1] == 1.0
    batches = Batches(stream, rows=3, context_tokens=30, seed=5)
    encoded = EncodedBatches(batches, autoencoder)
    for index in range(2 * batches.windows // 3):
        found = encoded.batch(index)
        assert torch.equal(found.ids, batches.batch(index))
        with torch.no_grad():
            expected = autoencoder.encode(found.ids.unflatten(1, (-1, 2)))
        for stored, exact in zip(found[1:], expected, strict=True):
            torch.testing.assert_close(stored.float(), exact, rtol=2**-10, atol=1e-4)
        assert found.targets().mean.shape == (3, 14, 8)


def test_an_interrupted_encoding_goes_on_where_it_stopped(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "FILE_PATCHES", 100)
    stream, autoencoder = opened(work)
    with torch.no_grad():
        autoencoder.embedding.weight.mul_(0.5)
    whole = {path.name: path.read_bytes() for path in write_latents(stream, autoencoder).iterdir()}
    folder = latents_folder(stream, autoencoder)
    first = folder / "latents-00000.npy"
    before = first.stat().st_mtime_ns
    (folder / "latents-00002.npy").unlink()
    (folder / "manifest.json").unlink()

    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(stream, autoencoder, stop)
    with pytest.raises(ConfigError, match="--latents"):
        EncodedBatches(Batches(stream, 3, 30, 0), autoencoder)
    fourth = folder / "latents-00003.npy"
    fourth.write_bytes(whole[fourth.name][:-1] + bytes([whole[fourth.name][-1] ^ 1]))  # is noticed, and made again
    write_latents(stream, autoencoder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert first.stat().st_mtime_ns == before

    second = folder / "latents-00001.npy"
    second.write_bytes(second.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"latents-00001\.npy is missing or damaged"):
        EncodedBatches(Batches(stream, 3, 30, 0), autoencoder)


def test_a_flipped_bit_is_found_where_everything_is_read_again(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latents, "FILE_PATCHES", 100)
    stream, autoencoder = opened(work)
    with torch.no_grad():
        autoencoder.embedding.weight.mul_(0.7)
    folder = write_latents(stream, autoencoder)
    others = [each.name for each in folder.parent.glob("latents-*") if each != folder]
    shutil.copytree(folder.parent, work / "damaged" / "train", ignore=shutil.ignore_patterns(*others))
    folder = work / "damaged" / "train" / folder.name
    manifest, last = folder / "manifest.json", sorted(folder.glob("*.npy"))[-1]

    def said() -> str:
        capsys.readouterr()
        command(monkeypatch, "verify", work / "damaged")
        found = capsys.readouterr()
        return found.out + found.err

    assert f"{folder}: latents of {stream.length // 2:,} patches, as they were written" in said()
    whole, sums = last.read_bytes(), folder / "sums.json"
    damaged = f"{last} is missing or damaged: it does not have the SHA-256 in sums.json; remove its folder"
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-2]):
        last.write_bytes(content)
        assert damaged in said()
    last.unlink()
    assert damaged in said()
    last.write_bytes(whole)
    written = sums.read_text()
    sums.write_text(json.dumps({**json.loads(written), last.name: "0"}))
    assert damaged in said()
    sums.write_text("[]")
    assert "sums.json is damaged: it is no list of sums" in said()
    sums.unlink()
    assert f"{folder}: not known, there is no sums.json" in said()
    sums.write_text(written)
    manifest.write_text("{}")
    assert str(manifest) in said()
    manifest.unlink()
    assert f"{folder}: not finished" in said()


def test_training_from_stored_latents(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *train(work, "lm", tmp_path / "none", "data.latents=true")) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "holds none of this autoencoder at 2 tokens a patch, packing aligned" in said
    assert not (tmp_path / "none" / "config.yaml").exists()
    assert command(monkeypatch, *prepare(work), "--latents", work / "ae") == 0
    assert "train with data.latents=true" in capsys.readouterr().out
    energies = []
    for name, more in (("encoded", []), ("stored", ["data.latents=true"])):
        assert command(monkeypatch, *train(work, "lm", tmp_path / name, *more)) == 0
        rows = read_metrics(tmp_path / name)
        energies.append([row["energy"] for row in rows])
    assert len(energies[0]) == 3
    assert energies[1] != energies[0]
    assert energies[1] == pytest.approx(energies[0], rel=2e-3)


@pytest.mark.parametrize("head", ["energy", "autoregressive"])
def test_stored_latents_are_read_as_input_too(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    """A head of tokens has no use for them without. Without stored ones, a step encodes its patches once."""
    assert command(monkeypatch, *prepare(work), "--latents", work / "ae") == 0
    capsys.readouterr()
    if head == "autoregressive":
        more = [f"model.head.kind={head}", "data.latents=true"]
        assert command(monkeypatch, *train(work, "lm", tmp_path / "none", *more)) != 0
        assert "learns from latents or whose input holds them" in " ".join(capsys.readouterr().err.split())
    encoded: list[int] = []
    original = Autoencoder.encode

    def encode(self: Autoencoder, ids: torch.Tensor) -> Posterior:
        encoded.append(ids[..., 0].numel())
        return original(self, ids)

    monkeypatch.setattr(Autoencoder, "encode", encode)
    losses, calls = [], []
    for stored in ("false", "true"):
        more = [f"model.head.kind={head}", "model.input=latents", f"data.latents={stored}", "train.eval_every=0"]
        encoded.clear()
        assert command(monkeypatch, *train(work, "lm", tmp_path / stored, *more)) == 0
        losses.append([row["loss"] for row in read_metrics(tmp_path / stored) if row["kind"] == "train"])
        calls.append(encoded.count(3 * 15))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert calls[0] - calls[1] == 6  # all patches of a batch at once, in each of its steps


@pytest.mark.parametrize("verb", ["autoencoder", "baseline"])
def test_runs_without_a_teacher_refuse(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert command(monkeypatch, *train(work, verb, tmp_path / "run", "data.latents=true")) != 0
    assert "data.latents is for a CALM" in " ".join(capsys.readouterr().err.split())


def test_an_autoencoder_of_another_tokenizer_is_refused_before_any_work(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "tokenizer", "train", work / "text", "--vocab-size", 270, "--out", tmp_path) == 0
    words = ["prepare", work / "text", "--tokenizer", tmp_path, "--out", tmp_path / "other", "--latents", work / "ae"]
    assert command(monkeypatch, *words) != 0
    assert "was trained with another tokenizer" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


def test_the_benchmark_measures_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "stored_latents.py"))
    found["main"](["--config", "calm-tiny", "--repeats", "2", "--json", str(tmp_path / "found.json"), "data.rows=1"])
    figures = json.loads((tmp_path / "found.json").read_text())
    assert figures["seconds"].keys() == {"encode", "stored"}
    assert figures["bytes_per_token"] == pytest.approx(
        4 * 64 / 4, rel=0.01
    )  # mean and log_std of L = 64 in float16, K = 4
    assert "bytes per token" in capsys.readouterr().out
