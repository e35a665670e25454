"""metrics.jsonl: one JSON object a line, written at once; and TensorBoard, when asked for and installed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextvec.errors import ConfigError
from nextvec.files import atomic_open

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
Row = dict[str, Any]


def read_metrics(path: Path, say: Callable[[str], None] | None = None) -> list[Row]:
    """The rows of a metrics file or of a run directory's; a last line cut off by a crash is left out.

    So is any other line that is no row, with one line to `say`.
    """
    path = Path(path)
    file = path / METRICS if path.is_dir() else path
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    found = [row_of(line) for line in lines]
    bad = [number for number, row in enumerate(found[:-1], 1) if row is None and lines[number - 1].strip()]
    if bad and say is not None:
        named = ", ".join(map(str, bad[:3])) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        say(f"{file}: damaged and left out: line {named}; all other rows are kept")
    return [row for row in found if row is not None]


def row_of(line: bytes) -> Row | None:
    """A row of metrics.jsonl, None for a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and row.get("kind") in ("train", "eval") and type(row.get("step")) is int
    return row if good else None


def check_tensorboard() -> None:
    """Raises ConfigError when the extra is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--tensorboard needs the tensorboard extra, which is not installed: pip install 'nextvec[tensorboard]'"
        ) from None


class MetricsLog:
    """Appends rows to RUN/metrics.jsonl. Values that are not finite are written as null.

    Opened at `step`, it first drops rows of later steps, so that a resumed run holds every row once, and damaged lines,
    with one line to `say`; `evaluation` is the newest held-out row. A row that cannot be written (full disk) is taken
    back whole and `write` raises OSError; the file stays readable.
    """

    def __init__(
        self, run: Path, step: int, tensorboard: bool = False, say: Callable[[str], None] | None = None
    ) -> None:
        self._path = Path(run) / METRICS
        self._board = _board(Path(run), step) if tensorboard else None
        kept = [row for row in read_metrics(self._path, say) if row["step"] <= step]
        self.evaluation: Row | None = next((row for row in reversed(kept) if row["kind"] == "eval"), None)
        with atomic_open(self._path) as handle:
            handle.writelines(_line(row) for row in kept)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed by close)

    def write(self, row: Row) -> None:
        """Append one row: `kind` ("train" or "eval"), `step`, and the rest."""
        if row["kind"] == "eval":
            self.evaluation = row
        end = os.fstat(self._file.fileno()).st_size
        data = _line(row).encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "seconds"):
                    self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def sync(self) -> None:
        """Make the rows so far durable, before the checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog:
    """The log of a process that writes none: it keeps the newest held-out row, as `MetricsLog` does."""

    evaluation: Row | None = None

    def write(self, row: Row) -> None:
        if row["kind"] == "eval":
            self.evaluation = row

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _line(row: Row) -> str:
    return json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _board(run: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
