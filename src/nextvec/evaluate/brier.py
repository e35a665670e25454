"""BrierLM of any language model over whole documents: one evaluator, one set of positions for CALM and baseline.

Protocol `documents-N`: each document alone, in windows of N tokens at stride N/2; every position that starts a patch,
from the second patch on, is scored once, with at least min(position, N/2) tokens of context. Never scored: the first
patch, padding, and n-grams that leave the document (its end-of-text token is a real token).

Legend: S draws, B windows in a batch, T context tokens, Q starts, N scored starts of all windows, n order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.ngrams import check_stride, draw_ngrams
from nextvec.model.interface import LanguageModel
from nextvec.scoring.brier import MAX_ORDER, BrierResult, Estimator, Protocol, brier_scores, summarise

Document = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Window:
    """A piece of one document and the starts scored in it, as offsets in tokens from `start`."""

    document: int
    start: int
    first: int  # first scored start
    last: int  # last scored start: the context that the window needs


def evaluate_brier(
    model: LanguageModel,
    documents: Sequence[Document],
    *,
    context_tokens: int,
    stride: int,
    draws: int,
    generator: torch.Generator,
    tokenizer_hash: str,
    estimator: Estimator = "all_pairs",
    order: int = MAX_ORDER,
    batch_rows: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> BrierResult:
    """Brier-1..order and BrierLM under the protocol `documents-N`, N = context_tokens.

    Args: documents: token ids of each document, its end-of-text token included; stride: tokens between two starts,
    the K of the comparison and a multiple of the model's own patch size; draws: S per position; generator: on the
    model's device, and with batch_rows all that the result depends on beside the arguments; order: longest n-gram,
    1..4; batch_rows: windows per pass; progress: called with (windows done, windows in all).

    The model is put in evaluation mode for the call. Raises ConfigError for a context, stride, order or number of
    draws that cannot work, DataError when no document is long enough to score.
    """
    check_stride(stride, model.patch_size)
    if draws < 2:
        raise ConfigError(f"draws must be at least 2 per position; got {draws}")
    if not 1 <= order <= MAX_ORDER:
        raise ConfigError(f"order must be between 1 and {MAX_ORDER}; got {order}")
    windows = plan_windows([len(document) for document in documents], context_tokens, stride)
    if not windows:
        longest = max((len(document) for document in documents), default=0)
        raise DataError(
            f"nothing can be scored: no document is longer than the first patch of {stride} tokens, which is context "
            f"only; got {len(documents)} documents of at most {longest} tokens: give longer ones"
        )
    values, valid, owner = [], [], []
    done = 0
    with _evaluation_mode(model):
        for batch in batches(windows, batch_rows):
            context_BT, target_BQn, valid_BQn = _tensors(documents, batch, stride, order)
            draws_SBQn = draw_ngrams(
                model, context_BT.to(model.device), draws, order, generator, stride=stride, first=batch[0].first
            )
            score_Nn = brier_scores(
                draws_SBQn.flatten(1, 2),
                target_BQn.flatten(0, 1).to(model.device),
                valid_BQn.flatten(0, 1).to(model.device),
                estimator,
            )
            values.append(score_Nn.cpu())
            valid.append(valid_BQn.flatten(0, 1))
            owner.append(torch.tensor([w.document for w in batch]).repeat_interleave(valid_BQn.shape[1]))
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    valid_Nn = torch.cat(valid)
    if not bool(valid_Nn[:, -1].any()):
        raise DataError(
            f"nothing can be scored at order {order}: no document has {order} tokens after its first patch of "
            f"{stride}; give longer documents or a smaller order"
        )
    protocol = Protocol(
        name=f"documents-{context_tokens}",
        tokenizer_hash=tokenizer_hash,
        context_tokens=context_tokens,
        positions="patch_starts",
        stride=stride,
        draws=draws,
        estimator=estimator,
        decode="argmax",
        documents=len(documents),
        documents_hash=hash_documents(documents),
        seed=generator.initial_seed(),
    )
    return summarise(torch.cat(values), valid_Nn, torch.cat(owner), protocol)


def plan_windows(lengths: Sequence[int], context_tokens: int, stride: int) -> list[Window]:
    """All windows with something to score, in order of document and start.

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


def batches(windows: Sequence[Window], rows: int) -> Iterator[list[Window]]:
    """Windows that score from the same offset together, longest first, so that padding is small."""
    for first in sorted({window.first for window in windows}):
        group = sorted((w for w in windows if w.first == first), key=lambda w: (-w.last, w.document, w.start))
        for begin in range(0, len(group), rows):
            yield group[begin : begin + rows]


def hash_documents(documents: Sequence[Document]) -> str:
    """Sha256 of all token ids and document lengths, independent of the integer type."""
    digest = hashlib.sha256()
    for document in documents:
        ids = np.ascontiguousarray(document, dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()


def _tensors(
    documents: Sequence[Document], batch: Sequence[Window], stride: int, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Context (B, T), targets (B, Q, n) and where they may be scored (B, Q, n); T is the largest `last` of the batch.

    A row that ends early is filled with id 0 after its end: causal models do not see it from before, and no
    n-gram that touches it is valid.
    """
    first, context = batch[0].first, max(window.last for window in batch)
    ids_BT = np.zeros((len(batch), context + order), dtype=np.int64)
    real_BT = np.zeros((len(batch), context + order), dtype=bool)
    for row, window in enumerate(batch):
        piece = documents[window.document][window.start : window.start + context + order]
        ids_BT[row, : len(piece)] = piece
        real_BT[row, : len(piece)] = True
    at_Qn = np.arange(first, context + 1, stride)[:, None] + np.arange(order)
    return (
        torch.from_numpy(ids_BT[:, :context]),
        torch.from_numpy(ids_BT[:, at_Qn]),
        torch.from_numpy(np.logical_and.accumulate(real_BT[:, at_Qn], axis=-1)),
    )


@contextmanager
def _evaluation_mode(model: object) -> Iterator[None]:
    """Puts a module in evaluation mode and takes it back to what it was."""
    if not isinstance(model, nn.Module):
        yield
        return
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
