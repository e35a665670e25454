"""CALM: tokens of patch i -> compressor -> causal Transformer -> state -> head -> latent of patch i + 1 -> tokens.

    ids_BPK -> embedding, compressor -> x_BPD -> backbone -> state_BPD -> head -> draws_SBPL -> autoencoder -> tokens_SBPK

The autoencoder is part of the model and frozen. The input is the discrete tokens of a patch, not its latent (paper section 3.3);
for the paper's ablation `config.input` takes the latent, or both. That latent is always the posterior's mean of the patch's
tokens, also of a patch that was drawn: a state depends on the text alone, whoever wrote it (docs/method.md).
Legend: B batch, P patches, K tokens per patch, D width, L latent, S draws, V vocabulary, N any leading dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from nextvec.config import CalmConfig
from nextvec.model.autoencoder import Autoencoder, Posterior
from nextvec.model.backbone import Backbone, Trunk
from nextvec.model.cache import KVCache
from nextvec.model.compressor import build_compressor
from nextvec.model.heads import build_head
from nextvec.model.heads.codes import CodeBook
from nextvec.model.heads.interface import Generators, Head, Metrics, ReadsContext, Sharpen
from nextvec.model.heads.recalling import Recalls
from nextvec.model.interface import DrawsWanted, Wanted
from nextvec.model.recall import DIM
from nextvec.model.text_states import States, TextStates

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nextvec.text.tokenizer import Tokenizer


class Calm(nn.Module):
    """The whole model. Constructing it does no I/O; pass a trained `autoencoder` or load a run directory."""

    def __init__(self, config: CalmConfig, autoencoder: Autoencoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.packed = False  # trained on packed documents, where no patch is padded
        self.context_tokens: int | None = None  # tokens of a training window, where it is known
        self.compressor = build_compressor(config)
        self.backbone = Backbone(config.backbone)
        self.head = build_head(config)
        self._reads_context = isinstance(self.head, ReadsContext)  # asked once: a protocol takes 10 us to ask
        self._recalls = isinstance(self.head, Recalls) and self.head.recall is not None
        self.autoencoder = autoencoder if autoencoder is not None else Autoencoder(config.autoencoder)
        if self.autoencoder.config != config.autoencoder:
            raise ValueError("the autoencoder given has another configuration than config.autoencoder")
        self.autoencoder.requires_grad_(False)
        if isinstance(self.head, CodeBook):
            self.head.bind(self.autoencoder)

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.backbone.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.norm.weight.dtype

    def states(self, ids_BPK: Tensor, cache: KVCache | None = None, latent_BPL: Tensor | None = None) -> States:
        """Backbone states (B, P, D) of patches (B, P, K); the state at p predicts patch p + 1.

        latent: the posterior means of these patches, where they are known and the input holds them; else they are encoded.
        A head that reads tokens of the patch itself finds them behind the state, which is that much wider. With one that
        looks tokens of the whole text up they are `TextStates`, which hold it.
        """
        read = memory = None
        if self._recalls and cache is not None:
            read = cache.write_text(ids_BPK)
            memory = None if cache.apart is not None else self._kept(cache, read[0], ids_BPK)
        state_BPD = self._with_context(self.backbone(self._inputs(ids_BPK, latent_BPL), cache), ids_BPK)
        if cache is None or read is None:
            return self._with_text(state_BPD, ids_BPK)
        text_BT, seen_BP = read
        text_BPT = text_BT[:, None].expand(-1, ids_BPK.shape[1], -1)
        return TextStates(state_BPD, text_BPT, seen_BP, cache.apart is not None, memory)

    def _kept(self, cache: KVCache, text_BT: Tensor, ids_BPK: Tensor) -> Tensor:
        """What lookups make of the texts, kept in the cache."""
        head: Any = self.head
        parts = head.recall.parts(head.tokens(), text_BT.numel())
        return head.recall.kept(cache, text_BT, ids_BPK[0].numel(), parts)

    def _with_context(self, state_BPD: Tensor, ids_BPK: Tensor) -> Tensor:
        if not self._reads_context:
            return state_BPD
        head: Any = self.head
        return torch.cat((state_BPD, head.context(ids_BPK).to(state_BPD.dtype)), dim=-1)

    def _with_text(self, state_BPD: Tensor, ids_BPK: Tensor) -> States:
        """With the patches that were read, from the first of the text."""
        if not self._recalls:
            return state_BPD
        seen_P = torch.arange(1, ids_BPK.shape[1] + 1, device=ids_BPK.device) * self.patch_size
        text_BPT = ids_BPK.flatten(1)[:, None].expand(-1, len(seen_P), -1)
        return TextStates(state_BPD, text_BPT, seen_P.expand(len(ids_BPK), -1))

    def _inputs(self, ids_BPK: Tensor, latent_BPL: Tensor | None = None) -> Tensor:
        """What the backbone reads, (B, P, D)."""
        if self.config.reads_latents and latent_BPL is None:
            latent_BPL = self.teacher(ids_BPK).mean
        return self.compressor(ids_BPK, latent_BPL)

    def new_cache(self, rows: int, patches: int) -> KVCache:
        """An empty cache for `rows` sequences of at most `patches` patches."""
        head: Any = self.head
        kept = (self.patch_size, (head.recall.heads, DIM)) if self._recalls else ()
        return KVCache(self.config.backbone, rows, patches, self.device, self.dtype, *kept)

    def trunk(self, ids_BPK: Tensor) -> tuple[States, Trunk]:
        """States and what branches attend to (see Backbone.branch)."""
        state_BPD, trunk = self.backbone.trunk(self._inputs(ids_BPK))
        state = self._with_text(self._with_context(state_BPD, ids_BPK), ids_BPK)
        return state, replace(trunk, text=ids_BPK) if self._recalls else trunk

    def branch(self, ids_BNK: Tensor, trunk: Trunk, at_N: Tensor) -> tuple[States, Trunk]:
        """States (B, N, D) after appending ids[:, n] to trunk positions 0..at[n] and its own branch (see Backbone.branch)."""
        state_BND, grown = self.backbone.branch(self._inputs(ids_BNK), trunk, at_N)
        state = self._with_context(state_BND, ids_BNK)
        if not self._recalls:
            return state, grown
        text_BNT, seen_N = trunk.grown_text(ids_BNK, at_N)
        return TextStates(state, text_BNT, seen_N.expand(len(text_BNT), -1)), replace(grown, own=(*trunk.own, ids_BNK))

    @property
    def has_latents(self) -> bool:
        """Whether the head draws latents, which the autoencoder decodes; else it draws tokens, and `draw_latents` fails."""
        return self.head.latents

    @property
    def learns_from_posterior(self) -> bool:
        """Whether the head's loss asks for the autoencoder's posterior of the patch; else for its tokens."""
        return self.head.teacher == "posterior"

    def draw_latents(self, state_ND: States, draws: int, generator: Generators | None = None) -> Tensor:
        """S latents (S, ..., L) for states (..., D): the model's predictive distribution of the next patch."""
        assert self.has_latents, "a head of tokens has no latent"
        return self.head.draw(state_ND, draws, generator)

    def draw_tokens(self, state_ND: States, draws: int, generator: Generators | None = None) -> Tensor:
        """S patches (S, ..., K) int64: latents drawn, then decoded by the most likely token at each place.

        A head of tokens draws them itself.
        """
        if not self.has_latents:
            return self.head.draw(state_ND, draws, generator)
        return self.autoencoder.decode_tokens(self.draw_latents(state_ND, draws, generator))

    def draw_wanted(self, state_ND: States, draws: int, generator: torch.Generator | None, wanted: Wanted) -> Tensor:
        """What `draw_tokens` draws, as far as it is wanted; see `DrawsWanted`."""
        if isinstance(self.head, DrawsWanted):
            return self.head.draw_wanted(state_ND, draws, generator, wanted)
        if not self.has_latents:
            return self.draw_tokens(state_ND, draws, generator)
        latent_SNL = self.draw_latents(state_ND, draws, generator)
        patch_SMK = self.autoencoder.decode_wanted(latent_SNL.flatten(1, -2), wanted)
        return patch_SMK.unflatten(1, state_ND.shape[:-1])

    @property
    def by_token(self) -> bool:
        """Whether the head knows the law of each token of a patch given those before it, as `draw_by_token` needs."""
        return self.head.by_token

    def draw_by_token(
        self,
        state_ND: States,
        generator: Generators | None = None,
        sharpen: Sharpen | None = None,
        given: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """A patch (..., K) int64 for each state (..., D), each token by what `sharpen` makes of its law; and its latent, if any.

        A sharpened law leaves a latent no noise of its own: it is the mean of its tokens' Gaussians. given: fewer than K ids
        that the patches begin with.
        """
        assert self.by_token, "this head has no law of single tokens"
        head: Any = self.head
        if not self.has_latents:
            return head.draw(state_ND, 1, generator, sharpen=sharpen, given=given)[0], None
        if sharpen is None:
            latent = head.draw(state_ND, 1, generator, given=given)[0]
            patch = self.autoencoder.decode_tokens(latent)
        else:
            latent, patch = head.at_means(head.pick(state_ND, 1, generator, sharpen=sharpen, given=given)[0])
            latent = latent.to(self.dtype)
        patch[..., : len(given)] = torch.tensor(given, dtype=patch.dtype, device=patch.device)
        return patch, latent

    @torch.no_grad()
    def teacher(self, ids_NK: Tensor) -> Posterior:
        """The frozen autoencoder's posterior of patches: of the targets, the distribution that the head learns."""
        return self.autoencoder.encode(ids_NK)

    def set_solver(self, solver: str | None, steps: int | None) -> None:
        """Draw by another solver, or in another number of steps, from now on. Raises ConfigError where the head cannot."""
        self.config = self.config.with_solver(solver, steps)
        head: Any = self.head
        if solver is not None or steps is not None:
            head.config = self.config.head

    def loss(self, state_ND: States, target_NK: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """The head's mean loss of states (..., D) against the patches (..., K) that follow them, and detached figures."""
        target: Any = self.teacher(target_NK) if self.learns_from_posterior else target_NK
        head: Head = self.head
        return head.loss(state_ND, target, generator)

    def train(self, mode: bool = True) -> Self:
        """Training mode; the frozen autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def compile_regions(self) -> list[nn.Module]:
        """The repeated blocks, for regional compilation."""
        return [*self.backbone.blocks, *self.head.compile_regions(), *self.autoencoder.compile_regions()]

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Calm:
        """Load a run directory (config.yaml, model.safetensors, tokenizer.json). Raises DataError, ConfigError."""
        from nextvec.rundir import load_model

        return load_model(path, cls, device, dtype)

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Text patch by patch; keyword arguments as `nextvec.sampling.generate.stream_text`."""
        from nextvec.sampling.generate import stream_text

        return stream_text(self, prompt, **sampling)

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The whole continuation as one string; keyword arguments as `stream`."""
        return "".join(self.stream(prompt, **sampling))
