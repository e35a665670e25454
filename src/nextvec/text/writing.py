"""Writes the shards of both splits in step, so that every finished group is a point to continue from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nextvec.files import atomic_open
from nextvec.text.shards import ShardRecord, Split


class ShardWriter:
    """One pair of files being written; nothing appears under their names before `finish`."""

    def __init__(self, folder: Path, number: int):
        self._folder = folder
        self._number = number
        self.stack = ExitStack()  # closing it puts the tokens in place, leaving it by an error removes them
        self._handle: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._offsets = [0]
        self._text_bytes = 0

    @property
    def tokens(self) -> int:
        return self._offsets[-1]

    def add(self, ids: NDArray[Any], text_bytes: int) -> None:
        """Append one document, its end-of-text included. The file is begun with the first."""
        if self._handle is None:
            self._handle = self.stack.enter_context(atomic_open(self._folder / self._name("tokens", "bin"), "wb"))
        data = ids.data.cast("B")
        self._handle.write(data)
        self._digest.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes

    def finish(self) -> ShardRecord | None:
        """Put both files in place; None when no document was added."""
        if self._handle is None:
            return None
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(self._offsets, dtype="<i8"))
        with atomic_open(self._folder / self._name("documents", "npy"), "wb") as handle:
            handle.write(buffer.getbuffer())
        self.stack.close()
        return ShardRecord(
            file=self._name("tokens", "bin"),
            offsets=self._name("documents", "npy"),
            tokens=self.tokens,
            documents=len(self._offsets) - 1,
            text_bytes=self._text_bytes,
            sha256=self._digest.hexdigest(),
            offsets_sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
        )

    def _name(self, kind: str, suffix: str) -> str:
        return f"{kind}-{self._number:05d}.{suffix}"


@contextmanager
def group(folders: dict[Split, Path], numbers: dict[Split, int]) -> Iterator[dict[Split, ShardWriter]]:
    """A writer for each split; when the body fails, none of their files is left behind."""
    writers = {split: ShardWriter(folder, numbers[split]) for split, folder in folders.items()}
    with ExitStack() as stack:
        for writer in writers.values():
            stack.push(writer.stack)
        yield writers
