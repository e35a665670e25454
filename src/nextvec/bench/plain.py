"""The textbook implementation of every training step: the yardstick of `nextvec bench`, never used for anything else.

The algorithm of the authors' code, written as a reader of the paper would: one matrix per projection; the head's first
linear on the concatenation [x; c] for every draw; all S x M x L and S x S x L differences in memory; all N x V logits in
memory; a hand-written RMSNorm and rotation; AdamW parameter by parameter. Same parameters, same function and same
gradients as the product: tests hold both to it in float64. Only the teacher term may differ: M draws here, whatever
`energy.teacher` says of the product.

Legend: B rows, P patches, K tokens per patch, T tokens, D width, L latent, S model draws, M teacher draws, R noise
dimensions, V vocabulary, N any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.bench.plain_model import Autoencoder, Calm, RMSNorm, TokenLM, wide
from nextvec.config import AutoencoderRun, CalmRun, OptimSettings, RunConfig, TokenLMRun
from nextvec.train.optim import parameter_groups

Metrics = dict[str, Tensor]


def energy_score(draws_SNL: Tensor, mean_NL: Tensor, log_std_NL: Tensor, eps_MNL: Tensor, alpha: float = 1.0) -> Tensor:
    """The energy loss (docs/method.md) with every difference in memory, (N,); in float32."""
    with torch.autocast(draws_SNL.device.type, enabled=False):
        draws = wide(draws_SNL)
        teacher_MNL = mean_NL + log_std_NL.exp() * eps_MNL
        to_teacher_SMN = distance(draws.unsqueeze(1) - teacher_MNL.unsqueeze(0), alpha)
        to_draws_SSN = distance(draws.unsqueeze(1) - draws.unsqueeze(0), alpha)
        pairs = draws.shape[0] * (draws.shape[0] - 1)
        return 2.0 * to_teacher_SMN.mean((0, 1)) - to_draws_SSN.sum((0, 1)) / pairs


def distance(difference: Tensor, alpha: float) -> Tensor:
    """||difference||^alpha with gradient 0 at 0."""
    norm = torch.linalg.norm(difference, dim=-1)
    if alpha == 1.0:
        return norm
    apart = norm > 0
    return torch.where(apart, torch.where(apart, norm, 1.0) ** alpha, 0.0)


def vocabulary_loss(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Tensor:
    """Mean cross-entropy from the logits of all rows at once."""
    logits_NV = wide(F.linear(hidden_ND, weight_VD)).flatten(0, -2)
    return F.cross_entropy(logits_NV, ids_N.flatten())


def head_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform on [-0.5, 0.5]."""
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator) - 0.5


