"""Diffusion head: predicts the noise in a latent, and the variance of a step back (docs/method.md).

Legend: S draws, N positions (any leading dimensions), D width, L latent.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nextvec.config import TIMES, DiffusionHeadConfig
from nextvec.model.heads.adaln import AdaLNNet
from nextvec.model.heads.denoise import denoise
from nextvec.model.heads.interface import Generators, Metrics, noise, wide
from nextvec.model.heads.schedule import cosine_schedule
from nextvec.model.posterior import Posterior

BIN, EDGE = 1.0 / 255.0, 0.999  # half width of a bin, and where the outer bins begin, of the inherited image likelihood


class DiffusionLoss(NamedTuple):
    """Per draw, (...)."""

    loss: Tensor  # mse + vb
    mse: Tensor  # of the predicted noise, mean over dimensions
    vb: Tensor  # variational bound's term of this step in bits, mean over dimensions; trains the variance alone


class DiffusionHead(nn.Module):
    """At step i of 1000 a latent lies at signal_i z + noise_i eps, z a draw of the teacher, eps standard normal."""

    latents: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    teacher: ClassVar[str] = "posterior"
    objective: ClassVar[str] = "diffusion"

    def __init__(self, config: DiffusionHeadConfig, width: int, latent: int) -> None:
        super().__init__()
        self.config, self.latent = config, latent
        self.net = AdaLNNet(width, latent, 2 * latent, config.blocks)

    def predict(self, x_SNL: Tensor, time_SN: Tensor, condition_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(noise, variance position) at (..., L), each (..., L); the position is 1 at beta and -1 at the posterior's."""
        both = self.net(x_SNL, time_SN, condition_ND).to(wide(self.net.dtype))
        eps, position = both.chunk(2, dim=-1)
        return eps, position

    def loss(self, state_ND: Tensor, target: Posterior, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean hybrid loss over teacher draws, steps and noise."""
        z_SNL = target.samples(self.config.teacher_draws, generator)
        time_SN = torch.randint(TIMES, z_SNL.shape[:-1], generator=generator, device=z_SNL.device)
        eps_SNL = torch.randn(z_SNL.shape, generator=generator, device=z_SNL.device, dtype=z_SNL.dtype)
        terms = self.hybrid(z_SNL, time_SN, eps_SNL, state_ND)
        loss = terms.loss.mean()
        return loss, {"diffusion": loss.detach(), "mse": terms.mse.detach().mean(), "vb": terms.vb.detach().mean()}

    def hybrid(self, z_SNL: Tensor, time_SN: Tensor, eps_SNL: Tensor, state_ND: Tensor) -> DiffusionLoss:
        """The loss of given draws (..., L), steps (...) and noise (..., L)  (Nichol and Dhariwal, Improved DDPM).

        vb = KL(q(x_{i-1} | x_i, z) || p(x_{i-1} | x_i)), with the mean's prediction detached; at step 0 minus the
        log-likelihood of z in bins, as inherited from image models, which only the variance of step 0 learns from, and
        no solver uses that.
        """
        at = cosine_schedule(TIMES).tables(time_SN, z_SNL.dtype)
        x_SNL = at.signal * z_SNL + at.noise * eps_SNL
        found_SNL, position_SNL = self.predict(x_SNL, time_SN, self.net.condition(state_ND))
        mse = (eps_SNL - found_SNL).square().mean(-1)
        share = (position_SNL + 1.0) / 2.0
        log_variance = share * at.log_beta + (1.0 - share) * at.log_variance
        clean = at.inverse_signal * x_SNL - at.noise_to_signal * found_SNL.detach()
        off = at.from_clean * (z_SNL - clean)  # difference of the two means, which share the part of x
        apart = at.log_variance - log_variance
        kl = 0.5 * (apart.exp() - apart - 1.0 + off.square() * (-log_variance).exp())
        mean = at.from_clean * clean + at.from_noisy * x_SNL
        vb = torch.where(time_SN[..., None] == 0, -_binned_log_likelihood(z_SNL, mean, 0.5 * log_variance), kl)
        vb = vb.mean(-1) / math.log(2.0)
        return DiffusionLoss(mse + vb, mse, vb)

    @torch.no_grad()
    def draw(self, state_ND: Tensor, draws: int, generator: Generators | None) -> Tensor:
        """S independent draws, (S, ..., L), for states (..., D); see `Head.draw`."""
        condition_ND = self.net.condition(state_ND)

        def predict(x_SNL: Tensor, time: int) -> tuple[Tensor, Tensor]:
            return self.predict(x_SNL, torch.tensor(time, device=x_SNL.device), condition_ND)

        def fresh() -> Tensor:
            return noise("normal", state_ND, draws, self.latent, generator, wide(self.net.dtype))

        return denoise(predict, fresh, self.config.solver, self.config.steps).to(self.net.dtype)

    def compile_regions(self) -> list[nn.Module]:
        return self.net.compile_regions()


def _binned_log_likelihood(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of a normal's mass in the bin of width 2/255 around z, the outer bins without end; an approximate normal CDF."""
    centred, scale = z - mean, (-log_std).exp()
    upper, lower = _normal_cdf(scale * (centred + BIN)), _normal_cdf(scale * (centred - BIN))
    inside = torch.where(z > EDGE, 1.0 - lower, upper - lower)
    return torch.where(z < -EDGE, upper, inside).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
