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
from nextvec.model.grams import Grams
from nextvec.model.heads.interface import Generators, Metrics, Sharpen, wide
from nextvec.model.heads.recalling import Asking, Recalls, and_then
from nextvec.model.layers import embedded
from nextvec.model.recall import Recall, Tokens, unit_tokens
from nextvec.model.text_states import States, vector_of


class AutoregressiveHead(Recalls, nn.Module):
    """[state, y_1, .., y_(K-1)] -> causal Transformer blocks -> logits of y_1 .. y_K, tied to the embedding of the y.

    The blocks are those of the backbone. It is what "multi-token prediction" with a causal head is: the same states as
    CALM's, with the next patch factorised token by token instead of drawn as one vector. With `recall`, what followed the
    last two tokens earlier in the text is added to each position's input (recall.py), and with `grams` what the last two and
    three say together (grams.py).
    """

    latents: ClassVar[bool] = False
    by_token: ClassVar[bool] = True
    teacher: ClassVar[str] = "tokens"
    objective: ClassVar[str] = "cross_entropy"

    def __init__(self, config: CalmConfig) -> None:
        nn.Module.__init__(self)
        assert isinstance(config.head, AutoregressiveHeadConfig)
        self.config, self.eps = config.head, config.backbone.norm_eps
        width = config.backbone.width
        self.patch_size = config.patch_size
        self.state_in = nn.Linear(width, width)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.decoder = Backbone(config.backbone.override(layers=config.head.blocks))
        self.recall = Recall(width, config.head.recall) if config.head.recall else None
        self.grams = Grams(width, config.head.grams) if config.head.grams else None

    def tokens(self) -> Tokens:
        return unit_tokens(self.embedding, self.eps)

    def loss(self, state_ND: States, target: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy in nats per token of the patches `target` (..., K), and the share of tokens it ranks first."""
        target_MK = target.flatten(0, -2)
        hidden_MKD = self._read(state_ND, target_MK)
        loss, accuracy = linear_cross_entropy(hidden_MKD.flatten(0, 1), self.embedding.weight, target_MK.reshape(-1))
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy.detach()}

    def log_probabilities(self, state_ND: States, ids_NK: Tensor) -> Tensor:
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
        state_ND: States,
        draws: int,
        generator: Generators | None,
        *,
        sharpen: Sharpen | None = None,
        given: Sequence[int] = (),
    ) -> Tensor:
        """S independent patches, (S, ..., K) int64, for states (..., D); see `Head`.

        The state is read once for all draws, which then go on as branches of it.
        """
        vector_ND = vector_of(state_ND)
        state_MD = self._start(vector_ND).reshape(-1, vector_ND.shape[-1])
        found = []
        for states, asking in self.askings(state_ND):
            own = generator[states] if isinstance(generator, Sequence) else generator
            law = sharpen and sharpen.of(states)
            found.append(self._chosen(state_MD[states], asking, draws, own, law, given))
        return torch.cat(found, dim=1).reshape(draws, *vector_ND.shape[:-1], self.patch_size)

    def _chosen(
        self,
        state_MD: Tensor,
        asking: Asking | None,
        draws: int,
        generator: Generators | None,
        sharpen: Sharpen | None,
        given: Sequence[int],
    ) -> Tensor:
        """Patches (S, M, K)."""
        last_MS3 = None if asking is None else asking.tail[:, None]
        hidden_M1D, trunk = self.decoder.trunk(self._with_answers(state_MD[:, None], asking, last_MS3))
        tokens = [torch.full((len(state_MD), draws), token, device=state_MD.device) for token in given]
        if not given:
            tokens.append(self._sample(hidden_M1D, draws, generator, sharpen))
            if sharpen is not None:
                sharpen.took(tokens[-1].flatten())
        at_S = torch.zeros(draws, dtype=torch.int64, device=state_MD.device)
        for place in range(1, self.patch_size):
            ids_MS = tokens[place - 1]
            last_MS3 = None if last_MS3 is None else and_then(last_MS3, ids_MS)
            x_MSD = self._with_answers(self._embedded(ids_MS), asking, last_MS3)
            hidden_MSD, trunk = self.decoder.branch(x_MSD, trunk, at_S)
            if place >= len(given):
                tokens.append(self._sample(hidden_MSD, 1, generator, sharpen))
                if sharpen is not None:
                    sharpen.took(tokens[-1].flatten())
        return torch.stack(tokens, dim=-1).transpose(0, 1)

    def _with_answers(self, x_MSD: Tensor, asking: Asking | None, last_MS3: Tensor | None) -> Tensor:
        return x_MSD if asking is None or last_MS3 is None else x_MSD + self.answers(asking, last_MS3)

    def compile_regions(self) -> list[nn.Module]:
        return list(self.decoder.blocks)

    def _embedded(self, ids: Tensor) -> Tensor:
        return embedded(self.embedding, ids, self.config.embedding_norm, self.eps)

    def _start(self, state_ND: Tensor) -> Tensor:
        return self.state_in(state_ND.to(self.state_in.weight.dtype))

    def _read(self, state_ND: States, ids_MK: Tensor) -> Tensor:
        """What the decoder says before each token of whole patches, (M, K, D)."""
        vector_ND = vector_of(state_ND)
        state_MD = self._start(vector_ND).reshape(-1, vector_ND.shape[-1])
        x_MKD = torch.cat((state_MD[:, None], self._embedded(ids_MK[:, :-1]).to(state_MD.dtype)), dim=1)
        found = self.answers_along(state_ND, ids_MK)
        return self.decoder(x_MKD if found is None else x_MKD + found.to(x_MKD.dtype))

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
            rows = []
            for row, (one, own) in enumerate(zip(hidden_MJD, generator, strict=True)):
                rows.append(self._sample_rows(one, draws, own, sharpen and sharpen.of(slice(row, row + 1))))
            return torch.stack([row.flatten() for row in rows])
        return self._sample_rows(hidden_MJD.flatten(0, 1), draws, generator, sharpen).view(len(hidden_MJD), -1)

    def _sample_rows(
        self, hidden_MD: Tensor, draws: int, generator: torch.Generator | None, sharpen: Sharpen | None
    ) -> Tensor:
        """(M, draws); the vocabulary exists for one chunk of rows at a time."""
        rows = max(1, CHUNK_ELEMENTS // self.embedding.num_embeddings)
        parts = []
        for start in range(0, len(hidden_MD), rows):
            some = slice(start, start + rows)
            law = self._law(hidden_MD[some], sharpen and sharpen.of(some))
            # two at least: for a single draw torch takes another way, 20 times slower on a CPU
            parts.append(torch.multinomial(law, max(2, draws), replacement=True, generator=generator))
        return torch.cat(parts)[:, :draws]
