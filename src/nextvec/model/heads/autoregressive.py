"""Autoregressive head: a small causal decoder over the K tokens of the next patch, given the state. No latent, likelihoods.

Legend: S draws, N positions (any leading dimensions), D width, K tokens per patch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from nextvec.config import AutoregressiveHeadConfig, CalmConfig
from nextvec.model.backbone import Backbone
from nextvec.model.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy
from nextvec.model.heads.interface import Generators, Metrics, Sharpen, wide
from nextvec.model.layers import embedded


class AutoregressiveHead(nn.Module):
    """[state, y_1, .., y_(K-1)] -> causal Transformer blocks -> logits of y_1 .. y_K, tied to the embedding of the y.

    The blocks are those of the backbone. It is what "multi-token prediction" with a causal head is: the same states as
    CALM's, with the next patch factorised token by token instead of drawn as one vector.
    """

    latents: ClassVar[bool] = False
    by_token: ClassVar[bool] = True
    teacher: ClassVar[str] = "tokens"
    objective: ClassVar[str] = "cross_entropy"

    def __init__(self, config: CalmConfig) -> None:
        super().__init__()
        assert isinstance(config.head, AutoregressiveHeadConfig)
        self.config, self.eps = config.head, config.backbone.norm_eps
        width = config.backbone.width
        self.patch_size = config.patch_size
        self.state_in = nn.Linear(width, width)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.decoder = Backbone(config.backbone.override(layers=config.head.blocks))

    def loss(self, state_ND: Tensor, target: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy in nats per token of the patches `target` (..., K), and the share of tokens it ranks first."""
        target_MK = target.flatten(0, -2)
        hidden_MKD = self._read(state_ND, target_MK)
        loss, accuracy = linear_cross_entropy(hidden_MKD.flatten(0, 1), self.embedding.weight, target_MK.reshape(-1))
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy.detach()}

    def log_probabilities(self, state_ND: Tensor, ids_NK: Tensor) -> Tensor:
        """log P of each token of the patches (..., K) given the state and the tokens before it, in nats, (..., K)."""
        ids_MK = ids_NK.flatten(0, -2)
        hidden_MD = self._read(state_ND, ids_MK).flatten(0, 1)
        rows = max(1, CHUNK_ELEMENTS // self.embedding.num_embeddings)
        parts = [
            self._log_softmax(hidden).gather(-1, ids)
            for hidden, ids in zip(hidden_MD.split(rows), ids_MK.reshape(-1, 1).split(rows), strict=True)
        ]
        return torch.cat(parts).view(ids_NK.shape)

    @torch.no_grad()
    def draw(
        self,
        state_ND: Tensor,
        draws: int,
        generator: Generators | None,
        sharpen: Sharpen | None = None,
        given: Sequence[int] = (),
    ) -> Tensor:
        """S independent patches, (S, ..., K) int64, for states (..., D); see `Head`.

        The state is read once for all draws, which then go on as branches of it.
        """
        state_MD = self._start(state_ND).reshape(-1, state_ND.shape[-1])
        hidden_M1D, trunk = self.decoder.trunk(state_MD[:, None])
        tokens = [torch.full((len(state_MD), draws), token, device=state_MD.device) for token in given]
        if not given:
            tokens.append(self._sample(hidden_M1D, draws, generator, sharpen))
        at_S = torch.zeros(draws, dtype=torch.int64, device=state_MD.device)
        for place in range(1, self.patch_size):
            hidden_MSD, trunk = self.decoder.branch(self._embedded(tokens[place - 1]), trunk, at_S)
            if place >= len(given):
                tokens.append(self._sample(hidden_MSD, 1, generator, sharpen))
        return torch.stack(tokens, dim=-1).transpose(0, 1).reshape(draws, *state_ND.shape[:-1], self.patch_size)

    def compile_regions(self) -> list[nn.Module]:
        return list(self.decoder.blocks)

    def _embedded(self, ids: Tensor) -> Tensor:
        return embedded(self.embedding, ids, self.config.embedding_norm, self.eps)

    def _start(self, state_ND: Tensor) -> Tensor:
        return self.state_in(state_ND.to(self.state_in.weight.dtype))

    def _read(self, state_ND: Tensor, ids_MK: Tensor) -> Tensor:
        """What the decoder says before each token of whole patches, (M, K, D)."""
        state_MD = self._start(state_ND).reshape(-1, state_ND.shape[-1])
        return self.decoder(torch.cat((state_MD[:, None], self._embedded(ids_MK[:, :-1]).to(state_MD.dtype)), dim=1))

    def _log_softmax(self, hidden_MD: Tensor) -> Tensor:
        logits = hidden_MD.to(self.embedding.weight.dtype) @ self.embedding.weight.T
        return logits.to(wide(logits.dtype)).log_softmax(-1)

    def _law(self, hidden_MD: Tensor, sharpen: Sharpen | None) -> Tensor:
        log_MV = self._log_softmax(hidden_MD)
        return log_MV.exp() if sharpen is None else sharpen(log_MV).softmax(-1)

    def _sample(self, hidden_MJD: Tensor, draws: int, generator: Generators | None, sharpen: Sharpen | None) -> Tensor:
        """`draws` tokens from each of J laws of M states, (M, J * draws)."""
        if isinstance(generator, Sequence):
            assert len(generator) == len(hidden_MJD), "one generator per state"
            each = zip(hidden_MJD, generator, strict=True)
            rows = [self._sample_rows(one, draws, own, sharpen) for one, own in each]
            return torch.stack([row.flatten() for row in rows])
        return self._sample_rows(hidden_MJD.flatten(0, 1), draws, generator, sharpen).view(len(hidden_MJD), -1)

    def _sample_rows(
        self, hidden_MD: Tensor, draws: int, generator: torch.Generator | None, sharpen: Sharpen | None
    ) -> Tensor:
        """(M, draws); the vocabulary exists for one chunk of rows at a time."""
        rows = max(1, CHUNK_ELEMENTS // self.embedding.num_embeddings)
        parts = [
            # two at least: for a single draw torch takes another way, 20 times slower on a CPU
            torch.multinomial(law, max(2, draws), replacement=True, generator=generator)
            for hidden in hidden_MD.split(rows)
            for law in [self._law(hidden, sharpen)]
        ]
        return torch.cat(parts)[:, :draws]
