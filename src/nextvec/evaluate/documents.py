"""The documents of an evaluation: a shard directory, or text files read and tokenised here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np

from nextvec.errors import DataError
from nextvec.evaluate.windows import Document, Layout
from nextvec.text.readers import documents, expand
from nextvec.text.shards import TokenShards
from nextvec.text.tokenizer import Tokenizer

ENCODED_TOGETHER = 64  # texts per call of the tokenizer


def read_documents(
    source: str,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    text_key: str = "text",
    layout: Layout = "documents",
) -> list[Document]:
    """Token ids of each document of `source`, its end-of-text token included, in order; the first `limit` of them.

    layout `wikitext103`: with the special tokens that the tokenizer itself puts around a text instead, as the authors
    read their evaluation file; it needs the text, since shards hold documents without them.

    `source`: a shard directory made with this tokenizer, or anything `nextvec prepare` reads. A text without a token
    is left out, as in preparation. Raises DataError for a missing source, another tokenizer, a bad line, or when
    nothing is left.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the number of documents must be at least 1; got {limit}")
    found = list(islice(_documents(source, tokenizer, text_key, layout), limit))
    if not found:
        raise DataError(f"{source} holds no text: there is nothing to evaluate")
    return found


def _documents(source: str, tokenizer: Tokenizer, text_key: str, layout: Layout) -> Iterator[Document]:
    path = Path(source)
    if (path / "manifest.json").is_file() or (path / "train" / "manifest.json").is_file():
        if layout != "documents":
            raise DataError(f"{layout} tokenises the text itself and {source} is a shard directory: give the text file")
        shards = TokenShards.open(path)
        shards.check_tokenizer(tokenizer)
        for index in range(shards.documents):
            yield shards.document(index)
        return
    texts_left = documents(expand([source]), text_key, _refuse)
    while texts := list(islice(texts_left, ENCODED_TOGETHER)):
        for ids in tokenizer.encode_batch(texts, specials=layout == "wikitext103"):
            if ids:
                yield np.array(ids if layout == "wikitext103" else [*ids, tokenizer.eos_id], dtype=np.int64)


def _refuse(message: str) -> NoReturn:
    raise DataError(message)
