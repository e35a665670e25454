"""Encode a stream of documents in order on several processes, with a bounded number of them in memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nextvec.errors import DataError
from nextvec.text.tokenizer import TextTokenizer

BATCH_CHARACTERS = 1 << 19  # text handed to a process at a time
BATCH_DOCUMENTS = 2048
SMALL = 1 << 20  # characters; below this, starting processes costs more than it saves

T = TypeVar("T")


class Encoded(NamedTuple):
    """Ids of several documents one after the other, each followed by end-of-text; `lengths` counts it."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]


def encode_documents(
    pairs: Iterable[tuple[str, T]], tokenizer: TextTokenizer, dtype: str, workers: int
) -> Generator[tuple[list[T], Encoded]]:
    """Encode (text, label) pairs; yields labels and ids in the order of the input, whatever the number of workers.

    A corpus below 1 MiB of text is encoded here, without processes, and with 0 workers any. Raises DataError when a process
    dies.
    """
    batches = _batches(pairs)
    if workers == 0:
        for texts, labels in batches:
            yield labels, encode(texts, tokenizer, dtype)
        return
    first: list[tuple[list[str], list[T]]] = []
    size = 0
    for batch in batches:
        first.append(batch)
        size += sum(map(len, batch[0]))
        if size > SMALL:
            break
    else:
        for texts, labels in first:
            yield labels, encode(texts, tokenizer, dtype)
        return
    yield from _parallel(_chain(first, batches), tokenizer, dtype, workers)


def encode(texts: list[str], tokenizer: TextTokenizer, dtype: str) -> Encoded:
    """Ids of `texts` as one array of `dtype`, an end-of-text after each."""
    little = np.dtype(dtype).newbyteorder("<")
    end = np.array([tokenizer.eos_id], dtype=little)
    pieces = [tokenizer.split(text) for text in texts]
    ids = _piece_ids([piece for parts in pieces for piece in parts], tokenizer, little)
    documents = [[*islice(ids, len(parts)), end] for parts in pieces]
    lengths = np.array([sum(map(len, parts)) for parts in documents], dtype=np.int64)
    return Encoded(np.concatenate([part for parts in documents for part in parts]), lengths)


def _piece_ids(pieces: list[str], tokenizer: TextTokenizer, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """Ids of each piece. Few pieces at a time: the library holds over 100 bytes a token while it encodes."""
    first, size = 0, 0
    for last, piece in enumerate(pieces, start=1):
        size += len(piece)
        if size >= SMALL or last == len(pieces):
            yield from (np.array(ids, dtype=dtype) for ids in tokenizer.encode_batch(pieces[first:last]))
            first, size = last, 0


def _parallel(
    batches: Iterable[tuple[list[str], list[T]]], tokenizer: TextTokenizer, dtype: str, workers: int
) -> Iterator[tuple[list[T], Encoded]]:
    # Fresh processes: a fork of a process that holds threads (torch, tokenizers) can hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer, dtype))
    waiting: deque[tuple[list[T], Future[Encoded]]] = deque()
    try:
        for texts, labels in batches:
            waiting.append((labels, pool.submit(_work, texts)))
            if len(waiting) > 2 * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process died, most likely for lack of memory: run the same command again with fewer "
            '--workers (a script of your own must call prepare under if __name__ == "__main__")'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque[tuple[list[T], Future[Encoded]]]) -> tuple[list[T], Encoded]:
    labels, future = waiting.popleft()
    return labels, future.result()


def _batches(pairs: Iterable[tuple[str, T]]) -> Iterator[tuple[list[str], list[T]]]:
    texts: list[str] = []
    labels: list[T] = []
    size = 0
    for text, label in pairs:
        texts.append(text)
        labels.append(label)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield texts, labels
            texts, labels, size = [], [], 0
    if texts:
        yield texts, labels


def _chain(first: list[T], rest: Iterator[T]) -> Iterator[T]:
    """`first` then `rest`, dropping what has been handed on."""
    while first:
        yield first.pop(0)
    yield from rest


_job: tuple[TextTokenizer, str] | None = None  # set once in each worker process


def _start_worker(tokenizer: TextTokenizer, dtype: str) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process: the processes already fill the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _job = (tokenizer, dtype)


def _leave_with_parent() -> None:
    """A parent that was killed cannot stop its workers: they watch it themselves."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> Encoded:
    assert _job is not None
    return encode(texts, *_job)
