"""One reader per file format: bytes on disk to documents, streamed, with the place of every mistake.

A reader yields `Document` or, for what a user may choose to skip, `Bad`; both in file order, the same on every run.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from nextvec.errors import DataError

CHUNK = 1 << 20  # bytes read at a time


class Document(NamedTuple):
    """One text. `key` decides whether it is held out; `fraction` is how far into its file the reader is, 0 to 1."""

    text: str
    key: str
    fraction: float


class Bad(NamedTuple):
    """A document that cannot be used; `message` names the file, the line and the rule."""

    message: str
    fraction: float


Reader = Callable[[Path, str], Iterator[Document | Bad]]


def read_text(path: Path, text_key: str) -> Iterator[Document | Bad]:
    """A file is a document. Bad: bytes that are not UTF-8."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        yield _not_utf8(path, raw, error)
        return
    yield Document(text, text, 1.0)


def read_jsonl(path: Path, text_key: str) -> Iterator[Document | Bad]:
    """One JSON object a line, its text under `text_key`; plain, gzip or zstandard by the name's ending."""
    yield from _json_lines(path, text_key, _CHUNKS.get(path.suffix.lower(), _plain_chunks))


def read_json(path: Path, text_key: str) -> Iterator[Document | Bad]:
    """One object, an array of objects or strings, or one object a line. An array is held in memory whole."""
    with open(path, "rb") as handle:
        head = handle.read(CHUNK).lstrip()
        first, newline, rest = head.partition(b"\n")
    if first.startswith(b"{") and (not newline or rest.strip()) and _is_json(first):
        yield from read_jsonl(path, text_key)
        return
    raw = path.read_bytes()
    try:
        value = _loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield _not_utf8(path, raw, error)
        return
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        yield Bad(f"{path}:{line}: not valid JSON ({_reason(error)})", 1.0)
        return
    items = value if isinstance(value, list) else [value]
    for index, item in enumerate(items):
        where = f"{path}: item {index + 1}" if isinstance(value, list) else str(path)
        fraction = (index + 1) / len(items)
        yield as_document({text_key: item} if isinstance(item, str) else item, text_key, where, fraction)


def read_parquet(path: Path, text_key: str) -> Iterator[Document | Bad]:
    """One row is a document, its text in column `text_key`. Needs pyarrow, of the extra `corpora`.

    Bad: a row that is not text or not UTF-8. Raises DataError, with the row reached, where the file itself is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'nextvec[corpora]'") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise DataError(
                    f"{path}: no column {text_key!r}; it has {', '.join(names)}: choose one with --text-key"
                )
            rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for cell in batch.column(0):  # not to_pylist(), where one bad string loses the batch
                    row += 1
                    where = f"{path}: row {row}"
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError as error:  # a writer may store any bytes in a string column
                        yield Bad(f"{where}: not valid UTF-8 (byte 0x{error.object[error.start]:02x})", row / rows)
                    else:
                        yield as_document({text_key: value}, text_key, where, row / rows)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's refusal, as for any other file; pyarrow's own (a damaged page) has no number
        raise DataError(f"{path}: not a readable parquet file from row {row + 1} on ({_reason(error)})") from None


def _json_lines(path: Path, text_key: str, chunks: Callable[[IO[bytes]], Iterator[bytes]]) -> Iterator[Document | Bad]:
    size = max(1, path.stat().st_size)
    number = 0
    with open(path, "rb") as handle:
        try:
            for number, line in enumerate(_lines(chunks(handle)), start=1):
                if not line.strip():
                    continue
                fraction = handle.tell() / size
                where = f"{path}:{number}"
                try:
                    value = _loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    yield Bad(f"{where}: not valid UTF-8 (byte 0x{line[error.start]:02x})", fraction)
                except ValueError as error:
                    yield Bad(f"{where}: not valid JSON ({_reason(error)})", fraction)
                else:
                    yield as_document(value, text_key, where, fraction)
        except (EOFError, gzip.BadGzipFile, zlib.error, DamagedError) as error:
            yield Bad(f"{path}:{number + 1}: the compressed file is damaged or cut short ({_reason(error)})", 1.0)


def as_document(value: Any, text_key: str, where: str, fraction: float) -> Document | Bad:
    """Check one parsed record; `where` names its file and line."""
    if not isinstance(value, dict):
        return Bad(f"{where}: expected an object with the key {text_key!r}, got {type(value).__name__}", fraction)
    if text_key not in value:
        known = ", ".join(map(str, list(value)[:8])) or "none"
        return Bad(f"{where}: no key {text_key!r}; its keys are {known}: choose one with --text-key", fraction)
    text = value[text_key]
    if not isinstance(text, str):
        return Bad(f"{where}: {text_key!r} must be text, got {type(text).__name__}", fraction)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" alone is legal JSON but no character
            return Bad(f"{where}: holds the lone surrogate U+{ord(text[error.start]):04X}, which is not text", fraction)
    return Document(text, text, fraction)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline; a last line may lack one."""
    held: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        held.append(first)
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held = [others[-1]]
    if last := b"".join(held):
        yield last


def _plain_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    while chunk := handle.read(CHUNK):
        yield chunk


def _gzip_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=handle) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


class DamagedError(Exception):
    """A zstandard stream that ends in the middle of a frame or does not decode."""


def _zstd_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    """Frame after frame; the library's own stream reader takes a file cut short for a complete one."""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = context.decompressobj()
    started = False
    while chunk := handle.read(CHUNK >> 3):
        while chunk:
            try:
                started = True
                if text := frame.decompress(chunk):
                    yield text
            except zstandard.ZstdError as error:
                raise DamagedError(str(error)) from None
            chunk = b""
            if frame.eof:
                chunk, frame, started = frame.unused_data, context.decompressobj(), False
    if started:
        raise DamagedError("it ends inside a frame")


def _is_json(line: bytes) -> bool:
    try:
        _loads(line)
    except ValueError:
        return False
    return True


def _loads(data: str | bytes) -> Any:
    """`json.loads` for data of any depth. Raises ValueError for everything that it cannot parse."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _not_utf8(path: Path, raw: bytes, error: UnicodeDecodeError) -> Bad:
    line = raw.count(b"\n", 0, error.start) + 1
    return Bad(f"{path}:{line}: not valid UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8", 1.0)


def _reason(error: Exception) -> str:
    text = getattr(error, "msg", "") or str(error)
    return " ".join(text.split())


_CHUNKS = {".gz": _gzip_chunks, ".zst": _zstd_chunks}

# Every suffix that is read, by name. A file of any of the text kinds is one document.
_PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml")
_SETTINGS = (".yaml", ".yml", ".toml", ".ini", ".cfg", ".sql", ".sh")
_CODE = (
    *(".py", ".pyi", ".js", ".ts", ".jsx", ".tsx", ".css", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go"),
    *(".java", ".kt", ".swift", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".hs", ".scala"),
)
READERS: dict[str, Reader] = {
    **dict.fromkeys((*_PROSE, *_SETTINGS, *_CODE), read_text),
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}


def reader_of(name: str) -> Reader | None:
    """The reader for a file name, or None for an unknown suffix. Endings are compared without case."""
    parts = name.lower().split(".")
    for count in (2, 1):
        if len(parts) > count and (reader := READERS.get("." + ".".join(parts[-count:]))):
            return reader
    return None
