"""Mixture head: the latent of each place is one of V Gaussians, the codes of a factored autoencoder (docs/heads.md).

Legend: S draws, N positions (any leading dimensions), D width, K tokens per patch, L latent, E = L / K dimensions of a token,
V vocabulary, W = max(1, K - 1) tokens that a place reads, C = D and the numbers of a query to recall, X numbers of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import CalmConfig, MixtureHeadConfig
from nextvec.model.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy
from nextvec.model.grams import Grams, with_grams
from nextvec.model.heads.codes import CodeBook
from nextvec.model.heads.interface import Generators, Metrics, Sharpen, noise, wide
from nextvec.model.heads.recalling import Asking, Recalls, and_then
from nextvec.model.heads.wanted import walk
from nextvec.model.interface import Wanted, counted_from
from nextvec.model.layers import ResidualMLP, RMSNorm, SwiGLU, normed_rows
from nextvec.model.packed import Kept, product_with
from nextvec.model.recall import Recall, Tokens, queries
from nextvec.model.text_states import States, vector_of

MOST_TOLD = 1 << 25  # numbers in the table of what every token tells the places after it


class MixtureHead(CodeBook, Recalls, nn.Module):
    """The law of the next patch's latent z, place after place:

        p(z | state) = prod_k sum_y p(y | state, the W tokens before place k) N(z_k; mean_y, std_y^2)

        log p(y | ...) = output_y . norm(blocks(slots_k(state) + sum_i before_i e(y_(k - i)))) + const

    The expected latents of a flow whose places are clean one after the other end in this law, and its draws need no flow.
    What stands before a place enters as the tokens that the latents decode to, as a patch enters the backbone (paper
    section 3.3): the last tokens of the patch that the state has read (`context`), then those of this one. A path so short
    learns which token follows which within the first steps of training, for all places at once; e is normalised, because
    otherwise it is 20 times smaller than the slots at the start.

    With `recall` each place also looks up, by the two tokens before it, what followed these two earlier in the text, in the
    patches that the state has read (recall.py); states are then `TextStates`. With `grams` it reads what the last two and three
    tokens say together, too (grams.py).
    """

    latents: ClassVar[bool] = True
    by_token: ClassVar[bool] = True
    teacher: ClassVar[str] = "tokens"
    objective: ClassVar[str] = "cross_entropy"

    def __init__(self, config: CalmConfig) -> None:
        nn.Module.__init__(self)
        CodeBook.__init__(self)
        assert isinstance(config.head, MixtureHeadConfig)
        width, eps = config.backbone.width, config.backbone.norm_eps
        self.patch_size, self.width, self.window = config.patch_size, width, max(1, config.patch_size - 1)
        self.slots = nn.Linear(width, self.patch_size * width)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.embedding_norm = RMSNorm(width, eps=eps)
        self.before = nn.Linear(self.window * width, width, bias=False)
        inner = config.head.inner or width
        self.blocks = nn.ModuleList(ResidualMLP(width, inner, eps) for _ in range(config.head.blocks))
        self.norm = RMSNorm(width, eps=eps)
        self.output = nn.Linear(width, config.vocab_size, bias=False)
        self.recall = Recall(width, config.head.recall) if config.head.recall else None
        self.grams = Grams(width, config.head.grams) if config.head.grams else None
        self._units = Kept[Tensor]()
        self._told = Kept[Callable[[Tensor], Tensor]]()

    def zero_initialised(self) -> list[Tensor]:
        """The blocks begin as the identity."""
        return [mlp.down.weight for mlp in self.modules() if isinstance(mlp, SwiGLU)]

    def tokens(self) -> Tokens:
        weight, norm = self.embedding.weight, self.embedding_norm
        return Tokens(lambda: norm(weight), self._embedded, (weight, norm.weight))

    def context(self, ids_NK: Tensor) -> Tensor:
        """What the head reads of a patch besides the state, (..., W * D); it stands behind the state (`Calm.states`)."""
        return self._embedded(ids_NK[..., -self.window :]).flatten(-2)

    def loss(self, state_ND: States, target: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy in nats per token of the patches `target` (..., K), and the share of tokens it ranks first."""
        hidden_MKD = self._read(state_ND, target.flatten(0, -2))
        loss, accuracy = linear_cross_entropy(hidden_MKD.flatten(0, 1), self.output.weight, target.reshape(-1))
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy.detach()}

    def log_probabilities(self, state_ND: States, ids_NK: Tensor) -> Tensor:
        """log p(y | ...) of each place's Gaussian, in nats, (..., K)."""
        hidden = self._read(state_ND, ids_NK.flatten(0, -2)).flatten(0, 1)
        rows = max(1, CHUNK_ELEMENTS // self.output.out_features)
        parts = [
            self._logits(part).log_softmax(-1).gather(-1, ids)
            for part, ids in zip(hidden.split(rows), ids_NK.reshape(-1, 1).split(rows), strict=True)
        ]
        return torch.cat(parts).view(ids_NK.shape)

    @torch.no_grad()
    def draw(self, state_ND: States, draws: int, generator: Generators | None, *, given: Sequence[int] = ()) -> Tensor:
        """S independent draws, (S, ..., L), for states (..., D); see `Head`. The first place is read once for all draws."""
        ids = self.pick(state_ND, draws, generator, given=given).view(draws, -1, self.patch_size)
        z = self._latents(ids, self._noise(vector_of(state_ND), draws, generator))
        return z.view(draws, *state_ND.shape[:-1], -1).to(self.output.weight.dtype)

    @torch.no_grad()
    def draw_wanted(self, state_ND: States, draws: int, generator: Generators | None, wanted: Wanted) -> Tensor:
        """Decoded patches (S, ..., K) of what `draw` with the same generator draws; see `wanted.walk`.

        `wanted` is given indices among all states.
        """
        vector_ND = vector_of(state_ND)
        vector_MX = vector_ND.reshape(-1, vector_ND.shape[-1]).to(self.output.weight.dtype)
        share = self._shares(vector_ND, draws, generator)
        eps = self._noise(vector_ND, draws, generator).unflatten(-1, (self.patch_size, -1))
        drawn = []
        for states, asking in self.askings(state_ND):
            of_these = counted_from(states.start or 0, wanted)
            drawn.append(walk(self, vector_MX[states], asking, share[:, states], eps[:, states], of_these))
        return torch.cat(drawn, dim=1).view(draws, *vector_ND.shape[:-1], self.patch_size)

    @torch.no_grad()
    def pick(
        self,
        state_ND: States,
        draws: int,
        generator: Generators | None,
        *,
        sharpen: Sharpen | None = None,
        given: Sequence[int] = (),
    ) -> Tensor:
        """The Gaussians of S draws, (S, ..., K) int64, each picked by what `sharpen` makes of its law; see `Head`."""
        vector_ND = vector_of(state_ND)
        vector_MX = vector_ND.reshape(-1, vector_ND.shape[-1]).to(self.output.weight.dtype)
        share = self._shares(vector_ND, draws, generator)
        chosen = [
            self._chosen(vector_MX[states], asking, share[:, states], sharpen and sharpen.of(states), given)
            for states, asking in self.askings(state_ND)
        ]
        ids = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
        return ids.view(draws, *vector_ND.shape[:-1], self.patch_size)

    def _shares(self, vector_ND: Tensor, draws: int, generator: Generators | None) -> Tensor:
        """Of a law, what stands before the token picked: (S, M, K), in [0, 1)."""
        dtype = wide(self.output.weight.dtype)
        share = noise("uniform", vector_ND, draws, self.patch_size, generator, dtype).view(draws, -1, self.patch_size)
        return share * (1 - torch.finfo(dtype).eps)  # none may round up to the whole law, behind its last token

    def _noise(self, vector_ND: Tensor, draws: int, generator: Generators | None) -> Tensor:
        """What the Gaussians add to their means, in units of their widths: (S, M, L)."""
        size = self.patch_size * self.codes().mean.shape[1]
        dtype = wide(self.output.weight.dtype)
        return noise("normal", vector_ND, draws, size, generator, dtype).view(draws, -1, size)

    def _chosen(
        self, state_MX: Tensor, asking: Asking | None, share: Tensor, sharpen: Sharpen | None, given: Sequence[int]
    ) -> Tensor:
        """Tokens (S, M, K) picked by the shares (S, M, K), place after place."""
        draws, states, _ = share.shape
        line_SMKC = self.line(state_MX, asking)[None]  # S is 1 until draws differ
        last_SM3 = None if asking is None else asking.tail[None]
        chosen: list[Tensor] = []
        for place in range(self.patch_size):
            if place < len(given):
                ids_SM = torch.full((1, states), given[place], device=share.device)
            else:
                hidden_SMD = self._hidden(self._looked_up(line_SMKC.select(2, 0), asking, last_SM3))
                if len(hidden_SMD) == 1:
                    ids_SM = self.picked(hidden_SMD[0], share[..., place].T, sharpen).T
                else:
                    ids_SM = self.picked(hidden_SMD.flatten(0, 1), share[..., place].reshape(-1, 1), sharpen)
                    ids_SM = ids_SM.view(draws, states)
                if sharpen is not None:
                    sharpen.took(ids_SM.flatten())
            chosen.append(ids_SM.expand(draws, -1))
            left = self.patch_size - place - 1
            if left:
                line_SMKC = line_SMKC.narrow(2, 1, left) + self.tells(ids_SM).narrow(2, 0, left)
                if self.grams is not None and last_SM3 is not None:
                    last_SM3 = and_then(last_SM3, ids_SM)
        return torch.stack(chosen, dim=-1)

    def line(self, state_MX: Tensor, asking: Asking | None) -> Tensor:
        """What the places of a patch read of the text before it, (M, K, C): numbers for the blocks, and a query to recall."""
        state_MD, before_MWD = self._split(state_MX)
        x_MKD = self._slots(state_MD) + self._windows(F.pad(before_MWD, (0, 0, 0, self.patch_size - 1)))
        if asking is None:
            return x_MKD
        first, second = queries(asking.tail, asking.parts), asking.parts.before(asking.tail[:, -1])
        query = torch.stack((first, second)[: self.patch_size], dim=1)
        return torch.cat((x_MKD, F.pad(query, (0, 0, 0, self.patch_size - query.shape[1]))), dim=-1)

    def tells(self, ids_N: Tensor) -> Tensor:
        """What tokens add to the W places after them, (..., W, C); by a table of the vocabulary where that is not large."""
        recall = None if self.recall is None else self.recall.query.weight
        made_of = [self.embedding.weight, self.embedding_norm.weight, self.before.weight]
        if recall is not None:
            made_of.append(recall)

        def make() -> Callable[[Tensor], Tensor]:
            steps = list(self.before.weight.chunk(self.window, dim=1)[::-1])  # the next place's first
            if recall is not None:
                asks = recall.chunk(2, dim=1)
                blank = torch.zeros_like(asks[0])
                steps = [torch.cat((step, asks[at] if at < 2 else blank)) for at, step in enumerate(steps)]
            matrix = torch.cat(steps)
            if len(matrix) * self.embedding.num_embeddings > MOST_TOLD:
                product = product_with(matrix)
                return lambda ids: product(self._embedded(ids))
            weight = self.embedding.weight
            return partial(F.embedding, weight=F.linear(self.embedding_norm(weight), matrix))

        return self._told.of(made_of, make)(ids_N).unflatten(-1, (self.window, -1))

    def _looked_up(self, line_SMC: Tensor, asking: Asking | None, last_SM3: Tensor | None) -> Tensor:
        """What the blocks read at one place of S draws, (S, M, D)."""
        if asking is None or last_SM3 is None:
            return line_SMC
        x_SMD, query_SMC = line_SMC.tensor_split((self.width,), dim=-1)
        answers_SMD = self.answers_to(asking, query_SMC.transpose(0, 1)).transpose(0, 1)
        return with_grams(self.grams, x_SMD + answers_SMD, last_SM3)

    def read_line(self, line_GC: Tensor, asking: Asking | None, state_G: Tensor, last_G3: Tensor | None) -> Tensor:
        """What `output` is multiplied with at one place of draws of these states, in ascending order, (G, D)."""
        if asking is None or last_G3 is None:
            return self._hidden(line_GC)
        x_GD, query_GC = line_GC.tensor_split((self.width,), dim=-1)
        return self._hidden(with_grams(self.grams, x_GD + self.answers_of(asking, state_G, query_GC), last_G3))

    def latents_of(self, ids_NK: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
        """S latents of given patches (..., K), each place from its token's Gaussian: (S, ..., L)."""
        codes, ids = self.codes(), ids_NK.expand(draws, *ids_NK.shape)
        size = (*ids.shape[:-1], self.patch_size * codes.mean.shape[1])
        eps = torch.randn(size, generator=generator, device=ids.device, dtype=codes.mean.dtype)
        return self._latents(ids, eps).to(self.output.weight.dtype)

    def compile_regions(self) -> list[nn.Module]:
        return list(self.blocks)

    def _embedded(self, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return normed_rows(self.embedding, ids, self.embedding_norm)
        weight, norm = self.embedding.weight, self.embedding_norm
        return F.embedding(ids, self._units.of((weight, norm.weight), lambda: norm(weight)))

    def _split(self, state_MX: Tensor) -> tuple[Tensor, Tensor]:
        """What the backbone made of the text (M, D), and embeddings of the tokens before the patch (M, W, D)."""
        state, context = state_MX.tensor_split((self.width,), dim=-1)
        return state, context.unflatten(-1, (self.window, -1))

    def _slots(self, state_MD: Tensor) -> Tensor:
        return self.slots(state_MD).unflatten(-1, (self.patch_size, -1))

    def _windows(self, line_MTD: Tensor) -> Tensor:
        """What the W tokens before each place of a patch tell it, (M, K, D), of W + K - 1 tokens."""
        windows = [line_MTD[:, place : place + self.window] for place in range(self.patch_size)]
        return self.before(torch.stack(windows, dim=1).flatten(-2))

    def _read(self, state_ND: States, ids_MK: Tensor) -> Tensor:
        """What `output` is multiplied with at every place of whole patches, (M, K, D)."""
        state, before = self._split(vector_of(state_ND).flatten(0, -2))
        own = self._embedded(ids_MK[:, :-1]).to(before.dtype)
        x = self._slots(state) + self._windows(torch.cat((before, own), dim=1))
        found = self.answers_along(state_ND, ids_MK)
        return self._hidden(x if found is None else x + found.to(x.dtype))

    def _latents(self, ids: Tensor, eps: Tensor) -> Tensor:
        codes = self.codes()
        mean, std = (each[ids].to(eps.dtype).flatten(-2) for each in (codes.mean, codes.std))
        return mean + std * eps.view_as(mean)

    def _hidden(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.output(hidden.to(self.output.weight.dtype))
        return logits.to(wide(logits.dtype))

    def picked(self, hidden_RD: Tensor, share_Rn: Tensor, sharpen: Sharpen | None = None) -> Tensor:
        """Tokens (R, n) at which the cumulated law of each row passes these shares of it; for a chunk of rows at a time."""
        rows = max(1, CHUNK_ELEMENTS // self.output.out_features)
        if len(hidden_RD) > rows:
            chunks = [slice(start, start + rows) for start in range(0, len(hidden_RD), rows)]
            return torch.cat([self.picked(hidden_RD[c], share_Rn[c], sharpen and sharpen.of(c)) for c in chunks])
        logits = self._logits(hidden_RD)
        below = (logits if sharpen is None else sharpen(logits)).softmax(-1).cumsum(-1)
        return torch.searchsorted(below, (share_Rn * below[:, -1:]).contiguous(), right=True)
