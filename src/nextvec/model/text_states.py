"""States together with the text that each has read, for a head that looks earlier tokens up (recall.py).

Legend: X numbers of a state, T tokens of the longest text, R texts, Q states of one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

States: TypeAlias = (
    Any  # a Tensor (..., X), or `TextStates` of that shape, which are indexed and joined in the same ways
)


@dataclass(frozen=True)
class TextStates:
    """States (..., X), their texts (..., T) int64, and how many tokens of them each has seen, (...).

    Operations on leading dimensions are those of tensors. Neighbours that share a text are views of one: `by_text` finds it.
    apart: each is to be drawn from by itself, so that its bits depend on no other (tiles of the deterministic mode). memory: what
    lookups have made of the texts, keys and values (2, R, H, T, E), where a cache holds it and each first index has one text.
    """

    vector: Tensor
    text: Tensor
    seen: Tensor
    apart: bool = False
    memory: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.vector.shape

    @property
    def device(self) -> torch.device:
        return self.vector.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vector.dtype

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, index: Any) -> TextStates:
        """Of leading dimensions. Some states of each of several texts still share them."""
        assert not isinstance(index, tuple) or Ellipsis not in index, (
            "leading dimensions alone: `vector` has the numbers"
        )
        text, of_all = self.text, isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)
        if of_all and self.vector.dim() == 3 and _shared(text) and isinstance(index[1], Tensor) and index[1].dim() == 1:
            text = text[:, :1].expand(-1, len(index[1]), -1)
        else:
            text = text[index]
        memory = self.memory
        if memory is not None:
            first = index[0] if isinstance(index, tuple) else index
            memory = memory[:, first] if isinstance(first, slice | list | Tensor) else None
        return replace(self, vector=self.vector[index], text=text, seen=self.seen[index], memory=memory)

    def expand(self, *sizes: int) -> TextStates:
        """As of the states; the last of the sizes is -1."""
        return replace(
            self,
            vector=self.vector.expand(*sizes),
            text=self.text.expand(*sizes),
            seen=self.seen.expand(*sizes[:-1]),
            memory=None,
        )

    def by_text(self) -> tuple[Tensor, Tensor]:
        """Texts (R, T), and how much of theirs their states have seen, (R, Q): in order the states of all leading dimensions."""
        if self.text.dim() > 1 and _shared(self.text):
            return self.text[..., 0, :].reshape(-1, self.text.shape[-1]), self.seen.reshape(-1, self.seen.shape[-1])
        return self.text.reshape(-1, self.text.shape[-1]), self.seen.reshape(-1, 1)


def join(states: Sequence[States]) -> States:
    """States one after the other, in the first dimension."""
    if len(states) == 1:
        return states[0]
    if not isinstance(states[0], TextStates):
        return torch.cat(list(states))
    longest = max(each.text.shape[-1] for each in states)
    texts = [F.pad(each.text, (0, longest - each.text.shape[-1])) for each in states]
    vector, seen = torch.cat([each.vector for each in states]), torch.cat([each.seen for each in states])
    return TextStates(vector, torch.cat(texts), seen, any(each.apart for each in states))


def vector_of(states: States) -> Tensor:
    """The states alone."""
    return states.vector if isinstance(states, TextStates) else states


def with_vector(states: States, vector: Tensor) -> States:
    """Other states that have read the same text."""
    return replace(states, vector=vector) if isinstance(states, TextStates) else vector


def _shared(text: Tensor) -> bool:
    """Whether all states of the last leading dimension are views of one text."""
    return text.shape[-2] == 1 or text.stride(-2) == 0
