"""Writes checkpoints on a thread of its own, so that training goes on meanwhile; one at a time.

Of a sharded run every process has a writer, and they begin and end the same checkpoints with the same result (parts.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from nextvec.errors import DataError, UserError
from nextvec.train.checkpoint import Say, Snapshot


class Writer:
    """At most one checkpoint is on its way to disk and none waits behind it, so memory holds at most one copy."""

    def __init__(self, write: Callable[[Snapshot], object], before: Callable[[], None], say: Say):
        """before: called on the writing thread first, for what must be durable earlier. say: gets the line of a failure."""
        self._to_disk, self._before, self._say = write, before, say
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self.saved: int | None = None  # step of the newest checkpoint known to be on disk

    def begin(self, taken: Snapshot) -> None:
        """Start writing; the one before is waited for."""
        self.settle(wait=True)
        self._pending = taken.state.step, self._pool.submit(self._write, taken)

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint, on disk or on its way."""
        return self._pending[0] if self._pending is not None else self.saved

    def settle(self, wait: bool) -> None:
        """Take note of a write that has ended, or with `wait` of the one on its way. A failure is one line, once."""
        if failed := self._failure(wait):
            self._say(f"{failed[0]}, training goes on")

    def finish(self) -> None:
        """Wait until all is on disk. Raises DataError in one sentence when it is not."""
        if failed := self._failure(wait=True):
            line, error = failed
            raise DataError(f"{line}; free some space and go on with --resume" if _full(error) else line) from error

    def kept(self) -> str:
        return (
            "no checkpoint had been written before"
            if self.saved is None
            else f"the checkpoint of step {self.saved} is kept"
        )

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _failure(self, wait: bool) -> tuple[str, Exception] | None:
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (UserError, OSError) as error:
            why = "the disk is full" if _full(error) else str(error)
            return f"the checkpoint of step {step} was not written ({why}); {self.kept()}", error
        self.saved = step
        return None

    def _write(self, taken: Snapshot) -> None:
        self._before()
        self._to_disk(taken)


def _full(error: Exception) -> bool:
    return isinstance(error, DataError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
