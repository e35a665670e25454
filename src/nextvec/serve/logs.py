"""Structured logs: one JSON object a line on standard error. No prompt, no text and no key is ever in them."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("nextvec.serve")
WAITING = 1000  # lines that may wait for a slow reader
PATIENCE = 2.0  # seconds at the end for those that still wait


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its fields."""
    LOGGER.log(level, name, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time (UTC), level, event, the fields, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LineWriter(logging.Handler):
    """Writes each record's line to a file descriptor from a thread of its own, so that a reader that stands still (a full
    pipe) does not stop the server. Lines beyond `WAITING` are lost; the next one that is written is told how many."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._lost = descriptor, 0
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        # handle() holds this handler's lock: the count is safe
        try:
            if self._lost:
                told = {"msg": "log lines lost", "levelname": "WARNING", "fields": {"lines": self._lost}}
                self._lines.put_nowait(self.format(logging.makeLogRecord(told)))
                self._lost = 0
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1

    def finish(self) -> None:
        """Let the lines that wait be written, for `PATIENCE` seconds."""
        try:
            self._lines.put(None, timeout=PATIENCE)
        except queue.Full:
            return
        self._thread.join(PATIENCE)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            rest = memoryview(f"{line}\n".encode())
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # the reader has gone
                continue


@contextmanager
def logs_to(descriptor: int) -> Iterator[None]:
    """Let our logger and uvicorn's write JSON lines to this file descriptor, 2 for standard error."""
    writer = LineWriter(descriptor)
    writer.setFormatter(JsonFormatter())
    before: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
    for name, level in (("nextvec.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers, logger.propagate))
        logger.handlers, logger.propagate = [writer], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        writer.finish()
