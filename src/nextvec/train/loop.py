"""The training loop, one for every kind of run; parallel.py says how its module lives on one process or several.

Nothing random is carried from step to step: batch number n = step * accumulate + micro comes from the data, and its noise
from a generator seeded with (seed, n). So a checkpoint needs no generator state, and a resumed run equals an uninterrupted
one bit for bit on the same hardware and number of threads. Objectives must draw from that generator only; torch's global
one is not saved.

Under `torchrun` or `accelerate launch` the same step is shared among the processes (world.py); process 0 writes for all.
A step whose loss or gradient is not finite changes nothing; a GPU sees to that by itself, and the host reads the figures of
each step two steps later (outcomes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from nextvec.config import RunConfig, dump_yaml
from nextvec.errors import ConfigError, UserError
from nextvec.files import atomic_open
from nextvec.hardware import choose_device
from nextvec.lock import run_lock
from nextvec.process import keep_freed_memory
from nextvec.train import checkpoint
from nextvec.train.data import Data, open_data
from nextvec.train.interface import Trainable, TrainResult
from nextvec.train.interrupt import Interrupt
from nextvec.train.kept import keep_frozen, let_go
from nextvec.train.latents import with_latents
from nextvec.train.launch import note_launch
from nextvec.train.metrics import METRICS, MetricsLog, NoLog, Row, check_tensorboard
from nextvec.train.progress import Display
from nextvec.train.recompute import recomputed_blocks
from nextvec.train.sitting import Sitting
from nextvec.train.world import World, lost_process, open_world


def train(
    config: RunConfig,
    objective: Trainable,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    valid: Path | None = None,
    data: Data | None = None,
    eval_batches: int = 8,
    time_budget: float | None = None,
    show: bool = True,
    tensorboard: bool = False,
    on_log: Callable[[Row], None] | None = None,
    command: str | None = None,
) -> TrainResult:
    """Train `objective` as `config` says and leave a run directory at `out`.

    config: settings; written to out/config.yaml before training begins.
    resume: go on from the newest whole checkpoint in `out`; from the start if the run has none yet.
    valid: held-out shards; by default those that lie beside the training shards.
    data: batches to use instead of opening `config.data.path`.
    eval_batches: held-out batches per evaluation, the same ones each time.
    time_budget: stop after so many seconds of training, over all sittings. Progress (for the schedule and the
        objective) is then max(seconds / time_budget, step / steps), so the run is not bit-reproducible.
    show: progress on stderr; warnings are printed in any case.
    tensorboard: write RUN/tensorboard too; ConfigError when that extra is not installed.
    on_log: called with each row of metrics.jsonl, after it is written.
    command: the command line that goes on with this run, named when training is interrupted.

    SIGINT and SIGTERM finish the step, save, and return with `interrupted` set. Raises ConfigError or DataError before
    anything is written when the device, data, run directory or settings do not fit or another process writes this run, and
    UserError when the loss stays not finite; the last checkpoint is kept then, and none is written of weights that are not.
    """
    keep_freed_memory()
    out = Path(out)
    place = choose_device(device)
    world = open_world(place)
    resume = world.share(resume)  # restarted by torchrun, each has looked for a run by itself
    world.part(config.train.accumulate, config.data.rows)  # refused here, before anything is written
    notes: list[str] = []
    if world.first:
        check_out(out, resume)
    try:
        with ExitStack() as stack:
            if resume and world.first:
                stack.enter_context(run_lock(out))
            display = stack.enter_context(closing(Display(config.train.steps, show, time_budget, mute=not world.first)))
            if data is None:
                data, note = open_data(config, valid, eval_batches)
                notes += [note] if note else []
            if tensorboard:
                check_tensorboard()
            if config.data.latents:
                data = with_latents(data, objective.module)
            frozen = checkpoint.frozen_digest(objective.module)
            found = _find(out, world, display) if resume else None
            if found is not None:
                checkpoint.check_same_run(found, config.model_dump(mode="json"), data.digest, frozen)
                check_steps(found.state.step, config, time_budget)
            elif resume:
                check_unfinished(out)
                notes.append(f"{out} has no checkpoint yet: training starts at step 0")
            if config.train.sharding == "full" and world.size == 1:
                notes.append("train.sharding=full changes nothing here: one process has nobody to share with")
            if world.first:
                if not resume:
                    stack.enter_context(run_lock(out))
                    check_out(out, resume)  # another one may have begun since
                if found is not None:
                    checkpoint.drop_newer(out, found.state.step)
                note_launch(out)
                keep_frozen(out, objective.module)
                if objective.tokenizer is not None:
                    objective.tokenizer.save(out)
                with atomic_open(out / "config.yaml") as handle:
                    handle.write(dump_yaml(config))
            for note in notes:
                display.note(note)
            step = found.state.step if found else 0
            log: MetricsLog | NoLog = MetricsLog(out, step, tensorboard, display.say) if world.first else NoLog()
            stack.enter_context(closing(log))
            sitting = Sitting(
                config, objective, out, place, data, frozen, log, display, time_budget, on_log, command, found, world
            )
            stack.enter_context(recomputed_blocks(objective.module, config.train.activation_checkpointing))
            interrupt = stack.enter_context(Interrupt(patient=world.size > 1))
            stack.enter_context(closing(sitting))
            result = sitting.run(interrupt)
            if world.first and not result.interrupted:
                let_go(out)
        world.close()
    except RuntimeError as error:
        if not lost_process(error, world):
            raise
        raise UserError(
            "another process of this run has ended; under `torchrun --max-restarts N` all go on from the last checkpoint, "
            "otherwise start again with --resume"
        ) from None
    return result


def _find(out: Path, world: World, display: Display) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint: process 0 reads and checks it all, the others open the one that it found."""
    return world.share(checkpoint.latest(out, display.say) if world.first else None)


def check_out(out: Path, resume: bool) -> None:
    """Raises ConfigError when `out` holds a run and `resume` is not set, or holds none and it is."""
    out = Path(out)
    held = [name for name in ("config.yaml", METRICS, "checkpoints", "model.safetensors") if (out / name).exists()]
    if held and not resume:
        raise ConfigError(f"{out} already holds a run ({held[0]}); go on with --resume, or give another directory")
    if resume and not held:
        raise ConfigError(f"--resume needs a run that was started before; {out} holds none")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"a run is a directory; {out} is a file")


def check_unfinished(out: Path) -> None:
    """Raises ConfigError when `out` holds a finished model and nothing to go on from: training anew would replace it."""
    if (out / "model.safetensors").exists():
        raise ConfigError(
            f"{out} holds a finished model and no checkpoint to go on from; train into another directory, with "
            f"--from {out} to begin with its weights"
        )


def check_steps(done: int, config: RunConfig, time_budget: float | None) -> None:
    """Raises ConfigError when a run has more steps behind it than it is to have."""
    if time_budget is None and done > config.train.steps:
        raise ConfigError(
            f"the run has done {done:,} steps, and train.steps is now {config.train.steps:,}: give at least {done}"
        )


__all__ = ["TrainResult", "Trainable", "check_out", "train"]
