"""Every verb with every head and input form, tiny and end to end: train, resume, score, continue a prompt, count, measure."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nextvec.bench import limits, memory, run
from nextvec.cli import main
from nextvec.model.calm import Calm
from nextvec.rundir import load_run
from nextvec.text.batches import Batches
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train.metrics import read_metrics

HEADS = {
    "energy": {"noise": 4, "blocks": 1},  # as settings files had it before there were other heads
    "flow": {"kind": "flow", "blocks": 1, "teacher_draws": 2, "steps": 3},
    "diffusion": {"kind": "diffusion", "blocks": 1, "teacher_draws": 2, "solver": "dpm++", "steps": 4},
    "categorical": {"kind": "categorical", "blocks": 1, "steps": 3},
    "mixture": {"kind": "mixture"},
    "autoregressive": {"kind": "autoregressive"},
}
FORMS = {
    "energy reads latents": ("energy", "latents"),
    "categorical reads both": ("categorical", "both"),
    "autoregressive reads both": ("autoregressive", "both"),
}
MODELS = {name: {"head": head} for name, head in HEADS.items()} | {
    name: {"head": HEADS[head], "input": form} for name, (head, form) in FORMS.items()
}
OBJECTIVES = {"energy": "energy", "flow": "flow", "diffusion": "diffusion"} | dict.fromkeys(
    ("categorical", "mixture", "autoregressive"), "cross_entropy"
)
SETTINGS = {
    "data": {"context_tokens": 32, "rows": 2},
    "optim": {"lr": 0.003, "warmup": 4},
    "train": {"steps": 16, "log_every": 4, "eval_every": 8, "precision": "fp32"},
}
TIMES = ("seconds", "cpu_seconds", "tokens_per_s", "share", "memory_bytes")
every_model = pytest.mark.parametrize("name", MODELS)
with_solver = pytest.mark.parametrize("head", ["flow", "diffusion", "categorical"])
without_solver = pytest.mark.parametrize("head", ["energy", "mixture", "autoregressive"])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a tiny corpus, an autoencoder, and a trained run of every model with the recipe `fast`."""
    work = tmp_path_factory.mktemp("heads")
    (work / "text").mkdir()
    for index in range(30):
        lines = [f"def f{index}_{n}(x):\n    return x + {n * index}\n" for n in range(12)]
        (work / "text" / f"{index}.py").write_text("".join(lines))
    prepare([str(work / "text")], byte_tokenizer(), work / "shards", valid_fraction=0.2, workers=1)
    model = {"patch_size": 2, "width": 16, "inner": 24, "latent": 8}
    (work / "ae.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": model}))
    (work / "factored.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": {**model, "factored": True}}))
    for name, own in MODELS.items():
        model = {"backbone": {"layers": 1, "width": 16, "inner": 32, "heads": 2}, **own}
        (work / f"{name}.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": model}))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ae", "factored"):
            words = ["train", "autoencoder", "--config", work / f"{name}.yaml", "--data", work / "shards"]
            assert command(patch, *words, "--out", work / name, "--device", "cpu") == 0
        for name in MODELS:
            assert train(patch, work, name, work / name) == 0
    return work


