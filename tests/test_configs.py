"""Shipped settings: the paper's values, said once; and each recipe end to end at tiny size with the same file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nextvec.cli import main
from nextvec.config import AutoencoderRun, CalmRun, RunConfig, TokenLMRun
from nextvec.configs.read import read_settings, shipped
from nextvec.errors import ConfigError
from nextvec.evaluate.paper import AUTOENCODER_TOKENS, PAPER_TOKENS
from nextvec.presets import LLAMA3_VOCAB, PRESETS, preset
from nextvec.recipes import SHIPPED, arena
from nextvec.rundir import read_config
from nextvec.sweep.spec import read_spec
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train import VERBS
from nextvec.train.metrics import read_metrics
from nextvec.train.settings import complete_run

PAPER = {
    "autoencoder": "autoencoder-paper",
    **{name: name for name in ("calm-m", "calm-l", "calm-xl", "transformer-s", "transformer-m", "transformer-l")},
}
TRAIN = ["train.steps=2", "train.accumulate=2", "train.log_every=1", "data.context_tokens=64", "data.rows=2"]
BACKBONE = [f"model.backbone.{name}" for name in ("layers=1", "width=16", "inner=16", "heads=2")]
TINY = {
    "autoencoder": [*TRAIN, "model.width=16", "model.inner=16", "model.latent=8"],
    "lm": [*TRAIN, *BACKBONE, "model.head.noise=4", "model.head.blocks=1"],
    "baseline": [*TRAIN, *BACKBONE],
}


class Llama:
    vocab_size, mask_id = LLAMA3_VOCAB, 0


def recipe(name: str) -> RunConfig:
    settings = read_settings(f"paper/{name}")
    settings["data"]["path"] = "shards"
    encoder = preset("autoencoder-paper") if settings["kind"] == "calm" else None
    return complete_run(settings, Llama(), encoder, name)  # type: ignore[arg-type]


def verb_of(name: str) -> str:
    kind = read_settings(f"paper/{name}")["kind"]
    return next(verb for verb, of in VERBS.items() if of == kind)


def command(patch: pytest.MonkeyPatch, *words: object) -> int:
    patch.setattr(sys, "argv", ["nextvec", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a tiny corpus, and the recipe's autoencoder trained on it for two steps."""
    work = tmp_path_factory.mktemp("configs")
    (work / "text").mkdir()
    for index in range(24):
        lines = [f"def f{index}_{n}(x):\n    return x + {n * index}\n" for n in range(12)]
        (work / "text" / f"{index}.py").write_text("".join(lines))
    prepare([str(work / "text")], byte_tokenizer(), work / "shards", valid_fraction=0.3, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, work, "autoencoder", work / "autoencoder") == 0
    return work


def train(patch: pytest.MonkeyPatch, work: Path, name: str, out: Path) -> int:
    verb = verb_of(name)
    encoder = ["--autoencoder", work / "autoencoder"] if verb == "lm" else []
    words = ["--config", f"configs/paper/{name}.yaml", "--data", work / "shards", "--out", out, "--device", "cpu"]
    return command(patch, "train", verb, *words, *encoder, *TINY[verb])


def test_there_is_a_recipe_for_each_run_of_the_paper() -> None:
    assert shipped() == sorted([*(f"paper/{name}" for name in PAPER), *SHIPPED.values()])


