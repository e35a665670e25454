"""Recall: what followed earlier in the text where the same two tokens stood, looked up by attention over single tokens.

A Transformer over tokens comes to do this by itself, in the course of training ("induction heads", Olsson et al. 2022,
arXiv 2209.11895). One over patches would have to find a pair of tokens wherever in a patch it lies (docs/recipe-history.md).
Legend: R texts, T tokens of a text, Q queries of a text, D width, H heads, E = 64 dimensions of one, V vocabulary, K patch size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.model.attention import causal_attention, prefix_attention
from nextvec.model.backbone import attend_branch
from nextvec.model.cache import KVCache
from nextvec.model.layers import embedded, rotary_dtype
from nextvec.model.packed import Kept

DIM = 64  # E
MOST_KEYS = 1 << 24  # numbers in the keys of the texts that are asked together, where no gradient is wanted
QUERY_CHUNKS = 4  # of a whole text's queries on a CPU, each against the tokens that its last one may see


class Memory(NamedTuple):
    """Of R texts: keys and values (R, H, T, E)."""

    keys: Tensor
    values: Tensor


class Tokens(NamedTuple):
    """Embeddings of unit size: of the whole vocabulary (V, D), and ids (...) -> (..., D); and the parameters they are made of."""

    table: Callable[[], Tensor]
    embed: Callable[[Tensor], Tensor]
    made_of: tuple[Tensor, ...]


def unit_tokens(embedding: nn.Embedding, eps: float) -> Tokens:
    """Of a table, brought to mean square 1."""
    weight = embedding.weight
    return Tokens(
        lambda: F.rms_norm(weight, weight.shape[-1:], eps=eps),
        lambda ids: embedded(embedding, ids, True, eps),
        (weight,),
    )


class Parts(NamedTuple):
    """ids (...) -> what single tokens bring to queries, as the last and as the one before (0 for the id -1), (..., H E) each;
    and to keys, likewise, and values, (..., 3 H E)."""

    last: Callable[[Tensor], Tensor]
    before: Callable[[Tensor], Tensor]
    tells: Callable[[Tensor], Tensor]


class Recall(nn.Module):
    """Attention whose keys are the two tokens before each token of a text, and whose values are the tokens:

        query_i = Q [e_i; e_(i-1)]   key_j = A [e_(j-1); e_(j-2)]
        answer_i = O [sum_j softmax_j(query_i . key_j / sqrt(E)) V e_j]

    with embeddings e of unit size, zero before the text. A = Q at the start: equal pairs then score some 10 (width 192), pairs
    equal in one token 5, others 0 give or take 1.4, so that they find each other from the first step. There are no positions.
    All of it hangs on ids alone, so where a vocabulary is smaller than the texts, or no gradient is wanted, products are with
    the vocabulary's embeddings, and the rest is looked up.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(2 * width, heads * DIM, bias=False)
        self.key = nn.Linear(2 * width, heads * DIM, bias=False)
        self.value = nn.Linear(width, heads * DIM, bias=False)
        self.out = nn.Linear(heads * DIM, width, bias=False)
        self._kept = Kept[tuple[Tensor, ...]]()

    def equal_at_start(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters that begin as copies of others: (copy, original)."""
        return [(self.key.weight, self.query.weight)]

    def parts(self, tokens: Tokens, count: int) -> Parts:
        """For texts of `count` tokens in all."""
        if not torch.is_grad_enabled():
            last_VF, before_VF, tells_VF = self._tables(tokens)
            return Parts(
                partial(F.embedding, weight=last_VF), before_VF.__getitem__, partial(F.embedding, weight=tells_VF)
            )
        if count > len(tokens.made_of[0]):
            with torch.autocast(self.key.weight.device.type, enabled=False):  # its gradient is a sum over many tokens
                looked_up = [partial(F.embedding, weight=each) for each in self._products(tokens.table())]
        else:
            looked_up = [partial(_product, tokens.embed, each) for each in self._matrices()]
        last, before, tells = looked_up
        return Parts(last, lambda ids: before(ids.clamp(min=0)).masked_fill((ids < 0)[..., None], 0.0), tells)

    def causal(self, ids_RT: Tensor, tokens: Tokens) -> Tensor:
        """Answers (R, T, D) for every token of whole texts, each of which sees itself and those before it."""
        parts = self.parts(tokens, ids_RT.numel())
        memory = self.memory(ids_RT, parts)
        query = self._split(parts.last(ids_RT) + _after(parts.before(ids_RT))).to(memory.keys.dtype)
        return self._answer(causal_attention(query, *memory))

    def memory(self, ids_RT: Tensor, parts: Parts) -> Memory:
        """Of texts of ids (R, T)."""
        last, before, value = parts.tells(ids_RT).chunk(3, dim=-1)
        keys, dtype = _after(last + _after(before)), rotary_dtype(value)
        return Memory(self._split(keys).to(dtype), self._split(value).to(dtype))

    def kept(self, cache: KVCache, ids_RT: Tensor, count: int, parts: Parts) -> Tensor:
        """`memory` of the texts (R, T) in a cache, (2, R, H, T, E), where only the `count` tokens just written are looked up.

        A view of the cache, which holds until a row of it is given to another text.
        """
        first_R = cache.lengths.to(ids_RT.device) * cache.text.shape[-1]
        place_Rn = first_R[:, None] + torch.arange(-2, count, device=ids_RT.device)
        last, before, value = parts.tells(ids_RT.gather(1, place_Rn.clamp(min=0))).chunk(3, dim=-1)
        there = (place_Rn >= 0)[..., None]
        key = last[:, 1:-1] * there[:, 1:-1] + before[:, :-2] * there[:, :-2]
        row_R1 = torch.arange(len(ids_RT), device=ids_RT.device)[:, None]
        for held, new in zip(cache.memory, (key, value[:, 2:]), strict=True):
            held[row_R1, :, place_Rn[:, 2:]] = new.unflatten(-1, (self.heads, DIM)).to(held.dtype)
        return cache.memory[..., : ids_RT.shape[1], :]

    def ask(self, memory: Memory, query_RNC: Tensor, seen_RQ: Tensor, apart: bool, all_seen: bool) -> Tensor:
        """Answers (R, N, D) to the queries (R, N, H E) of Q places of a text, equally many of each.

        seen: how many tokens of its text each place may see, at least one. apart: each place by itself, over exactly those, so
        that its bits depend on no other. all_seen: `sees_all`.
        """
        S = query_RNC.shape[1] // seen_RQ.shape[1]
        query = self._split(query_RNC).to(memory.keys.dtype)
        if all_seen and not apart:
            mixed = F.scaled_dot_product_attention(query, *memory)
        elif not apart:
            seen = seen_RQ[:1] if seen_RQ.stride(0) == 0 else seen_RQ  # of whole texts: one mask for all
            mixed = _attend(query, memory, seen.repeat_interleave(S, dim=1))
        else:
            mixed = torch.empty_like(query)
            for row, counts in enumerate(seen_RQ.tolist()):
                for place, count in enumerate(counts):
                    one = slice(row, row + 1), slice(None), slice(place * S, (place + 1) * S)
                    keys, values = (each[row : row + 1, :, :count] for each in memory)
                    mixed[one] = F.scaled_dot_product_attention(query[one], keys, values)
        return self._answer(mixed)

    def ask_branches(self, ids_BT: Tensor, own_BNm: Tensor, at_N: Tensor, parts: Parts) -> Tensor:
        """Answers (B, N, D) after tokens 0..at[n] of a text and m tokens of each branch's own, all of which it sees."""
        line_BNm = torch.cat(
            (last_ids(ids_BT, at_N.expand(len(ids_BT), -1) + 1), own_BNm), dim=-1
        )  # two of the text, its own
        last, before, value = parts.tells(line_BNm.clamp(min=0)).chunk(3, dim=-1)
        key = last[:, :, 1:-1] + before[:, :, :-2] * (line_BNm[:, :, :-2, None] >= 0)
        own = [
            (self._split(key[:, :, place]), self._split(value[:, :, place + 2])) for place in range(own_BNm.shape[-1])
        ]
        memory, hidden_NT = (
            self.memory(ids_BT, parts),
            torch.arange(ids_BT.shape[1], device=at_N.device) > at_N[:, None],
        )
        query = self._split(queries(line_BNm[:, :, -2:], parts))
        return self._answer(attend_branch(query, (memory.keys, memory.values), own, hidden_NT))

    def texts_at_once(self, tokens: int) -> int:
        """Texts of so many tokens that are asked together where no gradient is wanted."""
        return max(1, MOST_KEYS // (tokens * self.heads * DIM))

    def _split(self, x: Tensor) -> Tensor:
        """(R, T, H * E) -> (R, H, T, E)."""
        return x.unflatten(-1, (self.heads, DIM)).transpose(1, 2)

    def _answer(self, mixed_RHQE: Tensor) -> Tensor:
        return self.out(mixed_RHQE.transpose(1, 2).flatten(-2).to(self.out.weight.dtype))

    def _matrices(self) -> tuple[Tensor, ...]:
        """From one embedding to its parts of queries, (H E, D) twice, and of keys and values (3 H E, D)."""
        last, before = self.query.weight.chunk(2, dim=1)
        return last, before, torch.cat((*self.key.weight.chunk(2, dim=1), self.value.weight))

    def _products(self, e_VD: Tensor) -> tuple[Tensor, ...]:
        """Parts of all tokens, (V, H E) twice and (V, 3 H E)."""
        return tuple(F.linear(e_VD, matrix) for matrix in self._matrices())

    def _tables(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """Parts of all tokens, as `_products`, the second with a row of 0 for the id -1; made again after a change of weights."""

        def make() -> tuple[Tensor, ...]:
            last, before, tells = self._products(tokens.table())
            return last, F.pad(before, (0, 0, 0, 1)), tells

        return self._kept.of([*tokens.made_of, self.query.weight, self.key.weight, self.value.weight], make)


def queries(last_Nn: Tensor, parts: Parts) -> Tensor:
    """(..., H E) of the last ids (..., n), of which the last two count; -1 for none."""
    return parts.last(last_Nn[..., -1]) + parts.before(last_Nn[..., -2])


def last_ids(ids_RT: Tensor, seen_RQ: Tensor, count: int = 2, all_seen: bool = False) -> Tensor:
    """The last `count` of the first `seen` ids, (R, Q, count), the last one last; -1 for those before a text begins."""
    if all_seen and ids_RT.shape[1] >= count:
        return ids_RT[:, None, -count:].expand(-1, seen_RQ.shape[1], -1)
    ids = [
        ids_RT.gather(1, (seen_RQ - back).clamp(min=0)).masked_fill(seen_RQ < back, -1) for back in range(count, 0, -1)
    ]
    return torch.stack(ids, dim=-1)


def _product(embed: Callable[[Tensor], Tensor], matrix: Tensor, ids: Tensor) -> Tensor:
    return F.linear(embed(ids), matrix)


def _after(x_RTC: Tensor) -> Tensor:
    """Moved by one token, zero at the first."""
    return F.pad(x_RTC[:, :-1], (0, 0, 1, 0))


def sees_all(seen_RQ: Tensor, ids_RT: Tensor) -> bool:
    """Whether every place sees its whole text, as where single texts go on. Asked on a CPU alone, where that costs no wait."""
    return seen_RQ.device.type == "cpu" and int(seen_RQ.min()) >= ids_RT.shape[1]


def _attend(query_RHQE: Tensor, memory: Memory, seen_RQ: Tensor) -> Tensor:
    """Mixed values (R, H, Q, E); `seen` of each text, or one row for all.

    On a CPU long runs of queries go in pieces, over no more tokens than they see.
    """
    if len(seen_RQ) == 1 and torch.is_grad_enabled():
        mixed_RHQE = prefix_attention(query_RHQE, *memory, seen_RQ[0])
        if mixed_RHQE is not None:
            return mixed_RHQE
    size, on_cpu = query_RHQE.shape[2], query_RHQE.device.type == "cpu"
    step = -(-size // QUERY_CHUNKS) if on_cpu and size > 16 * QUERY_CHUNKS else size
    mixed = []
    for start in range(0, size, step):
        seen = seen_RQ[:, start : start + step]
        longest = int(seen.max()) if on_cpu else memory.keys.shape[2]
        keys, values = (each[:, :, :longest] for each in memory)
        visible = (torch.arange(longest, device=seen.device) < seen[..., None])[:, None]
        mixed.append(F.scaled_dot_product_attention(query_RHQE[:, :, start : start + step], keys, values, visible))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)
