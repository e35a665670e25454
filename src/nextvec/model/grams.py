"""What the last two and the last three tokens say together: embeddings of hashed n-grams, added to what a token's place reads.

Longer n-grams would each be too rare to be learnt in the trainings that this is for (docs/recipe-history.md); what follows a
rare one in its own text, recall.py finds. Legend: N any leading dimensions, D width, G = 64 numbers of an n-gram, B buckets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.model.packed import Kept, product_with

ORDERS = (2, 3)  # tokens of an n-gram
LONGEST = max(ORDERS)
DIM = 64  # G
MOST_MADE = 1 << 27  # bytes of the table that is made where no gradient is wanted
# Random odd numbers below 2^43: with ids below 2^18 the sum of three products stays below 2^63. Its upper bits are the hash.
FACTORS = ((0, 7_510_479_303_567, 6_611_278_104_569), (7_992_990_693_925, 8_524_812_017_577, 4_845_837_026_885))
SHIFT = 20


class Grams(nn.Module):
    """up [t_2(y_(i-1) y_i); t_3(y_(i-2) y_(i-1) y_i)], t_n of B rows each: (..., 3) ids -> (..., D).

    N-grams that meet in a row share it; the frequent ones win it. `up` begins at 0.
    """

    def __init__(self, width: int, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.Embedding(len(ORDERS) * buckets, DIM)
        self.up = nn.Linear(len(ORDERS) * DIM, width, bias=False)
        self._found = Kept[Callable[[Tensor], Tensor]]()

    def zero_initialised(self) -> list[Tensor]:
        return [self.up.weight]

    def forward(self, last_N3: Tensor) -> Tensor:
        """Of the last three ids, the last one last; -1 before a text begins."""
        rows_N2 = self.rows(last_N3)
        if torch.is_grad_enabled():
            return self.up(self.embedding(rows_N2).flatten(-2))
        return self._found.of((self.embedding.weight, self.up.weight), self._make)(rows_N2)

    def rows(self, last_N3: Tensor) -> Tensor:
        """Rows of `embedding`, (..., 2)."""
        factors, first = _constants(self.buckets, last_N3.device)
        return (((last_N3 + 1)[..., None, :] * factors).sum(-1) >> SHIFT).remainder(self.buckets) + first

    def _make(self) -> Callable[[Tensor], Tensor]:
        """From rows to what they say, for inference: `up` of every row is a table where that is not large."""
        up, table = self.up.weight, self.embedding.weight
        if len(table) * len(up) * up.element_size() > MOST_MADE:
            product = product_with(up)
            return lambda rows_N2: product(F.embedding(rows_N2, table).flatten(-2))
        parts = zip(table.split(self.buckets), up.split(DIM, dim=1), strict=True)
        made = torch.cat([F.linear(rows, matrix) for rows, matrix in parts])  # (2 B, D)
        return lambda rows_N2: F.embedding(rows_N2, made).sum(-2)


@functools.cache
def _constants(buckets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """No buffers of the module, which is made without memory before its weights are loaded."""
    with torch.inference_mode(False):
        return torch.tensor(FACTORS, device=device), torch.arange(len(ORDERS), device=device) * buckets


def with_grams(grams: Grams | None, x_ND: Tensor, last_N3: Tensor) -> Tensor:
    """x, and what the last three ids say together, if there are n-grams."""
    return x_ND if grams is None else x_ND + grams(last_N3).to(x_ND.dtype)


def windows(ids_RT: Tensor) -> Tensor:
    """The last three ids at each token of whole texts, (R, T, 3)."""
    return F.pad(ids_RT, (LONGEST - 1, 0), value=-1).unfold(1, LONGEST, 1)
