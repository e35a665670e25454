"""What evaluation and generation need of a language model; CALM (K tokens a step) and the token baseline (K = 1) both have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nextvec.model.backbone import Trunk
from nextvec.model.cache import KVCache
from nextvec.model.text_states import States

# Of draws by their states, indices (R,) in ascending order, and their tokens so far (R, L): which go on, (R,) bool.
Wanted = Callable[[Tensor, Tensor], Tensor]


def counted_from(first: int, wanted: Wanted) -> Wanted:
    """`wanted`, to be asked about states that are counted from `first` on."""
    return lambda state_R, tokens_RL: wanted(state_R + first, tokens_RL)


class LanguageModel(Protocol):
    """Predicts the next patch from the patches so far. Legend: B batch, P patches, K tokens per patch, D width, S draws."""

    @property
    def patch_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, rows: int, patches: int) -> KVCache:
        """An empty key/value cache for `rows` sequences of at most `patches` patches."""
        ...

    def states(self, ids_BPK: Tensor, cache: KVCache | None = None) -> States:
        """(B, P, K) int64 -> (B, P, D); the state at p predicts patch p + 1."""
        ...

    def trunk(self, ids_BPK: Tensor) -> tuple[States, Trunk]:
        """States, and the keys and values that branches attend to."""
        ...

    def branch(self, ids_BNK: Tensor, trunk: Trunk, at_N: Tensor) -> tuple[States, Trunk]:
        """N branches at once: the states (B, N, D) after trunk patches 0..at[n], earlier patches of branch n, ids[:, n]."""
        ...

    def draw_tokens(self, state_ND: States, draws: int, generator: torch.Generator | None) -> Tensor:
        """S independent patches (S, ..., K) int64 for states (..., D), at temperature 1."""
        ...


@runtime_checkable
class TokenProbabilities(Protocol):
    """What the estimator `exact_tail` needs beside `LanguageModel`: a model of patch size 1 that knows its probabilities."""

    def log_probabilities(self, state_ND: Tensor) -> Tensor:
        """log P(next token) in nats, (..., V), for states (..., D)."""
        ...


@runtime_checkable
class DrawsWanted(Protocol):
    """A model that can leave off drawing, or decoding, what nobody wants to know."""

    def draw_wanted(self, state_ND: States, draws: int, generator: torch.Generator | None, wanted: Wanted) -> Tensor:
        """What `draw_tokens` draws with the same generator, up to rounding; 0 behind the places where a draw was wanted.

        `wanted` is asked after each place but the last, and given indices among the states, flattened.
        """
        ...
