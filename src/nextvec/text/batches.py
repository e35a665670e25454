"""Stateless batches: batch i is a pure function of (seed, i), so resuming is an integer.

Legend: B rows of a batch, T tokens per row (the context length).
"""

from __future__ import annotations

import numpy as np
import torch

from nextvec.errors import ConfigError
from nextvec.text.layout import Stream
from nextvec.text.shards import Ids

ROUNDS = 8  # Feistel rounds; four already pass as random, the rest is margin at 0.3 us each


class Batches:
    """Windows of `context_tokens` tokens of a stream, each seen once an epoch in pseudo-random order.

    Every epoch has its own order and its own offset of the windows' grid, a multiple of K below context_tokens, so
    that window borders move. No order is stored: memory does not grow with the corpus.
    Raises ConfigError when K does not divide context_tokens or the stream is shorter than one window.
    """

    def __init__(self, stream: Stream, rows: int, context_tokens: int, seed: int):
        patch = stream.patch_size
        if rows < 1:
            raise ConfigError(f"rows must be at least 1; got {rows}")
        if context_tokens < 1 or context_tokens % patch:
            near = max(patch, round(context_tokens / patch) * patch)
            raise ConfigError(
                f"context_tokens must be a multiple of the patch size {patch}; got {context_tokens}, nearest {near}"
            )
        if stream.length < context_tokens:
            raise ConfigError(
                f"the corpus in {stream.shards.path} has {stream.length} tokens, less than one window of "
                f"{context_tokens}; use more text or a shorter context_tokens"
            )
        stream.shards.expect_random_reads()
        self.stream = stream
        self.rows = rows
        self.context_tokens = context_tokens
        self.seed = seed
        # Room for the largest offset is kept, except where that would leave no window at all.
        self.windows = max(1, (stream.length - context_tokens + patch) // context_tokens)
        slack = min(context_tokens - patch, stream.length - self.windows * context_tokens)
        self._offsets = slack // patch + 1

    @property
    def digest(self) -> str:
        """Of the stream."""
        return self.stream.digest

    def batch(self, index: int, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Batch `index` >= 0: (B, T) int64 token ids. The same for the same seed, in any order of calls.

        With `parts`, only the rows of one of so many equal parts, (B / parts, T).
        """
        return torch.from_numpy(np.stack([self.window(sample) for sample in samples(self.rows, index, part, parts)]))

    def window(self, sample: int) -> Ids:
        """Window number `sample`, counted over all epochs: (T,) int64."""
        return self.stream.read(self.start(sample), self.context_tokens)

    def start(self, sample: int) -> int:
        """Position in the stream where window number `sample`, counted over all epochs, begins."""
        epoch, place = divmod(sample, self.windows)
        key = mix(mix(self.seed) ^ epoch)
        offset = mix(key) % self._offsets * self.stream.patch_size
        return offset + permute(place, self.windows, key) * self.context_tokens


def samples(rows: int, index: int, part: int = 0, parts: int = 1) -> range:
    """Numbers of the windows of batch `index`, or of one of so many equal parts of its rows."""
    assert rows % parts == 0
    count = rows // parts
    return range(index * rows + part * count, index * rows + (part + 1) * count)


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under a pseudo-random permutation of range(size), in O(1) memory.

    A Feistel network over pairs (left, right) of a grid just larger than `size` (each round adds a hash of one half to
    the other, modulo its side), walked on until it lands inside: a bijection of the grid restricted to its first
    `size` cells stays a bijection (cycle walking; Black and Rogaway 2002).
    """
    assert 0 <= index < size
    rows = int(np.ceil(np.sqrt(size)))
    columns = -(-size // rows)
    while True:
        left, right = divmod(index, columns)
        for number in range(0, ROUNDS, 2):
            left = (left + mix((key + number) ^ (right << 8))) % rows
            right = (right + mix((key + number + 1) ^ (left << 8))) % columns
        index = left * columns + right
        if index < size:
            return index


def mix(value: int) -> int:
    """The 64-bit finaliser of SplitMix64: a fixed scrambling of integers, not a source of randomness."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
