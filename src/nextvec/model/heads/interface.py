"""What the rest of the code needs of a head, and the noise that heads draw from.

Legend: S draws, N positions (any leading dimensions), D width, L latent, K tokens per patch, R noise dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nextvec.model.text_states import States

Generators = torch.Generator | Sequence[torch.Generator]  # one for all states, or one for each
Metrics = dict[str, Tensor]


class Sharpen(Protocol):
    """Logits (R, V) of laws of tokens to those that are drawn from; row by row another one where it knows rows."""

    def __call__(self, logits_RV: Tensor) -> Tensor: ...

    def of(self, rows: slice) -> Sharpen:
        """That of some rows."""
        ...

    def took(self, ids_R: Tensor) -> None:
        """Its rows drew these tokens, one each."""
        ...


class Head(Protocol):
    """Draws the next patch given the backbone's state, and says how badly its draws fit the true one.

    A head of latents draws latents, which the autoencoder decodes, and a head of tokens draws patches. It learns from the
    autoencoder's posterior, or from the patch itself.

    by_token: it knows the law of each token of a patch given those before it. Its `draw` then also takes `given`, fewer than K
    ids that every patch begins with, and the `draw` of a head of tokens, or the `pick` of one of latents, `sharpen`: by what of
    its law each token is drawn (None: by the law itself).
    """

    latents: ClassVar[bool]
    by_token: ClassVar[bool]
    teacher: ClassVar[str]  # posterior | tokens: what `loss` is given
    objective: ClassVar[str]  # name of the metric that is the loss itself

    def loss(self, state_ND: States, target: Any, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean loss of the states (..., D), and detached figures, `objective` among them.

        target: the `Posterior` (..., L), or the ids (..., K) int64, as `teacher` says.
        """
        ...

    def draw(self, state_ND: States, draws: int, generator: Generators | None) -> Tensor:
        """S independent draws for states (..., D): latents (S, ..., L), or patches (S, ..., K) int64.

        One generator for all states, or one for each of (N, D), whose draws are then those it would give alone.
        """
        ...

    def compile_regions(self) -> list[nn.Module]:
        """The repeated blocks, for regional compilation."""
        ...


@runtime_checkable
class ReadsContext(Protocol):
    """A head that reads tokens of the patch before besides the state, behind which they then stand (`Calm.states`)."""

    def context(self, ids_NK: Tensor) -> Tensor:
        """(..., C) of patches (..., K)."""
        ...


def noise(
    law: Literal["uniform", "normal"],
    like_ND: Tensor,
    draws: int,
    size: int,
    generator: Generators | None,
    dtype: torch.dtype,
) -> Tensor:
    """Random numbers (S, ..., R) for states (..., D): uniform on [0, 1), or standard normal."""
    fill = torch.rand if law == "uniform" else torch.randn

    def values(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return fill(shape, generator=generator, device=like_ND.device, dtype=dtype)

    if isinstance(generator, Sequence):
        assert len(generator) == len(like_ND), "one generator per state"
        each = [values((draws, size), one) for one in generator]
        return each[0][:, None] if len(each) == 1 else torch.stack(each, dim=1)
    return values((draws, *like_ND.shape[:-1], size), generator)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which draws are added up and losses taken: float32, float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32
