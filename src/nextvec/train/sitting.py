"""One sitting of a run: the steps between a start or resume and the end or an interruption (see loop.py for the rules)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from nextvec.config import RunConfig
from nextvec.errors import DataError, UserError
from nextvec.hardware import Precision, choose_precision, matmul_rates, memory_in_use, synchronize
from nextvec.train import checkpoint
from nextvec.train.compile import compile_blocks
from nextvec.train.data import Data
from nextvec.train.flops import count_flops
from nextvec.train.interrupt import Interrupt
from nextvec.train.latents import Encoded
from nextvec.train.metrics import METRICS, MetricsLog, Row
from nextvec.train.optim import make_optimizer, rate_factor
from nextvec.train.progress import Display, duration

TRAIN, EVALUATE = 0, 1  # purposes of a generator


class Trainable(Protocol):
    """What the loop needs of an objective. Legend: B rows, T tokens per row."""

    module: Any  # an nn.Module whose forward is the loss; `loss` calls it, so that the loop may wrap it

    def loss(self, batch: Any, generator: torch.Generator | None, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and detached 0-dim metrics, without waiting for the device. `progress` in [0, 1) of training."""
        ...

    def evaluate(self, batches: Iterable[Tensor], generator: torch.Generator | None) -> dict[str, Any]:
        """Metrics over held-out batches of ids (B, T)."""
        ...

    def save(self, path: Path, trained: Row) -> None:
        """Write the run directory's model files. `trained`: step, tokens, seconds, and the last held-out figures."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """Where a call of `train` ended. `seconds` as in metrics.jsonl; `evaluation` is the last held-out row, if any."""

    out: Path
    step: int
    tokens: int
    seconds: float
    interrupted: bool
    precision: Precision
    evaluation: Row | None


def generator_for(seed: int, step: int, purpose: int, device: torch.device) -> torch.Generator:
    """The generator of one step. Distinct steps of a run get distinct seeds: torch's CPU generator reads 32 bits only."""
    key = (seed * 2 + purpose) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return torch.Generator(device).manual_seed((key >> 32 ^ key) + step & 0xFFFFFFFF)


