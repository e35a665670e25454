"""N-grams that follow a context, at many positions of a text at once: draws, and probabilities where a model has them.

Legend: S draws, B rows, T tokens, P patches (T = P * K), K tokens per patch, Q starts, N chains, D width, V vocabulary,
n order, F any further figures kept of each link of a chain, U patches that differ or stand on different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.errors import ConfigError
from nextvec.model.backbone import Trunk
from nextvec.model.cross_entropy import CHUNK_ELEMENTS
from nextvec.model.interface import DrawsWanted, LanguageModel, TokenProbabilities

BRANCHES = 512  # chains grown in one pass: bounds memory, and fastest on 2 cores, since a pass reads no later context
SCORES = 1 << 22  # chains in one pass times patches that each can attend to: bounds the memory of a long context

Link = tuple[Tensor, ...]  # the drawn patch of each chain, and any figures kept with it


class Scored(NamedTuple):
    """What drawn n-grams will be held against: it says which chains cannot matter any more."""

    target: Tensor  # (B, Q, n) ids
    valid: Tensor  # (B, Q, n) bool, where an order may be scored

    def matters(self, start_N: Tensor, chain_NL: Tensor) -> Tensor:
        """(N,) bool: chains, all of a start that have not been dropped, that may still count at order L + 1.

        `start_N` is the index of each chain's start among all B * Q.
        """
        L, base = chain_NL.shape[1], int(chain_NL.max()) + 1
        target_Nn, valid_Nn = self.target.flatten(0, 1), self.valid.flatten(0, 1)
        if target_Nn.shape[1] == L:
            return torch.zeros_like(start_N, dtype=torch.bool)
        right_N = (chain_NL == target_Nn[start_N, :L]).all(dim=-1)
        group_N = start_N  # chains of a start that agree so far share a number
        for token_N in chain_NL.T:
            _, group_N, count = (group_N * base + token_N).unique(return_inverse=True, return_counts=True)
        return valid_Nn[start_N, L] & (right_N | (count[group_N] > 1))


@torch.no_grad()
def draw_ngrams(
    model: LanguageModel,
    ids_BT: Tensor,
    draws: int,
    order: int,
    generator: torch.Generator,
    *,
    stride: int,
    first: int | None = None,
    scored: Scored | None = None,
) -> Tensor:
    """S independent n-grams of `order` tokens after each context ids[:, :s], s = first, first + stride, .., T.

    Every model is asked at the same starts, whatever its patch size: `stride` is the K of the comparison. Where one
    patch is shorter than the n-gram, patches are chained, each drawn given the previous drawn one (docs/method.md): the model
    reads the text once, and each further patch of each draw costs one pass over many starts together.

    With `scored` a chain, or a patch where the model can leave off inside one, is grown only as long as it can matter to
    a Brier score, which asks whether a draw equals the target and whether two draws are equal: once a chain has parted from
    the target and from all other draws of its start, or the next order is not valid there, its further tokens are 0. Every
    term keeps its law.

    Args: ids (B, T) int64, T a multiple of `stride`; first: the first start, default `stride` (the second patch).
    Returns (S, B, Q, order) int64. Raises ConfigError when the stride does not fit the model or the text.
    """
    K, T = model.patch_size, ids_BT.shape[1]
    first = stride if first is None else first
    check_stride(stride, K)
    for name, value in (("the context", T), ("the first start", first)):
        if value % stride or value < stride:
            raise ConfigError(f"{name} must be a positive multiple of the stride {stride}; got {value} tokens")
    ids_BPK = ids_BT.unflatten(1, (T // K, K))
    at_Q = torch.arange(first, T + 1, stride, device=ids_BT.device) // K - 1
    if scored is not None:
        scored = Scored(*(part.to(ids_BT.device) for part in scored))
    if order <= K:
        state_BQD = model.states(ids_BPK)[:, at_Q]
        if scored is not None and isinstance(model, DrawsWanted):
            return model.draw_wanted(state_BQD, draws, generator, scored.matters)[..., :order]
        return model.draw_tokens(state_BQD, draws, generator)[..., :order]
    state_BPD, trunk = model.trunk(ids_BPK)

    def grow(patch_BUK: Tensor, grown: Trunk, at_U: Tensor, of_N: Tensor) -> tuple[Link, Trunk]:
        state_BUD, grown = model.branch(patch_BUK, grown, at_U)
        return (model.draw_tokens(state_BUD[:, of_N], 1, generator)[0],), grown

    heads = (model.draw_tokens(state_BPD[:, at_Q], draws, generator),)
    return _chain(heads, trunk, at_Q, order, grow, scored)[0]


class TailTerms(NamedTuple):
    """What `exact_tail` is made of (see scoring.brier.exact_tail_scores); logarithms in nats."""

    target_log: Tensor  # (B, Q, n), log P(y_k | y_<k)
    drawn_log: Tensor  # (S, B, Q, n), log P(x_k | x_<k)
    collision: Tensor  # (S, B, Q, n), sum_v P(v | x_<k)^2


@torch.no_grad()
def tail_terms(
    model: LanguageModel, ids_BT: Tensor, start_Q: Tensor, draws: int, order: int, generator: torch.Generator
) -> TailTerms:
    """Probabilities along the target and along S drawn chains, for n-grams that follow ids[:, :s], s in start_Q.

    The chains are grown as in `draw_ngrams`. Args: ids (B, T) int64, `order` tokens beyond the last start.
    Raises ConfigError unless the model has token probabilities.
    """
    exact = with_probabilities(model)
    state_BTD, trunk = model.trunk(ids_BT[:, :-1, None])
    start_Q = start_Q.to(ids_BT.device)
    begin = int(start_Q[0])
    next_log_BT = _log_of(exact, model.vocab_size, state_BTD[:, begin - 1 :], ids_BT[:, begin:])
    target_log_BQn = next_log_BT[:, (start_Q - begin)[:, None] + torch.arange(order, device=ids_BT.device)]

    def grow(token_BU1: Tensor, grown: Trunk, at_U: Tensor, of_N: Tensor) -> tuple[Link, Trunk]:
        state_BUD, grown = model.branch(token_BU1, grown, at_U)
        return tuple(part[0] for part in _draw(exact, model.vocab_size, state_BUD[:, of_N], 1, generator)), grown

    heads = _draw(exact, model.vocab_size, state_BTD[:, start_Q - 1], draws, generator)
    _, drawn_log_SBQn, collision_SBQn = _chain(heads, trunk, start_Q - 1, order, grow)
    return TailTerms(target_log_BQn, drawn_log_SBQn, collision_SBQn)


def with_probabilities(model: LanguageModel) -> TokenProbabilities:
    """The model as one with token probabilities. Raises ConfigError for any other, such as CALM."""
    if model.patch_size != 1 or not isinstance(model, TokenProbabilities):
        raise ConfigError(
            f"exact_tail needs the probability of each token, and {type(model).__name__} (patch size "
            f"{model.patch_size}) has draws only: use the estimator all_pairs, whose expectation is the same"
        )
    return model


def check_stride(stride: int, patch_size: int) -> None:
    """Raises ConfigError unless starts every `stride` tokens are patch starts of the model."""
    if stride < 1 or stride % patch_size:
        raise ConfigError(
            f"stride must be a multiple of the model's patch size {patch_size}; got {stride}: "
            f"use {max(1, round(stride / patch_size)) * patch_size}"
        )


def _chain(
    heads_SBQF: Link,
    trunk: Trunk,
    at_Q: Tensor,
    order: int,
    grow: Callable[[Tensor, Trunk, Tensor, Tensor], tuple[Link, Trunk]],
    scored: Scored | None = None,
) -> Link:
    """Chains of the first links (S, B, Q, F), grown until their patches hold `order` tokens: each part (S, B, Q, order).

    grow: patches (1, U, K), what they are appended to, the trunk position of each, and to which of them each chain belongs,
    (N,) -> the next link of the chains, and the same with the patches. Chains that are equal so far are read as one. Chains
    are grown row by row, those of neighbouring starts together, in groups that fit in memory. A start's chains stay in one
    group: with `scored` those that parted are dropped on the way, and stay 0.
    """
    S, B, Q, K = heads_SBQF[0].shape
    whole = tuple(head.new_zeros(S, B, Q, order) for head in heads_SBQF)
    for part, head in zip(whole, heads_SBQF, strict=True):
        part[..., :K] = head
    room = max(1, min(BRANCHES, SCORES // trunk.layers[0][0].shape[-2]))
    every_N = torch.arange(S * Q, device=at_Q.device)
    for row in range(B if order > K else 0):
        draw_N, start_N = every_N % S, every_N // S
        if scored is not None:
            kept = scored.matters(row * Q + start_N, whole[0][draw_N, row, start_N, :K])
            draw_N, start_N = draw_N[kept], start_N[kept]
        for group in _groups(start_N, room):
            draw_G, start_G, length = draw_N[group], start_N[group], K
            grown = trunk.before(row, int(at_Q[start_G[-1]]) + 1)
            stem_G = start_G  # what the last patch of a chain stands on: its start, then the branch before
            while len(draw_G):
                patch_GK = whole[0][draw_G, row, start_G, length - K : length]
                stem_UK, of_G = torch.cat((stem_G[:, None], patch_GK), dim=1).unique(dim=0, return_inverse=True)
                at_U = at_Q[start_G.new_empty(len(stem_UK)).scatter_(0, of_G, start_G)]
                if length > K:
                    grown = grown.only(stem_UK[:, 0])
                link, grown = grow(stem_UK[None, :, 1:], grown, at_U, of_G)
                stem_G = of_G
                end = min(length + K, order)
                for part, new in zip(whole, link, strict=True):
                    part[draw_G, row, start_G, length:end] = new[0, :, : end - length]
                length = end
                if length == order:
                    break
                if scored is not None:
                    kept = scored.matters(row * Q + start_G, whole[0][draw_G, row, start_G, :length])
                    draw_G, start_G, stem_G = draw_G[kept], start_G[kept], stem_G[kept]
    return whole


def _groups(start_N: Tensor, room: int) -> Iterator[slice]:
    """Pieces of chains sorted by start: as many whole starts as fit in `room`, at least one."""
    begin = end = 0
    for count in start_N.unique_consecutive(return_counts=True)[1].tolist():
        if end > begin and end + count - begin > room:
            yield slice(begin, end)
            begin = end
        end += count
    if end > begin:
        yield slice(begin, end)


def _log_of(exact: TokenProbabilities, vocabulary: int, state_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """log P(ids), (B, T); the vocabulary exists for one chunk of rows at a time."""
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    chunks = zip(state_BTD.flatten(0, 1).split(rows), ids_BT.reshape(-1, 1).split(rows), strict=True)
    return torch.cat([exact.log_probabilities(state).gather(-1, ids) for state, ids in chunks]).view(ids_BT.shape)


def _draw(
    exact: TokenProbabilities, vocabulary: int, state_BND: Tensor, draws: int, generator: torch.Generator
) -> Link:
    """S tokens of each state, their log-probabilities and the collision of the law: each (S, B, N, 1)."""
    parts = []
    for state in state_BND.flatten(0, 1).split(max(1, CHUNK_ELEMENTS // vocabulary)):
        log_NV = exact.log_probabilities(state)
        p_NV = log_NV.exp()
        # two at least: for a single draw torch takes another way, 20 times slower on a CPU
        token_NS = torch.multinomial(p_NV, max(2, draws), replacement=True, generator=generator)[:, :draws]
        parts.append((token_NS, log_NV.gather(-1, token_NS), p_NV.square().sum(-1, keepdim=True).expand(-1, draws)))
    shape = (*state_BND.shape[:-1], draws, 1)
    return tuple(torch.cat(same).view(shape).movedim(-2, 0) for same in zip(*parts, strict=True))
