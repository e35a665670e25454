"""`nextvec bench` as a command: interleaved repeats, every figure in the JSON, trained runs only, mistakes in one sentence."""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench_runs import CPU, DATA, PARTS, RUNS, TOKENIZER, VOCAB
from nextvec.bench import limits, memory, run, steps
from nextvec.bench.sampling import held_out
from nextvec.bench.settings import training_config
from nextvec.bench.show import lines
from nextvec.bench.steps import write_text
from nextvec.bench.work import Spec, make_work
from nextvec.cli import main
from nextvec.config import (
    AutoencoderRun,
    CalmRun,
    TokenLMRun,
    dump_yaml,
)
from nextvec.errors import ConfigError, DataError
from nextvec.presets import calm_m, calm_reference
from nextvec.rundir import Run, build_model, save_run
from nextvec.text.prepare import prepare
from nextvec.text.shards import TokenShards

ALWAYS = {"tokens_per_s", "plain_tokens_per_s", "ratio", "share_of_limit", "peak_bytes", "breakdown"}
CARRIED = ALWAYS | {"machine", "config", "seed", "repeats", "limits", "definitions", "commit", "precision"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small square products, and memory measured in this process: the whole of it has a test of its own."""
    monkeypatch.setattr(run, "square_rates", functools.partial(limits.square_rates, sides=(16, 32)))
    monkeypatch.setattr(memory, "peak_bytes", memory.measure)
    monkeypatch.setattr(limits, "BURST", 1e-5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path / "text", VOCAB, 3000)
    return tmp_path / "text"


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nextvec", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code is None or isinstance(stop.value.code, int)
    return stop.value.code or 0


# --- whole benchmarks


def test_repeats_are_interleaved_with_the_limits_between_them() -> None:
    calls: list[str] = []

    class Fake:
        tokens = 1
        mark: Any = None

        def __init__(self, name: str) -> None:
            self.name = name

        def warm(self) -> None: ...

        def __call__(self) -> None:
            calls.append(self.name)
            time.sleep(0.001)

    works = {name: Fake(name) for name in ("ours", "plain")}
    times = run.interleave(works, 3, 1e-9, CPU, lambda: calls.append("limits"))
    assert calls == ["ours", "ours", "plain", "plain", *(["ours", "plain", "limits"] * 3)]
    assert all(len(values) == 3 and min(values) >= 0.001 for values in times.values())
    calls.clear()
    run.interleave(works, 2, 0.1, CPU, lambda: None)
    assert 4 < calls.count("ours") <= 52


def test_medians_and_spread() -> None:
    assert run.median([3.0, 1.0, 2.0]) == 2.0
    assert run.median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert run.spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0, "repeats": [3.0, 1.0, 2.0]}


@pytest.mark.parametrize("what", RUNS)
def test_training_benchmarks_carry_every_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(RUNS[what]), encoding="utf-8")
    out = tmp_path / "out.json"
    options = [
        "--config",
        tmp_path / "config.yaml",
        "--json",
        out,
        "--repeats",
        2,
        "--seconds",
        1e-6,
        "--device",
        "cpu",
    ]
    assert run_cli(monkeypatch, what, *options, "train.accumulate=1") == 0
    found = json.loads(out.read_text())
    assert set(found) >= CARRIED
    assert found["bench"] == what
    assert found["seed"] == 4
    assert found["precision"] == "fp32"
    assert found["config"]["train"]["accumulate"] == 1
    assert found["tokens_per_s"] == found["arms"]["ours"]["tokens_per_s"]["median"]
    assert found["ratio"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"])
    ends = found["repeats"]["tokens_per_s"]
    assert found["repeats"]["count"] == 2
    assert ends["min"] <= ends["median"] == found["tokens_per_s"] <= ends["max"]
    assert found["repeats"]["ratio"]["min"] <= found["repeats"]["ratio"]["max"]
    assert found["share_of_limit"] > 0
    assert found["flops_per_s"] > 0
    assert isinstance(found["peak_bytes"], int)
    assert isinstance(found["plain_peak_bytes"], int)
    assert set(found["breakdown"]) == PARTS[what]
    assert {row["dtype"] for row in found["limits"]["matmul"]} >= {"fp32"}
    assert found["limits"]["memory_bytes_per_s"] > 0
    for arm in found["arms"].values():
        seconds = sum(row["seconds"] for row in arm["products"])
        assert arm["share_of_limit"] == pytest.approx(seconds / arm["seconds"]["median"])
    shown = capsys.readouterr().out
    assert f"bench {what}: cpu fp32" in shown
    assert "ratio" in shown
    assert "parts of plain: " in shown
    for load, busy in ((0.0, False), (99.0, True)):
        found["arms"]["ours"]["load_average"] = [load, 2.0]
        assert ("busy" in "\n".join(lines(found))) is busy


def test_without_the_plain_arm_its_figures_are_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(dump_yaml(RUNS["baseline"]), encoding="utf-8")
    options = ["--config", tmp_path / "c.yaml", "--repeats", 1, "--seconds", 1e-6, "--json", tmp_path / "out.json"]
    monkeypatch.setattr(steps, "plain_module", None)  # would be called
    assert run_cli(monkeypatch, "baseline", *options, "--no-plain", "--device", "cpu") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) >= CARRIED
    assert found["plain_tokens_per_s"] is found["ratio"] is found["plain_peak_bytes"] is None
    assert found["repeats"]["ratio"] is None
    assert list(found["arms"]) == ["ours"]


def test_only_our_arm_is_compiled_and_only_when_asked(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_blocks(module: nn.Module, device: torch.device, trial: Any, say: Any) -> bool:
        trial()
        compiled.append(module)
        return True

    monkeypatch.setattr(steps, "compile_blocks", compile_blocks)
    settings = run.Settings(device="cpu", repeats=1, seconds=1e-6)
    source = text.parent / "c.yaml"
    source.write_text(dump_yaml(RUNS["baseline"]), encoding="utf-8")
    run.bench_training("baseline", str(source), [], settings, lambda line: None)
    assert not compiled
    run.bench_training("baseline", str(source), ["train.compile=true"], settings, lambda line: None)
    assert [type(module).__module__ for module in compiled] == ["nextvec.train.objectives"] * 2  # timed, and its memory


def test_the_reference_is_the_configuration_of_the_targets() -> None:
    config = training_config("train", "reference", [])
    assert isinstance(config, CalmRun)
    assert config.model == calm_reference()
    assert (config.data.rows, config.data.context_tokens) == (4, 1024)
    assert (config.recipe.name, config.optim.name, config.energy.draws) == ("paper", "adamw", 8)
    autoencoder = training_config("autoencoder", "reference", [])
    assert isinstance(autoencoder, AutoencoderRun)
    assert autoencoder.data.rows * autoencoder.data.context_tokens == 16384
    assert (autoencoder.model.vocab_size, autoencoder.model.width, autoencoder.model.patch_size) == (4096, 256, 4)
    baseline = training_config("baseline", "reference", [])
    assert isinstance(baseline, TokenLMRun)
    assert baseline.model.backbone == config.model.backbone
    large = training_config("train", "calm-m", ["data.rows=1", "recipe.name=fast"])
    assert isinstance(large, CalmRun)
    assert (large.model, large.data.rows, large.recipe.name) == (calm_m(), 1, "fast")


# --- trained runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories of an untrained and a "trained" model of each kind (every parameter moved a little)."""
    folder = tmp_path_factory.mktemp("runs")
    for what, config in RUNS.items():
        model = build_model(config, torch.Generator().manual_seed(0))
        save_run(folder / f"fresh-{what}", config, model, TOKENIZER)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_run(folder / what, config, model, TOKENIZER)
    (folder / "train" / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "tokens": 192}\n', encoding="utf-8")
    rows = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 3}) for i in range(4)]
    (folder / "held.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("what", ["train", "baseline"])
def test_generation_of_a_trained_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path, what: str
) -> None:
    options = ["--run", runs / what, "--repeats", 2, "--seconds", 1e-6, "--json", tmp_path / "out.json", "--tokens", 6]
    assert run_cli(monkeypatch, "generate", *options, "--candidates", 5, "--prompt", "de", "--device", "cpu") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) >= CARRIED
    assert found["training_tokens"] == (192 if what == "train" else None)
    arms = ["t05", "plain_t05", "t1", "plain_t1"] if what == "train" else ["t05", "t1"]
    assert list(found["arms"]) == arms
    assert found["tokens_per_s"] == found["arms"]["t05"]["tokens_per_s"]["median"]
    if what == "train":
        assert found["plain_tokens_per_s"] == found["arms"]["plain_t05"]["tokens_per_s"]["median"]
        for name in ("t05", "t1"):
            rates = [found["arms"][arm]["tokens_per_s"]["median"] for arm in (name, f"plain_{name}")]
            assert found["ratios"][name]["median"] == pytest.approx(rates[0] / rates[1])
        pools = found["arms"]["t05"]["pools"]
        assert pools["candidates"] == 5
        assert 0.2 <= pools["unique"] <= 1
        assert "candidates" in capsys.readouterr().out
    else:
        assert found["plain_tokens_per_s"] is None
        assert found["arms"]["t05"]["pools"] is None
    assert found["arms"]["t1"]["pools"] is None
    assert found["share_of_limit"] > 0
    assert set(found["breakdown"]) >= {"backbone", "vocabulary", "temperature"}
    if what == "train":
        drawn = [
            sum(
                row["count"] * row["shapes"][0][0]
                for row in found["arms"][arm]["products"]
                if row["shapes"][-1] == [8, VOCAB]
            )
            for arm in ("t05", "t1")
        ]
        assert drawn[0] > drawn[1] > 0  # 5 candidates decoded, as far as needed, against 1


