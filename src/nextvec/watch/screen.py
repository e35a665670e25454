"""A run on a terminal: progress, terms with their trends, held-out figures, the last checkpoint, and anomalies in sentences."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nextvec.report.words import count, duration, speed
from nextvec.train.anomalies import Anomaly
from nextvec.train.metrics import Row
from nextvec.train.progress import is_term, terms
from nextvec.watch.status import Reader, Status

KINDS = {"autoencoder": "autoencoder", "calm": "CALM", "token_lm": "token Transformer"}
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*#@"
COLUMNS = 24  # of a trend
SCALES = {"memory_bytes": 2.0**30}
NAMES = {
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_bytes": "memory (GiB)",
    "lr": "learning rate",
}


def follow(reader: Reader, console: Console, every: float) -> None:
    """Show the run until it is finished, or Ctrl-C. every: seconds between two looks."""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        try:
            while True:
                status = reader.look()
                live.update(View(status), refresh=True)
                if status.state == "finished":
                    return
                time.sleep(every)
        except KeyboardInterrupt:
            return


def print_whole(console: Console, view: View) -> None:
    """One look; what is no terminal has no width, and a line there is a line."""
    console.print(view, soft_wrap=not console.is_terminal)


class View:
    """One look at a run, as rich draws it."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> list[RenderableType]:
        s = self.status
        parts: list[RenderableType] = [Text(headline(s), style="bold")]
        if s.train:
            parts += [self._progress(options), Text(so_far(s)), self._terms(options)]
        if s.eval:
            parts.append(Text(f"held out at step {s.eval[-1]['step']:,}: {terms(s.eval[-1])}"))
        parts += [Text(line) for line in (checkpoint(s),) if line]
        parts += [Text(line, style="" if line.startswith("no ") else "yellow") for line in anomalies(s)]
        return [Group(*parts)]

    def _progress(self, options: ConsoleOptions) -> RenderableType:
        done, eta = self.status.progress or 0.0, self.status.eta
        words = f"{100 * done:.1f} %" + (f", ETA {duration(eta)}" if eta is not None and done < 1.0 else "")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(1.0, done, width=min(40, options.max_width // 2)), Text(words))
        return grid

    def _terms(self, options: ConsoleOptions) -> RenderableType:
        s = self.status
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name, side in (("", "left"), ("now", "right"), ("over the run", "left"), ("last quarter", "right")):
            table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
        blocks = PLAIN if options.ascii_only else BLOCKS
        for name in shown(s.train):
            values = [float(row[name]) for row in s.train if isinstance(row.get(name), int | float)]
            scale = SCALES.get(name, 1.0)
            now = speed(values[-1]) if name == "tokens_per_s" else f"{values[-1] / scale:.4g}"
            table.add_row(NAMES.get(name, name), now, sparkline(values, blocks), change(values))
        return table


def shown(rows: Sequence[Row]) -> list[str]:
    """Figures of train rows to show, in the order of the newest: the loss and its terms, then the bookkeeping."""
    last = rows[-1]
    ends = [name for name in ("lr", "grad_norm", "tokens_per_s", "memory_bytes") if _finite(last.get(name))]
    inner = [
        name for name, value in last.items() if is_term(name) and name not in (*ends, "skipped") and _finite(value)
    ]
    if any(last[name] == last["loss"] for name in inner if name != "loss" and "loss" in last):
        inner.remove("loss")  # the model's only term
    return [*inner, *ends]


def headline(s: Status) -> str:
    """What and where the run is."""
    kind = "run" if s.config is None else KINDS[s.config.kind]
    state = {
        "starting": "has not logged a step yet",
        "training": "is training",
        "finished": "is finished",
        "stopped": "is not being trained",
    }[s.state]
    who = f" ({s.holder})" if s.holder is not None else ""
    hint = ""
    if s.state == "stopped" and s.train:
        hint = "; go on with --resume"
    elif s.state == "training" and s.written is not None and s.written > 120:
        hint = f"; last row {duration(s.written)} ago"
    return f"{s.path}: {kind} {state}{who}{hint}"


def so_far(s: Status) -> str:
    """Steps, tokens and seconds of training."""
    steps = f"step {s.last['step']:,}"
    if s.config is not None and abs((s.progress or 0.0) - s.last["step"] / s.config.train.steps) < 1e-3:
        steps += f" of {s.config.train.steps:,}"  # else a budget of time ends it
    return f"{steps}, {count(s.last.get('tokens'))} tokens, {duration(s.last.get('seconds'))} of training"


def checkpoint(s: Status) -> str | None:
    """The newest checkpoint, and steps that were skipped."""
    if not s.train and s.checkpoint is None:
        return None
    parts = ["no checkpoint yet" if s.checkpoint is None else f"last checkpoint: step {s.checkpoint:,}"]
    if s.checkpoint is not None and s.checkpoint_age is not None and s.state == "training":
        parts[0] += f", {duration(s.checkpoint_age)} ago"
    parts.append(f"steps skipped: {s.last.get('skipped', 0):,}")
    return "; ".join(parts)


def anomalies(s: Status) -> list[str]:
    """One line each; what is over says so."""
    if not s.train:
        return []
    step = s.last["step"]
    return [f"anomaly: {a.text}{_until(a, s, step)}" for a in s.anomalies] or ["no anomalies"]


def _until(anomaly: Anomaly, s: Status, step: int) -> str:
    """Says of a state whether it is over; a speed is one only while somebody trains."""
    if anomaly.kind in ONCE:
        return ""
    if not anomaly.now(step):
        return " (over since)"
    return " (then training ended)" if anomaly.kind == "throughput" and s.state in ("stopped", "finished") else ""


ONCE = ("not finite", "gradient")  # anomalies that are moments, not states


def sparkline(values: Sequence[float], blocks: str = BLOCKS, columns: int = COLUMNS) -> str:
    """Means over equal stretches, from the least (lowest block) to the most.

    >>> sparkline([3.0, 2.0, 1.0, 0.0])
    '█▆▃▁'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = min(columns, len(finite))
    edges = [round(index * len(finite) / size) for index in range(size + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(blocks) - 1
    return "".join(blocks[round(top * (mean - low) / span) if span > 0 else 0] for mean in means)


def change(values: Sequence[float]) -> str:
    """The mean of the last quarter of the rows against that of the quarter before; empty with fewer than 8 rows."""
    size = len(values) // 4
    if size < 2:
        return ""
    before, now = math.fsum(values[-2 * size : -size]) / size, math.fsum(values[-size:]) / size
    return "" if before == 0 else f"{100 * (now / before - 1):+.1f} %"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