def teacher_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal."""
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


class NextPatchTokens(nn.Module):
    """The auxiliary of recipe `fast`."""

    def __init__(self, vocab_size: int, patch_size: int, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.slots = nn.Linear(width, patch_size * width)
        self.norm = RMSNorm(width, eps)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.patch_size = patch_size

    def forward(self, state_ND: Tensor, ids_NK: Tensor) -> Tensor:
        slots = self.slots(state_ND).unflatten(-1, (self.patch_size, -1))
        return vocabulary_loss(self.norm(slots), self.output.weight, ids_NK)


class CalmTraining(nn.Module):
    """The energy loss with S model draws and M teacher draws, whatever the product does about its teacher term."""

    def __init__(self, config: CalmRun) -> None:
        super().__init__()
        self.config = config
        self.model = Calm(config.model)
        model, fast = config.model, config.recipe.name == "fast"
        self.auxiliary = NextPatchTokens(model.vocab_size, model.patch_size, model.backbone.width) if fast else None

    def forward(self, ids_BT: Tensor, generator: torch.Generator | None, progress: float) -> tuple[Tensor, Metrics]:
        ids_BPK = ids_BT.unflatten(1, (-1, self.config.model.patch_size))
        config, like = self.config, self.model.head.out.weight
        noise_SBPR = head_noise((config.energy.draws, *ids_BPK[:, 1:, 0].shape, self.model.noise), like, generator)
        latent = config.model.autoencoder.latent
        eps_MBPL = teacher_noise((config.energy.teacher_draws, *ids_BPK[:, 1:, 0].shape, latent), like, generator)
        return self.loss(ids_BPK, noise_SBPR, eps_MBPL), {}

    def loss(self, ids_BPK: Tensor, noise_SBPR: Tensor, eps_MBPL: Tensor) -> Tensor:
        """The loss for given noise of the head and of the teacher."""
        state_BPD, target_BPK = self.model.states(ids_BPK[:, :-1]), ids_BPK[:, 1:]
        mean, log_std = self.model.teacher(target_BPK)
        draws_SBPL = self.model.draw_latents(state_BPD, noise_SBPR)
        loss = energy_score(draws_SBPL, mean, log_std, eps_MBPL, self.config.energy.alpha).mean()
        if self.auxiliary is not None and self.config.recipe.auxiliary_weight:
            loss = loss + self.config.recipe.auxiliary_weight * self.auxiliary(state_BPD, target_BPK)
        return loss


class AutoencoderTraining(nn.Module):
    """Spec section 1."""

    def __init__(self, config: AutoencoderRun) -> None:
        super().__init__()
        self.model = Autoencoder(config.model)

    def forward(self, ids_BT: Tensor, generator: torch.Generator | None, progress: float) -> tuple[Tensor, Metrics]:
        config, device = self.model.config, ids_BT.device
        ids_NK = ids_BT.reshape(-1, config.patch_size)
        dropped = torch.rand(ids_NK.shape, device=device, generator=generator) < config.token_dropout
        mean, log_std = self.model.encode(ids_NK.masked_fill(dropped, config.mask_id))
        std = log_std.exp()
        z = mean + std * torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator)
        lost = torch.rand(z.shape, device=device, generator=generator) < config.latent_dropout
        z = torch.where(lost, 0.0, z / (1.0 - config.latent_dropout))
        reconstruction = vocabulary_loss(self.model.decode_hidden(z), self.model.embedding.weight, ids_NK)
        kl_NL = 0.5 * (mean.pow(2) + std.pow(2) - 1.0 - 2.0 * log_std)
        clipped = torch.clamp(kl_NL, min=config.kl_clip).sum(-1).mean()
        return config.patch_size * reconstruction + config.kl_weight * clipped, {}


class TokenLMTraining(nn.Module):
    def __init__(self, config: TokenLMRun) -> None:
        super().__init__()
        self.model = TokenLM(config.model)

    def forward(self, ids_BT: Tensor, generator: torch.Generator | None, progress: float) -> tuple[Tensor, Metrics]:
        state_BTD = self.model.states(ids_BT[:, :-1])
        return vocabulary_loss(state_BTD, self.model.output.weight, ids_BT[:, 1:]), {}


def plain_module(config: RunConfig, product: nn.Module) -> nn.Module:
    """The plain training module with the parameters of the product's training module."""
    module: nn.Module
    if isinstance(config, CalmRun):
        module = CalmTraining(config)
    elif isinstance(config, TokenLMRun):
        module = TokenLMTraining(config)
    else:
        assert isinstance(config, AutoencoderRun)
        module = AutoencoderTraining(config)
    state = plain_tensors(product.state_dict())
    module.to(next(iter(state.values())))
    module.load_state_dict(state)
    return module.train()


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters (or gradients) of the product under the names and in the matrices of this file."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".")
        parent, _, layer = place.rpartition(".")
        if layer == "qkv":
            queries = tensor.shape[1]  # as many as the width
            keys = (tensor.shape[0] - queries) // 2
            for part, rows in zip("qkv", tensor.split((queries, keys, keys)), strict=True):
                found[f"{parent}.{part}.{kind}"] = rows
        elif layer == "gate_up" and parent.endswith(".mlp"):
            found[f"{parent}.gate.{kind}"], found[f"{parent}.up.{kind}"] = tensor.chunk(2)
        elif layer == "from_draw":
            other = [tensors[f"{parent}.from_state.{kind}"]] if kind == "weight" else []
            found[f"{parent}.l1.{kind}"] = torch.cat([tensor, *other], dim=-1)
        elif layer != "from_state":
            found[name] = tensor
    return found


def plain_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW parameter by parameter, whatever optimiser the settings name."""
    _, groups, _ = parameter_groups(module.named_parameters(), settings.override(name="adamw", rows_lr=None))
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, foreach=False, fused=False
    )
