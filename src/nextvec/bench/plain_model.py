"""The textbook networks of the yardstick in plain.py: one matrix per projection, nothing shared between draws.

Names are those of the product wherever the matrices are the same.
Legend: B rows, P patches, K tokens per patch, T tokens, D width, E head dimension, L latent, S model draws, R noise
dimensions, V vocabulary, N any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, TokenLMConfig
from nextvec.errors import ConfigError
from nextvec.model.grams import Grams, windows
from nextvec.model.recall import DIM

LAYER_NORM_EPS = 1e-6


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where the model is."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        x = wide(x_ND)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_ND.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_ND)) * self.up(x_ND))


class ResidualMLP(nn.Module):
    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, inner)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND + self.mlp(self.norm(x_ND))


def check_plain(config: AutoencoderConfig) -> None:
    """Raises ConfigError for an autoencoder that this textbook has not got."""
    if config.attention or config.factored or not config.variational:
        raise ConfigError("the plain arm has the published autoencoder alone, and this one is a variant: --no-plain")


class Autoencoder(nn.Module):
    """Spec section 1."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        check_plain(config)
        self.config = config
        width, half = config.width, config.layers // 2

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(ResidualMLP(width, config.inner, config.norm_eps) for _ in range(half))

        self.embedding = nn.Embedding(config.vocab_size, width)
        self.token_encoder = blocks()
        self.squeeze = nn.Linear(config.patch_size * width, width)
        self.patch_encoder = blocks()
        self.encoder_norm = RMSNorm(width, config.norm_eps)
        self.to_latent = nn.Linear(width, 2 * config.latent)
        self.from_latent = nn.Linear(config.latent, width)
        self.patch_decoder = blocks()
        self.expand = nn.Linear(width, config.patch_size * width)
        self.token_decoder = blocks()
        self.decoder_norm = RMSNorm(width, config.norm_eps)

    def encode(self, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, (N, L) each."""
        x = self.embedding(ids_NK)
        for block in self.token_encoder:
            x = block(x)
        x = self.squeeze(x.flatten(-2))
        for block in self.patch_encoder:
            x = block(x)
        mean, log_std = wide(self.to_latent(self.encoder_norm(x))).chunk(2, dim=-1)
        return mean, log_std

    def decode_hidden(self, z_NL: Tensor) -> Tensor:
        """(N, K, D)."""
        x = self.from_latent(z_NL)
        for block in self.patch_decoder:
            x = block(x)
        x = self.expand(x).unflatten(-1, (self.config.patch_size, self.config.width))
        for block in self.token_decoder:
            x = block(x)
        return self.decoder_norm(x)


class Attention(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        keys = config.key_value_heads * config.head_dim
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, keys, bias=False)
        self.v = nn.Linear(config.width, keys, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BPD: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        query, key, value = heads(self.q(x_BPD)), heads(self.k(x_BPD)), heads(self.v(x_BPD))
        query = query * cos_PE + rotate_half(query) * sin_PE
        key = key * cos_PE + rotate_half(key) * sin_PE
        groups = self.config.heads // self.config.key_value_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Block(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.inner)

    def forward(self, x_BPD: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> Tensor:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD), cos_PE, sin_PE)
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))


class Backbone(nn.Module):
    """Spec section 2."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x_BPD: Tensor) -> Tensor:
        size, base = self.config.head_dim, self.config.rope_base
        dtype = wide(x_BPD).dtype
        rates = base ** -(torch.arange(0, size, 2, device=x_BPD.device).to(dtype) / size)
        angles = torch.arange(x_BPD.shape[1], device=x_BPD.device).to(dtype)[:, None] * rates
        cos_PE, sin_PE = (f(angles).repeat(1, 2).to(x_BPD.dtype) for f in (torch.cos, torch.sin))
        for block in self.blocks:
            x_BPD = block(x_BPD, cos_PE, sin_PE)
        return self.norm(x_BPD)


class EnergyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.l1 = nn.Linear(2 * width, width)
        self.middle = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, width)

    def forward(self, x_SND: Tensor, state_SND: Tensor) -> Tensor:
        hidden = F.silu(self.l1(torch.cat((self.norm(x_SND), state_SND), dim=-1)))
        gate, up = self.gate_up(F.silu(self.middle(hidden))).chunk(2, dim=-1)
        return x_SND + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """Spec section 3: the state is repeated for every draw."""

    def __init__(self, config: EnergyHeadConfig, width: int, latent: int) -> None:
        super().__init__()
        self.noise_in = nn.Linear(config.noise, width)
        self.noise_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.state_in = nn.Linear(width, width)
        self.state_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(EnergyBlock(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.out_in = nn.Linear(width, width)
        self.out = nn.Linear(width, latent)

    def forward(self, state_ND: Tensor, noise_SNR: Tensor) -> Tensor:
        state_SND = state_ND.expand(noise_SNR.shape[0], *state_ND.shape).contiguous()
        x, state = self.noise_norm(self.noise_in(noise_SNR)), self.state_norm(self.state_in(state_SND))
        for block in self.blocks:
            x = block(x, state)
        return self.out(F.silu(self.out_in(self.norm(x))))


class Calm(nn.Module):
    def __init__(self, config: CalmConfig) -> None:
        super().__init__()
        self.config = config
        if not isinstance(config.head, EnergyHeadConfig):
            raise ConfigError(
                f"the plain arm has the energy head alone, and this model the {config.head.kind} head: --no-plain"
            )
        if config.input != "tokens":
            raise ConfigError(f"the plain arm reads tokens, and this model has the input {config.input}: --no-plain")
        width = config.backbone.width
        self.noise = config.head.noise
        self.compressor = Compressor(config.vocab_size, config.patch_size, width)
        self.backbone = Backbone(config.backbone)
        self.head = EnergyHead(config.head, width, config.autoencoder.latent)
        self.autoencoder = Autoencoder(config.autoencoder)
        self.autoencoder.requires_grad_(False)

    def states(self, ids_BPK: Tensor) -> Tensor:
        return self.backbone(self.compressor(ids_BPK))

    @torch.no_grad()
    def teacher(self, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.encode(ids_NK)

    def draw_latents(self, state_ND: Tensor, noise_SNR: Tensor) -> Tensor:
        return self.head(state_ND, noise_SNR)


class Compressor(nn.Module):
    def __init__(self, vocab_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.project = nn.Sequential(
            nn.Linear(patch_size * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width, eps=LAYER_NORM_EPS),
        )

    def forward(self, ids_NK: Tensor) -> Tensor:
        return self.project(self.embedding(ids_NK).flatten(-2))


class TokenLM(nn.Module):
    def __init__(self, config: TokenLMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.backbone.width)
        self.backbone = Backbone(config.backbone)
        self.output = nn.Linear(config.backbone.width, config.vocab_size, bias=False)
        self.recall = Recall(config.backbone.width, config.recall) if config.recall else None
        self.grams = Grams(config.backbone.width, config.grams) if config.grams else None
        self.config = config

    def states(self, ids_BT: Tensor) -> Tensor:
        x = self.embedding(ids_BT)
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.backbone.norm_eps)
        if self.config.embedding_norm:
            x = unit
        if self.recall is not None:
            x = x + self.recall(unit)
        return self.backbone(x if self.grams is None else x + self.grams(windows(ids_BT)))


class Recall(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(2 * width, heads * DIM, bias=False)
        self.key = nn.Linear(2 * width, heads * DIM, bias=False)
        self.value = nn.Linear(width, heads * DIM, bias=False)
        self.out = nn.Linear(heads * DIM, width, bias=False)

    def forward(self, e_BTD: Tensor) -> Tensor:
        padded = F.pad(e_BTD, (0, 0, 2, 0))
        pairs = torch.cat((padded[:, 1:], padded[:, :-1]), dim=-1)  # pair t: the tokens before t
        query, key, value = (
            x.unflatten(-1, (self.heads, DIM)).transpose(1, 2)
            for x in (self.query(pairs[:, 1:]), self.key(pairs[:, :-1]), self.value(e_BTD))
        )
        scores = query @ key.transpose(-1, -2) * DIM**-0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(-2))
