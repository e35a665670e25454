"""The baseline: a token-level Llama-style Transformer on the same blocks, with exact probabilities.

Legend: B batch, P positions, D width, V vocabulary, S draws, N any leading dimensions. A token is a patch of K = 1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextvec.config import TokenLMConfig
from nextvec.model.backbone import Backbone, Trunk
from nextvec.model.cache import KVCache
from nextvec.model.grams import LONGEST, Grams, windows, with_grams
from nextvec.model.layers import embedded
from nextvec.model.recall import DIM, Memory, Recall, Tokens, last_ids, queries, sees_all, unit_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nextvec.text.tokenizer import Tokenizer


class TokenLM(nn.Module):
    """Embedding -> backbone -> logits; untied input and output embeddings (the paper's 281M count needs both).

    With `recall`, what followed the last two tokens earlier in the text is added to a token's embedding (recall.py), and with
    `grams` what the last two and three say together (grams.py).
    """

    def __init__(self, config: TokenLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.packed = False  # with patches of one token, both packings are the same
        self.context_tokens: int | None = None  # tokens of a training window, where it is known
        self.embedding = nn.Embedding(config.vocab_size, config.backbone.width)
        self.backbone = Backbone(config.backbone)
        self.output = nn.Linear(config.backbone.width, config.vocab_size, bias=False)
        self.recall = Recall(config.backbone.width, config.recall) if config.recall else None
        self.grams = Grams(config.backbone.width, config.grams) if config.grams else None

    @property
    def patch_size(self) -> int:
        return 1

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def states(self, ids_BPK: Tensor, cache: KVCache | None = None) -> Tensor:
        """Backbone states (B, P, D) of tokens (B, P, 1); the state at p predicts token p + 1."""
        if self.recall is None or cache is None:
            return self.backbone(self._whole(ids_BPK[..., 0]), cache)
        (text_BT, seen_BP), apart = cache.write_text(ids_BPK), cache.apart is not None
        parts = self.recall.parts(self._tokens(), text_BT.numel())
        kept = None if apart else self.recall.kept(cache, text_BT, ids_BPK.shape[1], parts)
        if not apart and text_BT.shape[1] == ids_BPK.shape[1]:  # nothing was held
            return self.backbone(self._whole(ids_BPK[..., 0]), cache)
        all_seen = sees_all(seen_BP, text_BT)
        last_BP3 = last_ids(text_BT, seen_BP, LONGEST, all_seen)
        memory = self.recall.memory(text_BT, parts) if kept is None else Memory(*kept)
        found_BPD = self.recall.ask(memory, queries(last_BP3, parts), seen_BP, apart, all_seen)
        return self.backbone(with_grams(self.grams, self._embedded(ids_BPK[..., 0]) + found_BPD, last_BP3), cache)

    def new_cache(self, rows: int, patches: int) -> KVCache:
        """An empty cache for `rows` sequences of at most `patches` tokens."""
        kept = () if self.recall is None else (1, (self.recall.heads, DIM))
        return KVCache(self.config.backbone, rows, patches, self.device, self.dtype, *kept)

    def trunk(self, ids_BPK: Tensor) -> tuple[Tensor, Trunk]:
        """States and what branches attend to (see Backbone.branch)."""
        state_BPD, trunk = self.backbone.trunk(self._whole(ids_BPK[..., 0]))
        return state_BPD, trunk if self.recall is None else replace(trunk, text=ids_BPK)

    def branch(self, ids_BNK: Tensor, trunk: Trunk, at_N: Tensor) -> tuple[Tensor, Trunk]:
        """States (B, N, D) after appending ids[:, n] to trunk positions 0..at[n] and its own branch (see Backbone.branch)."""
        e_BND = self._embedded(ids_BNK[..., 0])
        if self.recall is None:
            return self.backbone.branch(e_BND, trunk, at_N)
        assert trunk.text is not None, "this trunk was made without its text"
        own = (*trunk.own, ids_BNK)
        parts = self.recall.parts(self._tokens(), trunk.text.numel())
        text_BT, own_BNm = trunk.text[..., 0], torch.cat(own, dim=-1)
        x_BND = e_BND + self.recall.ask_branches(text_BT, own_BNm, at_N, parts)
        if self.grams is not None:
            before_BN3 = last_ids(text_BT, at_N.expand(len(text_BT), -1) + 1, LONGEST)
            x_BND = with_grams(self.grams, x_BND, torch.cat((before_BN3, own_BNm), dim=-1)[..., -LONGEST:])
        state_BND, grown = self.backbone.branch(x_BND, trunk, at_N)
        return state_BND, replace(grown, own=own)

    def _whole(self, ids_BT: Tensor) -> Tensor:
        """What the backbone reads of texts from their beginning, (B, T, D)."""
        e_BTD = self._embedded(ids_BT)
        if self.recall is None:
            return e_BTD
        x_BTD = e_BTD + self.recall.causal(ids_BT, self._tokens())
        return x_BTD if self.grams is None else with_grams(self.grams, x_BTD, windows(ids_BT))

    def _embedded(self, ids: Tensor) -> Tensor:
        return embedded(self.embedding, ids, self.config.embedding_norm, self.config.backbone.norm_eps)

    def _tokens(self) -> Tokens:
        return unit_tokens(self.embedding, self.config.backbone.norm_eps)

    def logits(self, state_ND: Tensor) -> Tensor:
        """Next-token logits (..., V)."""
        logits: Tensor = self.output(state_ND.to(self.output.weight.dtype))
        return logits

    def log_probabilities(self, state_ND: Tensor) -> Tensor:
        """log P(next token), (..., V) in nats, float32 (float64 for a float64 model)."""
        logits = self.logits(state_ND)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def draw_tokens(
        self, state_ND: Tensor, draws: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """S independent tokens (S, ..., 1) from softmax(logits / temperature)."""
        logits = self.logits(state_ND).flatten(0, -2)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = torch.softmax(wide / temperature, dim=-1)
        # for a single draw torch takes another way, 20 times slower on a CPU: one random number per token of the vocabulary
        picked = torch.multinomial(probabilities, max(2, draws), replacement=True, generator=generator)[:, :draws]
        return picked.T.reshape(draws, *state_ND.shape[:-1], 1)

    def compile_regions(self) -> list[nn.Module]:
        """The repeated blocks, for regional compilation."""
        return list(self.backbone.blocks)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> TokenLM:
        """Load a run directory (config.yaml, model.safetensors, tokenizer.json). Raises DataError, ConfigError."""
        from nextvec.rundir import load_model

        return load_model(path, cls, device, dtype)

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Text token by token; keyword arguments as `nextvec.sampling.generate.stream_text`."""
        from nextvec.sampling.generate import stream_text

        return stream_text(self, prompt, **sampling)

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The whole continuation as one string; keyword arguments as `stream`."""
        return "".join(self.stream(prompt, **sampling))
