"""Settings of the process that decide how fast a CPU works: waiting threads sleep early, freed memory is kept for reuse.

Nothing here imports torch, so that the command line can call it first.
"""

from __future__ import annotations

import ctypes
import os
import sys

KEEP_BELOW = 32 << 20  # bytes: the largest threshold that glibc takes; larger blocks go back to the system when freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_USUAL = 128 << 10  # glibc's own start for both thresholds


def yield_waiting_threads() -> None:
    """Let OpenMP threads that wait for each other sleep early. Before torch is imported; the user's own setting wins.

    By default libgomp's threads spin for milliseconds; on a machine that does something else as well they then burn the time that
    the thread waited for needs. Measured: 20 times slower (docs/log.md). An idle machine hardly notices.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "300")


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
