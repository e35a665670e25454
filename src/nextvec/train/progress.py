"""What a person sees while training: a live line in a terminal, one plain line per log step elsewhere. All on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

_NOT_TERMS = {
    "kind", "step", "tokens", "seconds", "cpu_seconds", "lr", "tokens_per_s", "share", "memory_bytes", "per_document", "progress",
}  # fmt: skip


class _Live(Progress):
    """A bar with speed and time to go, and the loss terms on a line of their own below it."""

    terms = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.terms)


class Display:
    """`note` and `log` speak only when `show` is set; `say` always does (warnings, how to go on)."""

    def __init__(self, steps: int, show: bool, budget: float | None = None, mute: bool = False) -> None:
        """`budget`: seconds of training, where they and not `steps` end it. `mute`: another process speaks."""
        self._steps, self._budget, self._mute = steps, budget, mute
        self._show = show and not mute
        self._live: _Live | None = None
        self._task: TaskID | None = None

    def start(self, step: int, seconds: float) -> None:
        """Begin the live line, in a terminal."""
        if self._show and sys.stderr.isatty():
            unit = "steps" if self._budget is None else "s"
            columns = (BarColumn(20), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[status]}"))
            self._live = _Live(*columns, console=Console(stderr=True))
            self._task = self._live.add_task("", total=round(self._budget or self._steps), status="starting")
            self.advance(step, seconds)
            self._live.start()

    def say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(escape(line), highlight=False)
        elif not self._mute:
            print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        if self._show:
            self.say(line)

    def advance(self, step: int, seconds: float) -> None:
        """`seconds` of training so far, after `step` steps."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step if self._budget is None else round(seconds))

    def log(self, row: dict[str, Any], eta: float | None, rate: float | None) -> None:
        """Show a train row; `eta` in seconds, `rate` the measured operations per second that `share` refers to."""
        if self._live is not None and self._task is not None:
            self._live.terms = terms(row)
            self.advance(row["step"], row["seconds"])
            self._live.update(self._task, status=escape(speed(row, eta, rate)))
        elif self._show:
            of = f"/{self._steps}" if self._budget is None else f" ({row['seconds']:.0f} of {self._budget:.0f} s)"
            self.say(f"step {row['step']}{of}  {terms(row)}  {speed(row, eta, rate)}")

    def evaluation(self, row: dict[str, Any]) -> None:
        self.note(f"held out at step {row['step']}: {terms(row)}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def is_term(name: str) -> bool:
    """Whether a figure of a row is a term of the loss or measured beside it, and no bookkeeping."""
    return name not in _NOT_TERMS


def terms(row: dict[str, Any]) -> str:
    """The loss terms of a row: every number that is not bookkeeping."""
    parts = []
    for name, value in row.items():
        if not is_term(name) or value is None:
            continue
        numbers = value if isinstance(value, list | tuple) else [value]
        parts.append(f"{name} {' '.join('-' if number is None else f'{number:.4g}' for number in numbers)}")
    return "  ".join(parts)


def speed(row: dict[str, Any], eta: float | None, rate: float | None) -> str:
    """The bookkeeping of a train row: rate of learning, tokens/s, share of the machine, memory, time to go."""
    parts = [f"lr {row['lr']:.2g}", f"{row['tokens_per_s']:,.0f} tokens/s"]
    if row["share"] is not None and rate is not None:
        parts.append(f"{100 * row['share']:.0f} % of {rate / 1e9:,.0f} GFLOP/s")
    parts.append(f"{row['memory_bytes'] / 2**30:.2f} GiB")
    if eta is not None:
        parts.append(f"ETA {duration(eta)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """
    >>> duration(75.4), duration(3 * 3600 + 61)
    ('1:15', '3:01:01')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
