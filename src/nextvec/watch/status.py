"""What a run directory says now: rows of metrics as they are written, progress, checkpoints, anomalies, and who is at work.

Nothing here disturbs training: files are only read, and no lock is taken.
"""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextvec.config import RunConfig, load_yaml, parse_any_run
from nextvec.errors import ConfigError, DataError
from nextvec.lock import RUN_LOCK
from nextvec.train.anomalies import Anomaly, Detector
from nextvec.train.metrics import METRICS, Row, row_of

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"
CHECKPOINT = re.compile(r"step-(\d+)")  # folders below RUN/checkpoints
QUIET = 900.0  # seconds without a sign of life after which a process of another machine counts as gone
UNNAMED = 10.0  # seconds after which a lock file without a name in it was left behind
RECENT = 20  # rows that the time to go is read from
State = Literal["starting", "training", "stopped", "finished"]


@dataclass(frozen=True)
class Status:
    """One look at a run. Rows are those of metrics.jsonl, each step once."""

    path: Path
    config: RunConfig | None  # None: not written yet
    state: State
    holder: str | None  # the process at work, as a reader knows it
    train: tuple[Row, ...]
    eval: tuple[Row, ...]
    anomalies: tuple[Anomaly, ...]
    checkpoint: int | None  # step of the newest
    checkpoint_age: float | None  # seconds
    written: float | None  # seconds since the last row

    @property
    def last(self) -> Row:
        """The newest train row, empty before the first."""
        return self.train[-1] if self.train else {}

    @property
    def progress(self) -> float | None:
        """Share of the training that is done; None before the first row."""
        if not self.train:
            return None
        if self.state == "finished":
            return 1.0
        if isinstance(done := self.last.get("progress"), int | float):
            return float(done)
        return None if self.config is None else min(1.0, self.last["step"] / self.config.train.steps)

    @property
    def eta(self) -> float | None:
        """Seconds of training to go, at the pace of the last rows; None where that cannot be told."""
        if self.progress is None or self.config is None:
            return None
        first, last = self.train[max(0, len(self.train) - 1 - RECENT)], self.train[-1]
        if first is last:
            first = {"step": 0, "seconds": 0.0, "progress": 0.0}
        if "progress" in last and "progress" in first:
            covered = last["progress"] - first["progress"]
        else:
            covered = (last["step"] - first["step"]) / self.config.train.steps
        spent = last["seconds"] - first["seconds"]
        return (1 - self.progress) * spent / covered if covered > 0 and spent >= 0 else None


class Reader:
    """Follows one run directory: each `look` reads only what is new."""

    def __init__(self, run: Path) -> None:
        self.path = Path(run)
        self._config: tuple[float, RunConfig] | None = None  # when it was written, and what it says
        self._clear(None)

    def look(self) -> Status:
        """The run as it is now. Raises ConfigError for settings that cannot be read or are of no training."""
        config = self._settings()
        self._read()
        holder = self._holder()
        train, evaluated = tuple(self._rows["train"]), tuple(self._rows["eval"])
        step, age = self._checkpoint()
        return Status(
            path=self.path,
            config=config,
            state=self._state(config, holder, train),
            holder=holder,
            train=train,
            eval=evaluated,
            anomalies=tuple(self._detector.found),
            checkpoint=step,
            checkpoint_age=age,
            written=_age(self.path / METRICS) if train or evaluated else None,
        )

    def check(self) -> None:
        """Raises DataError when there is no run, and nobody who begins one."""
        if not self.path.exists():
            raise DataError(f"{self.path} does not exist")
        if not any((self.path / name).exists() for name in (CONFIG, METRICS, RUN_LOCK)):
            raise DataError(f"{self.path} is not a run directory: it has no {CONFIG}")

    def _clear(self, config: RunConfig | None) -> None:
        self._offset, self._file = 0, (-1, -1)
        self._rows: dict[str, list[Row]] = {"train": [], "eval": []}
        self._detector = Detector() if config is None else Detector.of(config)

    def _settings(self) -> RunConfig | None:
        path = self.path / CONFIG
        try:
            written = path.stat().st_mtime
        except OSError:
            return None
        if self._config is None or self._config[0] != written:
            config = parse_any_run(load_yaml(path), str(path))
            if not isinstance(config, RunConfig):
                raise ConfigError(f"{self.path} holds converted weights: there is no training of them to look at")
            self._config = written, config
            self._clear(config)
        return self._config[1]

    def _read(self) -> None:
        """Take in the whole lines that are new; a resumed run has written the file anew."""
        try:
            handle = open(self.path / METRICS, "rb")  # noqa: SIM115  (closed below)
        except OSError:
            return
        with handle:
            found = os.fstat(handle.fileno())
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                self._clear(None if self._config is None else self._config[1])
                self._file = found.st_dev, found.st_ino
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1  # what follows is a row in the making
        self._offset += end
        for line in data[:end].splitlines():
            row = row_of(line)
            if row is not None:
                self._rows[row["kind"]].append(row)
                self._detector.add(row)

    def _state(self, config: RunConfig | None, holder: str | None, train: tuple[Row, ...]) -> State:
        if holder is not None:
            return "training" if train else "starting"
        if config is None:
            return "starting"
        last = train[-1] if train else {}
        over = last.get("progress", 1.0) >= 1.0 or last["step"] >= config.train.steps
        return "finished" if over and (self.path / WEIGHTS).exists() else "stopped"

    def _holder(self) -> str | None:
        """The process that writes the run, from the lock file. Where it runs elsewhere, its files must have changed lately."""
        path = self.path / RUN_LOCK
        try:
            pid, _, host = path.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        except OSError:
            return None
        if not pid.isdigit():  # the name is written right after the lock is taken
            return "another process" if (_age(path) or 0.0) < UNNAMED else None
        if host != socket.gethostname():
            ages = [age for age in (_age(path), _age(self.path / METRICS)) if age is not None]
            return f"process {pid} on {host}" if min(ages, default=QUIET) < QUIET else None
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return None
        except OSError:  # it is somebody else's
            pass
        return f"process {pid}"

    def _checkpoint(self) -> tuple[int | None, float | None]:
        folders = self.path / "checkpoints"
        names = [CHECKPOINT.fullmatch(entry.name) for entry in folders.iterdir()] if folders.is_dir() else []
        newest = max((int(name[1]), name[0]) for name in names if name) if any(names) else None
        return (None, None) if newest is None else (newest[0], _age(folders / newest[1]))


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
