"""The causal Transformer over positions, with a key/value cache and with branches.

Legend: B batch, P positions, D width, H heads, E head dimension, N branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import BackboneConfig
from nextvec.model.cache import KVCache
from nextvec.model.layers import Block, RMSNorm, rotary_dtype, rotary_table

Layers = list[tuple[Tensor, Tensor]]  # rotated keys and values of every layer


@dataclass(frozen=True)
class Trunk:
    """Keys and values of a whole sequence, (B, H_kv, P, E), and of the branches grown on it, (B, H_kv, N, E).

    Entry c of `branches` holds the c-th patch of each of the N branches. text, own: their ids, (B, P, K) and (B, N, K) each.
    """

    layers: Layers
    branches: tuple[Layers, ...] = ()
    text: Tensor | None = None  # where the model looks earlier tokens up
    own: tuple[Tensor, ...] = ()

    def before(self, row: int, positions: int) -> Trunk:
        """The first positions of one row, without branches."""
        layers = [
            (key[row : row + 1, :, :positions], value[row : row + 1, :, :positions]) for key, value in self.layers
        ]
        return Trunk(layers, text=None if self.text is None else self.text[row : row + 1, :positions])

    def only(self, kept_N: Tensor) -> Trunk:
        """With some of the branches."""
        branches = tuple([(key[:, :, kept_N], value[:, :, kept_N]) for key, value in layer] for layer in self.branches)
        return replace(self, branches=branches, own=tuple(ids[:, kept_N] for ids in self.own))

    def grown_text(self, ids_BNK: Tensor, at_N: Tensor) -> tuple[Tensor, Tensor]:
        """What each branch has read with these patches, ids (B, N, T), and how many tokens that is, (N,)."""
        assert self.text is not None, "this trunk was made without its text"
        size = ids_BNK.shape[-1]
        own = torch.cat([*self.own, ids_BNK], dim=-1)  # (B, N, m)
        length_N = (at_N + 1) * size
        text = F.pad(self.text.flatten(1), (0, own.shape[-1]))[:, None].expand(-1, len(at_N), -1).clone()
        place_Nm = length_N[:, None] + torch.arange(own.shape[-1], device=own.device)
        return text.scatter_(-1, place_Nm.expand_as(own), own), length_N + own.shape[-1]


class Backbone(nn.Module):
    """Llama-style blocks and a final RMSNorm (docs/method.md): (B, P, D) -> states (B, P, D)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, x_BPD: Tensor, cache: KVCache | None = None) -> Tensor:
        """States of all positions; with a cache, each row's positions follow those it holds and are appended to them."""
        if cache is None:
            cos, sin = self._rotary(torch.arange(x_BPD.shape[1], device=x_BPD.device), x_BPD)
            for block in self.blocks:
                x_BPD = block(x_BPD, cos, sin)
            return self.norm(x_BPD)
        positions = x_BPD.shape[1]
        reading = cache.reading(positions)
        alone = reading.start == 0 and positions > 1  # nothing held: the new positions see each other only
        for layer, block in enumerate(cast("list[Block]", self.blocks)):
            query, key, value = block.attention.project(block.attention_norm(x_BPD), reading.cos, reading.sin)
            keys, values = reading.append(layer, key, value)
            if not alone:
                query, key, value = query.to(keys.dtype), keys, values
            if reading.apart is not None:
                mixed_BHPE = _attend_apart(query, key, value, reading.apart)
            else:
                mixed_BHPE = F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    reading.mask,
                    is_causal=alone,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            x_BPD = x_BPD + block.attention.out(mixed_BHPE.transpose(1, 2).flatten(-2).to(x_BPD.dtype))
            x_BPD = x_BPD + block.mlp(block.mlp_norm(x_BPD))
        cache.lengths += positions
        return self.norm(x_BPD)

    def trunk(self, x_BPD: Tensor) -> tuple[Tensor, Trunk]:
        """States (B, P, D) of a whole sequence, with the keys and values that branches attend to."""
        cos, sin = self._rotary(torch.arange(x_BPD.shape[1], device=x_BPD.device), x_BPD)
        layers: Layers = []
        for block in cast("list[Block]", self.blocks):
            query, key, value = block.attention.project(block.attention_norm(x_BPD), cos, sin)
            layers.append((key, value))
            x_BPD = x_BPD + block.attention.attend(query, key, value, None, causal=True)
            x_BPD = x_BPD + block.mlp(block.mlp_norm(x_BPD))
        return self.norm(x_BPD), Trunk(layers)

    def branch(self, x_BND: Tensor, trunk: Trunk, at_N: Tensor) -> tuple[Tensor, Trunk]:
        """States (B, N, D) of N branches at once, each after trunk positions 0..at[n], its own earlier inputs, x[:, n].

        Positions may repeat (several draws at one place) and stay the same from branch to branch. A branch sees the
        trunk and itself only, so its attention is one product with the trunk and a dot product per own input, where a
        plain loop would run N sequences.
        """
        cos, sin = self._rotary(at_N + 1 + len(trunk.branches), x_BND)
        positions = trunk.layers[0][0].shape[-2]
        hidden_NP = torch.arange(positions, device=at_N.device) > at_N[:, None]
        grown: Layers = []
        for layer, block in enumerate(cast("list[Block]", self.blocks)):
            query, key, value = block.attention.project(block.attention_norm(x_BND), cos, sin)
            grown.append((key, value))
            own = [branch[layer] for branch in trunk.branches] + [(key, value)]
            mixed = attend_branch(query, trunk.layers[layer], own, hidden_NP)
            x_BND = x_BND + block.attention.out(mixed.transpose(1, 2).flatten(-2))
            x_BND = x_BND + block.mlp(block.mlp_norm(x_BND))
        return self.norm(x_BND), replace(trunk, branches=(*trunk.branches, grown))

    def _rotary(self, positions_P: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions_P, self.config.head_dim, self.config.rope_base, rotary_dtype(like))


