"""Running sums of a run's metrics since its last log line, and the count of steps that were skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tally:
    """Sums in double precision on the host, so that a checkpoint holds them exactly."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # of batches in each sum
    skipped: int = 0  # steps whose loss or gradient was not finite, over all of training
    skipped_in_a_row: int = 0  # of these, the last ones without a good step between

    def good_step(self, sums: Mapping[str, float], batches: int, norm: float) -> None:
        """Count a step of so many batches and its gradient's norm."""
        for name, value in sums.items():
            self._add(name, value, batches)
        self._add("grad_norm", norm, 1)
        self.skipped_in_a_row = 0

    def skipped_step(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1

    def take_means(self) -> dict[str, float]:
        """Means since the last call; empty where no step counted."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def tensors(self) -> dict[str, Tensor]:
        """The sums as a checkpoint keeps them."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.sums.items()}

    def _add(self, name: str, value: float, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count


def finite(loss: float, norm: float) -> bool:
    """Whether a step may change the parameters."""
    return math.isfinite(loss) and math.isfinite(norm)
