"""torch.compile of the repeated blocks only ("regional"): each block's code is compiled once, so warm-up is seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nextvec.hardware import compiler_problem


def compile_regions_of(module: nn.Module) -> list[nn.Module]:
    """The trained blocks that `module` or its parts offer through `compile_regions() -> list[nn.Module]`, each once.

    A frozen block (CALM's autoencoder) runs forward only, once a step: its share is less than compiling it costs.
    """
    found: dict[int, nn.Module] = {}
    for part in module.modules():
        offered = getattr(part, "compile_regions", None)
        if callable(offered):
            found |= {id(region): region for region in offered() if any(p.requires_grad for p in region.parameters())}
    return list(found.values())


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/nextvec/compiled, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nextvec" / "compiled"


def compile_blocks(
    module: nn.Module,
    device: torch.device,
    trial: Callable[[], object],
    say: Callable[[str], None],
    backend: str = "inductor",
) -> bool:
    """Compile the repeated blocks in place with `nn.Module.compile()`; True when they run compiled.

    `trial` runs the module forward and backward once: compilation is lazy, so only a run shows whether it works. When
    there is no compiler or the trial fails, the blocks stay eager. `say` gets one line: the seconds it took, or the
    reason. The first time on a machine is slow (docs/performance.md); later runs find the kernels in a folder of the
    user's cache, where torch's own place is /tmp. TORCHINDUCTOR_CACHE_DIR names another.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    regions = compile_regions_of(module)
    problem = compiler_problem(device) or (None if regions else "this model offers no blocks to compile")
    if problem is None:
        try:
            begin = time.perf_counter()
            for region in regions:
                region.compile(dynamic=False, backend=backend)
            trial()
            say(f"compiled {len(regions)} blocks in {time.perf_counter() - begin:.0f} s")
            return True
        except Exception as error:  # the compiler's own errors share no base class
            for region in regions:
                region._compiled_call_impl = None  # undo of nn.Module.compile, which has no public one
            torch._dynamo.reset()
            trial()  # an error of the model itself, not of the compiler, surfaces here
            problem = f"torch.compile failed ({' '.join(str(error).split())[:200]})"
    say(f"{problem}; training runs eagerly")
    return False
