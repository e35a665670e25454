"""What heads with recall share: looking up in the text of each state what followed the tokens before a place (recall.py).

Legend: M states, S draws, R texts, Q states of one text, K tokens per patch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.model.grams import LONGEST, Grams, with_grams
from nextvec.model.recall import Memory, Parts, Recall, Tokens, last_ids, queries, sees_all
from nextvec.model.text_states import States, TextStates


class Asking(NamedTuple):
    """States that are about to look tokens up: Q of each of R texts."""

    memory: Memory
    parts: Parts
    seen: Tensor  # (R, Q)
    tail: Tensor  # (R * Q, 3), the last ids that a state has seen; -1 for none
    apart: bool
    all_seen: bool  # every state has seen its whole text


class Recalls:
    """For heads to inherit: `recall`, None without, and `grams`, None without. A head with them needs `TextStates`."""

    recall: Recall | None
    grams: Grams | None

    def tokens(self) -> Tokens:
        """The embeddings that recall is made of."""
        raise NotImplementedError

    def askings(self, state_ND: States) -> Iterator[tuple[slice, Asking | None]]:
        """Of the M states in order, some at a time where there are many texts; all at once where nothing is looked up."""
        if self.recall is None:
            yield slice(None), None
            return
        assert isinstance(state_ND, TextStates), "a head with recall needs states that hold their text"
        text_RT, seen_RQ = state_ND.by_text()
        parts = self.recall.parts(self.tokens(), text_RT.numel())
        whole = torch.is_grad_enabled() or state_ND.apart  # apart: pieces of a tile would depend on its longest text
        size = len(text_RT) if whole else self.recall.texts_at_once(text_RT.shape[1])
        done = 0
        for text, seen in zip(text_RT.split(size), seen_RQ.split(size), strict=True):
            all_seen = sees_all(seen, text)
            tail = last_ids(text, seen, LONGEST, all_seen).flatten(0, 1)
            states = slice(done, done + len(tail))
            if state_ND.memory is None:
                memory = self.recall.memory(text, parts)
            else:
                texts = slice(done // seen.shape[1], done // seen.shape[1] + len(text))
                memory = Memory(*state_ND.memory[:, texts])
            yield states, Asking(memory, parts, seen, tail, state_ND.apart, all_seen)
            done = states.stop

    def answers(self, asking: Asking, last_MS3: Tensor) -> Tensor:
        """What is found where these were the last ids (M, S, 3) of each state, (M, S, D)."""
        return with_grams(self.grams, self.answers_to(asking, queries(last_MS3, asking.parts)), last_MS3)

    def answers_to(self, asking: Asking, query_MSC: Tensor) -> Tensor:
        """What is found by S queries (M, S, H E) of each state, (M, S, D)."""
        assert self.recall is not None
        query_RNC = query_MSC.reshape(len(asking.seen), -1, query_MSC.shape[-1])
        found_RND = self.recall.ask(asking.memory, query_RNC, asking.seen, asking.apart, asking.all_seen)
        return found_RND.view(*query_MSC.shape[:2], -1)

    def answers_of(self, asking: Asking, state_G: Tensor, query_GC: Tensor) -> Tensor:
        """What is found by queries (G, C) of these states, in ascending order, as many of each as there are: (G, D)."""
        assert self.recall is not None
        texts, states = asking.seen.shape
        text_G = state_G // states
        count_R = text_G.bincount(minlength=texts)
        place_G = torch.arange(len(state_G), device=state_G.device) - (count_R.cumsum(0) - count_R)[text_G]
        query_RNC = query_GC.new_zeros(texts, int(count_R.max()), query_GC.shape[-1])
        query_RNC[text_G, place_G] = query_GC
        seen_RN = asking.seen.new_ones(query_RNC.shape[:2])  # of places that are filled up: one token
        seen_RN[text_G, place_G] = asking.seen.flatten()[state_G]
        found_RND = self.recall.ask(asking.memory, query_RNC, seen_RN, asking.apart, asking.all_seen)
        return found_RND[text_G, place_G]

    def answers_along(self, state_ND: States, ids_MK: Tensor) -> Tensor | None:
        """What every place of whole patches finds, (M, K, D); None where nothing is looked up."""
        found = []
        for states, asking in self.askings(state_ND):
            if asking is None:
                return None
            line = torch.cat((asking.tail, ids_MK[states, :-1]), dim=1)
            found.append(self.answers(asking, line.unfold(1, LONGEST, 1)))
        return torch.cat(found)


def and_then(last_MS3: Tensor, ids_MS: Tensor) -> Tensor:
    """The last three ids after one more, (M, S, 3), of those (M, S or 1, 3) before."""
    return torch.cat((last_MS3[..., 1:].expand(*ids_MS.shape, -1), ids_MS[..., None]), dim=-1)
