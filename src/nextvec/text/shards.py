"""Token shards on disk, independent of K and packing.

A shard directory: tokens-NNNNN.bin (raw little-endian ids, every document followed by end-of-text, no padding),
documents-NNNNN.npy (int64 start of each document inside its shard, plus the end), manifest.json, tokenizer.json.
"""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nextvec.config import Config
from nextvec.errors import ConfigError, DataError
from nextvec.files import read_json, sha256
from nextvec.text.tokenizer import TextTokenizer, Tokenizer, load_tokenizer

FORMAT = 1  # version of manifest.json; a newer one is refused with one sentence

Packing = Literal["aligned", "packed"]
Split = Literal["train", "valid"]
DTypeName = Literal["uint16", "uint32"]
Ids = NDArray[np.int64]


class ShardRecord(Config):
    """One pair of files. sha256 is of the tokens file."""

    file: str
    offsets: str
    tokens: int  # end-of-text tokens included
    documents: int
    text_bytes: int  # UTF-8 bytes of source text
    sha256: str
    offsets_sha256: str


class Manifest(Config):
    """What a shard directory says of itself."""

    format: int
    tokenizer: str  # hash of the tokenizer
    vocab_size: int
    eos_id: int
    pad_id: int
    mask_id: int
    dtype: DTypeName
    packing: Packing  # the layout asked for at preparation; a reader may choose the other
    split: Split
    shards: list[ShardRecord]
    tokens: int
    documents: int
    text_bytes: int
    skipped: int  # bad documents left out over all splits
    empty: int  # documents without a token, left out over all splits
    sources: list[str]  # as named on the command line
    fingerprint: str  # of the source files
    valid_fraction: float
    text_key: str
    python: str | None  # version of the interpreter whose library is in the corpus; None: no built-in corpus
    nextvec: str  # version of the package that wrote the shards


def shard_dtype(vocab_size: int, dtype: DTypeName | Literal["auto"] = "auto") -> DTypeName:
    """The smallest id type that holds the vocabulary, or the one asked for. Raises ConfigError when it is too small."""
    if dtype == "auto":
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise ConfigError(
            f"a vocabulary of {vocab_size} ids does not fit shards of {dtype} (at most {np.iinfo(dtype).max + 1}); "
            "use dtype uint32 or auto"
        )
    return dtype


