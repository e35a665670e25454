"""What came of each step, as the host learns it: at once on a processor, a few steps later on a GPU, which it need not wait for.

On a GPU a step whose loss or gradient is not finite is left out by the device itself (optim.py), and the host reads the
figures of steps that are done while later ones are queued. What is counted, said and agreed on among processes is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextvec.train.tally import finite
from nextvec.train.world import World

BEHIND = 2  # steps of a GPU that the host may be ahead: one runs, one is queued


def steps_behind(device: torch.device) -> int:
    """How many steps the host may be ahead of the device."""
    return BEHIND if device.type == "cuda" else 0


@dataclass(frozen=True)
class Outcome:
    """One step's figures, summed over all processes."""

    step: int  # number of the step, from 1
    sums: dict[str, float]  # metrics, `loss` among them, over the batches of the step
    norm: float  # of the gradient
    shared: tuple[float, ...]  # sums of what each process told

    @property
    def good(self) -> bool:
        """Whether the step may change, or has changed, the parameters."""
        return finite(self.sums["loss"], self.norm)


class Outcomes:
    """The figures of steps on their way to the host, oldest first."""

    def __init__(self, world: World, device: torch.device, behind: int) -> None:
        """behind: steps whose figures may wait; 0: the host waits for each."""
        self._world, self._device, self._behind = world, device, behind
        self._waiting: deque[tuple[int, list[str], Tensor, Any]] = deque()

    def add(self, step: int, sums: dict[str, Tensor], norm: Tensor, told: tuple[float, ...]) -> bool | Tensor:
        """Whether step number `step` may be taken: on a GPU a tensor there, which the host does not read.

        sums: 0-dim tensors of this process. told: what it tells all others, of the same length everywhere.
        """
        values = torch.stack(list(sums.values()))
        if self._world.size > 1:
            # In double precision, so that clocks keep their fractions.
            mine = (values.double(), torch.tensor(told, dtype=torch.float64).to(self._device, non_blocking=True))
            values = self._world.total(torch.cat(mine))
        values = torch.cat((values, norm.to(values).view(1)))
        loss = values[list(sums).index("loss")]
        good = loss.isfinite() & values[-1].isfinite() if self._behind else None
        copied = None
        if self._behind and values.device.type == "cuda":
            values, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._waiting.append((step, list(sums), values, copied))
        return self._read(self._waiting[-1]).good if good is None else good

    def read(self, all_of_them: bool = False) -> Iterator[Outcome]:
        """Outcomes in the order of their steps, of those that need not wait longer, or of all."""
        while len(self._waiting) > (0 if all_of_them else self._behind):
            yield self._read(self._waiting.popleft())

    def _read(self, waiting: tuple[int, list[str], Tensor, Any]) -> Outcome:
        step, names, values, copied = waiting
        if copied is not None:
            copied.synchronize()
        *found, norm = values.tolist()
        sums = dict(zip(names, found[: len(names)], strict=True))
        return Outcome(step, sums, norm, tuple(found[len(names) :]))
