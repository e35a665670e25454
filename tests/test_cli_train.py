"""`nextvec train` end to end on a byte corpus: every kind, resume after Ctrl-C, and one sentence for each mistake."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nextvec.cli import main
from nextvec.rundir import load_run
from nextvec.text.batches import Batches
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer
from nextvec.train.metrics import read_metrics

TIMES = ("seconds", "cpu_seconds", "tokens_per_s", "share", "memory_bytes")
COMMON = {
    "data": {"context_tokens": 32, "rows": 2},
    "optim": {"lr": 0.003, "warmup": 4},
    "train": {"steps": 20, "log_every": 8, "eval_every": 10, "accumulate": 2},
}
BACKBONE = {"layers": 1, "width": 16, "inner": 32, "heads": 2}
MODELS = {
    "autoencoder": {"patch_size": 2, "width": 16, "inner": 24, "latent": 8},
    "lm": {"backbone": BACKBONE, "head": {"noise": 4, "blocks": 1}},
    "baseline": {"backbone": BACKBONE},
}
LOSSES = {"autoencoder": "cross_entropy", "lm": "energy", "baseline": "cross_entropy"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a tiny corpus, a settings file per kind, and a trained autoencoder."""
    work = tmp_path_factory.mktemp("train")
    (work / "text").mkdir()
    for index in range(30):
        lines = [f"def f{index}_{n}(x):\n    return x + {n * index}\n" for n in range(12)]
        (work / "text" / f"{index}.py").write_text("".join(lines))
    prepare([str(work / "text")], byte_tokenizer(), work / "shards", valid_fraction=0.2, workers=1)
    for verb, model in MODELS.items():
        (work / f"{verb}.yaml").write_text(yaml.safe_dump({**COMMON, "model": model}))
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, *arguments(work, "autoencoder", work / "ae")) == 0
    return work


