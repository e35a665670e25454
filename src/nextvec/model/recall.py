"""Recall: what followed earlier in the text where the same two tokens stood, looked up by attention over single tokens.

A Transformer over tokens comes to do this by itself, in the course of training ("induction heads", Olsson et al. 2022,
arXiv 2209.11895). One over patches would have to find a pair of tokens wherever in a patch it lies (docs/recipe.md).
Legend: R texts, T tokens of a text, Q queries of a text, D width, H heads, E = 64 dimensions of one, V vocabulary, K patch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.model.backbone import attend_branch
from nextvec.model.packed import version

DIM = 64  # E
MOST_KEYS = 1 << 24  # numbers in the keys of the texts that are asked together, where no gradient is wanted
QUERY_CHUNKS = 4  # of a whole text's queries on a CPU, each against the tokens that its last one may see


class Memory(NamedTuple):
    """Of R texts: keys and values (R, H, T, E)."""

    keys: Tensor
    values: Tensor


class Tokens(NamedTuple):
    """Embeddings of unit size: ids (...) -> (..., D); and the parameters that they are made of."""

    embed: Callable[[Tensor], Tensor]
    vocab_size: int
    made_of: tuple[Tensor, ...]


class Recall(nn.Module):
    """Attention whose keys are the two tokens before each token of a text, and whose values are the tokens:

        query_i = Q [e_i; e_(i-1)]   key_j = A [e_(j-1); e_(j-2)]
        answer_i = O [sum_j softmax_j(query_i . key_j / sqrt(E)) V e_j]

    with embeddings e of unit size, zero before the text. A = Q at the start: equal pairs then score some 8 and others 0, and
    find each other from the first step. There are no positions.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(2 * width, heads * DIM, bias=False)
        self.key = nn.Linear(2 * width, heads * DIM, bias=False)
        self.value = nn.Linear(width, heads * DIM, bias=False)
        self.out = nn.Linear(heads * DIM, width, bias=False)
        self._tables: tuple[object, Tensor] | None = None

    def equal_at_start(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters that begin as copies of others: (copy, original)."""
        return [(self.key.weight, self.query.weight)]

    def causal(self, e_RTD: Tensor) -> Tensor:
        """Answers (R, T, D) for every token of whole texts, each of which sees itself and those before it as values."""
        pairs = pairs_of(e_RTD)
        keys, values = self._split(self.key(_after(pairs))), self._split(self.value(e_RTD))
        mixed = F.scaled_dot_product_attention(self._split(self.query(pairs)), keys, values, is_causal=True)
        return self._answer(mixed)

    def memory(self, ids_RT: Tensor, tokens: Tokens) -> Memory:
        """Of texts of ids (R, T). Without gradients, from tables of what each token brings to keys and values."""
        if torch.is_grad_enabled():
            e_RTD = tokens.embed(ids_RT)
            return Memory(self._split(self.key(_after(pairs_of(e_RTD)))), self._split(self.value(e_RTD)))
        last, before, value = F.embedding(ids_RT, self._table(tokens)).chunk(3, dim=-1)
        return Memory(self._split(_after(last) + _after(_after(before))), self._split(value))

    def ask(self, memory: Memory, pair_RQSD: Tensor, seen_RQ: Tensor, apart: bool = False) -> Tensor:
        """Answers (R, Q, S, D) to S pairs at each of Q places of a text: the last token's embedding and the one's before, 2 D.

        seen: how many tokens of its text each place may see, at least one. apart: each place by itself, over exactly those, so
        that its bits depend on no other.
        """
        _, Q, S, _ = pair_RQSD.shape
        query = self._split(self.query(pair_RQSD.flatten(1, 2))).to(memory.keys.dtype)
        if not apart:
            seen = seen_RQ[:1] if seen_RQ.stride(0) == 0 else seen_RQ  # of whole texts: one mask for all
            mixed = _attend(query, memory, seen.repeat_interleave(S, dim=1))
        else:
            mixed = torch.empty_like(query)
            for row, counts in enumerate(seen_RQ.tolist()):
                for place, count in enumerate(counts):
                    one = slice(row, row + 1), slice(None), slice(place * S, (place + 1) * S)
                    keys, values = (each[row : row + 1, :, :count] for each in memory)
                    mixed[one] = F.scaled_dot_product_attention(query[one], keys, values)
        return self._answer(mixed.to(pair_RQSD.dtype)).unflatten(1, (Q, S))

    def ask_branches(self, ids_BT: Tensor, own_BNm: Tensor, at_N: Tensor, tokens: Tokens) -> Tensor:
        """Answers (B, N, D) after tokens 0..at[n] of a text and m tokens of each branch's own, all of which it sees."""
        reached = torch.stack([(at_N - back).clamp(min=0) for back in (1, 0)], dim=-1)  # (N, 2)
        line = tokens.embed(torch.cat((ids_BT[:, reached], own_BNm), dim=-1))  # (B, N, m + 2, D)
        line = torch.cat((line[:, :, :1] * (at_N > 0)[:, None, None], line[:, :, 1:]), dim=2)
        pairs = torch.cat((line[:, :, 1:], line[:, :, :-1]), dim=-1)
        memory, hidden_NT = (
            self.memory(ids_BT, tokens),
            torch.arange(ids_BT.shape[1], device=at_N.device) > at_N[:, None],
        )
        key = [self._split(self.key(pairs[:, :, place])) for place in range(own_BNm.shape[-1])]
        value = [self._split(self.value(line[:, :, place + 2])) for place in range(own_BNm.shape[-1])]
        query = self._split(self.query(pairs[:, :, -1]))
        mixed = attend_branch(query, (memory.keys, memory.values), list(zip(key, value, strict=True)), hidden_NT)
        return self._answer(mixed)

    def texts_at_once(self, tokens: int) -> int:
        """Texts of so many tokens that are asked together where no gradient is wanted."""
        return max(1, MOST_KEYS // (tokens * self.heads * DIM))

    def _split(self, x: Tensor) -> Tensor:
        """(R, T, H * E) -> (R, H, T, E)."""
        return x.unflatten(-1, (self.heads, DIM)).transpose(1, 2)

    def _answer(self, mixed_RHQE: Tensor) -> Tensor:
        return self.out(mixed_RHQE.transpose(1, 2).flatten(-2))

    def _table(self, tokens: Tokens) -> Tensor:
        """(V, 3 H E): what a token brings to keys as the last and as the one before, and its value; made again after a change."""
        weights = *tokens.made_of, self.key.weight, self.value.weight
        state = tuple((version(weight), weight.dtype, weight.device) for weight in weights)
        if self._tables is None or self._tables[0] != state:
            with torch.no_grad(), torch.autocast(self.key.weight.device.type, enabled=False):
                e_VD = tokens.embed(torch.arange(tokens.vocab_size, device=self.key.weight.device))
                last, before = self.key.weight.chunk(2, dim=1)
                table = torch.cat([F.linear(e_VD, matrix) for matrix in (last, before, self.value.weight)], dim=-1)
            self._tables = (state, table)
        return self._tables[1]


def pairs_of(e_RTD: Tensor) -> Tensor:
    """Of every token its embedding and the one's before it, (R, T, 2 D)."""
    return torch.cat((e_RTD, _after(e_RTD)), dim=-1)


def _after(x_RTC: Tensor) -> Tensor:
    """Moved by one token, zero at the first."""
    return F.pad(x_RTC[:, :-1], (0, 0, 1, 0))


def _attend(query_RHQE: Tensor, memory: Memory, seen_RQ: Tensor) -> Tensor:
    """Mixed values (R, H, Q, E); `seen` of each text, or one row for all.

    On a CPU long runs of queries go in pieces, over no more tokens than they see.
    """
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
