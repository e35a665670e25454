"""The loop on a small fake objective: resume equals no interruption, failures keep the last checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nextvec.config import AutoencoderConfig, AutoencoderRun, DataSettings, OptimSettings, TrainSettings
from nextvec.errors import ConfigError, DataError, UserError
from nextvec.train import checkpoint
from nextvec.train.data import Data
from nextvec.train.loop import TrainResult, train
from nextvec.train.metrics import read_metrics
from nextvec.train.noise import generator_for

VOCAB, ROWS, CONTEXT = 11, 3, 8
TIMES = ("seconds", "cpu_seconds", "tokens_per_s", "share", "memory_bytes")


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Embedding(VOCAB, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, VOCAB)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.noise = 0.1
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.3, generator)

    def forward(self, ids_BT: Tensor, generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        state = self.frozen(self.norm(self.embedding(ids_BT[:, :-1])))
        state = state + self.noise * torch.randn(state.shape, generator=generator)
        loss = nn.functional.cross_entropy(self.out(state).flatten(0, 1), ids_BT[:, 1:].flatten())
        metrics = {"cross_entropy": loss.detach()}
        if progress < 0.5:
            metrics["early"] = loss.detach() * 0 + progress
        return loss, metrics


class Fake:
    tokenizer = None

    def __init__(self) -> None:
        self.module: Any = Module()
        self.calls = 0
        self.break_at: tuple[int, ...] = ()  # batches whose loss is not a number, from 1 on
        self.signal_at: int | None = None

    def loss(self, ids_BT: Tensor, generator: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.module(ids_BT, generator, progress)
        if self.module.training:
            self.calls += 1
            if self.calls - 1 in self.break_at:  # the first call counts operations
                loss = loss * float("nan")
            if self.calls - 1 == self.signal_at:
                os.kill(os.getpid(), signal.SIGINT)
        return loss, metrics

    def evaluate(self, batches: Iterable[Tensor], generator: Any) -> dict[str, Any]:
        assert not self.module.training
        assert not torch.is_grad_enabled()
        losses = [float(self.loss(ids, generator, 0.0)[0]) for ids in batches]
        return {"cross_entropy": sum(losses) / len(losses), "brier": [1.0, float("nan")]}

    def save(self, path: Path, trained: dict[str, Any]) -> None:
        (path / "model.safetensors").write_bytes(b"model")


class Source:
    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        return torch.randint(VOCAB, (ROWS, CONTEXT), generator=generator)


DATA = Data(Source(0), "digest", Source(1), 2)


def config(**changes: Any) -> AutoencoderRun:
    settings: dict[str, Any] = {"steps": 10, "log_every": 3, "eval_every": 5, "precision": "fp32", **changes}
    return AutoencoderRun(
        data=DataSettings(path="shards", context_tokens=CONTEXT, rows=ROWS),
        model=AutoencoderConfig(vocab_size=VOCAB, patch_size=2),
        optim=OptimSettings(lr=0.02, warmup=3),
        train=TrainSettings(**settings),
    )


def run(out: Path, settings: AutoencoderRun, objective: Fake | None = None, **changes: Any) -> TrainResult:
    return train(settings, objective or Fake(), out, data=DATA, device="cpu", show=False, **changes)


def tensors(out: Path, step: int) -> dict[str, Tensor]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "module.safetensors") | load_file(folder / "optimizer.safetensors")


def rows(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out)]


def assert_same(a: Path, b: Path, step: int) -> None:
    left, right = tensors(a, step), tensors(b, step)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert rows(a) == rows(b)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cut", [1, 5, 7])
def test_resumed_equals_uninterrupted(tmp_path: Path, accumulate: int, cut: int) -> None:
    settings = config(accumulate=accumulate)
    whole = run(tmp_path / "whole", settings)
    first = Fake()
    first.signal_at = cut * accumulate  # in the last micro-batch of step `cut`
    part = run(tmp_path / "part", settings, first)
    assert part.interrupted
    assert part.step == cut
    rest = run(tmp_path / "part", settings, resume=True)
    assert (rest.step, rest.tokens, rest.interrupted) == (whole.step, whole.tokens, False)
    assert_same(tmp_path / "whole", tmp_path / "part", 10)
    assert (tmp_path / "part" / "model.safetensors").exists()


def test_resume_from_an_older_step_after_a_crash(tmp_path: Path) -> None:
    """Rows written after the last checkpoint are not doubled, and no row is lost."""
    run(tmp_path / "whole", config())
    crashed = Fake()
    crashed.break_at = (8,)
    with pytest.raises(UserError, match="the checkpoint of step 5 is kept"):
        run(tmp_path / "part", config(save_every=5, skip_limit=0), crashed)
    with open(tmp_path / "part" / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "train", "st')  # as a crash leaves it
    assert [row["step"] for row in read_metrics(tmp_path / "part")][-1] == 6
    run(tmp_path / "part", config(), resume=True)  # skip_limit is free to change
    assert_same(tmp_path / "whole", tmp_path / "part", 10)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Three micro-batches of a step train like their concatenation, once the noise is taken out."""

    class Quiet(Fake):
        def __init__(self) -> None:
            super().__init__()
            self.module.noise = 0.0

    class Joined:
        def batch(self, index: int) -> Tensor:
            return torch.cat([Source(0).batch(3 * index + micro) for micro in range(3)])

    split, joined = Quiet(), Quiet()
    run(tmp_path / "split", config(accumulate=3), split)
    train(config(), joined, tmp_path / "joined", data=Data(Joined(), "d"), device="cpu", show=False)
    for a, b in zip(split.module.parameters(), joined.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(split.module.out.weight, Module().out.weight)


def test_metrics_rows(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = run(tmp_path / "run", config(), on_log=seen.append)
    written = read_metrics(tmp_path / "run")
    assert [(row["kind"], row["step"]) for row in written] == [
        ("train", 3), ("eval", 5), ("train", 6), ("train", 9), ("train", 10), ("eval", 10),
    ]  # fmt: skip
    assert [row["step"] for row in seen] == [row["step"] for row in written]
    first = written[0]
    assert first["tokens"] == 3 * ROWS * CONTEXT
    assert first["loss"] == pytest.approx(first["cross_entropy"])
    assert first["share"] > 0
    assert first["memory_bytes"] > 0
    assert first["early"] == pytest.approx(0.1)  # mean of 0, 0.1, 0.2
    assert written[2]["early"] == pytest.approx(0.35)  # only the batches that have it count
    assert "early" not in written[3]
    assert written[1]["brier"] == [1.0, None]
    assert result.evaluation is not None
    assert result.evaluation["step"] == 10
    assert written[3]["lr"] == pytest.approx(0.02 * 2 / 7)
    assert (result.step, result.tokens) == (10, 10 * ROWS * CONTEXT)


def test_training_learns_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    objective, before = Fake(), torch.get_rng_state()
    result = run(tmp_path / "run", config(steps=60, log_every=20), objective)
    assert torch.equal(before, torch.get_rng_state())
    losses = [row["loss"] for row in read_metrics(result.out) if row["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_bf16_keeps_parameters_and_optimizer_in_fp32(tmp_path: Path) -> None:
    objective = Fake()
    dtypes: list[torch.dtype] = []
    objective.module.out.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run(tmp_path / "run", config(precision="bf16"), objective)
    assert set(dtypes) == {torch.bfloat16}
    assert {t.dtype for t in tensors(tmp_path / "run", 10).values()} == {torch.float32}
    assert type(objective.module) is Module
    objective.module(Source().batch(0), None, 0.0)
    assert dtypes[-1] == torch.float32  # the loop gave the bare module back


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Fake()
    objective.break_at = (5, 7)
    run(tmp_path / "run", config(save_every=1, keep_last=99), objective)
    for step in (5, 7):
        before, after = tensors(tmp_path / "run", step - 1), tensors(tmp_path / "run", step)
        own = [name for name in before if not name.startswith("metrics/")]
        assert all(torch.equal(before[name], after[name]) for name in own)
        assert not torch.equal(tensors(tmp_path / "run", step + 1)["out.weight"], after["out.weight"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.partition(" (")[0] for line in lines] == [
        f"step {step} was skipped: its loss or gradient is not finite" for step in (5, 7)
    ]
    assert "(1 in a row, 2 in all; training stops after train.skip_limit=10 in a row)" in lines[1]
    found = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row.get("skipped") for row in found] == [None, 1, 2, 2]
    assert all(row["loss"] is not None for row in found)  # the mean of the steps that counted


def test_skipped_steps_are_remembered_by_a_resumed_run(tmp_path: Path) -> None:
    whole, first = Fake(), Fake()
    whole.break_at = first.break_at = (4, 5, 6)
    run(tmp_path / "whole", config(), whole)
    first.signal_at = 5
    assert run(tmp_path / "part", config(), first).step == 5
    rest = Fake()
    rest.break_at = (1,)
    run(tmp_path / "part", config(), rest, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "part", 10)
    assert rows(tmp_path / "part")[-1]["step"] == 10


def test_diverged_training_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    objective = Fake()
    objective.break_at = (5, 6, 7)
    with pytest.raises(
        UserError,
        match=r"stopped at step 7: .* was not finite in 3 steps in a row; the checkpoint of step 6 is kept; tr",
    ) as e:
        run(tmp_path / "run", config(save_every=2, skip_limit=2), objective)
    assert "\n" not in str(e.value)
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert (found.state.step, found.state.skipped, found.state.skipped_in_a_row) == (6, 2, 2)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Fake):
        def loss(self, ids_BT: Tensor, generator: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            if self.calls == 4:
                with torch.no_grad():
                    self.module.out.bias[0] = float("inf")
            return super().loss(ids_BT, generator, progress)

    with pytest.raises(UserError, match="the checkpoint of step 2 is kept"):
        run(tmp_path / "run", config(save_every=2, skip_limit=3), Broken())
    assert "the checkpoint of step 4 was not written (out.bias is not finite)" in capsys.readouterr().err
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert found.state.step == 2


def test_full_disk_during_a_save_keeps_the_previous_one_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = safetensors.torch.save_file, 0

    def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal calls
        calls += Path(path).parent.name.startswith(".step-")  # of checkpoints
        Path(path).write_bytes(b"half of it")
        if calls == 3:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    result = run(tmp_path / "run", config(save_every=2, steps=5))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "full" in line] == [
        "the checkpoint of step 4 was not written (the disk is full); the checkpoint of step 2 is kept, training goes on"
    ]
    assert result.step == 5
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-00000002", "step-00000005"]


def test_full_disk_at_the_end_is_an_error_that_names_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run", config(steps=4))

    class Exporting(Fake):
        def save(self, path: Path, trained: dict[str, Any]) -> None:
            (path / "model.safetensors").write_bytes(b"still fits")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nextvec.train.checkpoint.write_tensors", full)
    with pytest.raises(
        DataError, match=r"step 8 was not written \(the disk is full\); the checkpoint of step 4 is kept"
    ):
        run(tmp_path / "run", config(steps=8), Exporting(), resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == b"still fits"
    assert (found := checkpoint.latest(tmp_path / "run")) is not None
    assert found.state.step == 4
    monkeypatch.undo()
    assert run(tmp_path / "run", config(steps=8), resume=True).step == 8


def test_full_disk_for_a_metrics_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nextvec.train.metrics import MetricsLog

    original = MetricsLog.write

    def write(self: MetricsLog, row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, row)

    monkeypatch.setattr(MetricsLog, "write", write)
    run(tmp_path / "run", config())
    assert "step 3 is missing from" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [5, 6, 9, 10, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    class Interrupted(Fake):
        def loss(self, ids_BT: Tensor, generator: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            if self.calls == 4:
                os.kill(os.getpid(), number)
            return super().loss(ids_BT, generator, progress)

    before = signal.getsignal(number)
    result = run(tmp_path / "run", config(), Interrupted(), command="nextvec train autoencoder --resume")
    assert result.interrupted
    assert result.step == 4
    assert signal.getsignal(number) is before
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"interrupted; step 4 is saved in {tmp_path / 'run'}. Go on with: nextvec train autoencoder --resume"
    ]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_interrupt_during_evaluation_leaves_it_to_the_next_sitting(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def evaluate(self, batches: Iterable[Tensor], generator: Any) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGINT)
            return super().evaluate(batches, generator)

    run(tmp_path / "whole", config())
    part = run(tmp_path / "part", config(), Interrupted())
    assert part.interrupted
    assert part.step == 5
    run(tmp_path / "part", config(), resume=True)
    assert_same(tmp_path / "whole", tmp_path / "part", 10)


def test_time_budget_ends_training_and_drives_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nextvec.train.sitting as module

    now = 0.0

    class Slow(Fake):
        def loss(self, ids_BT: Tensor, generator: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal now
            if self.calls > 0 and self.module.training:
                now += 1.0
                seen.append(progress)
            return super().loss(ids_BT, generator, progress)

    seen: list[float] = []
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    result = run(tmp_path / "run", config(steps=1000), Slow(), time_budget=8.0)
    assert result.step == 8
    assert result.seconds == 8.0
    assert seen == pytest.approx([n / 8 for n in range(8)])
    assert read_metrics(tmp_path / "run")[-2]["lr"] == pytest.approx(0.02 / 8 / (1 - 3 / 1000))


def test_checkpoints_are_written_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nextvec.train.sitting as module

    now, saved = 0.0, []

    class Slow(Fake):
        def loss(self, ids_BT: Tensor, generator: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal now
            now += 50.0 if self.calls > 0 and self.module.training else 0.0  # the first is a look at the shapes
            return super().loss(ids_BT, generator, progress)

    real = module.checkpoint.write
    monkeypatch.setattr(
        module.checkpoint, "write", lambda out, taken, *more: saved.append(taken.state.step) or real(out, taken, *more)
    )
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    run(tmp_path / "run", config(save_minutes=2.0), Slow())
    assert saved == [3, 6, 9, 10]  # 150 s apart, the first time 120 s are over; and the end


def test_a_started_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "run", config(steps=2))
    with pytest.raises(ConfigError, match=r"already holds a run \(config.yaml\); go on with --resume, or give another"):
        run(tmp_path / "run", config(steps=2))
    with pytest.raises(ConfigError, match="--resume needs a run that was started before"):
        run(tmp_path / "other", config(steps=2), resume=True)


def test_finished_run_resumes_to_nothing_and_can_be_extended(tmp_path: Path) -> None:
    run(tmp_path / "run", config(steps=4))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(tmp_path / "run", config(steps=4), resume=True).step == 4
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert run(tmp_path / "run", config(steps=6, log_every=1), resume=True).step == 6


def test_resume_refuses_other_settings_data_and_frozen_weights(tmp_path: Path) -> None:
    run(tmp_path / "run", config(steps=2))
    changed = config(steps=2).override(optim=OptimSettings(lr=0.05, warmup=3))
    with pytest.raises(
        DataError, match=r"optim.lr was 0.02 and is now 0.05; set it back, or train into a new directory"
    ):
        run(tmp_path / "run", changed, resume=True)
    with pytest.raises(DataError, match=r"data\.path holds other tokens now"):
        train(config(steps=2), Fake(), tmp_path / "run", data=Data(Source(), "other"), resume=True, show=False)
    objective = Fake()
    with torch.no_grad():
        objective.module.frozen.weight[0, 0] += 1
    with pytest.raises(DataError, match="autoencoder that the run began with"):
        run(tmp_path / "run", config(steps=2), objective, resume=True)


def test_missing_device_is_one_sentence(tmp_path: Path) -> None:
    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(
        ConfigError, match=f"device {missing} is not available here; this machine and this torch offer cpu"
    ):
        train(config(), Fake(), tmp_path / "run", data=DATA, device=missing)
    with pytest.raises(ConfigError, match="auto, cpu, cuda, mps; got 'gpu'"):
        train(config(), Fake(), tmp_path / "run", data=DATA, device="gpu")
    assert not (tmp_path / "run").exists()


def test_resume_keeps_the_precision_that_was_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextvec.train.sitting.choose_precision", lambda device: ("bf16", "bf16: told so"))
    assert run(tmp_path / "run", config(steps=2, precision="auto")).precision == "bf16"
    monkeypatch.setattr("nextvec.train.sitting.choose_precision", lambda device: ("fp32", "fp32: told so"))
    assert run(tmp_path / "run", config(steps=4, precision="auto"), resume=True).precision == "bf16"


def test_plain_lines_name_terms_speed_and_time_to_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(steps=6), Fake(), tmp_path / "run", data=DATA, device="cpu")
    lines = capsys.readouterr().err.splitlines()
    assert "operations per token; 6 steps take at least" in lines[0]
    assert lines[1].startswith("step 3/6  loss ")
    for word in ("cross_entropy", "tokens/s", "% of", "GiB", "ETA", "grad_norm"):
        assert word in lines[1]
    assert lines[2].startswith("held out at step 5: cross_entropy")


def test_generators_differ_between_steps_and_purposes() -> None:
    device = torch.device("cpu")
    seeds = {generator_for(s, step, p, device).initial_seed() for s in (0, 1) for step in range(500) for p in (0, 1)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_config_is_written_first_and_metrics_are_json(tmp_path: Path) -> None:
    objective = Fake()
    objective.break_at = (1,)
    with pytest.raises(UserError):
        run(tmp_path / "run", config(skip_limit=0), objective)
    assert "kind: autoencoder" in (tmp_path / "run" / "config.yaml").read_text()
    run(tmp_path / "good", config())
    for line in (tmp_path / "good" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(text))


def test_compile_without_blocks_is_one_line_and_trains_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "eager", config())
    run(tmp_path / "asked", config(compile=True))
    assert capsys.readouterr().err.splitlines() == ["this model offers no blocks to compile; training runs eagerly"]
    assert_same(tmp_path / "eager", tmp_path / "asked", 10)


def test_a_finished_run_without_checkpoints_is_not_trained_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, config(steps=4))
    shutil.rmtree(out / "checkpoints")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="holds a finished model and no checkpoint to go on from; train into another"):
        run(out, config(steps=4), resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "model.safetensors").unlink()  # killed before its first checkpoint: nothing is lost by beginning again
    assert run(out, config(steps=4), resume=True).step == 4


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, config(steps=4))
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"has done 4 steps, and train\.steps is now 3: give at least 4"):
        run(out, config(steps=3), resume=True)
    assert (out / "config.yaml").read_bytes() == before
    assert run(out, config(steps=4), resume=True).step == 4


def test_a_damaged_line_of_the_metrics_costs_no_other_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run(out, config(steps=6, log_every=1, eval_every=0))
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\xff" + lines[1], b"5\n", *lines[3:]]))
    capsys.readouterr()
    run(out, config(steps=7, log_every=1, eval_every=0), resume=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert told == [f"{out / 'metrics.jsonl'}: damaged and left out: line 2, 3; all other rows are kept"]
    assert [row["step"] for row in read_metrics(out) if row["kind"] == "train"] == [1, 4, 5, 6, 7]
