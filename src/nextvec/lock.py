"""Locks between processes: a file that names its holder, and that the system lets go of when that process ends.

The lock is the system's own (flock), so that a process that was killed leaves none behind. Where a file system knows no
locks, the process id in the file decides, if it is of this machine.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nextvec.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_LOCK = ".lock"  # of a run directory: one process at a time writes it
POLL = 0.2  # seconds between two looks at a holder's process id


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold `run` (made if it is missing) for this process. Raises ConfigError, naming the holder, when it is in use."""
    path = Path(run) / RUN_LOCK
    with held(path, wait=False) as mine:
        if not mine:
            raise ConfigError(_in_use(path))
        yield


@contextmanager
def held(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` while inside; False when another process holds it and `wait` is not set.

    Its folder is made if it is missing; the file is removed afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with suppress(OSError):  # first away, then let go: whoever opens it later makes a new one
                path.unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path, wait: bool) -> int | None:
    """The open file, locked and with our name in it; None when another process has it and we do not wait."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            mine = _lock(handle, wait)
            if mine and _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not mine:
            if not wait:
                return None
            time.sleep(POLL)  # else its holder removed it between our opening and our locking


def _lock(handle: int, wait: bool) -> bool:
    """Whether the lock is ours from now on; where the system has none, as far as the process id in the file tells."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system
            pass
    pid, _, host = os.pread(handle, 1024, 0).decode(errors="replace").strip().partition(" ")
    if host != socket.gethostname() or not pid.isdigit() or int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _in_use(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # let go of since
        text = ""
    pid, _, host = text.strip().partition(" ")
    who = f"process {pid} on {host}" if pid.isdigit() else "another process"
    return f"{path.parent} is being written by {who}; wait for it or stop it, or give another directory"
