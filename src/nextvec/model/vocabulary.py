"""The most likely token of many rows, exactly, without the cost of exact logits.

argmax_v w_v . x over a vocabulary of V rows needs no logit but the largest. One cheap product bounds every logit from above; only
tokens whose bound reaches a logit that is known can win: a few per row, which are then computed in float32 and, where that
cannot separate them either, in float64. The answer is that of float64 logits of the same hidden states, ties to the lowest id.
Where a matrix is small, or a processor has products of neither kind below, all logits are computed, in float32 or wider.

The bound. In units of a row's scale s, x = s (q + r) with q the nearest whole numbers, of at most 127 (63 without VNNI); each
token w = t p + e likewise, of at most 127. By Cauchy-Schwarz  w . x / s <= t (p . q) + |e| |q| + |w| |r|,  one product of 8-bit
integers, whose sum is exact, at twice the speed of a bf16 product, and of a float32 product where there is no VNNI. Where a
processor has only bf16 products it is that of rounded x' and w', and
|w . x - w' . x'| <= |w - w'| |x'| + |w| |x - x'| + accumulation. Results are rounded to bf16 or float32, relative unit u.

Legend: N rows, D width, V vocabulary, C classes of tokens with equal id modulo C, G tokens in a class, M pairs
of a row and a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nextvec.model.packed import can_pack, has_bf16_products, integer_product, integer_steps, pack, packed_linear

CHUNK_ELEMENTS = 1 << 22  # bounds in memory at once: 8 MiB in bf16, which a processor's cache holds
WORTH = {torch.bfloat16: 1 << 18, torch.float32: 1 << 20}  # elements of a matrix from which bounds pay, by its dtype
FEW = 8  # rows at most for which all float32 logits cost less than bounds, without VNNI
CLASS = 64  # tokens of a class: the largest bound of each is looked at, and single ones only in classes that matter
MOST = 127  # of an 8-bit integer
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}  # rounding of a result, relative
TINY = 2.0**-24  # of float32
LogitOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states (N, D), rows and tokens of M pairs -> their logits


class Vocabulary:
    """A decoder's output matrix (V, D), made ready once for `argmax`.

    Large ones on a processor with products of low precision by bounds, as above; others, or all without `quick`, by all
    logits in float32 or wider.
    """

    def __init__(self, weight_VD: Tensor, quick: bool = True) -> None:
        self.weight = weight_VD.detach()
        size, width = self.weight.shape
        worth = size * width >= WORTH.get(self.weight.dtype, math.inf)
        able = self.weight.device.type == "cpu" and (integer_steps() > 0 or has_bf16_products())
        self.quick = quick and worth and able
        if not self.quick:
            self._wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).T
            return
        self._norm = float(self.weight.float().norm(dim=1).max())
        self._bound = _Bound(self.weight)
        self._few = FEW if self.weight.dtype == torch.float32 and self._bound.most < MOST else 0

    def argmax(self, x_ND: Tensor) -> Tensor:
        """The token (N,) with the largest logit for hidden states (N, D), the same inside autocast, which is left out here."""
        if x_ND.shape[0] == 0:
            return torch.zeros(0, dtype=torch.int64, device=x_ND.device)
        if torch.is_autocast_enabled(x_ND.device.type):
            with torch.autocast(x_ND.device.type, enabled=False):
                return self.argmax(x_ND)
        rows = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        if len(x_ND) <= rows:
            return self._chunk(x_ND)
        return torch.cat([self._chunk(x) for x in x_ND.split(rows)])

    def _chunk(self, x_ND: Tensor) -> Tensor:
        if not self.quick:
            return self._plain(x_ND)
        return self._all(x_ND) if len(x_ND) <= self._few else self._quick(x_ND)

    def _plain(self, x_ND: Tensor) -> Tensor:
        """By all logits."""
        return (x_ND.to(self._wide.dtype) @ self._wide).argmax(-1)

    def _all(self, x_ND: Tensor) -> Tensor:
        """By all float32 logits of a few rows, by bounds where these do not settle it. W x is twice as fast as x W for 4 rows."""
        wide_ND = x_ND.float()
        logit_VN = self.weight @ wide_ND.T
        best_N, token_N = logit_VN.max(0)
        margin_N = self._margin(wide_ND, wide_ND.norm(dim=1))
        if int((logit_VN >= best_N - margin_N).sum()) == len(x_ND):
            return token_N
        return self._quick(x_ND)

    def _margin(self, x_ND: Tensor, norm_N: Tensor) -> Tensor:
        """How far apart two float32 logits of a row may stand and be the other way round in truth."""
        return 8 * x_ND.shape[1] * TINY * self._norm * norm_N

    def _quick(self, x_ND: Tensor) -> Tensor:
        size = self.weight.shape[0]
        wide_ND = x_ND.float()
        norm_N = wide_ND.norm(dim=1)
        row_M, token_M = self._bound.pairs(x_ND, norm_N, self._logit)
        for dtype, margin in ((torch.float32, self._margin(x_ND, norm_N)), (torch.float64, None)):
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
    """Upper bounds of all logits by one product of low precision."""

    def __init__(self, weight_VD: Tensor) -> None:
        wide = weight_VD.float()
        self._size, self._classes = len(wide), -(-len(wide) // CLASS)
        # Rows beyond V repeat the first one, so they tie with it.
        wide = torch.cat((wide, wide[:1].expand(self._classes * CLASS - self._size, -1)))
        self._norm = float(wide.norm(dim=1).max())
        self._accumulation = 8 * wide.shape[1] * TINY
        self.most = integer_steps()
        if self.most:
            scale_V1 = (wide.abs().amax(1, keepdim=True) / MOST).clamp(min=1e-30)
            steps = (wide / scale_V1).round()
            self._error = float((wide - scale_V1 * steps).norm(dim=1).max())
            self._product: Callable[[Tensor], Tensor] = integer_product(steps.to(torch.int8), scale_V1[:, 0], self.most)
        else:
            rounded = wide.bfloat16()
            self._error = float((wide - rounded.float()).norm(dim=1).max())
            packed = pack(rounded) if can_pack() else rounded
            self._product = lambda x: packed_linear(x, packed) if can_pack() else x @ packed.T

    def pairs(self, x_ND: Tensor, norm_N: Tensor, logit: LogitOf) -> tuple[Tensor, Tensor]:
        """The pairs (row, token) that can have their row's largest logit, rows in order, at least one each."""
        wide = x_ND.float()
        if self.most:
            scale_N1 = (wide.abs().amax(1, keepdim=True) / self.most).clamp(min=1e-30)
            near = (wide / scale_N1).round()
            bound_NV = self._product(near)
            near = scale_N1 * near
            scale_N = scale_N1[:, 0]
        else:
            rounded = x_ND.bfloat16()
            bound_NV, near = self._product(rounded), rounded.float()
            scale_N = torch.ones(())
        # Token v is in class v mod C, so that the largest of a class is a maximum over vectors, not within one.
        bound_NGC = bound_NV.unflatten(1, (CLASS, self._classes))
        top_NC = bound_NGC.amax(1).float()
        best_N, class_N = top_NC.max(1)
        every = torch.arange(len(x_ND))
        place_N = bound_NGC[every, :, class_N].float().argmax(1)
        token_N = (place_N * self._classes + class_N).clamp_(max=self._size - 1)
        known_N = logit(x_ND, every, token_N) - self._accumulation * self._norm * norm_N
        slack_N = self._error * near.norm(dim=1) + self._norm * (wide - near).norm(dim=1)
        unit = UNIT[bound_NV.dtype]
        slack_N = (1 + unit) * slack_N + self._accumulation * self._norm * norm_N
        known_N, slack_N = known_N / scale_N, slack_N / scale_N
        slack_N += 1.05 * unit * torch.maximum(best_N.abs(), known_N.abs())  # bounds that matter lie between the two
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
