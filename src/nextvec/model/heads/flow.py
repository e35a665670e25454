"""Flow-matching head: a velocity field from noise to the teacher's latents, and its solvers (docs/method.md).

Legend: S draws, N positions (any leading dimensions), D width, L latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from nextvec.config import TIMES, FlowHeadConfig
from nextvec.model.heads.adaln import AdaLNNet
from nextvec.model.heads.interface import Generators, Metrics, noise, wide
from nextvec.model.posterior import Posterior


class FlowHead(nn.Module):
    """At time t in [0, 1] a latent lies at x = (1 - t) x0 + t z, x0 standard normal noise and z a draw of the teacher.

    The network predicts z - x0, the velocity, or with `predicts="latent"` z itself, and the velocity is (z - x) / (1 - t): the
    same square error with the weight (1 - t)^2, so that learning goes to early times, at which the tokens are decided.
    """

    latents: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    teacher: ClassVar[str] = "posterior"
    objective: ClassVar[str] = "flow"

    def __init__(self, config: FlowHeadConfig, width: int, latent: int) -> None:
        super().__init__()
        self.config, self.latent = config, latent
        self.net = AdaLNNet(width, latent, latent, config.blocks)

    def velocity(self, x_SNL: Tensor, time_SN: Tensor, condition_ND: Tensor) -> Tensor:
        """Velocity (..., L) at (..., L); time (...) in [0, 1], which the network sees as floor(1000 t).

        Below 1 where the network predicts the latent.
        """
        found_SNL = self._predict(x_SNL, time_SN, condition_ND)
        if self.config.predicts == "velocity":
            return found_SNL
        return (found_SNL - x_SNL) / (1.0 - time_SN[..., None])

    def _predict(self, x_SNL: Tensor, time_SN: Tensor, condition_ND: Tensor) -> Tensor:
        return self.net(x_SNL, (time_SN * TIMES).long(), condition_ND).to(wide(self.net.dtype))

    def loss(self, state_ND: Tensor, target: Posterior, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean square error of what the network predicts, over teacher draws z, times and noise."""
        z_SNL = target.samples(self.config.teacher_draws, generator)
        start_SNL = torch.randn(z_SNL.shape, generator=generator, device=z_SNL.device, dtype=z_SNL.dtype)
        time_SN = torch.rand(z_SNL.shape[:-1], generator=generator, device=z_SNL.device)
        at_SNL = start_SNL + time_SN[..., None] * (z_SNL - start_SNL)
        found_SNL = self._predict(at_SNL, time_SN, self.net.condition(state_ND))
        true_SNL = z_SNL - start_SNL if self.config.predicts == "velocity" else z_SNL
        loss = (found_SNL - true_SNL).square().mean()
        return loss, {"flow": loss.detach()}

    @torch.no_grad()
    def draw(self, state_ND: Tensor, draws: int, generator: Generators | None) -> Tensor:
        """S independent draws, (S, ..., L), for states (..., D); see `Head.draw`."""
        start = noise("normal", state_ND, draws, self.latent, generator, wide(self.net.dtype))
        return self.transport(start, state_ND).to(self.net.dtype)

    def transport(self, start_SNL: Tensor, state_ND: Tensor) -> Tensor:
        """Where the velocity field carries (S, ..., L), by the solver of the configuration."""
        condition_ND = self.net.condition(state_ND)

        def velocity(x_SNL: Tensor, time: float) -> Tensor:
            return self.velocity(x_SNL, torch.tensor(time, device=x_SNL.device), condition_ND)

        return integrate(velocity, start_SNL, self.config.solver, self.config.steps, self.config.predicts == "velocity")

    def compile_regions(self) -> list[nn.Module]:
        return self.net.compile_regions()


def integrate(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, solver: str, steps: int, at_end: bool = True
) -> Tensor:
    """x at time 1 of dx/dt = velocity(x, t) from x at time 0, in equal steps.

    `euler`: one evaluation a step, error of order 1 in the step. `midpoint` (the authors'): the velocity half a step
    ahead; `heun`: the mean of the velocities at both ends; two evaluations a step, order 2. Where there is no velocity
    at time 1 (`at_end` False) the last step of heun is one of euler.
    """
    assert solver in ("euler", "midpoint", "heun")
    size = 1.0 / steps
    for step in range(steps):
        time = step / steps
        first = velocity(x, time)
        if solver == "euler" or (solver == "heun" and step == steps - 1 and not at_end):
            x = x + size * first
        elif solver == "midpoint":
            x = x + size * velocity(x + 0.5 * size * first, time + 0.5 * size)
        else:
            x = x + 0.5 * size * (first + velocity(x + size * first, time + size))
    return x