@pytest.mark.parametrize("what", ["train", "baseline"])
def test_evaluation_of_a_trained_run(monkeypatch: pytest.MonkeyPatch, runs: Path, tmp_path: Path, what: str) -> None:
    options = ["--run", runs / what, "--repeats", 1, "--seconds", 1e-6, "--json", tmp_path / "out.json", "--tokens", 90]
    assert (
        run_cli(monkeypatch, "evaluate", *options, "--data", runs / "held.jsonl", "--draws", 2, "--device", "cpu") == 0
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) >= CARRIED
    arm = found["arms"]["evaluate"]
    assert arm["tokens"] == 90
    assert arm["context_tokens"] > arm["tokens"]  # windows overlap by half
    assert set(found["breakdown"]) >= {"backbone", "vocabulary", "scores"}


@pytest.mark.parametrize("named", ["shards", "shards/train"])
def test_held_out_text_lies_beside_the_training_shards(tmp_path: Path, named: str) -> None:
    for index in range(30):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{index}.txt").write_text(f"text number {index}\n" * 3, encoding="utf-8")
    prepare([str(tmp_path / "text")], TOKENIZER, tmp_path / "shards", valid_fraction=0.5, workers=1)
    config = RUNS["train"].override(data=DATA.override(path=str(tmp_path / named)))
    found = held_out(Run(tmp_path, config, build_model(config), TOKENIZER), None, 100)
    valid = TokenShards.open(tmp_path / "shards" / "valid")
    assert sum(len(document) for document in found) == 100
    assert np.array_equal(found[0], valid.document(0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trane"], "unknown benchmark 'trane'; did you mean 'train'?"),
        (["train", "--config", "calm-x"], "--config must be reference, a preset (transformer-s, "),
        (["train", "--config", "transformer-s"], "has kind 'token_lm', and bench train measures 'calm'; use: nextvec bench "),
        (["train", "data.rws=3"], "reference: data: unknown key 'rws'; did you mean 'rows'?"),
        (["train", "--repeats", "0"], "repeats must be at least 1; got 0"),
        (["train", "--seconds", "0"], "seconds must be above 0; got 0.0"),
        (["train", "--precision", "fp8"], "precision must be one of auto, bf16, fp32; got 'fp8'"),
        (["train", "--run", "x"], "bench train measures training steps of a new model; leave --run out"),
        (["train", "data.context_tokens=1022"], "context_tokens must be a multiple of the patch size 4; got 1022"),
        (["generate"], "bench generate measures a trained run: give --run RUN"),
        (["generate", "--run", "x", "--config", "calm-m"], "bench generate takes its settings from --run"),
        (["generate", "--run", "{}/absent"], "absent is not a run directory"),
        (["generate", "--run", "{}/autoencoder"], "is an autoencoder, which has no next patch to draw"),
        (["generate", "--run", "{}/fresh-train"], "fresh-train is not trained: the backbone is as it was initialised"),
        (["evaluate", "--run", "{}/fresh-baseline"], "is not trained: the backbone"),
        (["generate", "--run", "{}/train", "--candidates", "1"], "candidates"),
        (["evaluate", "--run", "{}/train"], "is not where its training was: give --data"),
        (["evaluate", "--run", "{}/train", "--data", "{}/none.txt"], "none.txt"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path, arguments: list[str], sentence: str
) -> None:
    assert run_cli(monkeypatch, *(word.replace("{}", str(runs)) for word in arguments), "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("nextvec: ")
    assert error.count("\n") == 1


def test_a_trained_backbone_does_not_excuse_an_untrained_head(runs: Path, tmp_path: Path) -> None:
    config = RUNS["train"]
    model: Any = build_model(config, torch.Generator().manual_seed(0))
    for part in (model.backbone, model.autoencoder):
        for parameter in part.parameters():
            parameter.data.add_(0.1)
    save_run(tmp_path / "half", config, model, TOKENIZER)
    request = {"kind": "generate", "run": str(tmp_path / "half"), "tokens": 4, "device": "cpu", "precision": "fp32"}
    with pytest.raises(DataError, match="the head is as it was initialised"):
        make_work(Spec.parse({**request, "threads": 1}))


def test_converted_weights_have_no_training_step(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("imported: {source: x}\nkind: calm\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no training settings to measure"):
        training_config("train", str(tmp_path / "c.yaml"), [])
