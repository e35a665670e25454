"""One sitting of a run: the steps between a start or resume and the end or an interruption (see loop.py for the rules)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextvec.config import RunConfig
from nextvec.errors import DataError, UserError
from nextvec.hardware import Precision, choose_precision, matmul_rates, memory_in_use, slow_precision, synchronize
from nextvec.train import checkpoint
from nextvec.train.anomalies import Detector
from nextvec.train.compile import compile_blocks
from nextvec.train.data import Data, moved
from nextvec.train.flops import count_flops
from nextvec.train.interface import Trainable, TrainResult
from nextvec.train.interrupt import Interrupt
from nextvec.train.latents import Encoded
from nextvec.train.metrics import METRICS, MetricsLog, NoLog, Row, read_metrics
from nextvec.train.noise import EVALUATE, TRAIN, generator_for
from nextvec.train.optim import rate_factor
from nextvec.train.outcomes import Outcomes
from nextvec.train.parallel import place
from nextvec.train.progress import Display, duration
from nextvec.train.tally import Tally
from nextvec.train.world import World
from nextvec.train.writer import Writer


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
        metrics: MetricsLog | NoLog,
        display: Display,
        time_budget: float | None,
        on_log: Callable[[Row], None] | None,
        command: str | None,
        found: checkpoint.Checkpoint | None,
        world: World,
    ) -> None:
        self.config, self.objective, self.out, self.device, self.data = config, objective, out, device, data
        self.frozen, self.metrics, self.display = frozen, metrics, display
        self.time_budget, self.on_log, self.command, self.world = time_budget, on_log, command, world
        settings = config.train
        self.part = world.part(settings.accumulate, config.data.rows)
        self.tokens_per_step = config.data.rows * config.data.context_tokens * settings.accumulate
        self.precision = self._choose_precision(found)
        self.module = place(config, world)(
            objective.module, config, world, device, self.precision, len(self.part.batches), found
        )

        self.step, self.seconds, self.logged_step, self.logged_seconds = 0, 0.0, 0, 0.0
        self.cpu_seconds = 0.0
        self.tally = Tally()
        self.outcomes = Outcomes(world, device, self.module.behind)
        self.anomalies = Detector.of(config)
        self.writer = Writer(
            lambda taken: self.module.write(out, taken, settings.keep_last, settings.keep_every),
            metrics.sync,
            display.say,
        )
        self.flops_per_token = 0.0
        self.peak_rate = world.size * matmul_rates(device)[self.precision]
        if found is not None:
            state = found.state
            self.tally = Tally(self.module.sums, dict(state.counts), state.skipped, state.skipped_in_a_row)
            self.step, self.seconds, self.writer.saved = state.step, state.seconds, state.step
            self.cpu_seconds = state.cpu_seconds
            self.logged_step, self.logged_seconds = state.logged_step, state.logged_seconds
            for row in read_metrics(out):
                self.anomalies.add(row)
        self.agreed_seconds = self.seconds  # of process 0 at the last step: what all of them decide by
        self.stopping = False  # an interrupt that all processes have heard of
        self.save_tried = time.monotonic()
        self.save_agreed = False  # a checkpoint is late by the clock of process 0
        objective.module = self.module.running
        self._start_clocks()

    def run(self, interrupt: Interrupt) -> TrainResult:
        settings = self.config.train
        self.display.start(self.step, self.seconds)
        if not self._finished():
            self._warm_up()
            if self.step and self._due(settings.eval_every):
                self._evaluate(interrupt)  # the last sitting was interrupted before it
        while not self._finished() and not self._stop(interrupt):
            self._train_step(interrupt)
            if self._finished():
                break
            if self._due(settings.log_every):
                self._log()
            if self._due(settings.eval_every):
                self._evaluate(interrupt)
            late = self._save_is_late() if self.world.size == 1 else self.save_agreed
            if self._due(settings.save_every) or late:
                self._save(last=False)
        if self._finished():
            self._log()
            self._evaluate(interrupt)
        interrupted = interrupt.requested or self.stopping
        try:
            self._save(last=True)
        except DataError:
            if not interrupted:
                with suppress(DataError, OSError):  # the first error says what to do
                    self._export()  # the model alone is a third of a checkpoint and may still fit
            raise
        if interrupted:
            self.module.gather()
            how = f"with: {self.command}" if self.command else "by training again with resume=True (--resume)"
            self.display.say(f"interrupted; step {self.step} is saved in {self.out}. Go on {how}")
        else:
            self._export()
        tokens = self.step * self.tokens_per_step
        return TrainResult(
            self.out, self.step, tokens, self.seconds, interrupted, self.precision, self.metrics.evaluation
        )

    def close(self) -> None:
        """Let a checkpoint on its way reach the disk, and give the objective its bare module back."""
        self.writer.close()
        self.objective.module = self.module.close()

    def _train_step(self, interrupt: Interrupt) -> None:
        settings, progress = self.config.train, self._progress()
        factor = rate_factor(self.step, progress, settings.steps, self.config.optim)
        for group in self.module.optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        sums: dict[str, Tensor] = {}
        for micro in self.part.batches:
            number = self.step * settings.accumulate + micro
            batch = moved(self._batch(number), self.device)
            generator = generator_for(settings.seed, number, TRAIN, self.device, self.part.part)
            with self.module.batch():
                loss, metrics = self.objective.loss(batch, generator, progress)
                self.module.backward(loss)
            for name, value in {**metrics, "loss": loss}.items():
                value = value.detach().float()
                sums[name] = sums[name] + value if name in sums else value
        norm = self.module.clip(self.config.optim.clip)
        self.module.step(take=self.outcomes.add(self.step + 1, sums, norm, self._told(interrupt)))
        self.step += 1
        self._tick()
        if self.world.size == 1:
            self.agreed_seconds = self.seconds
        self._settle(all_of_them=False)
        self.writer.settle(wait=False)
        self.display.advance(self.step, self.seconds)

    def _batch(self, number: int) -> Any:
        """Batch `number` of training, or the rows of it that are this process's."""
        if self.part.parts == 1:
            return self.data.train.batch(number)
        return self.data.train.batch(number, self.part.part, self.part.parts)

    def _told(self, interrupt: Interrupt) -> tuple[float, ...]:
        """What this process tells the others with its step: an interrupt, and the clocks of process 0."""
        if self.world.size == 1:
            return ()
        self._tick()
        clocks = (self.seconds, float(self._save_is_late())) if self.world.first else (0.0, 0.0)
        return (float(interrupt.requested), *clocks)

    def _settle(self, all_of_them: bool) -> None:
        """Count the steps whose figures have come, or wait for all of them. Raises UserError as `_say_skipped`."""
        for outcome in self.outcomes.read(all_of_them):
            if outcome.shared:
                stop, self.agreed_seconds, save = outcome.shared
                self.stopping, self.save_agreed = stop > 0, save > 0
            if outcome.good:
                self.tally.good_step(outcome.sums, len(self.part.batches) * self.world.size, outcome.norm)
            else:
                self.tally.skipped_step()
                self._say_skipped(outcome.step)

    def _say_skipped(self, step: int) -> None:
        """Raises UserError when too many steps in a row had to be skipped."""
        limit = self.config.train.skip_limit
        if self.tally.skipped_in_a_row > limit:
            self.writer.settle(wait=True)
            raise UserError(
                f"training stopped at step {step}: the loss or its gradient was not finite in {limit + 1} steps in a "
                f"row; {self.writer.kept()}; train again with a lower optim.lr or a longer optim.warmup"
            )
        self.display.say(
            f"step {step} was skipped: its loss or gradient is not finite ({self.tally.skipped_in_a_row} in a row, "
            f"{self.tally.skipped} in all; training stops after train.skip_limit={limit} in a row)"
        )

    def _log(self) -> None:
        self._settle(all_of_them=True)
        means = self.tally.take_means()
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
            "progress": min(self._done(), 1.0),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        row |= {"loss": loss, **means, "lr": self.module.optimizer.param_groups[-1]["lr"], "grad_norm": norm}
        row |= {"skipped": self.tally.skipped} if self.tally.skipped else {}
        share = self.flops_per_token * speed / self.peak_rate if self.flops_per_token else None
        row |= {"tokens_per_s": speed, "share": share, "memory_bytes": memory_in_use(self.device)}
        self.logged_step, self.logged_seconds = self.step, self.seconds
        self._write(row)
        eta = (self.config.train.steps - self.step) * seconds / steps
        if self.time_budget is not None:
            eta = min(eta, self.time_budget - self.seconds)
        self.display.log(row, eta, self.peak_rate)

    def _evaluate(self, interrupt: Interrupt) -> None:
        """Held-out metrics, unless this step has them already; an interrupt leaves them to the next sitting."""
        known = self.metrics.evaluation is not None and self.metrics.evaluation["step"] == self.step
        if not self.data.held_out_batches or self.world.share(known):
            return

        def ids() -> Iterator[Tensor]:
            for ids_BT in self.data.held_out_ids():
                if interrupt.requested:
                    raise _Interrupted
                yield ids_BT.to(self.device)

        with self._paused(), self.module.whole() as whole:
            self.objective.module = whole  # every process measures the same for itself: nothing to wait for
            try:
                with torch.no_grad(), self.module.autocast():
                    whole.eval()
                    found = self.objective.evaluate(
                        ids(), generator_for(self.config.train.seed, 0, EVALUATE, self.device)
                    )
            except _Interrupted:
                return
            finally:
                whole.train()
                self.objective.module = self.module.running
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
        for anomaly in self.anomalies.add(row):
            if anomaly.kind != "not finite":  # which each of its steps has said
                self.display.say(f"anomaly: {anomaly.text}")
        if self.on_log is not None and self.world.first:
            self.on_log(row)

    def _save(self, last: bool) -> None:
        """Begin to write a checkpoint. When it cannot be written, training goes on, except after the last step."""
        self._settle(all_of_them=True)
        if not self.module.writes:
            return
        if self.writer.newest != self.step:
            self.save_tried = time.monotonic()
            with self._paused():
                state = checkpoint.TrainState(
                    step=self.step,
                    tokens=self.step * self.tokens_per_step,
                    seconds=self.seconds,
                    cpu_seconds=self.cpu_seconds,
                    logged_step=self.logged_step,
                    logged_seconds=self.logged_seconds,
                    counts=dict(self.tally.counts),
                    precision=self.precision,
                    config=self.config.model_dump(mode="json"),
                    data=self.data.digest,
                    frozen=self.frozen,
                    skipped=self.tally.skipped,
                    skipped_in_a_row=self.tally.skipped_in_a_row,
                )
                self.writer.begin(self.module.snapshot(state, self.tally.tensors()))
        if last:
            self.writer.finish()

    def _export(self) -> None:
        trained: Row = {"step": self.step, "tokens": self.step * self.tokens_per_step, "seconds": self.seconds}
        with self._paused():
            self.module.gather()
            if self.world.first:
                self.objective.save(self.out, {**(self.metrics.evaluation or {}), **trained})

    def _warm_up(self) -> None:
        """Count operations on one row, and compile; neither touches parameters, batches or noise of the run."""
        settings = self.config.train
        first = moved(self._batch(self.step * settings.accumulate), self.device)
        row = first.head(1) if isinstance(first, Encoded) else first[:1]

        def trial(batch: Any = first) -> None:
            generator = generator_for(settings.seed, self.step, TRAIN, self.device)
            loss, _ = self.objective.loss(batch, generator, self._progress())
            loss.backward()
            self.module.optimizer.zero_grad()

        self.objective.module = self.module.trial
        self.flops_per_token = count_flops(lambda: trial(row)) / self.config.data.context_tokens
        if settings.compile:
            compile_blocks(self.module.trial, self.device, trial, self.display.say)
        self.objective.module = self.module.running
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
            if (slow := slow_precision(wanted, self.device)) is not None:
                self.display.note(slow)
            return wanted
        if found is not None:
            return found.state.precision  # a new measurement might choose differently, and end bit-exactness
        chosen, reason = self.world.share(choose_precision(self.device) if self.world.first else ("fp32", ""))
        self.display.note(f"device {self.device.type}, precision {reason}")
        return chosen

    def _done(self) -> float:
        """Share of training, from 0 to 1 or a little more."""
        done = self.step / self.config.train.steps
        return done if self.time_budget is None else max(done, self.agreed_seconds / self.time_budget)

    def _progress(self) -> float:
        """The same in [0, 1)."""
        return min(self._done(), 1.0 - 2**-20)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _save_is_late(self) -> bool:
        """Whether the last checkpoint is too long ago."""
        return time.monotonic() - self.save_tried >= 60 * self.config.train.save_minutes

    def _stop(self, interrupt: Interrupt) -> bool:
        return interrupt.requested if self.world.size == 1 else self.stopping

    def _finished(self) -> bool:
        over = self.time_budget is not None and self.agreed_seconds >= self.time_budget
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
