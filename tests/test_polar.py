"""The orthogonal factor that Muon steps along: the polynomials' optimality, singular values, the way over the Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nextvec.train import polar
from nextvec.train.polar import LEAST, STEPS, orthogonal

ROOM = 0.01  # for rounding


def matrix(rows: int, columns: int, values: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return (left * values @ right.T).to(dtype)


def test_each_polynomial_is_the_best_over_what_those_before_it_leave() -> None:
    """Chebyshev: of three coefficients the error of the best takes its largest value four times, with alternating signs."""
    low, high = LEAST, 1 + ROOM
    for a, b, c in STEPS:
        x = np.concatenate([np.geomspace(low, high, 200_000), np.linspace(low, high, 200_000)])
        x.sort()
        error = 1 - (a * x + b * x**3 + c * x**5)
        worst = np.abs(error).max()
        at_worst = np.sign(error[np.abs(error) > 0.9999 * worst])
        assert np.flatnonzero(np.diff(at_worst)).size == 3
        low, high = (1 - worst) * (1 - ROOM), (1 + worst) * (1 + ROOM)
    assert worst == pytest.approx(0.2855, abs=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 192), (192, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int, dtype: torch.dtype) -> None:
    values = torch.arange(1, 65, dtype=torch.float64) ** -1  # down to 1/64 of the largest
    given = matrix(rows, columns, values, dtype)
    found = orthogonal(given * 1e-4)  # whatever its size
    assert found.dtype == dtype
    assert found.shape == given.shape
    singular = torch.linalg.svdvals(found.double())
    assert 0.6 < singular.min() < singular.max() < 1.31
    left, _, right = torch.linalg.svd(given.double(), full_matrices=False)
    inside = left.T @ found.double() @ right.T
    largest = (inside - inside.diagonal().diag()).abs().max()
    assert largest < (0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("leading", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_leading_values_keep_their_sign_and_size_where_the_first_polynomial_is_smallest(
    leading: int, dtype: torch.dtype
) -> None:
    """Its terms all but cancel near 0.83 of the bound, where four or five equal values lie."""
    values = torch.cat((torch.ones(leading), torch.full((96 - leading,), 0.05))).double()
    given = matrix(96, 96, values)
    found = orthogonal(given.to(dtype)).double()
    left, _, right = torch.linalg.svd(given)
    along = (left.T @ found @ right.T).diagonal()[:leading]
    assert 0.65 < along.min() <= along.max() < 1.35


def test_one_singular_value_and_none() -> None:
    one = torch.outer(torch.ones(5), torch.arange(1.0, 8.0))
    found = torch.linalg.svdvals(orthogonal(one))
    assert found[0] == pytest.approx(1.0, abs=0.3)
    assert found[1:].max() < 1e-4
    assert torch.equal(orthogonal(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(12, 36), (48, 12), (12, 12)])
def test_long_matrices_go_by_their_gram_matrix_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update[:, 0] *= 1e-3
    calls = []
    by_gram = polar._by_gram
    monkeypatch.setattr(polar, "_by_gram", lambda x: calls.append(x) or by_gram(x))
    found, in_float = (orthogonal(update.to(dtype)) for dtype in (torch.float64, torch.float32))
    assert len(calls) == (0 if shape == (12, 12) else 2)
    orthogonal(update.bfloat16())  # too coarse for squares
    assert len(calls) == (0 if shape == (12, 12) else 2)
    monkeypatch.setattr(polar, "GRAM_ASPECT", float("inf"))
    expected = orthogonal(update)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(in_float.double(), expected, rtol=0.0, atol=1e-4)
