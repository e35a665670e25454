"""Sources as a user names them (files, folders, globs, hf:..., python-stdlib) to a list of items that can be read."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nextvec.errors import DataError
from nextvec.text import builtin
from nextvec.text.formats import READERS, Bad, Document, Reader, as_document, reader_of

HUB = "hf:"


@dataclass(frozen=True)
class Item:
    """One file or one dataset split: what a corpus is a sequence of."""

    label: str  # how messages name it
    identity: tuple[str | int, ...]  # changes when the content changes: (name, size in bytes, modification time in ns)
    weight: int  # bytes on disk, for the progress bar
    read: Callable[[str], Iterator[Document | Bad]]  # argument: the key or column that holds the text


def expand(sources: Sequence[str]) -> list[Item]:
    """All items of `sources`, in the order given; inside a folder or glob, by name.

    Raises DataError for a source that does not exist, holds nothing readable, or has an unknown suffix.
    """
    if not sources:
        raise DataError("name at least one source: a file, a folder, a glob, hf:owner/name or python-stdlib")
    return [item for source in sources for item in _expand(source)]


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 over the identities of all items in order: the same files, unchanged, give the same value."""
    return hashlib.sha256(json.dumps([item.identity for item in items]).encode()).hexdigest()


def documents(items: Sequence[Item], text_key: str, bad: Callable[[str], None]) -> Iterator[str]:
    """The texts of all items; `bad` is called with each mistake's sentence and may raise."""
    for item in items:
        for found in item.read(text_key):
            if isinstance(found, Bad):
                bad(found.message)
            else:
                yield found.text


def _expand(source: str) -> list[Item]:
    if source.startswith(HUB):
        return [hub_item(source)]
    if source == builtin.NAME:
        return [_stdlib_file(path, name) for path, name in builtin.stdlib_files()]
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return [_file(path, path.name)]
    if any(character in source for character in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
        files = [_file(match, match.as_posix()) for match in matches if match.is_file()]
        if not files:
            raise DataError(f"no file matches {source!r}")
        return files
    raise DataError(f"source {source} does not exist; give a file, a folder, a glob, hf:owner/name or {builtin.NAME}")


def _folder(root: Path) -> list[Item]:
    """Every file of a known kind below `root`; hidden ones and unknown suffixes are passed over."""
    found = []

    def refused(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read ({error.strerror}); grant access or leave it out")

    for folder, folders, files in os.walk(root, onerror=refused):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".") and reader_of(name)]
    if not found:
        raise DataError(f"folder {root} holds no file that can be read; known suffixes are {', '.join(READERS)}")
    named = sorted((path.relative_to(root).as_posix(), path) for path in found)
    return [_file(path, name) for name, path in named]


def _file(path: Path, name: str) -> Item:
    reader = reader_of(path.name)
    if reader is None:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; known suffixes are {', '.join(READERS)}")
    return _item(path, name, partial(reader, path))


def _stdlib_file(path: Path, name: str) -> Item:
    return _item(path, name, partial(_keyed, path, name))


def _item(path: Path, name: str, read: Callable[[str], Iterator[Document | Bad]]) -> Item:
    try:
        stat = path.stat()
    except OSError:  # a link to nothing, say: reading it fails as well, and that can be skipped
        size, modified = 0, -1
    else:
        size, modified = stat.st_size, stat.st_mtime_ns
    return Item(str(path), (name, size, modified), size, partial(_readable, path, read))


def _readable(path: Path, read: Callable[[str], Iterator[Document | Bad]], text_key: str) -> Iterator[Document | Bad]:
    """A file that the system does not let us read, or only in part, is a bad document, not the end of the corpus."""
    try:
        yield from read(text_key)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # pyarrow puts a paragraph into strerror
        yield Bad(f"{path}: cannot be read ({reason})", 1.0)


def _keyed(path: Path, name: str, text_key: str) -> Iterator[Document | Bad]:
    """A library file is held out by its name, so that every Python version holds out the same modules."""
    reader: Reader = READERS[".py"]
    for found in reader(path, text_key):
        yield found._replace(key=name) if isinstance(found, Document) else found


def hub_item(source: str) -> Item:
    """`hf:owner/name[:config][:split]` or `hf:/a/local/folder[...]`, streamed through `datasets`; split: train.

    A single extra part is a config where the dataset has one of that name, else a split.
    Raises DataError when the extra `corpora` is missing or the dataset cannot be loaded.
    """
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"a dataset is written hf:owner/name[:config][:split]; got {source!r}")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading datasets needs a package; pip install 'nextvec[corpora]'") from None
    datasets.disable_progress_bars()
    try:
        if len(rest) == 1 and rest[0] not in datasets.get_dataset_config_names(name):
            rest = ["", *rest]
        config, split = [*rest, "", ""][0] or None, (rest[1:] or ["train"])[0]
        builder = datasets.load_dataset_builder(name, config)
        stream = builder.as_streaming_dataset(split=split)
    except Exception as error:  # the library raises dozens of kinds; its first line says which
        raise DataError(f"{source} cannot be loaded: {_first_line(error)}") from None
    known = (builder.info.splits or {}).get(split)
    rows = known.num_examples if known else 0
    weight = (known.num_bytes if known else 0) or 0
    return Item(source, (name, config or "", split, builder.hash), weight, partial(_rows, source, stream, rows))


def _rows(source: str, stream: Any, rows: int, text_key: str) -> Iterator[Document | Bad]:
    records = iter(stream)
    number = 0
    while True:
        try:
            record = next(records, None)
        except Exception as error:
            raise DataError(f"{source}: row {number + 1} cannot be read: {_first_line(error)}") from None
        if record is None:
            return
        number += 1
        yield as_document(record, text_key, f"{source}: row {number}", min(1.0, number / rows) if rows else 0.0)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
