"""Protocols: how documents become windows, and which offsets of a window start an n-gram.

`documents-N`: each document alone, in windows of N tokens at stride N/2; every start is scored once, with at least
min(start, N/2) tokens of context (less the shift, for shifted passes).
`wikitext103-N`: the authors' handling of their evaluation file: documents, each with the special tokens that its
tokenizer puts around a text, one after the other, cut into blocks of N tokens; what is left over is dropped. A block
is read alone, across the documents in it, and an n-gram may end in another document than it began in.

Positions `patch_starts`: multiples of K from the second patch of a document or block on. `every_offset`: the same in K
passes, the text shifted by 0..K-1 tokens, so that every offset from the second patch on is scored once. Contexts are
whole patches in both, for every model, so that models of several patch sizes are asked the same.

Legend: T context tokens, B windows in a batch, Q starts, n order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nextvec.errors import ConfigError, DataError

Document = npt.NDArray[np.integer[Any]]
Layout = Literal["documents", "wikitext103"]
Positions = Literal["patch_starts", "every_offset"]
BASELINE_STRIDE = 4  # tokens between scored positions of a token baseline: K of the reference CALM
WIKITEXT_BLOCKS = (1024, 2048, 8192)  # tokens: the authors' evaluation script, their training-time baseline, and CALM


@dataclass(frozen=True)
class Window:
    """A piece of one text and the starts scored in it, as offsets in tokens from `start`."""

    document: int  # index of the text: a document, or a block
    start: int
    first: int  # first scored start
    last: int  # last scored start: the context that the window needs


@dataclass(frozen=True)
class Plan:
    """Texts that no context and no n-gram leaves, windows on them, and the document that each token belongs to."""

    name: str  # of the protocol
    texts: Sequence[Document]
    windows: list[Window]
    owners: list[npt.NDArray[np.int64]] | None = None  # per text and token; None: text i is document i

    def owner(self, window: Window, start: int) -> int:
        """Index of the document of the first token after `start` tokens of the window."""
        if self.owners is None:
            return window.document
        return int(self.owners[window.document][window.start + start])


def parse_protocol(name: str) -> tuple[Layout, int]:
    """`documents-512` -> ("documents", 512). Raises ConfigError for anything else than a protocol's name."""
    layout, _, tokens = name.rpartition("-")
    if layout in get_args(Layout) and tokens.isdecimal() and int(tokens) > 0:
        check_block(layout, int(tokens))
        return layout, int(tokens)  # type: ignore[return-value]
    known = ", ".join(f"wikitext103-{block}" for block in WIKITEXT_BLOCKS)
    raise ConfigError(f"protocol must be documents-N with N tokens, or one of {known}; got {name!r}")


def check_block(layout: str, tokens: int) -> None:
    """Raises ConfigError for a block length that the authors do not use."""
    if layout == "wikitext103" and tokens not in WIKITEXT_BLOCKS:
        raise ConfigError(f"wikitext103 has blocks of {', '.join(map(str, WIKITEXT_BLOCKS))} tokens; got {tokens}")


def plan(documents: Sequence[Document], layout: Layout, context_tokens: int, stride: int, positions: Positions) -> Plan:
    """The windows of a protocol. `stride` is K of the comparison.

    Raises ConfigError for an unknown name or a context that K does not fit, DataError where nothing can be scored.
    """
    for what, value, known in (("layout", layout, Layout), ("positions", positions, Positions)):
        if value not in get_args(known):
            raise ConfigError(f"{what} must be one of {', '.join(get_args(known))}; got {value!r}")
    shifts = range(stride if positions == "every_offset" else 1)
    if layout == "wikitext103":
        return _plan_blocks(documents, context_tokens, stride, shifts)
    windows: list[Window] = []
    for shift in shifts:
        lengths = [len(document) - shift for document in documents]
        for w in plan_windows(lengths, context_tokens, stride):
            windows.append(Window(w.document, w.start + shift, w.first, w.last))
    if not windows:
        longest = max((len(document) for document in documents), default=0)
        raise DataError(
            f"nothing can be scored: no document is longer than the first patch of {stride} tokens, which is context "
            f"only; got {len(documents)} documents of at most {longest} tokens: give longer ones"
        )
    return Plan(f"documents-{context_tokens}", documents, windows)


