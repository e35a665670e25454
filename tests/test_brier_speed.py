"""benchmarks/brier_speed.py: its arms measure the same figure, and its command runs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "brier_speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("brier_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
@pytest.mark.parametrize("name", ["calm", "baseline"])
def test_the_arms_agree_on_the_figure(speed, monkeypatch, name):
    """400 positions, each with a value in [-1, 1]: two arms differ by less than 6 standard errors of a difference."""
    monkeypatch.setattr(speed, "VOCAB", 16)
    calm, baseline = speed.build(16, 1, 0.4)
    model, stride = (calm, 2) if name == "calm" else (baseline, 1)
    text = torch.from_numpy(np.random.default_rng(0).integers(0, 16, 400 * stride + 4))
    others = {"calm": (speed.loop_calm, speed.authors_calm), "baseline": (speed.loop_baseline, speed.authors_baseline)}
    loop, authors = others[name]
    runs = [speed.ours(model, text, stride), loop(model, text, 1), authors(model, text)]
    found = [run(torch.Generator().manual_seed(seed)) for seed, run in enumerate(runs)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=6 * 1.4 / 400**0.5)
    assert speed._agreement(model) == pytest.approx(0.4, abs=0.1)


def test_the_command_writes_what_it_measured(speed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "VOCAB", 16)
    out = tmp_path / "speed.json"
    settings = {"positions": 12, "width": 16, "layers": 1, "repeats": 1, "loop-every": 3, "noise": 2, "json": out}
    speed.main([f"--{name}={value}" for name, value in settings.items()])
    found = json.loads(out.read_text())["found"]
    assert set(found) == {"calm, K = 2", "baseline"}
    for case in found.values():
        assert set(case["ratio"]) == {"loop", "authors"}
        assert {arm: len(values) for arm, values in case["deviation"].items()} == {"ours": 4, "authors": 4}
        assert case["positions"] == 12
    assert "times as fast" in capsys.readouterr().out
