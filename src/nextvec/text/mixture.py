"""Windows of several corpora mixed by weight, as stateless as those of one: window n is a pure function of (seed, n).

Legend: B rows of a batch, T tokens per row.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from nextvec.errors import ConfigError
from nextvec.text.batches import Batches, mix, permute, samples
from nextvec.text.shards import Ids

BLOCK = 4096  # windows in which every corpus has its exact share


class Mixture:
    """Batches of several corpora. Of every BLOCK windows each corpus gives its share by weight, rounded to whole windows.

    The order inside a block is pseudo-random. Each corpus walks through its own windows without a gap, so that none is seen
    again before all of it was: a small one with a large weight has more epochs. Nothing is stored: memory does not grow, and
    resuming is an integer. Raises ConfigError for a weight too small for a window in BLOCK.
    """

    def __init__(self, corpora: Sequence[Batches], weights: Sequence[float], seed: int):
        self.corpora = list(corpora)
        self.rows = self.corpora[0].rows
        self.seed = seed
        self.shares = shares(weights)
        for corpus, share, weight in zip(self.corpora, self.shares, weights, strict=True):
            if not share:
                raise ConfigError(
                    f"weight {weight:g} of {corpus.stream.shards.path} is less than one window in {BLOCK}; "
                    "give it more, or leave it out"
                )
        self._ends = list(accumulate(self.shares))
        self.windows = sum(corpus.windows for corpus in self.corpora)

    @property
    def digest(self) -> str:
        """SHA-256 of the corpora and their shares."""
        identity = [[corpus.stream.digest, share] for corpus, share in zip(self.corpora, self.shares, strict=True)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def place(self, sample: int) -> tuple[int, int]:
        """Number of the corpus that gives window `sample`, and which of its own windows that is, over all its epochs."""
        block, inside = divmod(sample, BLOCK)
        slot = permute(inside, BLOCK, mix(mix(self.seed) ^ mix(block)))
        corpus = bisect_right(self._ends, slot)
        share = self.shares[corpus]
        return corpus, block * share + slot - (self._ends[corpus] - share)

    def window(self, sample: int) -> Ids:
        """Window number `sample`: (T,) int64."""
        corpus, own = self.place(sample)
        return self.corpora[corpus].window(own)

    def batch(self, index: int, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Batch `index`, or a part of its rows, as `Batches.batch`: (B, T) int64."""
        return torch.from_numpy(np.stack([self.window(sample) for sample in samples(self.rows, index, part, parts)]))


def shares(weights: Sequence[float]) -> list[int]:
    """Windows of each corpus in a block: proportional to `weights`, rounded by largest remainder.

    >>> shares([3, 1]), shares([1, 1, 1])
    ([3072, 1024], [1366, 1365, 1365])
    """
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    found = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda corpus: found[corpus] - exact[corpus])
    for corpus in by_remainder[: BLOCK - sum(found)]:
        found[corpus] += 1
    return found