def plan_windows(lengths: Sequence[int], context_tokens: int, stride: int) -> list[Window]:
    """Windows of the protocol `documents-N` with something to score, in order of document and start.

    The first window of a document scores its starts from the second patch on; each later one, N/2 further, scores
    its second half only. Raises ConfigError unless half a window is a positive multiple of the stride.
    """
    if context_tokens < 2 * stride or context_tokens % (2 * stride):
        best = max(1, round(context_tokens / (2 * stride))) * 2 * stride
        raise ConfigError(
            f"context-tokens must be a multiple of {2 * stride}, twice the stride of {stride}, since windows overlap "
            f"by half; got {context_tokens}, nearest {best}"
        )
    hop = context_tokens // 2
    windows = []
    for document, length in enumerate(lengths):
        for start in range(0, max(length, 1), hop):
            first = hop if start else stride
            last = (min(context_tokens, length - start) - 1) // stride * stride
            if last < first:
                break
            windows.append(Window(document, start, first, last))
    return windows


def _plan_blocks(documents: Sequence[Document], tokens: int, stride: int, shifts: range) -> Plan:
    check_block("wikitext103", tokens)
    name = f"wikitext103-{tokens}"
    if tokens % stride:
        raise ConfigError(f"{name} needs a stride that divides its blocks of {tokens} tokens; got {stride}")
    total = sum(len(document) for document in documents)
    blocks = total // tokens
    if blocks == 0:
        raise DataError(
            f"{name} cuts the text into blocks of {tokens} tokens and the text is shorter than one: got {total} tokens "
            f"in {len(documents)} documents; give more text, or use a protocol documents-N"
        )
    stream = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    edges = list(pairwise(range(0, blocks * tokens + 1, tokens)))
    windows = [
        Window(block, shift, stride, (tokens - shift - 1) // stride * stride)
        for shift in shifts
        for block in range(blocks)
    ]
    return Plan(name, [stream[a:b] for a, b in edges], windows, [owner[a:b] for a, b in edges])


def batches(windows: Sequence[Window], rows: int) -> Iterator[list[Window]]:
    """Windows that score from the same offset together, longest first, so that padding is small."""
    for first in sorted({window.first for window in windows}):
        group = sorted((w for w in windows if w.first == first), key=lambda w: (-w.last, w.document, w.start))
        for begin in range(0, len(group), rows):
            yield group[begin : begin + rows]


@dataclass(frozen=True)
class Batch:
    """Windows as tensors. `ids` goes n tokens beyond the last start, as far as its target."""

    ids: Tensor  # (B, context + n)
    starts: Tensor  # (Q,), tokens of context before each start
    target: Tensor  # (B, Q, n)
    valid: Tensor  # (B, Q, n), where an order may be scored
    owner: Tensor  # (B * Q,), document of each start

    @property
    def context(self) -> Tensor:
        """What a model may read: up to the last start."""
        return self.ids[:, : int(self.starts[-1])]


def tensors(plan: Plan, windows: Sequence[Window], stride: int, order: int) -> Batch:
    """One batch of windows that begin to score at the same offset.

    A row that ends early is filled with id 0 after its end: causal models do not see it from before, and no
    n-gram that touches it is valid.
    """
    first, context = windows[0].first, max(window.last for window in windows)
    ids_BT = np.zeros((len(windows), context + order), dtype=np.int64)
    real_BT = np.zeros((len(windows), context + order), dtype=bool)
    start_Q = np.arange(first, context + 1, stride)
    owner_BQ = np.full((len(windows), len(start_Q)), -1, dtype=np.int64)  # -1: after the row's end
    for row, window in enumerate(windows):
        piece = plan.texts[window.document][window.start : window.start + context + order]
        ids_BT[row, : len(piece)] = piece
        real_BT[row, : len(piece)] = True
        starts = start_Q[start_Q <= window.last]
        owner_BQ[row, : len(starts)] = [plan.owner(window, int(start)) for start in starts]
    at_Qn = start_Q[:, None] + np.arange(order)
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(start_Q),
        torch.from_numpy(ids_BT[:, at_Qn]),
        torch.from_numpy(np.logical_and.accumulate(real_BT[:, at_Qn], axis=-1)),
        torch.from_numpy(owner_BQ).flatten(),
    )


def hash_documents(documents: Sequence[Document]) -> str:
    """Sha256 of all token ids and document lengths, independent of the integer type."""
    digest = hashlib.sha256()
    for document in documents:
        ids = np.ascontiguousarray(document, dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()
