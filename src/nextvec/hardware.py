"""What the machine offers: devices, processor features, measured rates, and the precision that follows from them.

Rates are measured, not looked up: matrix products in floating-point operations per second (a multiply-add counts as 2)
and memory in bytes per second. Each is measured once per process and takes well under a second.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from nextvec.errors import ConfigError

Precision = Literal["bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_MARGIN = 1.2  # bf16 must measure this much faster than fp32: autocast pays for casts that a bare product does not
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")  # names as in /proc/cpuinfo


def choose_device(name: str = "auto") -> torch.device:
    """The device for auto | cpu | cuda | mps. Raises ConfigError when the one asked for is missing."""
    found = available_devices()
    if name == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if d in found))
    if name not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device must be one of auto, cpu, cuda, mps; got {name!r}")
    if name not in found:
        raise ConfigError(f"device {name} is not available here; this machine and this torch offer {', '.join(found)}")
    return torch.device(name)


def available_devices() -> list[str]:
    """Device types that can compute here, the processor first."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes: peak allocated by torch on a GPU, resident size of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return int(psutil.Process().memory_info().rss)


def cpu_features() -> list[str]:
    """Instruction sets that matter for matrix products, as the system names them (empty where it does not say)."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("flags", "features"):
                flags = set(value.split())
                break
    return [flag for flag in _FLAGS if flag in flags]


def has_bf16(device: torch.device) -> bool:
    """True where the hardware multiplies bf16 itself (AMX, AVX512-BF16, ARM BF16, a GPU's tensor cores)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return True  # every Metal GPU that runs bf16 at all runs it natively; the measurement decides
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(cpu_features()))


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A sentence for whoever asks for bf16 where it is emulated; None where nothing is to be said."""
    if precision != "bf16" or has_bf16(device):
        return None
    return f"this {_kind(device)} has no bf16 instructions and is 20 times slower or more in bf16: fp32 is faster here"


@functools.cache
def matmul_rates(device: torch.device) -> dict[Precision, float]:
    """Measured rates of square matrix products, in floating-point operations per second.

    Precisions take turns and the best of many runs counts, so that a busy machine does not favour one of them. Takes
    0.8 s the first time and nothing afterwards; without bf16 instructions its product is small, being slow.
    """
    largest = 1024 if device.type == "cpu" else 4096
    sides: dict[Precision, int] = {"fp32": largest, "bf16": largest if has_bf16(device) else 256}
    factors = {name: [_random(side, device).to(DTYPES[name]) for _ in range(2)] for name, side in sides.items()}
    best = dict.fromkeys(sides, float("inf"))
    deadline = time.perf_counter() + 0.8
    for turn in itertools.count():
        for name, (left, right) in factors.items():
            seconds = _time_of(functools.partial(torch.matmul, left, right), device)
            best[name] = min(best[name], seconds) if turn else best[name]  # the first turn is warm-up
        if turn and time.perf_counter() > deadline:
            break
    return {name: 2.0 * side**3 / best[name] for name, side in sides.items()}


@functools.cache
def memory_rate(device: torch.device) -> float:
    """Measured rate of copying a buffer larger than the caches, in bytes per second read plus written."""
    source = torch.zeros((256 if device.type == "cuda" else 64) << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    return 2.0 * source.nbytes / min(_time_of(copy, device) for _ in range(8))


@functools.cache
def choose_precision(device: torch.device) -> tuple[Precision, str]:
    """bf16 where the hardware has it and it measures faster than fp32, else fp32; and the reason in one line."""
    if not has_bf16(device):
        return "fp32", f"fp32: this {_kind(device)} has no bf16 matrix instructions"
    rates = matmul_rates(device)
    fp32, bf16 = rates["fp32"], rates["bf16"]
    measured = f"measured {bf16 / 1e9:,.0f} GFLOP/s in bf16 and {fp32 / 1e9:,.0f} in fp32"
    if bf16 < BF16_MARGIN * fp32:
        return "fp32", f"fp32: {measured}, which is no gain worth its rounding"
    return "bf16", f"bf16: {measured}"


def compiler_problem(device: torch.device) -> str | None:
    """None when torch.compile can build kernels for this device, else why not in one line."""
    if device.type == "cuda":
        try:
            import triton  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ImportError:
            return "torch.compile needs the package triton on a GPU and it is not installed"
        return None
    if device.type == "mps":
        return None
    wanted = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if platform.system() != "Windows" and shutil.which(wanted) is None:
        return f"torch.compile needs a C++ compiler and {wanted} was not found (set CXX, or install one)"
    return None


@dataclass(frozen=True)
class Environment:
    """What `nextvec env` prints. Rates in operations or bytes per second, memory in bytes."""

    nextvec: str
    python: str
    torch: str
    system: str
    processor: str
    cores: int
    threads: int
    memory_bytes: int
    cpu_features: list[str]
    gpus: list[str]
    device: str
    matmul_rate: dict[Precision, float]
    memory_rate: float
    precision: str
    precision_reason: str
    compile: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for a reader, one fact a line."""
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.matmul_rate.items())
        return [
            f"nextvec    {self.nextvec} on Python {self.python}, torch {self.torch}, {self.system}",
            f"processor  {self.processor}, {self.cores} cores ({self.threads} threads used), "
            f"{self.memory_bytes / 2**30:.1f} GiB memory",
            f"features   {', '.join(self.cpu_features) or 'none of ' + ', '.join(_FLAGS)}",
            f"gpu        {', '.join(self.gpus) or 'none'}",
            f"device     {self.device} (chosen by --device auto)",
            f"matmul     {rates} (measured)",
            f"memory     {self.memory_rate / 1e9:,.1f} GB/s (measured copy, read plus write)",
            f"precision  {self.precision_reason}",
            f"compile    {self.compile}",
        ]


def environment() -> Environment:
    """Measure and describe this machine; about a second."""
    from nextvec import __version__

    device = choose_device("auto")
    precision, reason = choose_precision(device)
    return Environment(
        nextvec=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor_name(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=int(psutil.virtual_memory().total),
        cpu_features=cpu_features(),
        gpus=_gpu_names(),
        device=device.type,
        matmul_rate=dict(matmul_rates(device)),
        memory_rate=memory_rate(device),
        precision=precision,
        precision_reason=reason,
        compile=compiler_problem(device) or "available",
    )


def _time_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue empty before and after."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def _random(side: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(side, side, generator=generator, device=device)


def _kind(device: torch.device) -> str:
    return "processor" if device.type == "cpu" else "GPU"


def _gpu_names() -> list[str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    return names


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