class Sitting:
    """The state that changes while training; `loop.train` describes the behaviour."""

    def __init__(
        self,
        config: RunConfig,
        objective: Trainable,
        out: Path,
        device: torch.device,
        data: Data,
        frozen: str,
        metrics: MetricsLog,
        display: Display,
        time_budget: float | None,
        on_log: Callable[[Row], None] | None,
        command: str | None,
        found: checkpoint.Checkpoint | None,
    ) -> None:
        self.config, self.objective, self.out, self.device, self.data = config, objective, out, device, data
        self.frozen, self.metrics, self.display = frozen, metrics, display
        self.time_budget, self.on_log, self.command = time_budget, on_log, command
        settings = config.train
        self.tokens_per_step = config.data.rows * config.data.context_tokens * settings.accumulate
        self.precision = self._choose_precision(found)
        self.accelerator = _accelerator(device, self.precision, settings.accumulate)
        self.bare: nn.Module = objective.module.to(device).train()
        self.optimizer = make_optimizer(self.bare, config.optim)
        self.parameters = [p for p in self.bare.parameters() if p.requires_grad]

        self.step, self.seconds, self.logged_step, self.logged_seconds = 0, 0.0, 0, 0.0
        self.cpu_seconds = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.saved_step: int | None = None
        self.flops_per_token = 0.0
        self.peak_rate = matmul_rates(device)[self.precision]
        if found is not None:
            state = found.state
            self.sums = {n: t.to(device) for n, t in checkpoint.restore(found, self.bare, self.optimizer).items()}
            self.counts = dict(state.counts)
            self.step, self.seconds, self.saved_step = state.step, state.seconds, state.step
            self.cpu_seconds = state.cpu_seconds
            self.logged_step, self.logged_seconds = state.logged_step, state.logged_seconds
        objective.module, self.prepared_optimizer = self.accelerator.prepare(self.bare, self.optimizer)
        self._start_clocks()
        self.save_tried = time.monotonic()

    def run(self, interrupt: Interrupt) -> TrainResult:
        settings = self.config.train
        self.display.start(self.step, self.seconds)
        if not self._finished():
            self._warm_up()
            if self.step and self._due(settings.eval_every):
                self._evaluate(interrupt)  # the last sitting was interrupted before it
        while not self._finished() and not interrupt.requested:
            self._train_step()
            if self._finished():
                break
            if self._due(settings.log_every):
                self._log()
            if self._due(settings.eval_every):
                self._evaluate(interrupt)
            if self._due(settings.save_every) or time.monotonic() - self.save_tried >= 60 * settings.save_minutes:
                self._save(last=False)
        if self._finished():
            self._log()
            self._evaluate(interrupt)
        interrupted = interrupt.requested
        try:
            self._save(last=True)
        except DataError:
            if not interrupted:
                with suppress(DataError, OSError):  # the first error says what to do
                    self._export()  # the model alone is a third of a checkpoint and may still fit
            raise
        if interrupted:
            how = f"with: {self.command}" if self.command else "by training again with resume=True (--resume)"
            self.display.say(f"interrupted; step {self.step} is saved in {self.out}. Go on {how}")
        else:
            self._export()
        tokens = self.step * self.tokens_per_step
        return TrainResult(
            self.out, self.step, tokens, self.seconds, interrupted, self.precision, self.metrics.evaluation
        )

    def close(self) -> None:
        """Give the objective its bare module back."""
        self.objective.module = self.accelerator.unwrap_model(self.objective.module, keep_fp32_wrapper=False)

    def _train_step(self) -> None:
        settings, progress = self.config.train, self._progress()
        factor = rate_factor(self.step, progress, settings.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        generator = generator_for(settings.seed, self.step, TRAIN, self.device)
        for micro in range(settings.accumulate):
            batch = self.data.train.batch(self.step * settings.accumulate + micro).to(self.device, non_blocking=True)
            with self.accelerator.accumulate(self.objective.module):
                loss, metrics = self.objective.loss(batch, generator, progress)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optim.clip)
                    assert isinstance(norm, Tensor)
                    self._add({"grad_norm": norm})
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
            self._add({**metrics, "loss": loss.detach()})
        self.step += 1
        self._tick()
        self.display.advance(self.step, self.seconds)

    def _add(self, metrics: dict[str, Tensor]) -> None:
        """Sum metrics on the device until the next log line."""
        for name, value in metrics.items():
            total = self.sums.get(name)
            self.sums[name] = value.detach().float().clone() if total is None else total + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def _means(self) -> dict[str, float]:
        """Means since the last log line; waits for the device. Raises UserError when training has diverged."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values())).tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means[name]):
                raise UserError(
                    f"training stopped at step {self.step}: the {name.replace('_', ' of the gradient: ')} is {means[name]} "
                    f"since step {self.logged_step}; {self._kept()}; train again with a lower optim.lr or a longer optim.warmup"
                )
        return means

    def _log(self) -> None:
        means = self._means()
        self._tick()
        if not means:
            return
        steps, seconds = self.step - self.logged_step, max(self.seconds - self.logged_seconds, 1e-9)
        speed = steps * self.tokens_per_step / seconds
        loss, norm = means.pop("loss"), means.pop("grad_norm")
        row: Row = {
            "kind": "train",
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        row |= {"loss": loss, **means, "lr": self.optimizer.param_groups[-1]["lr"], "grad_norm": norm}
        share = self.flops_per_token * speed / self.peak_rate if self.flops_per_token else None
        row |= {"tokens_per_s": speed, "share": share, "memory_bytes": memory_in_use(self.device)}
        self.sums, self.counts = {}, {}
        self.logged_step, self.logged_seconds = self.step, self.seconds
        self._write(row)
        eta = (self.config.train.steps - self.step) * seconds / steps
        if self.time_budget is not None:
            eta = min(eta, self.time_budget - self.seconds)
        self.display.log(row, eta, self.peak_rate)

    def _evaluate(self, interrupt: Interrupt) -> None:
        """Held-out metrics, unless this step has them already; an interrupt leaves them to the next sitting."""
        if not self.data.held_out_batches or (self.metrics.evaluation and self.metrics.evaluation["step"] == self.step):
            return

        def ids() -> Iterator[Tensor]:
            for ids_BT in self.data.held_out_ids():
                if interrupt.requested:
                    raise _Interrupted
                yield ids_BT.to(self.device)

        with self._paused():
            try:
                with torch.no_grad(), self.accelerator.autocast():
                    self.bare.eval()
                    found = self.objective.evaluate(
                        ids(), generator_for(self.config.train.seed, 0, EVALUATE, self.device)
                    )
            except _Interrupted:
                return
            finally:
                self.bare.train()
            tokens = self.step * self.tokens_per_step
            times = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
            row: Row = {"kind": "eval", "step": self.step, "tokens": tokens, **times, **found}
            self._write(row)
            self.display.evaluation(row)

    def _write(self, row: Row) -> None:
        try:
            self.metrics.write(row)
        except OSError as error:
            self.display.say(
                f"step {self.step} is missing from {self.out / METRICS} ({error.strerror}); training goes on"
            )
        if self.on_log is not None:
            self.on_log(row)

    def _save(self, last: bool) -> None:
        """Write a checkpoint. When it cannot be written, training goes on, except after the last step."""
        if self.saved_step == self.step:
            return
        self._means()  # never from a state that is not finite
        self.save_tried = time.monotonic()
        with self._paused():
            state = checkpoint.TrainState(
                step=self.step,
                tokens=self.step * self.tokens_per_step,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                logged_step=self.logged_step,
                logged_seconds=self.logged_seconds,
                counts=self.counts,
                precision=self.precision,
                config=self.config.model_dump(mode="json"),
                data=self.data.digest,
                frozen=self.frozen,
            )
            try:
                self.metrics.sync()
                checkpoint.save(self.out, state, self.bare, self.optimizer, self.sums)
            except (DataError, OSError) as error:
                why = "the disk is full" if isinstance(error, DataError) else str(error)
                line = f"the checkpoint of step {self.step} was not written ({why}); {self._kept()}"
                if last:
                    raise DataError(f"{line}; free some space and go on with --resume") from error
                self.display.say(f"{line}, training goes on")
                return
        self.saved_step = self.step

    def _export(self) -> None:
        trained: Row = {"step": self.step, "tokens": self.step * self.tokens_per_step, "seconds": self.seconds}
        with self._paused():
            self.objective.save(self.out, {**(self.metrics.evaluation or {}), **trained})

    def _kept(self) -> str:
        if self.saved_step is None:
            return "no checkpoint had been written before"
        return f"the checkpoint of step {self.saved_step} is kept"

    def _warm_up(self) -> None:
        """Count operations on one row, and compile; neither touches parameters, batches or noise of the run."""
        settings = self.config.train
        first = self.data.train.batch(self.step * settings.accumulate).to(self.device)
        row = first.head(1) if isinstance(first, Encoded) else first[:1]

        def trial(batch: Any = first) -> None:
            generator = generator_for(settings.seed, self.step, TRAIN, self.device)
            loss, _ = self.objective.loss(batch, generator, self._progress())
            loss.backward()
            self.optimizer.zero_grad()

        self.flops_per_token = count_flops(lambda: trial(row)) / self.config.data.context_tokens
        if settings.compile:
            compile_blocks(self.bare, self.device, trial, self.display.say)
        self._tick()
        if self.logged_step == self.step:
            self.logged_seconds = self.seconds  # the first tokens/s shall not show the warm-up
        if self.flops_per_token and self.time_budget is None:
            left = (settings.steps - self.step) * self.tokens_per_step * self.flops_per_token / self.peak_rate
            self.display.note(
                f"{self.flops_per_token / 1e6:,.1f} million operations per token; {settings.steps - self.step:,} steps "
                f"take at least {duration(left)} at this machine's measured {self.peak_rate / 1e9:,.0f} GFLOP/s"
            )

    def _choose_precision(self, found: checkpoint.Checkpoint | None) -> Precision:
        wanted = self.config.train.precision
        if wanted != "auto":
            return wanted
        if found is not None:
            return found.state.precision  # a new measurement might choose differently, and end bit-exactness
        chosen, reason = choose_precision(self.device)
        self.display.note(f"device {self.device.type}, precision {reason}")
        return chosen

    def _progress(self) -> float:
        progress = self.step / self.config.train.steps
        if self.time_budget is not None:
            progress = max(progress, self.seconds / self.time_budget)
        return min(progress, 1.0 - 2**-20)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _finished(self) -> bool:
        over = self.time_budget is not None and self.seconds >= self.time_budget
        return over or self.step >= self.config.train.steps

    def _tick(self) -> None:
        """Add the time since the last call to the seconds of training, and this process's part of the processors."""
        wall, cpu = self._marks
        self._start_clocks()
        self.seconds += self._marks[0] - wall
        self.cpu_seconds += self._marks[1] - cpu

    def _start_clocks(self) -> None:
        self._marks = time.perf_counter(), time.process_time()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Time inside the block is not training time."""
        synchronize(self.device)
        self._tick()
        try:
            yield
        finally:
            self._start_clocks()


class _Interrupted(Exception):  # noqa: N818  (control flow, never seen outside)
    pass


def _accelerator(device: torch.device, precision: Precision, accumulate: int) -> Accelerator:
    """A fresh Accelerator: its state is shared by the whole process, and each run may choose anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    mixed = "bf16" if precision == "bf16" else "no"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, gradient_accumulation_steps=accumulate)
