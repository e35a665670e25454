"""train.anomalies: real runs on and off the plateau, each threshold from both sides, and what training says of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvec.config import BackboneConfig, CalmConfig, CalmRun, DataSettings, EnergySettings, TrainSettings
from nextvec.presets import preset
from nextvec.train.anomalies import Anomaly, Detector
from test_train_loop import Fake, config, run

REAL = Path(__file__).parent / "fixtures" / "metrics"
Row = dict[str, Any]


def rows_of(name: str, kinds: tuple[str, ...] = ("train", "eval")) -> list[Row]:
    rows = [json.loads(line) for line in (REAL / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] in kinds]


def found(rows: list[Row], steps: int | None = None, alpha: float = 1.0) -> dict[str, Anomaly]:
    detector = Detector(steps, alpha)
    for row in rows:
        detector.add(row)
    return {anomaly.kind: anomaly for anomaly in detector.found}


def row(step: int, **values: Any) -> Row:
    return {"kind": "train", "step": step, **values}


@pytest.mark.parametrize("kinds", [("train", "eval"), ("train",)], ids=["with held-out rows", "without"])
def test_a_run_that_stayed_on_the_plateau_is_called_so_at_half_of_its_training(kinds: tuple[str, ...]) -> None:
    anomaly = found(rows_of("plateau", kinds), 250)["plateau"]
    assert (anomaly.first, anomaly.last) == (130, 250)
    assert anomaly.now(250)
    assert "fidelity 34.86 and diversity 17.25 have been flat since step 125" in anomaly.text
    assert ("no held-out row says the conditioning gap" in anomaly.text) == ("eval" not in kinds)


@pytest.mark.parametrize(
    ("name", "steps"), [("left", 250), ("slow", 700), ("demo", 722), ("demo", None), ("autoencoder", 500)]
)
def test_healthy_runs_raise_no_alarm_with_or_without_held_out_rows(name: str, steps: int | None) -> None:
    for kinds in (("train", "eval"), ("train",)):
        kept = found(rows_of(name, kinds), steps).keys()
        assert kept == ({"throughput"} if name == "slow" else set()), name  # its machine was busy indeed


def test_every_prefix_of_a_healthy_run_is_healthy_too_when_its_end_is_not_known() -> None:
    """Without the number of steps, patience is a multiple of the rise; `left` has 8 times its rise behind it at step 240."""
    for name in ("left", "demo"):
        assert "plateau" not in found(rows_of(name, ("train",)))


def curve(energy: float, rows: int = 40, start: float = 24.8) -> list[Row]:
    """A first row at which draws coincide, then `energy` of calibrated draws, flat."""
    return [row(1, fidelity=start, diversity=0.0)] + [
        row(step, fidelity=2 * energy, diversity=energy) for step in range(2, rows + 1)
    ]


def test_the_plateau_needs_flat_calibrated_terms_that_gain_nothing() -> None:
    law = 24.8 / 2**0.5  # energy of independent draws of the law, from the first row
    assert "plateau" in found(curve(law), 40)
    assert "plateau" not in found(curve(0.98 * law), 40)  # flat, but better than the law
    assert "plateau" not in found(curve(law)[:15], 40)  # too early: less than half, and than 8 times the rise at step 2
    assert "plateau" in found(curve(law)[:19])
    narrow = [{**each, "diversity": 0.8 * each["diversity"]} for each in curve(law)]
    assert "plateau" not in found(narrow, 40)  # draws too narrow: not the law's spread
    falling = [{**each, "fidelity": each["fidelity"] * 0.999 ** each["step"]} for each in curve(1.2 * law)]
    assert "plateau" not in found(falling, 40)


def test_a_measured_gap_decides_and_a_run_that_began_trained_needs_one() -> None:
    law = 24.8 / 2**0.5
    gap = {"kind": "eval", "step": 30, "conditioning_gap": 0.1}
    known = curve(law)
    assert "plateau" not in found([*known[:15], {**gap, "step": 15}, *known[15:20]], 40)
    assert "plateau" in found([*known[:15], {**gap, "step": 15, "conditioning_gap": 0.01}, *known[15:20]], 40)
    trained = [row(step, fidelity=2 * law, diversity=law) for step in range(1, 41)]
    assert "plateau" not in found(trained, 40)
    assert "plateau" in found([*trained[:30], {**gap, "conditioning_gap": 0.0}, *trained[30:]], 40)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_energy_of_the_law_is_read_off_draws_that_know_nothing(alpha: float, spread: float) -> None:
    """Latents of unequal scales in 128 dimensions; draws around their mean, coinciding or not, independent of the truth."""
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(128, generator=g) + 0.2

    def latents() -> torch.Tensor:
        return scale * torch.randn(4000, 128, generator=g)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(((a - b).norm(dim=-1) ** alpha).mean())

    z, other = latents(), latents()
    x, y = spread * latents(), spread * latents()
    detector = Detector(alpha=alpha)
    detector.add(row(1, fidelity=2 * distance(x, z), diversity=distance(x, y)))
    assert detector._independent() == pytest.approx(distance(z, other), rel=0.004)


def test_the_settings_say_steps_and_exponent() -> None:
    model = CalmConfig(autoencoder=preset("autoencoder-tiny"), backbone=BackboneConfig(layers=1, width=16, heads=2))  # type: ignore[arg-type]
    energy = EnergySettings(teacher="sampled", alpha=1.5)
    settings = CalmRun(model=model, data=DataSettings(path="x"), energy=energy, train=TrainSettings(steps=77))
    detector = Detector.of(settings)
    assert (detector._steps, detector._alpha) == (77, 1.5)
    assert Detector.of(config())._alpha == 1.0


def test_skipped_steps_are_counted() -> None:
    detector = Detector()
    detector.add(row(10, loss=1.0))
    (first,) = detector.add(row(20, loss=1.0, skipped=1))
    assert first.text.startswith("1 step was skipped, the last before step 20")
    assert detector.add(row(30, loss=1.0, skipped=1)) == []
    assert detector.add(row(40, loss=None, skipped=4)) == []
    (now,) = detector.found
    assert now.text.startswith("4 steps were skipped, the last before step 40")
    assert (now.first, now.last) == (20, 40)


def test_gradient_spikes() -> None:
    calm = [row(step, grad_norm=1.0 + 0.1 * (step % 3)) for step in range(1, 13)]
    assert not found([*calm, row(13, grad_norm=4.3)])
    assert not found([*calm[:9], row(10, grad_norm=50.0)])  # nothing to compare with yet
    spiked = found([*calm, row(13, grad_norm=11.0), *[row(step, grad_norm=1.0) for step in range(14, 30)]])
    assert "11 on average up to step 13, 10 times the usual 1.1" in spiked["gradient"].text
    assert not spiked["gradient"].now(29)
    twice = found([*calm, row(13, grad_norm=11.0), row(14, grad_norm=None), row(15, grad_norm=12.0)])
    assert "2 such rows so far" in twice["gradient"].text


def speeds(*values: float, share: float = 1.0) -> list[Row]:
    """Rows of these speeds, ten seconds each; a process that gets `share` of a processor while it is slow."""
    rows, cpu = [], 0.0
    for index, value in enumerate(values, 1):
        cpu += 10.0 * (share if value < 50 else 1.0)
        rows.append(row(index, tokens_per_s=value, seconds=10.0 * index, cpu_seconds=cpu))
    return rows


def test_a_drop_of_the_throughput() -> None:
    usual = [100.0] * 10
    assert not found(speeds(*usual, 40, 40))
    assert not found(speeds(*usual, 40, 40, 60, 40))
    assert not found(speeds(*usual[:7], 40, 40, 40))
    own = found(speeds(*usual, 40, 40, 40))["throughput"]
    assert own.text == "40 tokens/s at step 13, 40% of this run's median 100"
    other = found(speeds(*usual, 40, 40, 40, share=0.4))["throughput"]
    assert other.text.endswith("it gets so much less of the processor: other work runs on this machine")
    over = found(speeds(*usual, 40, 40, 40, 100))["throughput"]
    assert (over.first, over.last, over.now(14)) == (13, 13, False)


@pytest.mark.parametrize(
    ("good", "bad"), [({"collapsed": 0.0}, {"collapsed": 71.0}), ({"sigma": 0.5}, {"sigma": 0.75})]
)
def test_collapsed_latents(good: Row, bad: Row) -> None:
    def of(*values: Row) -> dict[str, Anomaly]:
        return found([row(step, grad_norm=1.0, **each) for step, each in enumerate(values, 1)], 50)

    assert not of(*[good] * 40)
    assert not of(*[bad] * 9, *[good] * 9)  # every autoencoder starts wide
    assert not of(*[good] * 30, bad, bad, good)
    collapsed = of(*[bad] * 14)["collapsed"]
    assert collapsed.first == 10
    assert "71 latent dimensions" in collapsed.text or "mean std is 0.75" in collapsed.text


def test_progress_of_a_row_goes_before_the_steps_of_the_settings() -> None:
    rows = [row(step, grad_norm=1.0, collapsed=3.0, progress=0.01) for step in range(1, 41)]
    assert not found(rows, 40)
    assert found([{**each, "progress": 0.9} for each in rows], 10**6)


def test_values_that_are_no_numbers_are_passed_over() -> None:
    names = (
        "fidelity",
        "diversity",
        "grad_norm",
        "tokens_per_s",
        "sigma",
        "collapsed",
        "skipped",
        "seconds",
        "progress",
    )
    rows = [
        row(step, **dict.fromkeys(names, value))
        for step, value in enumerate([None, "x", True, float("nan"), float("inf")])
    ]
    assert not found([*rows, {"kind": "eval", "step": 3, "conditioning_gap": None}, {"kind": "note"}, {}])


def test_it_is_said_once_and_a_long_run_is_read_quickly() -> None:
    detector = Detector(20_000)
    begin, said = time.process_time(), 0
    law = 24.8 / 2**0.5
    for index in range(20_000):
        more = {"fidelity": 2 * law, "diversity": law} if index else {"fidelity": 24.8, "diversity": 0.0}
        said += len(detector.add(row(index + 1, grad_norm=1.0, tokens_per_s=100.0, seconds=1.0 * index, **more)))
    assert said == 1
    assert time.process_time() - begin < 4.0  # about 0.5 s: no row looks at all the rows before


class Spiky(Fake):
    """A loss that is large at some batches, numbered from 1 on."""

    at: tuple[int, ...] = (13,)

    def loss(self, *arguments: Any) -> Any:
        loss, metrics = super().loss(*arguments)
        return (1000.0 if self.calls - 1 in self.at else 1.0) * loss, metrics


def test_training_says_it_in_a_line_once_and_not_again_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Spiky()
    objective.at = (13, 15)
    run(tmp_path / "run", config(steps=16, log_every=1, eval_every=0), objective)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anomaly: ")]
    assert len(lines) == 1
    assert "the gradient's norm was" in lines[0]
    assert "up to step 13" in lines[0]
    resumed = Spiky()
    resumed.at = (2,)
    run(tmp_path / "run", config(steps=20, log_every=1, eval_every=0), resumed, resume=True)
    assert "anomaly" not in capsys.readouterr().err
    fresh = Spiky()
    fresh.at = ()
    run(tmp_path / "healthy", config(steps=20, log_every=1, eval_every=0), fresh)
    assert "anomaly" not in capsys.readouterr().err