def test_the_fast_files_train_one_after_the_other(monkeypatch: pytest.MonkeyPatch, work: Path, tmp_path: Path) -> None:
    """As their comments say, on models made small; the arena's settings are theirs."""
    encoder, small = tmp_path / "encoder", ["--device", "cpu", *TRAIN, "data.context_tokens=64", "optim.warmup=1"]
    for kind, file in SHIPPED.items():
        settings, arms = read_settings(file), arena(kind, 2048, 10.0)
        assert {name: settings[name] for name in arms} == arms
        assert settings.keys() - arms.keys() <= {"kind", "train"}
        verb = next(verb for verb, of in VERBS.items() if of == settings["kind"])
        words = ["train", verb, "--config", file, "--data", work / "shards", "--out", tmp_path / kind]
        if kind == "autoencoder":
            words[-1] = encoder
            words += ["model.width=16", "model.inner=16", "model.latent=8"]
        else:
            words += ["--autoencoder", encoder] if kind == "calm" else []
            words += ["model.autoencoder.patch_size=4"] if kind == "multi-token" else []
            words += BACKBONE
        assert command(monkeypatch, *words, *small) == 0
    assert arena("autoencoder", 300, 10.0)["data"]["rows"] == 1


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_papers(name: str) -> None:
    run = recipe(name)
    assert run.model == preset(PAPER[name])
    assert run.optim.model_dump(exclude={"matrix_lr", "momentum", "rows_lr"}) == {
        "name": "adamw", "lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0,
        "warmup": 1000 if name == "autoencoder" else 2000, "schedule": "constant",
    }  # fmt: skip
    assert (run.train.init_std, run.train.precision, run.data.packing) == (0.02, "bf16", "packed")
    step = run.data.rows * run.data.context_tokens * run.train.accumulate
    planned = AUTOENCODER_TOKENS if name == "autoencoder" else PAPER_TOKENS
    assert run.train.steps == (30_000 if name == "autoencoder" else 250_000)
    assert step == (2**19 if name == "autoencoder" else 2**21)
    assert step * run.train.steps == pytest.approx(planned, rel=0.05)
    if isinstance(run, CalmRun):
        energy = run.energy
        assert (energy.draws, energy.teacher, energy.teacher_draws, energy.alpha) == (8, "sampled", 100, 1.0)
        assert run.recipe.name == "paper"
        assert run.data.context_tokens == 4 * 2048
    elif isinstance(run, TokenLMRun):
        assert run.data.context_tokens == 2048
    else:
        assert isinstance(run, AutoencoderRun)