def _attend_apart(query_BHPE: Tensor, key: Tensor, value: Tensor, seen: tuple[tuple[int, ...], ...]) -> Tensor:
    """Mixed values (B, H, P, E): each position by itself, over the first `seen` held; zero for those that `seen` leaves out."""
    mixed_BHPE, grouped = torch.zeros_like(query_BHPE), query_BHPE.shape[1] != key.shape[1]
    for row, counts in enumerate(seen):
        for place, count in enumerate(counts):
            one = slice(row, row + 1), slice(None), slice(place, place + 1)
            mixed_BHPE[one] = F.scaled_dot_product_attention(
                query_BHPE[one], key[row : row + 1, :, :count], value[row : row + 1, :, :count], enable_gqa=grouped
            )
    return mixed_BHPE


def attend_branch(query_BHNE: Tensor, trunk: tuple[Tensor, Tensor], own: Layers, hidden_NP: Tensor) -> Tensor:
    """softmax over the visible trunk positions and each branch's own inputs: mixed values (B, H, N, E).

    Query heads are grouped by the key/value head that they share, G to each.
    """
    key_heads = trunk[0].shape[1]
    query = query_BHNE.unflatten(1, (key_heads, -1)) * query_BHNE.shape[-1] ** -0.5  # (B, H_kv, G, N, E)
    keys, values = (x.unsqueeze(2) for x in trunk)  # (B, H_kv, 1, P, E)
    with_trunk = (query @ keys.transpose(-1, -2)).masked_fill(hidden_NP, float("-inf"))
    with_own = torch.stack([(query * key.unsqueeze(2)).sum(dim=-1) for key, _ in own], dim=-1)
    scores = torch.cat([with_trunk, with_own], dim=-1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights = wide.softmax(dim=-1).to(values.dtype)
    on_trunk, *on_own = weights.split([keys.shape[-2]] + [1] * len(own), dim=-1)
    mixed = on_trunk @ values
    for weight, (_, value) in zip(on_own, own, strict=True):
        mixed = mixed + weight * value.unsqueeze(2)
    return mixed.flatten(1, 2)
