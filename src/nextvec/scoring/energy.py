"""The energy score of model draws against the autoencoder's posterior: what CALM is trained with.

    loss = 2 E||x - z||^alpha - E||x - x'||^alpha,   x, x' model draws, z ~ N(mean, diag std^2) teacher

A strictly proper loss for alpha in (0, 2) (lower is better; the paper's "score" is minus this), estimated without bias
from S draws as a U-statistic. Everything runs in float32 (float64 for float64 draws) with autocast off, and through
inner products, so no S x M x L or S x S x L tensor exists.

Legend: S model draws, M teacher draws, N positions, L latent, Q quadrature nodes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.config import EnergySettings

DELTA_FROM = 128  # latent dimensions from which the two-term expansion (3e-5) is as good as the quadrature, and cheaper
NODES, LOW, HIGH = 12, -7.0, 5.0  # trapezoid nodes in log t for the quadrature: 1e-4 or better (docs/method.md)


class EnergyLoss(NamedTuple):
    """Per position (N,): loss = fidelity - diversity, in latent units to the power alpha."""

    loss: Tensor
    fidelity: Tensor  # 2 E||x - z||^alpha: how far draws lie from the truth
    diversity: Tensor  # E||x - x'||^alpha: how far draws lie from each other


def energy_score_loss(
    draws_SNL: Tensor,
    mean_NL: Tensor,
    log_std_NL: Tensor,
    settings: EnergySettings,
    generator: torch.Generator | None = None,
    eps_MNL: Tensor | None = None,
) -> EnergyLoss:
    """Energy loss of S >= 2 draws (S, ..., L) against teachers (..., L); source: paper section 4.2, equation 10.

    `settings.teacher` "exact" integrates the teacher in closed form (no teacher draws, no sampling noise in the gradient);
    "sampled" uses M teacher draws shared by all S model draws, as the paper, from `generator` or from given standard normals
    `eps_MNL`. Equals 2 x the fair ensemble energy score. Raises ValueError for fewer than two draws or shapes that differ.
    """
    if draws_SNL.shape[0] < 2:
        raise ValueError(f"the energy score needs at least 2 draws; got {draws_SNL.shape[0]}")
    if draws_SNL.shape[1:] != mean_NL.shape or mean_NL.shape != log_std_NL.shape:
        raise ValueError(
            f"draws (S, ..., L) need mean and log_std (..., L); got {tuple(draws_SNL.shape)}, {tuple(mean_NL.shape)} "
            f"and {tuple(log_std_NL.shape)}"
        )
    wide = torch.float64 if draws_SNL.dtype == torch.float64 else torch.float32
    shape = draws_SNL.shape[1:-1]
    with torch.autocast(draws_SNL.device.type, enabled=False):
        draws = draws_SNL.to(wide).flatten(1, -2)
        mean, std = mean_NL.to(wide).flatten(0, -2), log_std_NL.to(wide).flatten(0, -2).exp()
        centred = draws - mean  # inner products of small vectors: no cancellation against a far mean
        if settings.teacher == "exact" and eps_MNL is None:
            distance_SN = _expected_distance(centred, std)
            fidelity = 2.0 * distance_SN.mean(0)
        else:
            if eps_MNL is None:
                size = (settings.teacher_draws, *mean.shape)
                eps_MNL = torch.randn(size, generator=generator, device=mean.device, dtype=wide)
            offset = eps_MNL.to(wide).flatten(1, -2) * std
            fidelity = 2.0 * _mean_power(_cross_squares(centred, offset), settings.alpha)
        diversity = _pair_mean(centred, settings.alpha)
        return EnergyLoss(*(t.unflatten(0, shape) for t in (fidelity - diversity, fidelity, diversity)))


def _cross_squares(x_SNL: Tensor, z_MNL: Tensor) -> Tensor:
    """||x_s - z_m||^2 for all pairs, (N, S, M), by one batched product."""
    x, z = x_SNL.transpose(0, 1), z_MNL.transpose(0, 1)
    norms = x.square().sum(-1)[:, :, None] + z.square().sum(-1)[:, None, :]
    return torch.baddbmm(norms, x, z.transpose(1, 2), alpha=-2.0).clamp(min=0.0)


def _mean_power(squares_NSM: Tensor, alpha: float) -> Tensor:
    return _power(squares_NSM, alpha, 0.0).mean((1, 2))


def _power(squares: Tensor, alpha: float, floor: Tensor | float) -> Tensor:
    """squares^(alpha/2), and exactly 0 with gradient exactly 0 where squares <= floor (coinciding points)."""
    apart = squares > floor
    safe = torch.where(apart, squares, torch.ones_like(squares))
    root = safe.sqrt() if alpha == 1.0 else safe ** (alpha / 2)
    return torch.where(apart, root, torch.zeros_like(root))


def _pair_mean(x_SNL: Tensor, alpha: float) -> Tensor:
    """Mean of ||x_s - x_t||^alpha over ordered pairs s != t, (N,).

    Translation invariant, so draws are centred on their own average first: then norms are of the size of the distances
    and float32 keeps them to 1e-6. Squared distances below the rounding of their two norms are equal draws: 0, gradient 0.
    """
    draws = x_SNL.shape[0]
    x = (x_SNL - x_SNL.mean(0)).transpose(0, 1)  # (N, S, L)
    gram = x @ x.transpose(1, 2)
    norms = gram.diagonal(dim1=1, dim2=2)
    sums = norms[:, :, None] + norms[:, None, :]
    squares = sums - 2.0 * gram
    rounding = 16.0 * torch.finfo(x.dtype).eps
    floor = rounding * sums.detach()
    return _power(squares, alpha, floor).sum((1, 2)) / (draws * (draws - 1))


def _expected_distance(d_SNL: Tensor, std_NL: Tensor) -> Tensor:
    """E||d - std * eps|| for standard normal eps, (S, N): from L = 128 by expansion, below by quadrature."""
    if d_SNL.shape[-1] >= DELTA_FROM:
        return expected_distance_expansion(d_SNL, std_NL)
    return expected_distance_quadrature(d_SNL, std_NL)


def expected_distance_expansion(d_SNL: Tensor, std_NL: Tensor) -> Tensor:
    """Two-term expansion sqrt(m) (1 - v / (8 m^2)) of E sqrt(Q), Q = ||d - std eps||^2 with mean m and variance v, (S, N).

    Relative error for std in [0.1, 0.4], draws close to the mean (the hard case): 3e-5 at L = 128, 8e-4 at L = 32.
    """
    variance = std_NL.square()
    squares = d_SNL.square()
    m = squares.sum(-1) + variance.sum(-1)
    v = 4.0 * torch.einsum("snl,nl->sn", squares, variance) + 2.0 * variance.square().sum(-1)
    return m.sqrt() * (1.0 - v / (8.0 * m.square()))


def expected_distance_quadrature(
    d_SNL: Tensor, std_NL: Tensor, nodes: int = NODES, low: float = LOW, high: float = HIGH
) -> Tensor:
    """E||d - std eps|| by the fractional-moment integral with a control variate, (S, N).

    E sqrt(Q) = sqrt(m) + 1/(2 sqrt(pi)) int_0^inf (exp(-t m) - Phi(t)) t^(-3/2) dt, Phi(t) = E exp(-t Q), by the trapezoid
    rule in log(t m0) with nodes chosen per position (m0 = average of m over the draws), so the sums over L are one product.
    12 nodes on [-7, 5]: 1e-4 or better; 24 nodes on [-12, 7]: 2e-6.
    """
    variance = std_NL.square()
    squares = d_SNL.square()
    m = squares.sum(-1) + variance.sum(-1)
    u = torch.linspace(low, high, nodes, device=m.device, dtype=m.dtype)
    t_NQ = u.exp() / m.detach().mean(0)[:, None]
    spread_NLQ = 1.0 + 2.0 * variance[:, :, None] * t_NQ[:, None, :]
    log_scale_NQ = -0.5 * spread_NLQ.log().sum(1)
    exponent_NSQ = squares.transpose(0, 1) @ (t_NQ[:, None, :] / spread_NLQ)
    phi = (log_scale_NQ[:, None, :] - exponent_NSQ).exp()
    gap = (-t_NQ[:, None, :] * m.T[:, :, None]).exp() - phi
    step = (high - low) / (nodes - 1)
    ends = torch.ones_like(u)
    ends[0] = ends[-1] = 0.5
    integral = (gap * (t_NQ.rsqrt() * ends)[:, None, :]).sum(-1) * step
    return m.sqrt() + integral.T / (2.0 * math.sqrt(math.pi))
