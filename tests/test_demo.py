"""The demo, at its shortest: everything that it promises is there, and an interrupted one goes on."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from nextvec import Calm, load_run
from nextvec.demo import Demo, run_demo
from nextvec.demo.settings import PAPER_STAGES, STAGES
from nextvec.demo.stages import demo_command, open_folder
from nextvec.errors import ConfigError


@pytest.mark.slow
def test_the_shortest_demo_leaves_models_figures_and_a_report_and_goes_on_where_it_was(tmp_path: Path) -> None:
    demo = Demo(out=tmp_path / "demo", minutes=0.5)
    lines: list[str] = []
    report = run_demo(demo, lines.append)
    assert report.stat().st_size > 50_000
    summary = json.loads((demo.out / "summary.json").read_text(encoding="utf-8"))
    assert {"seconds", "K", "L", "V", "N", "recipe", "decode_rule", "seed"} <= summary.keys()
    assert {"token_accuracy", "sigma", "collapsed_dims"} <= summary["autoencoder"].keys()
    for arm in ("calm", "baseline"):
        assert len(summary[arm]["brier"]) == len(summary[arm]["brier_stderr"]) == 4
        assert summary[arm]["train_tokens"] > 0
        assert summary[arm]["generate_tokens_per_s"]["t05"] > 0
        assert (demo.out / arm / "README.md").read_text(encoding="utf-8").startswith("# ")
    assert summary["K"] >= 2
    assert summary["decode_rule"] == "argmax"
    assert "Report:" in lines[-1]

    names = {name for name, _ in load_run(demo.out / "calm").model.named_parameters()}
    assert not any("auxiliary" in name for name in names)  # training only
    assert Calm.from_pretrained(demo.out / "calm").generate("def ", max_tokens=8, candidates=4) is not None

    trained = {name: (demo.out / name / "model.safetensors").stat().st_mtime_ns for name in STAGES}
    report.unlink()  # as if interrupted at the very end
    run_demo(demo, lines.append)
    assert report.is_file()
    assert {name: (demo.out / name / "model.safetensors").stat().st_mtime_ns for name in STAGES} == trained


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds something that is not a demo; give another folder with --out"):
        run_demo(Demo(out=tmp_path))
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_an_older_demo_is_moved_aside_and_an_unfinished_one_goes_on(tmp_path: Path) -> None:
    demo, lines = Demo(out=tmp_path / "my demo", device="cpu"), list[str]()
    open_folder(demo, lines.append)
    (demo.out / "kept").write_text("work", encoding="utf-8")
    open_folder(replace(demo, device="auto"), lines.append)  # the same demo, on another device
    assert (demo.out / "kept").is_file()
    assert lines == []
    for number in (1, 2):
        open_folder(replace(demo, seed=number), lines.append)
        assert lines[-1] == f"The demo that was in {demo.out} is now in {tmp_path / f'my demo-{number}'}"
    assert (tmp_path / "my demo-1" / "kept").read_text(encoding="utf-8") == "work"
    command = shlex.split(demo_command(demo))
    assert command[command.index("--out") + 1] == str(demo.out)
    assert command[command.index("--device") + 1] == "cpu"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"minutes": 0.1}, "minutes must be between 0.5 and 1440; got 0.1"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\); got -1"),
        ({"recipe": "fats"}, "recipe must be fast or paper; got 'fats'"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Demo(**settings)  # type: ignore[arg-type]


def test_time_left_over_goes_to_the_later_stages() -> None:
    demo = Demo(minutes=8.0)
    on_time = demo.seconds_for("calm", 100.0)
    assert demo.seconds_for("calm", 40.0) > on_time > demo.seconds_for("calm", 200.0)
    left = 8.0 * 60 - 100 - 12 - 7 * 8.0
    assert demo.seconds_for("calm", 100.0) == pytest.approx(left * 0.44 / 0.94)
    paper = Demo(minutes=8.0, recipe="paper")
    assert paper.seconds_for("calm", 100.0) == pytest.approx(left * 0.52 / 0.82)
    assert sum(STAGES.values()) == sum(PAPER_STAGES.values()) == 1.0
    assert demo.seconds_for("baseline", 479.0) == 3.0  # never nothing
