"""One process at a time writes a run directory: RUN/.lock names it, and the system lets go of it when that process ends.

The lock is the system's own (flock), so that a process that was killed leaves none behind. Where a file system knows no
locks, the process id in the file decides, if it is of this machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nextvec.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold `run` (made if it is missing) for this process. Raises ConfigError, naming the holder, when it is in use."""
    path = Path(run) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path)
    try:
        yield
    finally:
        with suppress(OSError):  # first away, then let go: whoever opens it later makes a new one
            path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _locked(handle):
                raise ConfigError(_in_use(path))
            if not _is_at(handle, path):  # its holder removed it between our opening and our locking
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return handle
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise


def _locked(handle: int) -> bool:
    """Whether another process has the lock; if not, it is ours from now on."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:  # no locks on this file system
            pass
    pid, _, host = os.pread(handle, 1024, 0).decode(errors="replace").strip().partition(" ")
    if host != socket.gethostname() or not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _in_use(path: Path) -> str:
    pid, _, host = path.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
    who = f"process {pid} on {host}" if pid.isdigit() else "another process"
    return f"{path.parent} is being written by {who}; wait for it or stop it, or give another directory"
