"""Categorical head: a flow from noise to latents whose network says which tokens a noisy latent came from (docs/heads.md).

Where every token has latent dimensions of its own (`model.autoencoder.factored`), the teacher's latent of a patch is one of a
table of V codes at each place, plus the posterior's noise. The expected latent given a noisy one, all that a flow needs, is then
an average of codes, weighted with the probabilities of the tokens: so the network learns these, by cross-entropy, and
the velocity follows. The same in diffusion language models: Dieleman et al. 2022, Continuous diffusion for categorical data.

Legend: S draws, N positions (any leading dimensions), D width, K tokens per patch, L latent, E = L / K dimensions of a token,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nextvec.config import TIMES, CalmConfig, CategoricalHeadConfig
from nextvec.model.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy
from nextvec.model.heads.adaln import AdaLNNet
from nextvec.model.heads.codes import CodeBook, Codes
from nextvec.model.heads.interface import Generators, Metrics, noise, wide
from nextvec.model.layers import RMSNorm
from nextvec.model.packed import version


class CategoricalHead(CodeBook, nn.Module):
    """At time t in [0, 1] a latent lies at x = (1 - t) x0 + t z, x0 standard normal noise and z a draw of the teacher.

    Logits of the token y at a place are what x says of it there, exactly, and what the network says:

        log N(x_E; t mean_y, v) + output_y . norm(slots(state) + [t > 0] net(x, t, state)),   v = (1 - t)^2 + t^2 s^2

    with one s^2, the mean over tokens and dimensions, for the posterior's variance. So the network begins with what noise
    hides and never has to learn to tell codes apart; it learns the law of a place given the state (all of it at t = 0, where x
    says nothing) and what the other places of x say of this one. The expected latent is sum_y p_y mean_y, moved towards x by
    what the posterior's own noise explains.
    """

    latents: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    teacher: ClassVar[str] = "tokens"
    objective: ClassVar[str] = "cross_entropy"

    def __init__(self, config: CalmConfig) -> None:
        nn.Module.__init__(self)
        CodeBook.__init__(self)
        assert isinstance(config.head, CategoricalHeadConfig)
        width, latent = config.backbone.width, config.autoencoder.latent
        self.config = config.head
        self.patch_size, self.latent = config.patch_size, latent
        self.slots = nn.Linear(width, self.patch_size * width)
        self.net = AdaLNNet(width, latent, self.patch_size * width, config.head.blocks)
        self.norm = RMSNorm(width, eps=config.backbone.norm_eps)
        self.output = nn.Linear(width, config.vocab_size, bias=False)
        self._drawn_with: tuple[object, Codes, Tensor] | None = None

    def loss(self, state_ND: Tensor, target: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy in nats per token of the patches `target` (..., K), given their noisy latents.

        A share `clean` of the times is 0, where the patch is predicted from the state alone; the others are uniform up to
        `until`. `accuracy` is the share of tokens ranked first.
        """
        codes = self.codes()
        state_MD, ids_MK = state_ND.flatten(0, -2), target.flatten(0, -2)
        shape = (self.config.teacher_draws, *ids_MK.shape)
        place: dict[str, Any] = {"generator": generator, "device": ids_MK.device, "dtype": codes.mean.dtype}
        time_SM = self.config.until * torch.rand(shape[:2], **place)
        time_SM = time_SM.masked_fill(torch.rand(shape[:2], **place) < self.config.clean, 0.0)
        start, eps = (torch.randn((*shape, codes.mean.shape[1]), **place) for _ in range(2))
        z = codes.mean[ids_MK] + codes.std[ids_MK] * eps
        x_SML = (start + time_SM[..., None, None] * (z - start)).flatten(-2)
        coupling = self._coupling(x_SML, time_SM, self.net.condition(state_MD))
        hidden = self.slots(state_MD) + torch.where((time_SM > 0)[..., None], coupling, 0.0)
        rows = self._rows(hidden, x_SML, time_SM, codes)
        loss, accuracy = linear_cross_entropy(rows.flatten(0, -2), self._table(codes), ids_MK.expand(shape).reshape(-1))
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy.detach()}

    @torch.no_grad()
    def draw(self, state_ND: Tensor, draws: int, generator: Generators | None) -> Tensor:
        """S independent draws, (S, ..., L), for states (..., D); see `Head.draw`."""
        start = noise("normal", state_ND, draws, self.latent, generator, wide(self.net.dtype))
        return self.transport(start, state_ND).to(self.net.dtype)

    def transport(self, start_SNL: Tensor, state_ND: Tensor) -> Tensor:
        """Where the flow carries (S, ..., L): euler steps at even times from 0 to `until`, and one from there to 1.

        The last arrives at the expected latent. At time 0 that is the same for all draws of a state, and computed once.
        """
        codes = self.codes()
        table_VF = self._table_for_draws(codes)
        slots, condition = self.slots(state_ND.to(self.net.dtype)), self.net.condition(state_ND)
        x = start_SNL
        times = [self.config.until * step / (self.config.steps - 1) for step in range(self.config.steps)]
        for time, then in zip(times, [*times[1:], 1.0], strict=True):
            at = torch.tensor(time, device=x.device, dtype=x.dtype)
            seen, hidden = (x, slots + self._coupling(x, at, condition)) if time else (x[:1], slots[None])
            found = self._expected(self._rows(hidden, seen, at, codes), seen, at, codes, table_VF)
            x = x + (then - time) / (1.0 - time) * (found - x)
        return x

    def compile_regions(self) -> list[nn.Module]:
        return self.net.compile_regions()

    def _coupling(self, x_SNL: Tensor, time: Tensor, condition_ND: Tensor) -> Tensor:
        """What the places of a noisy latent say of each other, (S, ..., K * D); `time` is one for all, or (S, ...)."""
        size = ((1.0 - time).square() + time.square()).sqrt()[..., None]  # of a latent's numbers, about 1 at either end
        return self.net(x_SNL / size, time * TIMES, condition_ND)

    def _rows(self, hidden: Tensor, x_SNL: Tensor, time: Tensor, codes: Codes) -> Tensor:
        """Rows (S, ..., K, F), F = D + E + 1, whose products with `_table` are the logits."""
        x = x_SNL.unflatten(-1, (self.patch_size, -1))
        at = time.expand(x_SNL.shape[:-1])[..., None, None]
        variance = _variance(at, codes)
        square = (-0.5 * at.square() / variance).expand(*x.shape[:-1], 1)
        return torch.cat(
            (self.norm(hidden.unflatten(-1, (self.patch_size, -1))).to(x.dtype), at / variance * x, square), dim=-1
        )

    def _table(self, codes: Codes) -> Tensor:
        """(V, F): the vocabulary matrix, the codes, and their squared lengths."""
        return torch.cat((self.output.weight, codes.mean, codes.mean.square().sum(-1, keepdim=True)), dim=-1)

    def _table_for_draws(self, codes: Codes) -> Tensor:
        """`_table` in the model's precision; made again after an optimiser or a load changed what it is made of."""
        state = (version(self.output.weight), self.net.dtype, self.output.weight.device)
        kept = self._drawn_with
        if kept is None or kept[0] != state or kept[1] is not codes:
            kept = self._drawn_with = (state, codes, self._table(codes).detach().to(self.net.dtype))
        return kept[2]

    def _expected(self, rows: Tensor, x_SNL: Tensor, time: Tensor, codes: Codes, table_VF: Tensor) -> Tensor:
        """The expected latent (..., L) given a noisy one; logits exist for a chunk of rows at a time."""
        size = max(1, CHUNK_ELEMENTS // len(table_VF))
        parts = [
            (part @ table_VF.T).to(x_SNL.dtype).softmax(-1) @ codes.mean.to(x_SNL.dtype)
            for part in rows.to(table_VF.dtype).flatten(0, -2).split(size)
        ]
        mean = torch.cat(parts).view(*x_SNL.shape[:-1], self.latent)
        gain = time * codes.square / _variance(time, codes)
        return mean + gain * (x_SNL - time * mean)


def _variance(time: Tensor, codes: Codes) -> Tensor:
    """Of x given the token, in each dimension."""
    return (1.0 - time).square() + time.square() * codes.square
