"""Which generator draws the noise of which batch: a function of seed and position, so that nothing random is carried along."""

from __future__ import annotations

import torch

TRAIN, EVALUATE = 0, 1  # purposes of a generator


def generator_for(seed: int, number: int, purpose: int, device: torch.device, part: int = 0) -> torch.Generator:
    """The generator of one batch. Distinct batches of a run get distinct seeds: torch's CPU generator reads 32 bits only.

    number: of the batch, counted over all of training. part: of a batch that several processes share.
    """
    key = (seed * 2 + purpose) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    key ^= part * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return torch.Generator(device).manual_seed((key >> 32 ^ key) + number & 0xFFFFFFFF)
