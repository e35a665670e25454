"""Activation checkpointing of the repeated blocks: their activations are computed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from nextvec.train.compile import compile_regions_of


@contextmanager
def recomputed_blocks(module: nn.Module, wanted: bool) -> Iterator[int]:
    """Recompute the trained blocks that `module` offers (compile.py) while inside; yields their number, 0 if not `wanted`.

    The results are the same bits: blocks draw no noise.
    """
    blocks = compile_regions_of(module) if wanted else []
    before = [vars(block).get("forward") for block in blocks]  # None where it is the class's
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield len(blocks)
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
