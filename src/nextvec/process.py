"""The process: how long waiting threads spin and whether freed memory is kept, which decide how fast a CPU works; how it ends.

Nothing here imports torch, so that the command line can call it first.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import NoReturn

SPIN_ALONE, SPIN_SHARED = 3000, 300  # rounds that a waiting thread spins
KEEP_BELOW = 32 << 20  # bytes: the largest threshold that glibc takes; larger blocks go back to the system when freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_USUAL = 128 << 10  # glibc's own start for both thresholds


def yield_waiting_threads() -> None:
    """Choose how long OpenMP threads that wait for each other spin before they sleep, by whether the machine is busy.

    Before torch is imported; the user's own setting wins. A training step of small products has thousands of places where
    threads meet. On an idle machine threads that sleep there cost up to half of the step; on one that does something else as
    well, threads that spin burn the time that the thread waited for needs: libgomp's own 300,000 rounds up to a factor of
    20 (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_SHARED if busy() else SPIN_ALONE))


def busy(samples: int = 5, pause: float = 0.002) -> bool:
    """Whether more than one process in eight cores wants to run beside this one, at each of a few moments; True where
    the system does not say."""
    others = []
    for _ in range(samples):
        try:
            with open("/proc/loadavg", encoding="ascii") as file:
                others.append(int(file.read().split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return True
        time.sleep(pause)
    return 8 * min(others) > (os.cpu_count() or 1)


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc hand freed tensors out again instead of returning them to the system; `keep=False` goes back to its usual way.

    By default every tensor above a threshold is mapped anew and its pages are cleared by the kernel at first touch, step after
    step: 5 to 25 % of a training step on 2 cores (docs/performance.md). Without effect on other systems, and where the user
    has set glibc's own variables.
    """
    own = "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ
    if not sys.platform.startswith("linux") or own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, KEEP_BELOW if keep else _USUAL)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1 if keep else _USUAL)


_beside = False


def run_beside_others() -> None:
    """Note that this process talks to others by torch.distributed: see `leave`."""
    global _beside
    _beside = True


def leave(status: int) -> NoReturn:
    """End the process with this exit status; one that talked to others without Python's own way out.

    gloo's threads outlive their process group (DTensor's caches hold its mesh) and may still be letting go of the last
    tensors. One of them that asks for the interpreter while that shuts down is unwound through C++ that cannot be, and a
    run that had finished ends with SIGABRT.
    """
    if not _beside:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # what was said is lost
            status = status or 1
    os._exit(status)