def test_the_papers_ablations_stand_on_the_same_settings() -> None:
    spec = read_spec("paper-draws")
    calm = spec.settings(spec.points()[0], "lm", 0)
    ours = read_settings("paper/calm-m")
    assert calm["model"] == ours["model"]
    assert calm["optim"] == {name: float(v) if name in ("lr", "eps") else v for name, v in ours["optim"].items()}
    assert calm["energy"] == {**ours["energy"], "teacher": "exact", "draws": 8}
    assert calm["data"] == ours["data"]
    assert spec.settings(spec.points()[0], "autoencoder", 0)["train"]["accumulate"] == 8


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_trains_is_scored_and_writes_at_tiny_size(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(monkeypatch, work, name, out) == 0
    config, rows = read_config(out), read_metrics(out)
    assert isinstance(config, RunConfig)
    assert (config.optim.name, config.data.packing, config.train.precision) == ("adamw", "packed", "bf16")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert rows[0]["lr"] == pytest.approx(3e-4 / config.optim.warmup)
    assert rows[-1]["kind"] == "eval"
    context = [] if name == "autoencoder" else ["--context-tokens", "64", "--stride", "4", "--draws", "2"]
    assert command(monkeypatch, "eval", out, "--data", work / "shards" / "valid", "--max-documents", 2, *context) == 0
    if name != "autoencoder":
        capsys.readouterr()
        assert command(monkeypatch, "generate", out, "--prompt", "def ", "--max-tokens", 8, "--candidates", 8) == 0
        assert capsys.readouterr().out.startswith("def ")


@pytest.mark.parametrize("name", PAPER)
def test_what_a_recipe_costs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "flops", f"paper/{name}", "--rate", "4e14", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    run = recipe(name)
    tokens = run.train.steps * run.train.accumulate * run.data.rows * run.data.context_tokens
    assert row["train_tokens"] == tokens
    assert row["train_seconds"] == pytest.approx(row["train_flops_split"] / 4e14)
    assert command(monkeypatch, "flops", PAPER[name], "--tokens", tokens, "--json") == 0
    (same,) = json.loads(capsys.readouterr().out)
    assert (row["params"], row["train_flops"]) == (same["params"], same["train_flops"])


def test_the_table_of_costs_is_what_flops_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    for name in PAPER:
        assert command(monkeypatch, "flops", f"paper/{name}", "--rate", "4e14") == 0
        out = capsys.readouterr().out
        assert command(monkeypatch, "flops", f"paper/{name}", "--json") == 0
        (row,) = json.loads(capsys.readouterr().out)
        time = out.partition("at 4e+14 operations a second: ")[2].partition(" of training")[0]
        number, unit = time.split()
        days = float(number) / (24 if unit == "hours" else 1)
        cells = [f"`paper/{name}`", f"{row['train_tokens'] / 1e9:.3g}B", f"{row['train_flops_split'] / 1e20:.3g}"]
        line = next(line for line in text.splitlines() if line.startswith(f"| {cells[0]} |"))
        found = [cell.strip() for cell in line.strip("|").split("|")]
        assert found[:3] == cells
        assert float(found[3]) == pytest.approx(days, rel=0.01)


def test_another_head_leaves_behind_what_only_the_parents_has(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("from: fast/calm\nmodel: {head: {kind: flow, teacher_draws: 2}}\n")
    assert read_settings(str(path))["model"]["head"] == {"kind": "flow", "blocks": 1, "teacher_draws": 2}
    path.write_text("from: fast/calm\nmodel.head.blocks: 2\n")
    assert read_settings(str(path))["model"]["head"] == {
        "kind": "mixture",
        "blocks": 2,
        "inner": 512,
        "recall": 1,
        "grams": 131072,
    }


def test_a_file_of_ones_own_stands_on_others(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "from: [base, paper/calm-l]\nmodel: {backbone: {layers: 2}}\ntrain: {steps: 7}\n"
    )
    (tmp_path / "base.yaml").write_text("train: {steps: 5, seed: 3}\noptim: {lr: 1e-3}\n")
    found = read_settings(str(tmp_path / "mine.yaml"))
    assert found["kind"] == "calm"
    assert found["train"] == {**read_settings("paper/calm-l")["train"], "steps": 7, "seed": 3}
    assert found["model"]["backbone"] == {"layers": 2, "width": 1536, "inner": 4096, "heads": 16}
    assert "from" not in found
    assert (
        read_settings("paper/calm-l.yaml")
        == read_settings("configs/paper/calm-l.yaml")
        == read_settings("paper/calm-l")
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_by_the_name_of_its_preset(name: str, tmp_path: Path) -> None:
    """Sizes only: vocabulary and autoencoder are the run's."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"model": {"preset": name}}))
    settings = read_settings(str(path))
    expected = preset(name)
    encoder = getattr(expected, "autoencoder", None)
    run = complete_run({**settings, "data": {"path": ""}}, Fixed(expected.vocab_size), encoder, name)
    assert run.model == expected


class Fixed:
    """The tokenizer of the tiny presets has its mask at 1, that of the others says 0."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.mask_id = vocab_size, int(vocab_size < 1000)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", "expected a mapping of settings, got list"),
        ("from: a", "takes its settings `from` itself: a.yaml from a.yaml"),
        ("from: paper/calm-n", r"config file paper/calm-n does not exist; did you mean 'paper/calm-m'\?"),
        ("model: {preset: calm-n}", r"unknown preset 'calm-n'; did you mean 'calm-m'\?"),
        (
            "kind: token_lm\nmodel: {preset: calm-m}",
            "model.preset is of the kind 'calm', and the settings are of 'token_lm'",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_settings(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_a_sweep_refuses_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "data: {source: x}\nbase: {lm: {from: paper/transformer-s}}\ngrid: {lm.energy.draws: [2]}\n"
    )
    with pytest.raises(
        ConfigError, match=r"base.lm: paper/transformer-s has kind 'token_lm', and this stage trains 'calm'"
    ):
        read_spec(str(tmp_path / "s.yaml"))


def test_rate_is_for_one_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def words(*more: Any) -> str:
        command(monkeypatch, "flops", *more)
        found = capsys.readouterr()
        return found.err or found.out

    assert "--rate is for one model; leave it out of --table1" in words("--table1", "--rate", "1e12")
    assert "at 1e+15 operations a second:" in words("autoencoder-paper", "--rate", "1e15")
