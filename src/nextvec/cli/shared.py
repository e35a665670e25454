"""What verbs that read a trained run have in common: the context of its training, its head's solver, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nextvec.config import ModelRun
    from nextvec.rundir import Run

Solver = Annotated[
    str | None, typer.Option(help="Flow, diffusion and categorical heads: another solver than the run's own.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Flow, diffusion and categorical heads: solver steps per draw.")]


def trained_context(config: ModelRun) -> int:
    """The context length of training, in tokens. Raises ConfigError for converted weights, which do not say it."""
    from nextvec.config import RunConfig
    from nextvec.errors import ConfigError

    if not isinstance(config, RunConfig):
        raise ConfigError(
            "converted weights come without the context length of their training: give --context-tokens N"
        )
    return config.data.context_tokens


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (what, done, total): one bar per `what` on a terminal's standard error, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def change_solver(run: Run, solver: str | None, steps: int | None) -> None:
    """Let the run's head draw by another solver or in other steps. Raises ConfigError where it has none."""
    from nextvec.errors import ConfigError
    from nextvec.model.calm import Calm

    if isinstance(run.model, Calm):
        run.model.set_solver(solver, steps)
    elif solver is not None or steps is not None:
        raise ConfigError(
            f"{run.path} holds a {type(run.model).__name__}, which has no head: leave --solver and --steps out"
        )
