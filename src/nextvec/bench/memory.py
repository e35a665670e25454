"""Peak memory of one arm, in a process of its own: `python -m nextvec.bench.memory`, a Spec on its input, JSON on its output.

On a CPU the high-water mark of the process's resident size; on CUDA of what torch has allocated. From either, what was
there before the first whole unit of work is taken off: libraries, model, optimiser state, text. What remains are
gradients, activations, temporaries, casts of weights, and what the allocator holds on to.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from nextvec.bench.steps import TrainStep
from nextvec.bench.work import Spec, make_work
from nextvec.process import keep_freed_memory

CALLS = 3  # units of work, after which the mark stays
MEANING = (
    "highest resident size of a process that does nothing else (on CUDA: memory allocated by torch) over 3 units of work, "
    "above its size with libraries, model, optimiser state and text in place: gradients, activations, temporaries and "
    "the allocator's slack"
)


def peak_bytes(spec: Spec) -> int | None:
    """The peak of `spec`'s work, measured in a new process; None on devices that do not say (mps)."""
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=spec.model_dump_json(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return None if found is None else int(found)


def measure(spec: Spec) -> int | None:
    """The same in this process."""
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type == "mps":
        return None
    work = make_work(spec)
    if isinstance(work, TrainStep):
        work.compile(lambda line: None)
    work.warm()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        _trim()
        before = psutil.Process().memory_info().rss
    for _ in range(CALLS):
        work()
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) - before)
    return max(0, resident_peak() - before)


def resident_peak() -> int:
    """Highest resident size of this process so far, in bytes.

    Where there is /proc, from there: Linux lets a process begin with the ru_maxrss of the one that started it, so that a
    large parent would hide its children.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _trim() -> None:
    """Give free memory back to the system, where the C library can, so that it does not count as in use before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    print(json.dumps({"peak_bytes": measure(Spec.model_validate_json(sys.stdin.read()))}))
