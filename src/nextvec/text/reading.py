"""The documents of a preparation in the order of its sources, from any place in them on."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from numpy.typing import NDArray

from nextvec.errors import DataError
from nextvec.text.encoding import encode_documents
from nextvec.text.formats import Bad
from nextvec.text.readers import Item
from nextvec.text.shards import Split
from nextvec.text.tokenizer import TextTokenizer

SHOWN = 5  # sentences of skipped documents that are kept for the summary


class Note(NamedTuple):
    """What travels with a document from reading to writing."""

    split: Split
    text_bytes: int
    item: int  # place in the sources: number of the item,
    entry: int  # and entries of it used up, this document included
    skipped: int  # bad entries met before this document
    fraction: float  # of all sources, by bytes on disk


class Reading:
    """Documents from one place on. `skipped` and `messages` grow while they are read."""

    def __init__(
        self,
        items: Sequence[Item],
        text_key: str,
        valid_fraction: float,
        skip_bad: bool,
        item: int = 0,
        entry: int = 0,
        skipped: int = 0,
    ) -> None:
        """item, entry: the place, entries of it used up. skipped: bad entries before it."""
        self._items, self._text_key, self._fraction, self._skip_bad = items, text_key, valid_fraction, skip_bad
        self._item, self._entry = item, entry
        self.skipped = skipped
        self.messages: list[str] = []  # the first sentences of bad entries

    def encoded(
        self, tokenizer: TextTokenizer, dtype: str, workers: int
    ) -> Generator[tuple[Note, NDArray[Any] | None]]:
        """One document at a time; None for ids when a text has no token at all. workers: processes, 0 for none but this.

        Raises DataError for a bad entry, unless they are to be skipped.
        """
        with closing(encode_documents(self._texts(), tokenizer, dtype, workers)) as batches:
            for notes, encoded in batches:
                start = 0
                for note, length in zip(notes, encoded.lengths.tolist(), strict=True):
                    yield note, encoded.ids[start : start + length] if length > 1 else None
                    start += length

    def _texts(self) -> Iterator[tuple[str, Note]]:
        """Documents, each with what writing it needs to know."""
        total = max(1, sum(item.weight for item in self._items))
        before = sum(item.weight for item in self._items[: self._item])
        first, skip = self._item, self._entry
        for number, item in enumerate(self._items[first:], start=first):
            for entry, found in enumerate(item.read(self._text_key), start=1):
                if number == first and entry <= skip:
                    continue
                if isinstance(found, Bad):
                    self._bad(found.message)
                    continue
                data = found.text.encode()
                key = data if found.key is found.text else found.key.encode()
                yield (
                    found.text,
                    Note(
                        split="valid" if held_out(key, self._fraction) else "train",
                        text_bytes=len(data),
                        item=number,
                        entry=entry,
                        skipped=self.skipped,
                        fraction=(before + item.weight * found.fraction) / total,
                    ),
                )
            before += item.weight

    def _bad(self, message: str) -> None:
        if not self._skip_bad:
            raise DataError(f"{message} (--skip-bad leaves such documents out)")
        self.skipped += 1
        if len(self.messages) < SHOWN:
            self.messages.append(message)


def held_out(key: bytes, fraction: float) -> bool:
    """True for a share `fraction` of all keys, the same ones always: by SHA-256, read as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) < fraction * 2**64
