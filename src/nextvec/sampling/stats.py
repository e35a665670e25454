"""What a generation took: time to the first text, tokens per second, draws, and how often they agreed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nextvec.sampling.generate import Piece


@dataclass
class Stats:
    """Counts pieces as they pass. The clock starts when the first one is asked for: loading a model does not count."""

    tokens: int = 0
    patches: int = 0
    draws: int = 0  # of the model, over all patches
    pools: int = 0  # patches chosen from more than one draw
    unanimous: int = 0  # pools of one patch alone
    unique: float = 0.0  # sum over the pools of the share of their draws that are different patches
    seconds: float = 0.0
    first: float | None = None  # seconds to the first text
    _begin: float = field(default=0.0, repr=False)

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces."""
        self._begin = time.perf_counter()
        for piece in pieces:
            self.seconds = time.perf_counter() - self._begin
            if self.first is None and piece.text:
                self.first = self.seconds
            self.tokens += piece.tokens
            self.patches += 1
            self.draws += piece.pool.draws
            if piece.pool.copies is not None:
                self.pools += 1
                self.unanimous += piece.pool.unanimous
                self.unique += piece.pool.unique / piece.pool.draws
            yield piece

    def __str__(self) -> str:
        """One line."""
        first = "no text" if self.first is None else f"first text after {self.first:.3f} s"
        rate = self.tokens / self.seconds if self.seconds else 0.0
        words = [first, f"{self.tokens:,} tokens in {self.seconds:.2f} s, {rate:,.0f} tokens/s"]
        words.append(f"{self.draws:,} draws for {self.patches:,} patches")
        if self.pools:
            words.append(
                f"{self.unanimous / self.pools:.0%} of {self.pools:,} pools unanimous, "
                f"{self.unique / self.pools:.0%} of their draws unique"
            )
        return "; ".join(words)
