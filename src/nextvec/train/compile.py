"""torch.compile of the repeated blocks only ("regional"): each block's code is compiled once, so warm-up is seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from nextvec.hardware import compiler_problem


def compile_regions_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that `module` or its parts offer through `compile_regions() -> list[nn.Module]`, each once."""
    found: dict[int, nn.Module] = {}
    for part in module.modules():
        offered = getattr(part, "compile_regions", None)
        if callable(offered):
            found |= {id(region): region for region in offered()}
    return list(found.values())


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
    reason. The first time on a machine is slow (10 to 30 s of a C++ compiler on a CPU); later runs find the kernels in
    torch's cache on disk.
    """
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
