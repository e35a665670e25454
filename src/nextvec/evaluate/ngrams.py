"""N-grams that follow a context, at many positions of a text at once: draws, and probabilities where a model has them.

Legend: S draws, B rows, T tokens, P patches (T = P * K), K tokens per patch, Q starts, N chains, D width, V vocabulary,
F any further figures kept of each link of a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.errors import ConfigError
from nextvec.model.backbone import Trunk
from nextvec.model.cross_entropy import CHUNK_ELEMENTS
from nextvec.model.interface import LanguageModel, TokenProbabilities

BRANCHES = 2048  # chains grown in one pass: bounds memory, and fastest on 2 cores
SCORES = 1 << 22  # chains in one pass times patches that each can attend to: bounds the memory of a long context

Link = tuple[Tensor, ...]  # the drawn patch of each chain, and any figures kept with it


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
) -> Tensor:
    """S independent n-grams of `order` tokens after each context ids[:, :s], s = first, first + stride, .., T.

    Every model is asked at the same starts, whatever its patch size: `stride` is the K of the comparison. Where one
    patch is shorter than the n-gram, patches are chained, each drawn given the previous drawn one (spec 5): the model
    reads the text once, and each further patch of each draw costs one pass over all starts together.

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
    if order <= K:
        return model.draw_tokens(model.states(ids_BPK)[:, at_Q], draws, generator)[..., :order]
    state_BPD, trunk = model.trunk(ids_BPK)

    def grow(patch_BNK: Tensor, grown: Trunk, at_N: Tensor) -> tuple[Link, Trunk]:
        state_BND, grown = model.branch(patch_BNK, grown, at_N)
        return (model.draw_tokens(state_BND, 1, generator)[0],), grown

    heads = (model.draw_tokens(state_BPD[:, at_Q], draws, generator),)
    return _chain(heads, trunk, at_Q, order, grow)[0]


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

    def grow(token_BN1: Tensor, grown: Trunk, at_N: Tensor) -> tuple[Link, Trunk]:
        state_BND, grown = model.branch(token_BN1, grown, at_N)
        return tuple(part[0] for part in _draw(exact, model.vocab_size, state_BND, 1, generator)), grown

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
    grow: Callable[[Tensor, Trunk, Tensor], tuple[Link, Trunk]],
) -> Link:
    """Chains of the first links (S, B, Q, F), grown until their patches hold `order` tokens: each part (S, B, Q, order).

    grow: patches (B, N, K), what they are appended to, and the trunk position of each -> the next link, and the same
    with them. Chains are grown in groups that fit in memory: several draws of all starts, or some starts of one draw.
    """
    S, B, Q, K = heads_SBQF[0].shape
    patches = trunk.layers[0][0].shape[-2]
    room = max(1, min(BRANCHES, SCORES // patches) // B)  # chains of one row that are grown together
    across = []
    for starts in torch.arange(Q).split(room):
        down = []
        for draws in torch.arange(S).split(max(1, room // Q)):
            at_N = at_Q[starts].repeat(len(draws))  # N: the starts of one draw, then those of the next
            parts = [part[draws[:, None], :, starts].permute(2, 0, 1, 3).flatten(1, 2) for part in heads_SBQF]
            links, grown = [parts], trunk
            while K * len(links) < order:
                link, grown = grow(links[-1][0], grown, at_N)
                links.append(list(link))
            chain = [torch.cat(same, dim=-1)[..., :order] for same in zip(*links, strict=True)]
            down.append([part.unflatten(1, (len(draws), -1)).transpose(0, 1) for part in chain])
        across.append([torch.cat(same) for same in zip(*down, strict=True)])
    return tuple(torch.cat(same, dim=2) for same in zip(*across, strict=True))


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
        token_NS = torch.multinomial(p_NV, draws, replacement=True, generator=generator)
        parts.append((token_NS, log_NV.gather(-1, token_NS), p_NV.square().sum(-1, keepdim=True).expand(-1, draws)))
    shape = (*state_BND.shape[:-1], draws, 1)
    return tuple(torch.cat(same).view(shape).movedim(-2, 0) for same in zip(*parts, strict=True))