def command(patch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit status of the command line."""
    patch.setattr(sys, "argv", ["nextvec", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def train(patch: pytest.MonkeyPatch, work: Path, name: str, out: Path, *more: str) -> int:
    words = ["train", "lm", "--config", work / f"{name}.yaml", "--data", work / "shards", "--out", out]
    return command(patch, *words, "--autoencoder", encoder_of(work, name), "--device", "cpu", *more)


def refused(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence of a refused command."""
    capsys.readouterr()
    assert command(patch, *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def rows(run: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]


def head_of(name: str) -> str:
    return FORMS[name][0] if name in FORMS else name


def encoder_of(work: Path, name: str) -> Path:
    return work / ("factored" if head_of(name) in ("categorical", "mixture") else "ae")


@every_model
def test_training_logs_its_loss_and_writes_a_run(work: Path, name: str) -> None:
    head = head_of(name)
    trained = [row for row in read_metrics(work / name) if row["kind"] == "train"]
    held_out = [row for row in read_metrics(work / name) if row["kind"] == "eval"]
    for row in trained:
        assert row["loss"] == pytest.approx(row[OBJECTIVES[head]] + row["auxiliary"], rel=1e-5)
    assert trained[-1][OBJECTIVES[head]] < trained[0][OBJECTIVES[head]] + (1.0 if head == "energy" else 0.0)
    assert {OBJECTIVES[head], "conditioning_gap"} <= held_out[-1].keys()
    card = (work / name / "README.md").read_text(encoding="utf-8")
    assert f"| head | {head}, 1 block" in card
    assert (f"draws in {HEADS[head].get('steps')} steps of" in card) is (head in ("flow", "diffusion", "categorical"))
    model = load_run(work / name).model
    assert isinstance(model, Calm)
    assert model.config.head.kind == head
    assert model.config.input == MODELS[name].get("input", "tokens")
    assert ("| input | the tokens of a patch |" in card) is (name not in FORMS)


@every_model
def test_the_recipe_paper_interrupted_and_resumed_equals_uninterrupted(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(monkeypatch, work, name, whole, "recipe.name=paper") == 0
    original = Batches.batch

    def batch(self: Batches, index: int) -> torch.Tensor:
        if index == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", batch)
        assert train(patch, work, name, cut, "recipe.name=paper") == 130
    again = ["train", "lm", "--out", cut, "--resume", "--autoencoder", encoder_of(work, name), "--device", "cpu"]
    assert command(monkeypatch, *again) == 0
    before, after = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows(whole) == rows(cut)


@every_model
def test_brier_lm_generation_and_operations(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "eval.json"
    words = [
        "eval",
        work / name,
        "--data",
        work / "shards" / "valid",
        "--draws",
        2,
        "--max-documents",
        2,
        "--json",
        out,
    ]
    assert command(monkeypatch, *words) == 0
    result = json.loads(out.read_text())
    assert result["head"]["kind"] == head_of(name)
    assert len(result["brier"]["brier"]) == 4
    texts = []
    for temperature in (1.0, 0.5, 1.0):
        capsys.readouterr()
        words = ["generate", work / name, "--prompt", "def f(x", "--temperature", temperature, "--candidates", 6]
        assert command(monkeypatch, *words, "--max-tokens", 12, "--seed", 3) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2]
    assert all(text.startswith("def f(x") for text in texts)
    assert command(monkeypatch, "flops", work / name, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["inference_flops_per_token"] > 0


@every_model
def test_bench_measures_its_training_step(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    head = head_of(name)
    monkeypatch.setattr(run, "square_rates", functools.partial(limits.square_rates, sides=(16,)))
    monkeypatch.setattr(memory, "peak_bytes", memory.measure)
    monkeypatch.setattr(limits, "BURST", 1e-5)
    out = tmp_path / "bench.json"
    words = ["bench", "train", "--config", work / f"{name}.yaml", "--repeats", 1, "--seconds", 1e-6, "--device", "cpu"]
    words += [
        f"model.autoencoder.factored={str(head in ('categorical', 'mixture')).lower()}",
        "model.autoencoder.vocab_size=259",
        "model.autoencoder.patch_size=2",
        "model.autoencoder.width=16",
    ]
    assert command(monkeypatch, *words, "--no-plain", "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["tokens_per_s"] > 0
    assert found["breakdown"]["head"]["share"] > 0
    assert ("energy loss" in found["breakdown"]) is (head == "energy")
    if head != "energy":
        assert f"this model the {head} head: --no-plain" in refused(monkeypatch, capsys, *words)
    elif name in FORMS:
        assert "this model has the input latents: --no-plain" in refused(monkeypatch, capsys, *words)


@with_solver
def test_another_solver_at_the_command_line(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    solver, foreign = {"flow": ("heun", "ddim"), "diffusion": ("ddim", "euler"), "categorical": ("euler", "heun")}[head]
    data = ["--data", work / "shards" / "valid", "--max-documents", 2]
    found = []
    for steps in (2, 3):
        out = tmp_path / f"{steps}.json"
        words = ["eval", work / head, *data, "--draws", 2, "--json", out]
        assert command(monkeypatch, *words, "--solver", solver, "--steps", steps) == 0
        found.append(json.loads(out.read_text()))
    assert [(each["head"]["solver"], each["head"]["steps"]) for each in found] == [(solver, 2), (solver, 3)]
    own = HEADS[head].get("solver", "euler" if head == "categorical" else "midpoint")
    assert load_run(work / head).config.model.head.solver == own  # the run is as it was
    operations = []
    for steps in (2, 3):
        capsys.readouterr()
        assert command(monkeypatch, "flops", work / head, "--steps", steps, "--json") == 0
        operations.append(json.loads(capsys.readouterr().out)[0]["inference_flops_per_token"])
    assert operations[0] < operations[1]
    for verb in (
        ["eval", work / head, *data],
        ["generate", work / head],
        ["bound", work / head, *data],
        ["flops", work / head],
    ):
        told = refused(monkeypatch, capsys, *verb, "--solver", foreign)
        assert f"the {head} head knows the solvers" in told
        assert told.endswith(f"got {foreign!r}")
        assert "steps must be at most 1000" in refused(monkeypatch, capsys, *verb, "--steps", 1001)


@without_solver
def test_a_head_without_a_solver_says_so(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    data = ["--data", work / "shards" / "valid"]
    for verb in (["eval", work / head, *data], ["generate", work / head], ["flops", work / head]):
        told = refused(monkeypatch, capsys, *verb, "--steps", 3)
        assert told == f"nextvec: the {head} head draws without a solver: leave out solver and steps"
    told = refused(monkeypatch, capsys, "eval", work / "ae", *data, "--solver", "heun")
    assert "holds a Autoencoder, which has no head: leave --solver and --steps out" in told


@every_model
def test_bits_per_byte_are_bounded_where_latents_are_drawn_and_exact_where_tokens_are(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["bound", work / name, "--data", work / "shards" / "valid", "--draws", 2, "--patches", 8]
    assert command(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert ("baseline, exact: " in told) == (head_of(name) == "autoregressive")
    assert ("upper bound" in told) == (head_of(name) != "autoregressive")


def test_a_new_kind_leaves_the_settings_of_the_old_head_behind(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model.head.kind=flow` over a file with an energy head: its `noise` goes, its `blocks` stay."""
    assert train(monkeypatch, work, "energy", tmp_path / "run", "model.head.kind=flow", "train.steps=1") == 0
    assert load_run(tmp_path / "run").config.model.head.model_dump() == {
        "kind": "flow", "predicts": "velocity", "blocks": 1, "teacher_draws": 8, "solver": "midpoint", "steps": 10,
    }  # fmt: skip
    words = ["train", "lm", "--config", work / "energy.yaml", "--data", work / "shards", "--autoencoder", work / "ae"]
    told = refused(monkeypatch, capsys, *words, "--out", tmp_path / "x", "model.head.kind=flow", "energy.draws=4")
    assert "energy is for the energy head, and model.head.kind is flow: leave it out" in told
    assert not (tmp_path / "x").exists()
