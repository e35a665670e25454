"""Penalties on what a text has already: OpenAI's, on the logits of laws of single tokens.

    logit_v - frequency * (times that the text has v) - presence * (whether it has v)

before the temperature. The text is what was drawn, without its prompt, so that to repeat the prompt costs nothing; tokens of the
patch in the making count from the next place on. Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nextvec.model.heads.interface import Sharpen
from nextvec.sampling.temperature import sharpener


@dataclass(frozen=True)
class Penalised:
    """A `Sharpen` of rows whose texts have tokens already: counts (R, V), which grow as tokens are drawn."""

    counts: Tensor
    presence: float
    frequency: float
    then: Sharpen | None  # temperature and cuts

    def __call__(self, logits_RV: Tensor) -> Tensor:
        logits_RV = logits_RV - self.frequency * self.counts - self.presence * (self.counts > 0)
        return logits_RV if self.then is None else self.then(logits_RV)

    def of(self, rows: slice) -> Penalised:
        return Penalised(self.counts[rows], self.presence, self.frequency, self.then)

    def took(self, ids_R: Tensor) -> None:
        self.counts.scatter_add_(1, ids_R[:, None], torch.ones_like(ids_R[:, None], dtype=self.counts.dtype))


def law_of(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    presence: float,
    frequency: float,
    counts_RV: Tensor | None,
) -> Sharpen | None:
    """What makes of laws of single tokens those that are drawn from; None where that is the model's own.

    counts: how often each row's text has each token, taken over; needed for penalties alone.
    """
    sharpen = sharpener(temperature, top_k, top_p)
    if presence == 0 and frequency == 0:
        return sharpen
    assert counts_RV is not None, "penalties need what the texts have"
    return Penalised(counts_RV, presence, frequency, sharpen)
