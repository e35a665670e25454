"""Patch autoencoder: K tokens <-> one latent (paper section 3.1; method in docs/method.md).

Encoder: embed -> residual SwiGLU per token -> concatenate K -> linear -> residual SwiGLU -> RMSNorm -> (mean, log_std).
Decoder: linear -> residual SwiGLU -> linear -> split into K -> residual SwiGLU -> RMSNorm -> tied logits.

With `factored` all of this is done token by token, for a patch of one token with L / K dimensions, and the latent of a patch
is those of its tokens side by side: what the categorical head needs (docs/heads.md).
Legend: N patches (any leading dimensions), K tokens per patch, D width d, L latent, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import AutoencoderConfig
from nextvec.model.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy
from nextvec.model.interface import Wanted, counted_from
from nextvec.model.layers import PatchAttention, ResidualMLP, RMSNorm
from nextvec.model.packed import version
from nextvec.model.posterior import COLLAPSED
from nextvec.model.posterior import Posterior as Posterior
from nextvec.model.posterior import gaussian_kl as gaussian_kl
from nextvec.model.vocabulary import Vocabulary

POINT = -20.0  # log standard deviation that stands for none: nothing in float32


class Autoencoder(nn.Module):
    """Context-free patch autoencoder. `encode` and `decode` are deterministic; noise and dropout live in `loss`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        half, width, span = config.layers // 2, config.width, config.span
        blocks = [ResidualMLP(width, config.inner, config.norm_eps) for _ in range(2 * config.layers)]
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.token_encoder = nn.ModuleList(blocks[:half])
        self.squeeze = nn.Linear(span * width, width)
        self.patch_encoder = nn.ModuleList(blocks[half : 2 * half])
        self.encoder_norm = RMSNorm(width, eps=config.norm_eps)
        self.to_latent = nn.Linear(width, (2 if config.variational else 1) * config.span_latent)
        self.from_latent = nn.Linear(config.span_latent, width)
        self.patch_decoder = nn.ModuleList(blocks[2 * half : 3 * half])
        self.expand = nn.Linear(width, span * width)
        self.token_decoder = nn.ModuleList(blocks[3 * half :])
        self.decoder_norm = RMSNorm(width, eps=config.norm_eps)
        mixers = [
            PatchAttention(width, config.attention_heads, config.norm_eps)
            for _ in range(config.layers if config.attention else 0)
        ]
        self.encoder_attention, self.decoder_attention = nn.ModuleList(mixers[:half]), nn.ModuleList(mixers[half:])
        self._vocabulary: tuple[object, Vocabulary] | None = None

    def encode(self, ids_NK: Tensor) -> Posterior:
        """Posterior of each patch: ids (..., K) int64 -> mean and log_std (..., L)."""
        x = self._per_token(self.embedding(ids_NK), self.token_encoder, self.encoder_attention)
        x = self.squeeze(x if self.config.factored else x.flatten(-2))
        for block in self.patch_encoder:
            x = block(x)
        both = self.to_latent(self.encoder_norm(x))
        if both.dtype != torch.float64:
            both = both.float()
        if not self.config.variational:
            mean = self._joined(both)
            return Posterior(mean, torch.full_like(mean, POINT))
        mean, log_std = both.chunk(2, dim=-1)
        return Posterior(self._joined(mean), self._joined(log_std))

    def _joined(self, x: Tensor) -> Tensor:
        """Latents (..., L) of the parts of patches: where the autoencoder is factored, (..., K, L / K)."""
        return x.flatten(-2) if self.config.factored else x

    def decode_hidden(self, z_NL: Tensor) -> Tensor:
        """Last hidden states (..., K, D): the logits are their product with the embedding matrix."""
        return self._spread(self.decode_stem(z_NL))

    def decode(self, z_NL: Tensor) -> Tensor:
        """Logits (..., K, V) of latents (..., L)."""
        return F.linear(self.decode_hidden(z_NL), self.embedding.weight)

    def decode_tokens(self, z_NL: Tensor) -> Tensor:
        """Most likely token at each place, (..., L) -> (..., K) int64: the argmax of exact logits of `decode_hidden`.

        Exact also where the model is bf16, whose own logits are rounded so far that the argmax is another one at about
        1 % of the tokens (docs/sampling.md). Logits exist for one chunk of rows at a time.
        """
        config, vocabulary = self.config, self.vocabulary()
        rows = max(1, 4 * CHUNK_ELEMENTS // (config.patch_size * config.inner))
        parts = [vocabulary.argmax(self.decode_hidden(z).flatten(0, -2)) for z in z_NL.flatten(0, -2).split(rows)]
        return torch.cat(parts).view(*z_NL.shape[:-1], config.patch_size)

    def decode_stem(self, z_NL: Tensor) -> Tensor:
        """What the places of a patch share in decoding: (..., L) -> (..., D), for `decode_place`; factored: (..., K, D)."""
        z = z_NL.to(self.from_latent.weight.dtype)
        x = self.from_latent(z.unflatten(-1, (self.config.patch_size, -1)) if self.config.factored else z)
        for block in self.patch_decoder:
            x = block(x)
        return x

    def decode_place(self, stem_ND: Tensor, place: int) -> Tensor:
        """`decode_tokens(z)[..., place]`, (N,), from `decode_stem(z)`, (N, D), at a K-th of the cost.

        With `attention` the places depend on each other, and only the vocabulary product is saved.
        """
        if self.config.attention:
            return self.vocabulary().argmax(self._spread(stem_ND)[:, place])
        if self.config.factored:
            x = self.expand(stem_ND[:, place])
        else:
            rows = slice(place * self.config.width, (place + 1) * self.config.width)
            x = F.linear(stem_ND, self.expand.weight[rows], self.expand.bias[rows])
        for block in self.token_decoder:
            x = block(x)
        return self.vocabulary().argmax(self.decoder_norm(x))

    def decode_wanted(self, z_SML: Tensor, wanted: Wanted) -> Tensor:
        """`decode_tokens` of S latents of M states, (S, M, K), place after place for those that are `wanted`; of others 0."""
        states, rows = z_SML.shape[1], max(1, 4 * CHUNK_ELEMENTS // (self.config.patch_size * self.config.inner))
        step = max(1, rows // len(z_SML))
        parts = [
            self._decode_wanted(z_SML[:, first : first + step], counted_from(first, wanted))
            for first in range(0, states, step)
        ]
        return torch.cat(parts, dim=1)

    def _decode_wanted(self, z_SML: Tensor, wanted: Wanted) -> Tensor:
        draws, states = z_SML.shape[:2]
        state_R = torch.arange(states, device=z_SML.device).repeat_interleave(draws)
        stem_RD = self.decode_stem(z_SML.transpose(0, 1).flatten(0, 1))
        alive = torch.arange(len(state_R), device=z_SML.device)
        token_RK = torch.zeros(len(state_R), self.config.patch_size, dtype=torch.int64, device=z_SML.device)
        for place in range(self.config.patch_size):
            token_RK[alive, place] = self.decode_place(stem_RD[alive], place)
            if place < self.config.patch_size - 1:
                alive = alive[wanted(state_R[alive], token_RK[alive, : place + 1])]
            if not len(alive):
                break
        return token_RK.view(states, draws, -1).transpose(0, 1)

    def _spread(self, stem_ND: Tensor) -> Tensor:
        """`decode_hidden(z)`, (..., K, D), from `decode_stem(z)`."""
        x = self.expand(stem_ND)
        if not self.config.factored:
            x = x.unflatten(-1, (self.config.patch_size, self.config.width))
        return self.decoder_norm(self._per_token(x, self.token_decoder, self.decoder_attention))

    def _per_token(self, x_NKD: Tensor, blocks: nn.ModuleList, mixers: nn.ModuleList) -> Tensor:
        """Blocks of each token, with `attention` each after one among the tokens of the patch."""
        for index, block in enumerate(blocks):
            x_NKD = block(mixers[index](x_NKD) if len(mixers) else x_NKD)
        return x_NKD

    def vocabulary(self) -> Vocabulary:
        """The embedding matrix ready for `argmax`; made again after an optimiser or a load changed it."""
        weight = self.embedding.weight
        state = (version(weight), weight.dtype)
        if self._vocabulary is None or self._vocabulary[0] != state:
            self._vocabulary = (state, Vocabulary(weight))
        return self._vocabulary[1]

    def loss(self, ids_NK: Tensor, generator: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per patch: K * cross-entropy + beta * sum_i max(clip, KL_i), of one posterior draw (docs/method.md).

        Without `variational` the latent is the mean, and the KL term is left out.
        In training mode tokens and latents are dropped; in evaluation mode neither, so figures are those of a plain draw.

        ids (N, K). Returns the scalar loss (nats per patch) and metrics: cross_entropy (nats per token), accuracy
        (share of tokens), kl (nats per patch, unclipped), sigma (mean posterior std), collapsed (dimensions that carry less
        than COLLAPSED nats on average).
        """
        config = self.config
        token_rate, latent_rate = (config.token_dropout, config.latent_dropout) if self.training else (0.0, 0.0)
        dropped = _bernoulli(ids_NK.shape, token_rate, ids_NK.device, generator)
        posterior = self.encode(ids_NK.masked_fill(dropped, config.mask_id))
        kl_NL = gaussian_kl(posterior)
        z = posterior.sample(generator)
        z = z.masked_fill(_bernoulli(z.shape, latent_rate, z.device, generator), 0.0) / (1.0 - latent_rate)
        hidden = self.decode_hidden(z)
        cross_entropy, accuracy = linear_cross_entropy(hidden.flatten(0, -2), self.embedding.weight, ids_NK.reshape(-1))
        loss = config.patch_size * cross_entropy
        if config.variational:
            loss = loss + config.kl_weight * kl_NL.clamp(min=config.kl_clip).sum(-1).mean()
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "accuracy": accuracy.detach(),
            "kl": kl_NL.detach().sum(-1).mean(),
            "sigma": posterior.log_std.detach().exp().mean(),
            "collapsed": (kl_NL.detach().mean(0) < COLLAPSED).sum().float(),
        }
        return loss, metrics

    def compile_regions(self) -> list[nn.Module]:
        """The repeated blocks, for regional compilation."""
        return [*self.token_encoder, *self.patch_encoder, *self.patch_decoder, *self.token_decoder]


def _bernoulli(shape: torch.Size, rate: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """True with probability `rate`."""
    if rate == 0.0:
        return torch.zeros(shape, dtype=torch.bool, device=device)
    return torch.rand(shape, device=device, generator=generator) < rate
