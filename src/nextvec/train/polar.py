"""The orthogonal factor of a matrix, near enough for an optimiser: its singular values brought near 1 by three polynomials.

Legend: n rows and rn columns of a matrix that lies, r its aspect.
"""

from __future__ import annotations

import torch
from torch import Tensor

# (a, b, c) of a x + b x^3 + c x^5, one after the other. Each is, of all such polynomials, the one that leaves singular values
# least far from 1 in the worst case, over the interval to which those before it bring them, LEAST to 1 at first, and 1 % more
# for rounding (the way of Amsel et al. 2025, arXiv 2505.16932; found by linear programming, tests/test_polar.py checks them). In
# the end they are within 0.29 of 1.
STEPS = ((8.017171, -22.940970, 16.611271), (3.618367, -2.658765, 0.513718), (2.679935, -1.965586, 0.440101))
LEAST = 0.01  # of the largest singular value; smaller ones grow 78 times
GRAM_ASPECT = 1.5  # from which aspect on `_by_gram` takes fewer operations
TINY = 1e-7  # norm of a matrix below which it counts as zero
LEAST_SIZE = 1e-3  # of a matrix of norm 1 and fewer than a million rows


def orthogonal(update: Tensor) -> Tensor:
    """A matrix with the singular vectors of `update` and singular values near 1, in its dtype; zero stays zero.

    Muon's usual iteration (Jordan et al. 2024) takes five steps from the matrix over its Frobenius norm, which is several times
    its largest singular value. The fourth root of the norm of (x x^T)^2, a product of the first step, bounds that
    value as well and is at most n^(1/8) times as large; from there three steps do.
    """
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=TINY)
    if x.dtype != torch.bfloat16 and x.shape[1] >= GRAM_ASPECT * x.shape[0]:
        x = _by_gram(x)
    else:
        for step in range(len(STEPS)):
            x = _factor(x @ x.T, step) @ x
    return x.T if tall else x


def _factor(gram: Tensor, step: int) -> Tensor:
    """What x is multiplied with in a step, a polynomial of x x^T; in the first, with the division of x by its size."""
    a, b, c = STEPS[step]
    square = gram @ gram
    if step:
        factor = gram.mul(b).add_(square, alpha=c)
        factor.diagonal().add_(a)
        return factor
    wide = torch.float64 if gram.dtype == torch.float64 else torch.float32
    wide_gram, wide_square = gram.to(wide), square.to(wide)  # the terms all but cancel where the polynomial is smallest
    size = torch.linalg.matrix_norm(wide_square).sqrt().sqrt().clamp(min=LEAST_SIZE)
    factor = wide_gram * (b / size**3) + wide_square * (c / size**5)
    factor.diagonal().add_(a / size)
    return factor.to(gram.dtype)


def _by_gram(x: Tensor) -> Tensor:
    """The same over x x^T alone, and x multiplied once, at the end.

    The factors of all steps are polynomials of the first x x^T, so they commute: their product is kept beside the x x^T that
    they make, both n x n: 2r + 9 products of n^3 in the place of 6r + 3. Not in bf16, where small singular values drown in
    their squares.
    """
    gram, made = x @ x.T, None
    for step in range(len(STEPS)):
        factor = _factor(gram, step)
        made = factor if made is None else made @ factor
        if step < len(STEPS) - 1:
            gram = gram @ factor @ factor
    assert made is not None
    return made @ x
