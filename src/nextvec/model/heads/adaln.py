"""The network of the flow and diffusion heads: an MLP on a noisy latent, modulated by the state and the time (docs/method.md).

Legend: S draws, N positions (any leading dimensions), D width, L latent, O outputs.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # LayerNorm epsilon of the authors' code
WAVES = 128  # frequencies of the time embedding, a cosine and a sine each
LONGEST = 10000.0  # ratio of the first frequency and the one after the last


class AdaLNBlock(nn.Module):
    """x + gate * second(silu(first(LayerNorm(x) * (1 + scale) + shift))), (shift, scale, gate) = split(linear(signal))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x_SND: Tensor, signal_ND: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(signal_ND).chunk(3, dim=-1)
        hidden = F.silu(self.first(self.norm(x_SND) * (1.0 + scale) + shift))
        return x_SND + gate * self.second(hidden)


class AdaLNNet(nn.Module):
    """(noisy latent, time, state) -> O numbers.

    What depends on time and state alone, three fifths of a block, is computed for as many rows as there are times and
    states: when a solver asks for all draws of a state at one time, once for all of them.
    """

    def __init__(self, width: int, latent: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.latent_in = nn.Linear(latent, width)
        self.time_in = nn.Linear(2 * WAVES, width)
        self.time_out = nn.Linear(width, width)
        self.state_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, outputs)

    def zero_initialised(self) -> list[Tensor]:
        """Parameters that start at 0, so that each block is the identity and the output 0 at step 0 (authors' code)."""
        parts = [*self.blocks, self]
        return [self.out.weight, *(part.get_submodule("modulation").weight for part in parts)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.out.weight.dtype

    def condition(self, state_ND: Tensor) -> Tensor:
        """What the network sees of a state, (..., D), for `forward`."""
        return self.state_in(state_ND.to(self.dtype))

    def forward(self, x_SNL: Tensor, time_SN: Tensor, condition_ND: Tensor) -> Tensor:
        """Outputs (..., O) for noisy latents (..., L) at integer times, which may be one for all, and `condition(states)`."""
        time = self.time_out(F.silu(self.time_in(embed_times(time_SN).to(self.dtype))))
        signal = F.silu(time + condition_ND)
        x = self.latent_in(x_SNL.to(self.dtype))
        for block in self.blocks:
            x = block(x, signal)
        shift, scale = self.modulation(signal).chunk(2, dim=-1)
        return self.out(self.norm(x) * (1.0 + scale) + shift)

    def compile_regions(self) -> list[nn.Module]:
        return list(self.blocks)


def embed_times(time_N: Tensor) -> Tensor:
    """[cos, sin](time * 10000^(-j / 128)), j < 128, (..., 256), in float32 as in the published code."""
    angle = time_N[..., None].float() * frequencies().to(time_N.device)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@functools.cache
def frequencies() -> Tensor:
    """10000^(-j / 128), (128,): the published float32 expression, its exponential rounded once, so the same everywhere."""
    j = torch.arange(WAVES, dtype=torch.float32)
    return (-math.log(LONGEST) * j / WAVES).double().exp().float()
