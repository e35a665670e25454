"""What the training loop needs of an objective, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nextvec.hardware import Precision
from nextvec.text.tokenizer import Tokenizer
from nextvec.train.metrics import Row


class Trainable(Protocol):
    """What the loop needs of an objective. Legend: B rows, T tokens per row."""

    module: Any  # an nn.Module whose forward is the loss; `loss` calls it, so that the loop may wrap it

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Kept in the run directory from the first step on."""
        ...

    def loss(self, batch: Any, generator: torch.Generator | None, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and detached 0-dim metrics, without waiting for the device. `progress` in [0, 1) of training."""
        ...

    def evaluate(self, batches: Iterable[Tensor], generator: torch.Generator | None) -> dict[str, Any]:
        """Metrics over held-out batches of ids (B, T)."""
        ...

    def save(self, path: Path, trained: Row) -> None:
        """Write the run directory's model files. `trained`: step, tokens, seconds, and the last held-out figures."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """Where a call of `train` ended. `seconds` as in metrics.jsonl; `evaluation` is the last held-out row, if any."""

    out: Path
    step: int
    tokens: int
    seconds: float
    interrupted: bool
    precision: Precision
    evaluation: Row | None
