"""Row-wise Adagrad, for tables of which a step touches few rows: those alone are read and written (docs/method.md).

Legend: R rows of a table, G numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nextvec.model.grams import Grams
from nextvec.train.muon import loss_of

EPS = 1e-12  # beside root mean squares of gradients, which are some 1e-5 for rows that are touched


class RowAdagrad(torch.optim.Optimizer):
    """w_r -= lr g_r / sqrt(sum over steps of mean(g_r^2)), one sum for each row r (Duchi et al. 2011, with a sum a row).

    A row that a step does not touch keeps its bits, so that a sparse gradient gives what a dense one gives. A row that is seen
    for the first time moves as far as the first step of AdamW, and the less the oftener it has been seen: what an embedding
    of a rare thing needs. No decay, no momentum.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all tables that have a gradient, of either layout."""
        loss = loss_of(closure)
        bad: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                update = _sparse if table.grad.is_sparse else _dense
                update(table, table.grad, self.state[table], group["lr"], bad)
        return loss


def _dense(table: Tensor, gradient: Tensor, state: dict[str, Any], rate: float, bad: Tensor | None) -> None:
    if bad is not None:
        gradient = gradient.masked_fill(bad.bool(), 0.0)
    square = gradient.square().mean(1, keepdim=True)
    if "sum" not in state:
        state["sum"] = torch.zeros_like(square)
    state["sum"].add_(square)
    table.addcdiv_(gradient, state["sum"].sqrt().add_(EPS), value=-rate)


def _sparse(table: Tensor, gradient: Tensor, state: dict[str, Any], rate: float, bad: Tensor | None) -> None:
    if "sum" not in state:
        state["sum"] = table.new_zeros(len(table), 1)
    if bad is not None and bool(bad):
        return
    gradient = gradient.coalesce()
    (rows,), values = gradient.indices(), gradient.values()
    total = state["sum"][rows] + values.square().mean(1, keepdim=True)
    state["sum"][rows] = total
    table.index_add_(0, rows, values / total.sqrt().add_(EPS), alpha=-rate)


def sparse_gradients(module: nn.Module, wanted: bool) -> None:
    """Let the gradients of n-grams be sparse, which only RowAdagrad in one process takes, or dense, as they usually are."""
    for part in module.modules():
        if isinstance(part, Grams):
            part.embedding.sparse = wanted
