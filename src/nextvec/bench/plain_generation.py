"""Generation as the authors' code does it: the yardstick of `nextvec bench generate`, never used for anything else.

The networks of plain_model.py; keys and values concatenated step by step; every candidate of a pool decoded to all of its
logits, which exist in memory at once, in the model's dtype; the batch temperature algorithm as Python loops over candidates.
Same draws of the noise and same use of the random number as the product, so that in float64 both give the same text.

Legend: B rows (1), P patches, K tokens per patch, D width, L latent, N candidates, R noise dimensions, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.bench.plain import head_noise, plain_tensors
from nextvec.bench.plain_model import Attention, Autoencoder, Backbone, Block, Calm, rotate_half, wide
from nextvec.model import calm as product

Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, P, E) of every layer
Patch = tuple[int, ...]


def plain_calm(model: product.Calm) -> Calm:
    """The textbook networks with the parameters of the product, in its dtype and on its device."""
    plain = Calm(model.config).to(model.device, model.dtype)
    plain.load_state_dict(plain_tensors(model.state_dict()))
    return plain.eval()


@torch.no_grad()
def plain_text(
    model: Calm,
    prompt: Sequence[int],
    temperature: float,
    candidates: int,
    max_tokens: int,
    generator: torch.Generator,
    *,
    eos_id: int,
    pad_id: int,
) -> list[int]:
    """The ids that continue a prompt of whole patches, until end-of-text or `max_tokens`; temperature 1/n."""
    size, power = model.config.patch_size, round(1 / temperature)
    assert len(prompt) % size == 0, "a prompt of whole patches"
    assert math.isclose(1 / power, temperature), "a temperature of 1/n"
    device = next(model.parameters()).device
    ids_BPK = torch.tensor([eos_id] + [pad_id] * (size - 1) + list(prompt), device=device).view(1, -1, size)
    cache: Cache = []
    text: list[int] = []
    while True:
        state_D = cached_states(model.backbone, model.compressor(ids_BPK), cache)[0, -1]
        noise_NR = head_noise((candidates if power > 1 else 1, model.noise), state_D, generator)
        latent_NL = model.draw_latents(state_D, noise_NR)
        pool = decode_all(model.autoencoder, latent_NL).tolist()
        patch = choose([tuple(ids) for ids in pool], power, generator)
        for token in patch:
            if token == eos_id:
                return text
            text.append(token)
            if len(text) == max_tokens:
                return text
        ids_BPK = torch.tensor([[patch]], device=device)


def decode_all(decoder: Autoencoder, latent_NL: Tensor) -> Tensor:
    """The likeliest token at each place, (N, K), from all logits at once."""
    return all_logits(decoder, latent_NL).argmax(-1)


def all_logits(decoder: Autoencoder, latent_NL: Tensor) -> Tensor:
    """(N, K, V)."""
    return F.linear(decoder.decode_hidden(latent_NL), decoder.embedding.weight)


def choose(pool: Sequence[Patch], power: int, generator: torch.Generator) -> Patch:
    """The paper's Algorithm 2 for T = 1 / power, as it stands."""
    if power == 1:
        return pool[0]
    counts = Counter(pool)
    for level in range(power, 0, -1):
        if any(count >= level for count in counts.values()):
            break
    weights = [math.comb(counts[patch], level) / counts[patch] for patch in pool]
    left = float(torch.rand(1, 1, generator=generator, dtype=torch.float64, device=generator.device)) * sum(weights)
    for patch, weight in zip(pool, weights, strict=True):
        left -= weight
        if left < 0:
            return patch
    return pool[-1]  # only when rounding leaves nothing over


def cached_states(backbone: Backbone, x_BPD: Tensor, cache: Cache) -> Tensor:
    """States (B, P, D) of positions that follow those in the cache, which grows by them."""
    start = cache[0][0].shape[2] if cache else 0
    size, base, dtype = backbone.config.head_dim, backbone.config.rope_base, wide(x_BPD).dtype
    rates = base ** -(torch.arange(0, size, 2, device=x_BPD.device).to(dtype) / size)
    positions = torch.arange(start, start + x_BPD.shape[1], device=x_BPD.device).to(dtype)
    cos_PE, sin_PE = (f(positions[:, None] * rates).repeat(1, 2).to(x_BPD.dtype) for f in (torch.cos, torch.sin))
    for layer, block in enumerate(cast("list[Block]", backbone.blocks)):
        query, key, value = _project(block.attention, block.attention_norm(x_BPD), cos_PE, sin_PE)
        if start:
            key, value = torch.cat((cache[layer][0], key), 2), torch.cat((cache[layer][1], value), 2)
            cache[layer] = key, value
        else:
            cache.append((key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=not start)
        x_BPD = x_BPD + block.attention.out(mixed.transpose(1, 2).flatten(-2))
        x_BPD = x_BPD + block.mlp(block.mlp_norm(x_BPD))
    return backbone.norm(x_BPD)


def _project(attention: Attention, x_BPD: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, attention.config.head_dim)).transpose(1, 2)

    query, key, value = heads(attention.q(x_BPD)), heads(attention.k(x_BPD)), heads(attention.v(x_BPD))
    query, key = (y * cos_PE + rotate_half(y) * sin_PE for y in (query, key))
    return query, key, value
