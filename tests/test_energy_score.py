"""The energy loss against slow float64 twins, against scoringrules, and by its properties.

Legend: S model draws, M teacher draws, N positions, L latent.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scoringrules
import torch
from torch import Tensor

from nextvec.config import EnergySettings
from nextvec.scoring.energy import (
    energy_score_loss,
    expected_distance_expansion,
    expected_distance_quadrature,
)

SAMPLED = EnergySettings(teacher="sampled", teacher_draws=5)
EXACT = EnergySettings(teacher="exact")


def make(draws: int, positions: int, latent: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(positions, latent, generator=generator, dtype=dtype)
    log_std = torch.empty(positions, latent, dtype=dtype).uniform_(math.log(0.1), math.log(0.4), generator=generator)
    x = mean + torch.randn(draws, positions, latent, generator=generator, dtype=dtype)
    return x, mean, log_std


def slow_loss(x: Tensor, z: Tensor, alpha: float) -> Tensor:
    """Plain loops over positions, draws and teachers."""
    s, n, m = x.shape[0], x.shape[1], z.shape[0]
    out = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        for a in range(s):
            for b in range(m):
                out[i] += 2.0 / (s * m) * (x[a, i] - z[b, i]).norm() ** alpha
            for b in range(s):
                if a != b:
                    out[i] -= (x[a, i] - x[b, i]).norm() ** alpha / (s * (s - 1))
    return out


@pytest.mark.parametrize("alpha", [0.75, 1.0, 1.5])
def test_sampled_teacher_equals_plain_loops_in_value_and_gradient(alpha: float) -> None:
    x, mean, log_std = make(4, 3, 6)
    eps = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    settings = EnergySettings(teacher="sampled", teacher_draws=5, alpha=alpha)
    ours = energy_score_loss(fast, mean, log_std, settings, eps_MNL=eps).loss
    theirs = slow_loss(slow, mean + log_std.exp() * eps, alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-12)


def test_equals_twice_the_fair_energy_score_of_scoringrules_averaged_over_teachers() -> None:
    x, mean, log_std = make(6, 4, 8)
    eps = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = mean + log_std.exp() * eps
    ours = energy_score_loss(x, mean, log_std, SAMPLED, eps_MNL=eps).loss
    ensemble = x.permute(1, 0, 2).numpy()
    theirs = np.mean([scoringrules.es_ensemble(t.numpy(), ensemble, estimator="fair") for t in z], axis=0)
    np.testing.assert_allclose(ours.numpy(), 2.0 * theirs, rtol=1e-10)


@pytest.mark.parametrize(("latent", "tolerance"), [(8, 1e-4), (64, 2e-5), (128, 1e-5)])
def test_exact_teacher_is_the_limit_of_many_teacher_draws(latent: int, tolerance: float) -> None:
    """Reference: the same integral with 400 nodes on [-30, 25], where it is converged to 1e-10 in float64."""
    x, mean, log_std = make(4, 5, latent)
    reference = expected_distance_quadrature(x - mean, log_std.exp(), nodes=400, low=-30.0, high=25.0)
    fidelity = energy_score_loss(x, mean, log_std, EXACT).fidelity
    torch.testing.assert_close(fidelity, 2.0 * reference.mean(0), rtol=tolerance, atol=0.0)


def test_quadrature_agrees_with_monte_carlo_within_five_standard_errors() -> None:
    x, mean, log_std = make(1, 1, 4)
    exact = expected_distance_quadrature(x - mean, log_std.exp(), nodes=400, low=-30.0, high=25.0)
    eps = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    distances = (x[0, 0] - mean[0] - log_std[0].exp() * eps).norm(dim=-1)
    z = (distances.mean() - exact[0, 0]) / (distances.std() / math.sqrt(len(distances)))
    assert abs(float(z)) < 5.0  # false alarm 6e-7


def test_expansion_error_is_what_the_docstring_says() -> None:
    for latent, bound in ((128, 5e-5), (64, 2e-4), (32, 8e-4)):
        x, mean, log_std = make(8, 50, latent)
        near = mean + 0.05 * (x - mean)  # draws close to the target are the hard case
        exact = expected_distance_quadrature(near - mean, log_std.exp(), nodes=400, low=-30.0, high=25.0)
        error = (expected_distance_expansion(near - mean, log_std.exp()) / exact - 1.0).abs().max()
        assert float(error) < bound


def test_float32_stays_close_even_for_narrow_draws_far_from_the_origin_and_under_autocast() -> None:
    x, mean, log_std = make(8, 16, 128)
    narrow = mean + 50.0 + 1e-3 * (x - mean)
    wide = energy_score_loss(narrow, mean + 50.0, log_std, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        single = energy_score_loss(narrow.float(), (mean + 50.0).float(), log_std.float(), EXACT)
    assert single.loss.dtype == torch.float32
    torch.testing.assert_close(single.fidelity.double(), wide.fidelity, rtol=1e-5, atol=0.0)
    # the draws themselves are rounded at 50 * 6e-8 = 3e-6 of distances of 1e-2
    torch.testing.assert_close(single.diversity.double(), wide.diversity, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("draws", [2, 3, 8])
def test_coinciding_draws_have_zero_diversity_and_zero_gradient_through_it(draws: int) -> None:
    mean = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    x = (mean + 3.0).expand(draws, 5, 16).clone().requires_grad_()
    result = energy_score_loss(x, mean, torch.full_like(mean, -1.0), EXACT)
    assert torch.equal(result.diversity, torch.zeros(5))
    (gradient,) = torch.autograd.grad(result.diversity.sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    result.loss.sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_two_equal_draws_among_others_count_as_distance_zero() -> None:
    x, mean, log_std = make(4, 3, 16, torch.float32)
    x[1] = x[0]
    x.requires_grad_()
    result = energy_score_loss(x, mean, log_std, EXACT)
    twin = slow_loss(x.detach().double(), mean.double()[None], 1.0)
    pairs = 2.0 * sum((x[s] - mean).detach().double().norm(dim=-1) for s in range(4)) / 4 - twin
    torch.testing.assert_close(result.diversity.detach().double(), pairs, rtol=1e-5, atol=1e-6)
    result.loss.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], x.grad[1], rtol=1e-5, atol=1e-6)


def test_translation_permutation_and_scale() -> None:
    x, mean, log_std = make(5, 3, 80)
    base = energy_score_loss(x, mean, log_std, EXACT).loss
    moved = energy_score_loss(x + 7.0, mean + 7.0, log_std, EXACT).loss
    mixed = energy_score_loss(x.flip(0), mean, log_std, EXACT).loss
    scaled = energy_score_loss(3.0 * x, 3.0 * mean, log_std + math.log(3.0), EXACT).loss
    torch.testing.assert_close(moved, base, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed, base, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled, 3.0 * base, rtol=1e-10, atol=1e-10)


def test_the_true_distribution_has_the_lowest_expected_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.zeros(4000, 4), torch.full((4000, 4), math.log(0.3))

    def loss(shift: float, spread: float) -> float:
        draws = shift + spread * torch.randn(8, 4000, 4, generator=generator)
        return float(energy_score_loss(draws, mean, log_std, EXACT).loss.mean())

    truth = loss(0.0, 0.3)
    for shift, spread in ((0.2, 0.3), (0.0, 0.15), (0.0, 0.6), (0.0, 0.0)):
        assert loss(shift, spread) > truth + 0.005


def test_wrong_shapes_and_too_few_draws_are_named() -> None:
    x, mean, log_std = make(1, 3, 6)
    with pytest.raises(ValueError, match="at least 2 draws; got 1"):
        energy_score_loss(x, mean, log_std, EXACT)
    with pytest.raises(ValueError, match=r"got \(2, 3, 6\), \(4, 6\)"):
        energy_score_loss(x.expand(2, 3, 6), mean.new_zeros(4, 6), mean.new_zeros(4, 6), EXACT)
    with pytest.raises(ValueError, match='use teacher "sampled"'):
        EnergySettings(teacher="exact", alpha=1.5)
