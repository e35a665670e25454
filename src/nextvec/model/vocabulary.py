"""The most likely token of many rows, exactly, without the cost of exact logits.

argmax_v w_v . x over a vocabulary of V rows needs no logit but the largest. One cheap product bounds every logit from above; only
tokens whose bound reaches a logit that is known can win: a few per row, which are then computed in float32 and, where that
cannot separate them either, in float64. The answer is that of float64 logits of the same hidden states, ties to the lowest id.
Where a matrix is small, or a processor has no bf16 products, all logits are computed, in float32 or wider.

The bound. Turn both sides by an orthogonal matrix whose first R axes hold most of W (its leading right singular vectors), and
split x = (a, b), w = (c, d) there. By Cauchy-Schwarz  w . x <= c . a + |d| |b| = (c, |d|) . (a, |b|),  one product of R + 1
columns instead of D. It is computed in bf16, where with a', c' for rounded a, c and u = 2^-8 for the rounding of the result

    |c . a - bf16(c' . a')| <= |c - c'| |a'| + |c| |a - a'| + u |result| + accumulation.

Legend: N rows, D width, V vocabulary, R leading axes, C classes of tokens with equal id modulo C, G tokens in a class, M pairs
of a row and a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nextvec.model.packed import can_pack, has_bf16_products, pack, packed_linear

CHUNK_ELEMENTS = 1 << 21  # bounds in memory at once: 4 MiB in bf16, which a processor's cache holds
WORTH = {torch.bfloat16: 1 << 18, torch.float32: 1 << 20}  # elements of a matrix from which bounds pay, by its dtype
TURN_WORTH = 1 << 20  # elements from which leaving columns out pays
MOST_PAIRS = 64  # pairs per row: a matrix without leading axes shows itself by more, and is then used whole
CLASS = 64  # tokens of a class: the largest bound of each is looked at, and single ones only in classes that matter
UNIT = 2.0**-8  # rounding of bf16, relative
TINY = 2.0**-24  # of float32
LogitOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states (N, D), rows and tokens of M pairs -> their logits


class Vocabulary:
    """A decoder's output matrix (V, D), made ready once for `argmax`.

    Large ones on a processor with bf16 products by bounds, as above; others by all logits in float32 or wider.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight = weight_VD.detach()
        size, width = self.weight.shape
        worth = size * width >= WORTH.get(self.weight.dtype, math.inf)
        self.quick = worth and self.weight.device.type == "cpu" and has_bf16_products()
        if not self.quick:
            self._wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).T
            return
        self._norm = float(self.weight.float().norm(dim=1).max())
        self._bounds: list[_Bound] = [_Bound(self.weight, None)]
        if size * width >= TURN_WORTH:
            self._bounds.append(_Bound(self.weight, width // 2))

    def argmax(self, x_ND: Tensor) -> Tensor:
        """The token (N,) with the largest logit for hidden states (N, D)."""
        if x_ND.shape[0] == 0:
            return torch.zeros(0, dtype=torch.int64, device=x_ND.device)
        rows = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return torch.cat([self._quick(x) if self.quick else self._plain(x) for x in x_ND.split(rows)])

    def _plain(self, x_ND: Tensor) -> Tensor:
        """By all logits."""
        return (x_ND.to(self._wide.dtype) @ self._wide).argmax(-1)

    def _quick(self, x_ND: Tensor) -> Tensor:
        size = self.weight.shape[0]
        wide_ND = x_ND.float()
        norm_N = wide_ND.norm(dim=1)
        row_M, token_M = self._bounds[-1].pairs(x_ND, norm_N, self._logit)
        if len(self._bounds) > 1 and len(row_M) > MOST_PAIRS * len(x_ND):
            self._bounds.pop()
        margin_N = 8 * x_ND.shape[1] * TINY * self._norm * norm_N
        for dtype, margin in ((torch.float32, margin_N), (torch.float64, None)):
            if len(row_M) == len(x_ND):
                return token_M  # one token left in each row, and rows are in order
            logit_M = self._logit(x_ND, row_M, token_M, dtype)
            best_N = torch.full((len(x_ND),), -math.inf, dtype=dtype).scatter_reduce_(0, row_M, logit_M, "amax")
            stay_M = logit_M >= (best_N if margin is None else best_N - margin)[row_M]
            row_M, token_M = row_M[stay_M], token_M[stay_M]
        return torch.full((len(x_ND),), size).scatter_reduce_(0, row_M, token_M, "amin")

    def _logit(self, x_ND: Tensor, row_M: Tensor, token_M: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.linalg.vecdot(x_ND[row_M].to(dtype), self.weight[token_M].to(dtype))


class _Bound:
    """Upper bounds of all logits from `axes` leading axes and the norm of the rest; from all of D where `axes` is None."""

    def __init__(self, weight_VD: Tensor, axes: int | None) -> None:
        wide = weight_VD.float()
        size, width = wide.shape
        self._axes, self._size, self._classes = axes, size, -(-size // CLASS)
        self._turn: Tensor | None = None
        if axes is not None:
            self._turn = torch.linalg.eigh(wide.double().T @ wide.double()).eigenvectors.flip(1).float()
            turned = wide @ self._turn
            rest = turned[:, axes:].norm(dim=1, keepdim=True) * (1 + 2 * UNIT)  # rounds to more than it is
            wide = torch.cat((turned[:, :axes], rest), dim=1)
        rounded = wide.bfloat16()
        self._norm = float(wide.norm(dim=1).max())
        self._error = float((wide - rounded.float())[:, :axes].norm(dim=1).max())
        self._accumulation = 8 * width * TINY
        # Rows beyond V repeat the first one, so they tie with it.
        padding = self._classes * CLASS - size
        full = torch.cat((rounded, rounded[:1].expand(padding, -1))).contiguous()
        self._product = pack(full) if can_pack() else full

    def pairs(self, x_ND: Tensor, norm_N: Tensor, logit: LogitOf) -> tuple[Tensor, Tensor]:
        """The pairs (row, token) that can have their row's largest logit, rows in order, at least one each."""
        sides = x_ND.float()
        if self._turn is not None:
            turned = sides @ self._turn
            rest = turned[:, self._axes :].norm(dim=1, keepdim=True) * (1 + 2 * UNIT)
            sides = torch.cat((turned[:, : self._axes], rest), dim=1)
        rounded = sides.bfloat16()
        bound_NV = packed_linear(rounded, self._product) if can_pack() else rounded @ self._product.T
        # Token v is in class v mod C, so that the largest of a class is a maximum over vectors, not within one.
        bound_NGC = bound_NV.unflatten(1, (CLASS, self._classes))
        top_NC = bound_NGC.amax(1).float()
        best_N, class_N = top_NC.max(1)
        slack_N = self._error * norm_N * (1 + UNIT) + self._accumulation * self._norm * norm_N
        if self._turn is not None or x_ND.dtype != torch.bfloat16:
            slack_N += self._norm * (sides - rounded)[:, : self._axes].norm(dim=1)
        if self._turn is None:
            known_N = best_N - slack_N - UNIT * best_N.abs()  # a bound without a rest is near its logit on both sides
        else:
            every = torch.arange(len(x_ND))
            place_N = bound_NGC[every, :, class_N].float().argmax(1)
            token_N = (place_N * self._classes + class_N).clamp_(max=self._size - 1)
            known_N = logit(x_ND, every, token_N) - self._accumulation * self._norm * norm_N
        slack_N += 1.05 * UNIT * torch.maximum(best_N.abs(), known_N.abs())  # bounds that matter lie between the two
        floor_N = known_N - slack_N
        row_M, class_M = (top_NC >= floor_N[:, None]).nonzero(as_tuple=True)
        if len(row_M) == len(x_ND) == 1:
            place_M = bound_NGC[0, :, class_M[0]].float() >= floor_N
            token_M = place_M.nonzero()[:, 0] * self._classes + class_M
            row_M = torch.zeros_like(token_M)
        else:
            pair_M, place_M = (bound_NGC[row_M, :, class_M].float() >= floor_N[row_M, None]).nonzero(as_tuple=True)
            row_M, token_M = row_M[pair_M], place_M * self._classes + class_M[pair_M]
        return row_M, torch.where(token_M < self._size, token_M, 0)