class TokenShards:
    """Memory-mapped tokens of one split. Ids come out as int64."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._open: tuple[int, Ids] | None = None  # the shard whose documents were asked for last
        self.tokens = manifest.tokens
        self.documents = manifest.documents
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._maps: list[NDArray[Any]] = []
        self._files: list[mmap.mmap] = []
        starts, first = [0], [0]
        for record in manifest.shards:
            _check_size(path / record.file, record.tokens * dtype.itemsize)
            # A plain view: slicing np.memmap itself costs microseconds each time.
            mapped = np.memmap(path / record.file, dtype=dtype, mode="r")
            self._files.append(mapped._mmap)  # type: ignore[attr-defined]
            self._maps.append(mapped.view(np.ndarray))
            _offsets(path / record.offsets, record)  # checked here, read again when they are needed: memory stays flat
            starts.append(starts[-1] + record.tokens)
            first.append(first[-1] + record.documents)
        #: (shards + 1,) position of each shard's first token in the raw stream over all shards, and the end
        self.starts: Ids = np.asarray(starts, dtype=np.int64)
        self._first_documents: Ids = np.asarray(first, dtype=np.int64)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> TokenShards:
        """Open a shard directory. Sizes are always checked; `verify` also reads everything and compares checksums.

        Raises DataError when a file is missing, cut short or changed, or when the manifest's format is newer.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise DataError(_not_shards(path))
        data = read_json(path / "manifest.json", "shard manifest")
        found = data.get("format") if isinstance(data, dict) else None
        if not isinstance(found, int) or found > FORMAT:
            raise DataError(f"{path}/manifest.json has format {found!r}, this nextvec reads {FORMAT}; upgrade nextvec")
        try:
            manifest = Manifest.parse(data, f"{path}/manifest.json")
            shard_dtype(manifest.vocab_size, manifest.dtype)
        except ConfigError as error:
            raise DataError(f"{path}: {error}") from None
        if verify:
            for record in manifest.shards:
                _check_size(path / record.file, record.tokens * np.dtype(manifest.dtype).itemsize)
                for name, expected in ((record.file, record.sha256), (record.offsets, record.offsets_sha256)):
                    if sha256(path / name) != expected:
                        raise DataError(f"{path / name} has changed since it was written; prepare the corpus again")
        shards = cls(path, manifest)
        if verify:
            shards.check_tokenizer(shards.tokenizer)
        return shards

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer kept beside the shards. Raises DataError when it is not the one that made them."""
        tokenizer = load_tokenizer(self.path)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, of: str | Path | None = None) -> None:
        """Raises DataError when `tokenizer` is not the one that made these shards. of: the folder that it lies in."""
        if tokenizer.hash != self.manifest.tokenizer and of is not None:
            raise DataError(
                f"the tokenizer of {of} does not match the shards in {self.path}; prepare that text again with "
                f"--tokenizer {of}"
            )
        if tokenizer.hash != self.manifest.tokenizer:
            raise DataError(
                f"the tokenizer (hash {tokenizer.hash[:12]}) does not match the shards in {self.path} "
                f"(made with {self.manifest.tokenizer[:12]}); prepare the corpus again with this tokenizer"
            )

    def expect_random_reads(self) -> None:
        """Tell the system to read only the pages asked for, not 128 KiB around each (docs/scale.md)."""
        if hasattr(mmap, "MADV_RANDOM"):
            for file in self._files:
                file.madvise(mmap.MADV_RANDOM)

    def offsets(self, shard: int) -> Ids:
        """(documents + 1,) start of each document of one shard inside it, and the end; read from disk."""
        record = self.manifest.shards[shard]
        return _offsets(self.path / record.offsets, record)

    def document(self, index: int) -> Ids:
        """Ids of one document, its end-of-text included."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document index must be in [0, {self.documents}); got {index}")
        shard = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        if self._open is None or self._open[0] != shard:  # documents are mostly asked for in order
            self._open = shard, self.offsets(shard)
        start, end = self._open[1][index - int(self._first_documents[shard]) :][:2]
        return self.read(int(self.starts[shard] + start), int(end - start))

    def read(self, start: int, length: int) -> Ids:
        """`length` ids from position `start` of the raw stream over all shards.

        Raises DataError for an id outside the vocabulary.
        """
        assert 0 <= start <= start + length <= self.tokens
        out = np.empty(length, dtype=np.int64)
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        done = 0
        while done < length:
            inside = start + done - int(self.starts[shard])
            part = self._maps[shard][inside : inside + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        # Sizes say nothing of the contents; an id beyond the embedding would fail far from here, or nowhere.
        if length and (largest := int(out.max())) >= self.manifest.vocab_size:
            raise DataError(
                f"{self.path} is damaged: it holds the id {largest}, its vocabulary has {self.manifest.vocab_size}; "
                "run the same nextvec prepare command again"
            )
        return out


def _offsets(path: Path, record: ShardRecord) -> Ids:
    try:
        offsets = np.load(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; prepare the corpus again") from None
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the corpus again") from None
    if offsets.shape != (record.documents + 1,) or offsets[0] != 0 or offsets[-1] != record.tokens:
        raise DataError(f"{path} does not fit its manifest ({record.documents} documents); prepare the corpus again")
    return offsets.astype(np.int64)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; prepare the corpus again")
    found = path.stat().st_size
    if found != expected:
        raise DataError(
            f"{path} is cut short or damaged: {found} bytes instead of {expected}; prepare the corpus again"
        )


def _not_shards(path: Path) -> str:
    if not path.is_dir():
        return f"shard directory {path} does not exist; write one with: nextvec prepare SRC... --tokenizer T --out DIR"
    if (path / "train" / "manifest.json").is_file():
        return f"{path} holds several splits; open {path / 'train'} or {path / 'valid'}"
    return f"{path} holds no manifest.json: its preparation did not finish; run the same nextvec prepare command again"
