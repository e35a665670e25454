"""Energy head: one network pass turns uniform noise and a backbone state into a draw (docs/method.md).

Legend: S draws, N positions (any leading dimensions), D width, L latent, R noise dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import EnergyHeadConfig, EnergySettings
from nextvec.model.heads.interface import Generators, Metrics, noise
from nextvec.model.posterior import Posterior
from nextvec.scoring.energy import energy_score_loss

EPS = 1e-6  # LayerNorm epsilon of the authors' code


class EnergyBlock(nn.Module):
    """x + down(silu(g) * u), (g, u) = split(l3(silu(l2(silu(l1([LayerNorm(x); c])))))), all with biases.

    l1 is kept as its two halves: `from_draw` on x (with the bias) and `from_state` on c. The half on c is the same for all
    draws, so it runs once per position instead of once per draw: the same function, D^2 fewer multiply-adds per draw.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.from_draw = nn.Linear(width, width)
        self.from_state = nn.Linear(width, width, bias=False)
        self.middle = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, width)

    def forward(self, x_SND: Tensor, state_ND: Tensor) -> Tensor:
        hidden = F.silu(self.from_draw(self.norm(x_SND)) + self.from_state(state_ND))
        gate, up = self.gate_up(F.silu(self.middle(hidden))).chunk(2, dim=-1)
        return x_SND + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """Draws latents from an implicit distribution given the state."""

    latents: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    teacher: ClassVar[str] = "posterior"
    objective: ClassVar[str] = "energy"

    def __init__(self, config: EnergyHeadConfig, width: int, latent: int) -> None:
        super().__init__()
        self.config = config
        self.score = EnergySettings()  # of the loss; they are the training run's, not the model's
        self.noise_in = nn.Linear(config.noise, width)
        self.noise_norm = nn.LayerNorm(width, eps=EPS)
        self.state_in = nn.Linear(width, width)
        self.state_norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(EnergyBlock(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.out_in = nn.Linear(width, width)
        self.out = nn.Linear(width, latent)

    def zero_initialised(self) -> list[Tensor]:
        """Parameters that start at 0, so that all draws coincide at step 0 (authors' code)."""
        return [self.out.weight]

    def forward(self, state_ND: Tensor, noise_SNR: Tensor) -> Tensor:
        """Draws (S, ..., L) for states (..., D) and noise (S, ..., R) in [-0.5, 0.5]."""
        x = self.noise_norm(self.noise_in(noise_SNR))
        state = self.state_norm(self.state_in(state_ND))
        for block in self.blocks:
            x = block(x, state)
        return self.out(F.silu(self.out_in(self.norm(x))))

    def loss(self, state_ND: Tensor, target: Posterior, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean energy loss of S draws against the posterior, and its two terms apart, which show a plateau (docs/method.md)."""
        draws_SNL = self.draw(state_ND, self.score.draws, generator)
        score = energy_score_loss(draws_SNL, target.mean, target.log_std, self.score, generator)
        metrics = {
            "energy": score.loss.detach().mean(),
            "fidelity": score.fidelity.detach().mean(),
            "diversity": score.diversity.detach().mean(),
        }
        return score.loss.mean(), metrics

    def draw(self, state_ND: Tensor, draws: int, generator: Generators | None) -> Tensor:
        """S independent draws, (S, ..., L), for states (..., D); see `Head.draw`."""
        dtype = self.noise_in.weight.dtype
        uniform = noise("uniform", state_ND, draws, self.config.noise, generator, dtype)
        return self.forward(state_ND.to(dtype), uniform - 0.5)

    def compile_regions(self) -> list[nn.Module]:
        return list(self.blocks)
