"""Building blocks shared by the autoencoder, the backbone and the baseline.

Legend: B batch, P positions (patches, or tokens for the baseline), D width, H heads, E head dimension, N any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import BackboneConfig
from nextvec.model.attention import causal_attention
from nextvec.model.lean import keeps_for_backward, rms_norm, swiglu_down


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight takes the input's dtype, so that the fused kernel also serves bfloat16 activations."""

    def forward(self, x_ND: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x_ND, self.weight.to(x_ND.dtype), self.eps)


def embedded(table: nn.Embedding, ids: Tensor, norm: bool, eps: float) -> Tensor:
    """Embeddings (..., D), with `norm` of mean square 1; no weights.

    Fresh ones are some 20 times smaller than what blocks add to them, and what a token alone says of the next is learnt late.
    """
    return normed_rows(table, ids, lambda x: F.rms_norm(x, x.shape[-1:], eps=eps)) if norm else table(ids)


def normed_rows(table: nn.Embedding, ids: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """`norm(table(ids))`, of the table where that has fewer rows than there are ids."""
    if ids.numel() > table.num_embeddings:
        return F.embedding(ids, norm(table.weight))
    return norm(table(ids))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases; gate and up are one matrix, so one product."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)  # rows: gate, then up
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_up = self.gate_up(x_ND)
        if keeps_for_backward():
            return swiglu_down(gate_up, self.down.weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ResidualMLP(nn.Module):
    """x + mlp(rmsnorm(x)): the autoencoder's block (docs/method.md)."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=eps)
        self.mlp = SwiGLU(width, inner)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND + self.mlp(self.norm(x_ND))


def rotary_table(positions_P: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (P, E/2), angles in float64 so that no precision is lost at any position."""
    half = torch.arange(0, head_dim, 2, device=positions_P.device, dtype=torch.float64) / head_dim
    angles = positions_P.to(torch.float64)[:, None] * base**-half
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_dtype(like: Tensor) -> torch.dtype:
    """What a product with `like` gives: the rotations of its queries and keys are made in that."""
    if torch.is_autocast_enabled(like.device.type):
        return torch.get_autocast_dtype(like.device.type)
    return like.dtype if like.dtype in (torch.float64, torch.bfloat16, torch.float16) else torch.float32


def rotate(x_BPHE: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> Tensor:
    """Rotary position embedding, half-split (Llama's layout); cos and sin for all rows, or (B, P, E) for each."""
    first, second = x_BPHE.chunk(2, dim=-1)
    cos, sin = cos_PE.unsqueeze(-2), sin_PE.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, no biases. Query, key and value are one matrix."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.key_value_heads, config.head_dim
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def project(self, x_BPD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query (B, H, P, E), rotated key and value (B, H_kv, P, E)."""
        qkv = self.qkv(x_BPD).unflatten(-1, (-1, self.head_dim))
        rotated = rotate(qkv[..., : self.heads + self.kv_heads, :], cos, sin)
        query, key = rotated.split((self.heads, self.kv_heads), dim=-2)
        value = qkv[..., self.heads + self.kv_heads :, :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention output (B, P, D) before nothing else: softmax(q k^T / sqrt(E)) v, then the output matrix."""
        if causal:
            mixed = causal_attention(query, key, value)
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, enable_gqa=self.kv_heads != self.heads
            )
        return self.out(mixed.transpose(1, 2).flatten(-2))


class PatchAttention(nn.Module):
    """x + attention(rmsnorm(x)) among the tokens of a patch, in both directions: an option of the autoencoder."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=eps)
        self.config = BackboneConfig(layers=1, width=width, inner=1, heads=heads)
        self.attention = Attention(self.config)

    def forward(self, x_NKD: Tensor) -> Tensor:
        rows_NKD = x_NKD.flatten(0, -3)
        positions = torch.arange(x_NKD.shape[-2], device=x_NKD.device)
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_base, rotary_dtype(x_NKD))
        query, key, value = self.attention.project(self.norm(rows_NKD), cos, sin)
        mixed = self.attention.attend(query, key, value, None, causal=False)
        return x_NKD + mixed.view(x_NKD.shape)


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then SwiGLU."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config.width, config.inner)

    def forward(self, x_BPD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.attention.project(self.attention_norm(x_BPD), cos, sin)
        x_BPD = x_BPD + self.attention.attend(query, key, value, None, True)
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))
