"""A stream of tokens laid out for a patch size, from shards that know of none."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict

import numpy as np

from nextvec.errors import ConfigError
from nextvec.text.shards import Ids, Packing, TokenShards

CACHE = 256 << 20  # bytes of document positions kept in memory: those of about 16 million documents


class Stream:
    """The documents of a shard directory as one token stream, laid out for patches of K tokens.

    aligned: each document is padded with pad_id to whole patches, so that no patch holds two documents; the padding
    is put in while reading, shards do not know K. packed: documents follow each other (as the paper's code).
    `length` is in tokens, a multiple of K. Where documents lie is read once to measure the stream, and then shard by shard as
    it is needed, so memory does not grow with the corpus. Raises ConfigError for a patch size below 1.
    """

    def __init__(self, shards: TokenShards, patch_size: int, packing: Packing | None = None):
        if patch_size < 1:
            raise ConfigError(f"patch_size must be at least 1 token; got {patch_size}")
        self.shards = shards
        self.patch_size = patch_size
        self.packing: Packing = packing or shards.manifest.packing
        if self.packing not in ("aligned", "packed"):
            raise ConfigError(f'packing must be "aligned" or "packed"; got {self.packing!r}')
        self._cached: OrderedDict[int, tuple[Ids, Ids]] = OrderedDict()
        self._bytes = 0
        self._plain = self.packing == "packed" or patch_size == 1  # nothing to pad
        if self._plain:
            self._starts = shards.starts
        else:
            lengths = [int(self._positions(shard)[1][-1]) for shard in range(len(shards.manifest.shards))]
            self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.length = int(self._starts[-1]) // patch_size * patch_size

    @property
    def digest(self) -> str:
        """SHA-256 of what the stream is made of: tokens, tokenizer and packing. Neither K nor the folder's name."""
        manifest = self.shards.manifest
        identity = [manifest.tokenizer, self.packing, *(record.sha256 for record in manifest.shards)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def read(self, start: int, length: int) -> Ids:
        """`length` ids from position `start`; any offset, across documents and shards."""
        if not 0 <= start <= start + length <= self.length:
            raise IndexError(f"read of {length} tokens at {start} leaves the stream of {self.length}")
        if self._plain:
            return self.shards.read(start, length)
        if not length:
            return np.empty(0, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while length:
            begin, end = (int(position) for position in self._starts[shard : shard + 2])
            count = min(length, end - start)
            pieces.append(self._read(shard, start - begin, count))
            start, length, shard = start + count, length - count, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read(self, shard: int, start: int, length: int) -> Ids:
        """From one shard, at a position inside it."""
        raw, laid = self._positions(shard)
        base, end = int(self.shards.starts[shard]), start + length
        first = int(np.searchsorted(laid, start, side="right")) - 1
        inside = int(raw[first] + start - laid[first])
        if inside + length <= raw[first + 1]:  # within one document, the usual case: nothing to pad
            return self.shards.read(base + inside, length)
        last = int(np.searchsorted(laid, end, side="left"))  # one past the last document touched
        raw, laid = raw[first : last + 1], laid[first : last + 1]
        # Where each document's real tokens begin and end inside this window; between them lies padding.
        begins = np.clip(laid[:-1], start, end) - start
        ends = np.clip(laid[:-1] + np.diff(raw), start, end) - start
        tokens = self.shards.read(base + min(inside, int(raw[1])), int((ends - begins).sum()))
        edges = np.zeros(length + 1, dtype=np.int8)  # +1 where tokens begin, -1 where they end
        np.add.at(edges, begins, 1)
        np.add.at(edges, ends, -1)
        out = np.full(length, self.shards.manifest.pad_id, dtype=np.int64)
        out[np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)] = tokens
        return out

    def _positions(self, shard: int) -> tuple[Ids, Ids]:
        """Start of each document in one shard, and the end: as stored, and as laid out."""
        found = self._cached.get(shard)
        if found is not None:
            self._cached.move_to_end(shard)
            return found
        raw = self.shards.offsets(shard)
        laid = np.concatenate([[0], np.cumsum(-(-np.diff(raw) // self.patch_size) * self.patch_size)])
        self._cached[shard] = raw, laid
        self._bytes += raw.nbytes + laid.nbytes
        while self._bytes > CACHE and len(self._cached) > 1:
            _, dropped = self._cached.popitem(last=False)
            self._bytes -= sum(each.nbytes for each in dropped)
        return raw, laid
