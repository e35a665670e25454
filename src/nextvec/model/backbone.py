"""The causal Transformer over positions, with a key/value cache and with branches.

Legend: B batch, P positions, D width, H heads, E head dimension, C cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nextvec.config import BackboneConfig
from nextvec.model.layers import Block, RMSNorm, rotary_table


class KVCache:
    """Preallocated keys and values of every layer: (layers, 2, B, H_kv, capacity, E)."""

    def __init__(
        self, config: BackboneConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.layers, 2, rows, config.key_value_heads, capacity, config.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.store.shape[-2]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H_kv, P, E) keys and values at the end; return all that is cached for this layer."""
        end = self.length + key.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; got {end}: make a larger one")
        self.store[layer, 0, :, :, self.length : end] = key
        self.store[layer, 1, :, :, self.length : end] = value
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]


@dataclass(frozen=True)
class Trunk:
    """Keys and values of a whole sequence and of the branches grown on it.

    `keys[layer]` is a list of (B, H_kv, P, E): the trunk first, then one entry per branch; entry c of position p
    is the c-th patch appended after trunk positions 0..p.
    """

    keys: list[list[Tensor]]
    values: list[list[Tensor]]

    @property
    def depth(self) -> int:
        return len(self.keys[0])


class Backbone(nn.Module):
    """Llama-style blocks and a final RMSNorm (spec section 2): (B, P, D) -> states (B, P, D)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, x_BPD: Tensor, cache: KVCache | None = None) -> Tensor:
        """States of all positions; with a cache, the positions follow those cached and are appended to it."""
        start = 0 if cache is None else cache.length
        cos, sin = self._rotary(start, x_BPD.shape[1], x_BPD)
        if cache is None:
            for block in self.blocks:
                x_BPD = block(x_BPD, cos, sin)
            return self.norm(x_BPD)
        positions = x_BPD.shape[1]
        mask = None
        if start and positions > 1:
            mask = torch.ones(positions, start + positions, dtype=torch.bool, device=x_BPD.device).tril(start)
        for layer, block in enumerate(cast("list[Block]", self.blocks)):
            query, key, value = block.attention.project(block.attention_norm(x_BPD), cos, sin)
            key, value = cache.append(layer, key, value)
            mixed = block.attention.attend(query, key, value, mask, causal=not start and positions > 1)
            x_BPD = x_BPD + mixed
            x_BPD = x_BPD + block.mlp(block.mlp_norm(x_BPD))
        cache.length += positions
        return self.norm(x_BPD)

    def trunk(self, x_BPD: Tensor) -> tuple[Tensor, Trunk]:
        """States (B, P, D) of a whole sequence, with the keys and values that branches attend to."""
        return self._grow(x_BPD, None)

    def branch(self, x_BPD: Tensor, trunk: Trunk) -> tuple[Tensor, Trunk]:
        """For every position p at once: the state after trunk positions 0..p, earlier branches at p, and input x[:, p].

        Costs one pass over P positions, where a plain loop would run P sequences.
        """
        return self._grow(x_BPD, trunk)

    def _grow(self, x_BPD: Tensor, trunk: Trunk | None) -> tuple[Tensor, Trunk]:
        positions, depth = x_BPD.shape[1], 0 if trunk is None else trunk.depth
        cos, sin = self._rotary(depth, positions, x_BPD)
        mask = None
        if trunk is not None:
            causal = torch.ones(positions, positions, dtype=torch.bool, device=x_BPD.device).tril()
            own = torch.eye(positions, dtype=torch.bool, device=x_BPD.device)
            mask = torch.cat([causal] + [own] * depth, dim=1)
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        for layer, block in enumerate(cast("list[Block]", self.blocks)):
            query, key, value = block.attention.project(block.attention_norm(x_BPD), cos, sin)
            keys.append([*(trunk.keys[layer] if trunk else ()), key])
            values.append([*(trunk.values[layer] if trunk else ()), value])
            all_keys, all_values = torch.cat(keys[-1], dim=-2), torch.cat(values[-1], dim=-2)
            x_BPD = x_BPD + block.attention.attend(query, all_keys, all_values, mask, causal=mask is None)
            x_BPD = x_BPD + block.mlp(block.mlp_norm(x_BPD))
        return self.norm(x_BPD), Trunk(keys, values)

    def _rotary(self, start: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + count, device=like.device)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        elif like.dtype in (torch.bfloat16, torch.float16):
            dtype = like.dtype
        return rotary_table(positions, self.config.head_dim, self.config.rope_base, dtype)