def arguments(work: Path, verb: str, out: Path, *more: str) -> list[str]:
    words = [
        "train",
        verb,
        "--config",
        work / f"{verb}.yaml",
        "--data",
        work / "shards",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    words += ["--autoencoder", work / "ae"] if verb == "lm" else []
    return [str(word) for word in [*words, *more]]


def command(patch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit status of the command line."""
    patch.setattr(sys, "argv", ["nextvec", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def refused(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a refused command."""
    capsys.readouterr()
    assert command(patch, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("nextvec: ")
    return lines[0]


def rows(run: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("verb", list(MODELS))
def test_interrupted_and_resumed_equals_uninterrupted(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    precision: str,
) -> None:
    """Weights, optimiser state, auxiliary parts and metrics, bit for bit, whatever the state of torch's global generator."""
    setting = f"train.precision={precision}"
    torch.manual_seed(1)
    assert command(monkeypatch, *arguments(work, verb, tmp_path / "whole", setting)) == 0
    out = capsys.readouterr().out
    assert "20 steps, 2,560 tokens" in out
    assert f"held out: {'energy' if verb == 'lm' else 'cross_entropy'}" in out

    original = Batches.batch

    def batch(self: Batches, index: int) -> torch.Tensor:
        if index == 27:  # the second micro-batch of the 14th step
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", batch)
        assert command(patch, *arguments(work, verb, tmp_path / "part", setting)) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        f"interrupted; step 14 is saved in {tmp_path / 'part'}. Go on with: nextvec train {verb} --out"
    )
    assert not (tmp_path / "part" / "model.safetensors").exists()
    assert command(monkeypatch, *shlex.split(line.partition("nextvec ")[2])) == 0  # exactly what it said

    for name in ("module", "optimizer"):
        file = f"checkpoints/step-00000020/{name}.safetensors"
        whole, part = load_file(tmp_path / "whole" / file), load_file(tmp_path / "part" / file)
        assert whole.keys() == part.keys()
        assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "part")
    assert [(row["kind"], row["step"]) for row in rows(tmp_path / "whole")] == [
        ("train", 8), ("eval", 10), ("train", 16), ("train", 20), ("eval", 20),
    ]  # fmt: skip
    left, right = load_run(tmp_path / "whole").model, load_run(tmp_path / "part").model
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("verb", list(MODELS))
def test_it_learns(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    words = arguments(work, verb, tmp_path / "run", "train.steps=60", "train.eval_every=0", "train.precision=fp32")
    assert command(monkeypatch, *words) == 0
    losses = [row[LOSSES[verb]] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert losses[-1] < 0.97 * losses[0]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    tokens = config["model"]["autoencoder"] if verb == "lm" else config["model"]
    assert tokens["vocab_size"] == byte_tokenizer().vocab_size
    if verb != "baseline":
        assert tokens["mask_id"] == byte_tokenizer().mask_id
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_a_finished_run_resumed_keeps_its_card_and_says_how_its_text_was_laid_out(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(work, "baseline", tmp_path / "run")
    assert command(monkeypatch, *words) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "20 steps" in card
    assert "cross_entropy" in card
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["packing"] == "aligned"
    assert command(monkeypatch, *words, "--resume") == 0
    again = (tmp_path / "run" / "README.md").read_text()
    assert again == card
    assert command(monkeypatch, "train", "baseline", "--out", str(tmp_path / "run"), "--resume") == 0


def test_a_path_that_yaml_would_read_as_something_else_stays_a_path(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(work, "baseline", tmp_path / "run")
    words[words.index("--data") + 1] = "no"
    assert "no holds no shards" in refused(monkeypatch, capsys, *words)


def test_plain_shard_directory_and_given_held_out_shards(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(work, "baseline", tmp_path / "plain", "train.steps=2")
    words[words.index(str(work / "shards"))] = str(work / "shards" / "train")
    assert command(monkeypatch, *words) == 0
    assert {row["kind"] for row in read_metrics(tmp_path / "plain")} == {"train"}
    words[words.index(str(tmp_path / "plain"))] = str(tmp_path / "valid")
    assert command(monkeypatch, *words, "--valid", str(work / "shards" / "valid")) == 0
    assert {row["kind"] for row in read_metrics(tmp_path / "valid")} == {"train", "eval"}


def test_held_out_text_shorter_than_a_window_trains_without_evaluation(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for index in range(20):
        (tmp_path / "text" / f"{index}.txt").write_text(f"a few words, number {index}\n")
    prepare([str(tmp_path / "text")], byte_tokenizer(), tmp_path / "shards", valid_fraction=0.1, workers=1)
    words = arguments(work, "baseline", tmp_path / "run", "train.steps=2", "data.context_tokens=128")
    words[words.index(str(work / "shards"))] = str(tmp_path / "shards")
    assert command(monkeypatch, *words) == 0
    assert "no evaluation during training: the corpus in" in capsys.readouterr().err
    assert {row["kind"] for row in read_metrics(tmp_path / "run")} == {"train"}


@pytest.mark.parametrize(
    ("verb", "override", "sentence"),
    [
        ("baseline", "optim.learning_rate=1", "unknown key 'learning_rate'"),
        ("baseline", "train.step=5", "unknown key 'step'; did you mean 'steps'?"),
        (
            "autoencoder",
            "model.patch_size=5",
            "context_tokens must be a multiple of the patch size 5; got 32, nearest 30",
        ),
        ("autoencoder", "data.context_tokens=1000000", "less than one window of 1000000"),
        ("baseline", "model.vocab_size=999", "vocabulary of 259 tokens and the model has 999"),
        ("baseline", "optim.lr=fast", "optim.lr: Input should be a valid number"),
        ("baseline", "optim.lr", "an override is written key=value"),
        ("baseline", "optim.lr=[1", "optim.lr: the value '[1' cannot be read"),
        ("baseline", "train.seed=9223372036854775808", "train.seed: Input should be less than 9223372036854775808"),
        ("lm", "model.autoencoder.latent=4", "model.autoencoder differs from the settings of the trained autoencoder"),
        ("lm", "model.backbone.heads=3", "heads must divide width 16; got 3"),
        ("baseline", "data.path=nowhere", "nowhere holds no shards"),
        ("baseline", "kind=calm", "kind"),
    ],
)
def test_wrong_settings(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    override: str,
    sentence: str,
) -> None:
    assert sentence in refused(monkeypatch, capsys, *arguments(work, verb, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_wrong_commands(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(verb: str, *more: str, out: Path = tmp_path / "run") -> str:
        return refused(monkeypatch, capsys, *arguments(work, verb, out, *more))

    assert f"{work / 'ae'} already holds a run" in line("autoencoder", out=work / "ae")
    assert "--resume needs a run that was started before" in line("autoencoder", "--resume")
    assert "optim.lr was 0.003 and is now 0.01" in line("autoencoder", "--resume", "optim.lr=0.01", out=work / "ae")
    assert "device must be one of" in line("baseline", "--device", "tpu")
    assert "lm.yaml does not exist" in line("baseline", "--config", str(tmp_path / "lm.yaml"))
    assert "nowhere is not a run directory" in line("lm", "--autoencoder", str(tmp_path / "nowhere"))
    bare = ["train", "baseline", "--out", str(tmp_path / "run")]
    assert "give --data SHARDS" in refused(monkeypatch, capsys, *bare)
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "expected a mapping of settings, got list" in line("baseline", "--config", str(tmp_path / "list.yaml"))
    (tmp_path / "calm.yaml").write_text("kind: calm\n")
    assert "use: nextvec train lm" in line("baseline", "--config", str(tmp_path / "calm.yaml"))
    assert not (tmp_path / "run").exists()


def test_shards_of_another_tokenizer_are_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["def f(x): return x " * 20], 265)
    prepare([str(work / "text")], tokenizer, tmp_path / "shards", valid_fraction=0.2, workers=1)
    words = arguments(work, "lm", tmp_path / "run")
    words[words.index(str(work / "shards"))] = str(tmp_path / "shards")
    assert "does not match the shards" in refused(monkeypatch, capsys, *words)


def test_damaged_newest_checkpoint_at_resume(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = arguments(work, "baseline", run, "train.steps=4", "train.save_every=2")
    assert command(monkeypatch, *words) == 0
    file = run / "checkpoints" / "step-00000004" / "module.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert command(monkeypatch, *words, "--resume") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert f"checkpoint file {file} is damaged" in lines[0]
    assert "going on from the older checkpoint" in lines[0]
    for step in (2, 4):
        file = run / "checkpoints" / f"step-{step:08d}" / "module.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    line = refused(monkeypatch, capsys, *words, "--resume")
    assert "no older checkpoint is whole" in line


def test_full_disk_at_the_export_loses_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    original = safetensors.torch.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "model.safetensors" in Path(path).name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path, metadata)

    words = arguments(work, "baseline", tmp_path / "run", "train.steps=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save_file)
        assert command(patch, *words) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert command(monkeypatch, *words, "--resume") == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
