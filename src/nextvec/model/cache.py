"""Keys and values of texts being read: one slot per row, rows of different lengths side by side.

Legend: B rows, P positions read at once, H heads, E head dimension, C positions held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.config import BackboneConfig
from nextvec.model.layers import rotary_table


class KVCache:
    """Preallocated keys and values of every layer, (layers, 2, B, H_kv, capacity, E), and the rotations of all positions.

    A bf16 model's cache on a CPU is float32: one query against the cache is then 4.5 to 8 times faster, and rounded less.
    `rows` gives a part of it as a cache of its own on the same memory. `apart`: each position attends by itself, over exactly
    those before it, so that its bits depend on no other; only positions of the first so many rows, and of these the first so
    many, do: the others fill a tile up, and nobody reads their states. text_patch: tokens of a position that are kept, too, for
    a model that looks them up (`recall`), with what its lookups have made of them, `memory` (2, B, heads, tokens, numbers).
    """

    apart: tuple[int, int] | None = None

    def __init__(
        self,
        config: BackboneConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        text_patch: int = 0,
        memory: tuple[int, int] = (0, 0),
    ) -> None:
        wide = torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" else dtype
        shape = (config.layers, 2, rows, config.key_value_heads, capacity, config.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=wide)
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # positions held by each row, on the host
        self.text = torch.zeros(rows, capacity, text_patch, device=device, dtype=torch.int64)
        heads, numbers = memory
        self.memory = torch.zeros(2, rows, heads, capacity * text_patch, numbers, device=device, dtype=wide)
        positions = torch.arange(capacity, device=device)
        self._rotations = rotary_table(positions, config.head_dim, config.rope_base, dtype)

    @property
    def capacity(self) -> int:
        return self.store.shape[-2]

    def rows(self, start: int, stop: int) -> KVCache:
        """Rows start..stop: what is read into them is in this cache too."""
        part = object.__new__(KVCache)
        part.store, part.lengths = self.store[:, :, start:stop], self.lengths[start:stop]
        part.text, part.memory = self.text[start:stop], self.memory[:, start:stop]
        part._rotations = self._rotations
        return part

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        length = int(self.lengths[source])
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]
        self.text[target, :length] = self.text[source, :length]
        tokens = length * self.text.shape[-1]
        self.memory[:, target, :, :tokens] = self.memory[:, source, :, :tokens]
        self.lengths[target] = length

    def repeat(self, source: KVCache, lengths: Sequence[int]) -> None:
        """Every row becomes the first of `source`, up to these lengths."""
        self.store.copy_(source.store[:, :, :1].expand_as(self.store))
        self.text.copy_(source.text[:1].expand_as(self.text))
        self.memory.copy_(source.memory[:, :1].expand_as(self.memory))
        self.lengths.copy_(torch.tensor(lengths))

    def write_text(self, ids_BPK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the ids of positions about to be read. Returns all texts (B, T), and how much each position has seen, (B, P)."""
        rows, positions, size = ids_BPK.shape
        lengths = self.lengths.tolist()
        if min(lengths) == max(lengths):
            start, longest = lengths[0], lengths[0] + positions
            self._check_room(longest)
            self.text[:, start:longest] = ids_BPK
            seen_P = torch.arange((start + 1) * size, (longest + 1) * size, size, device=ids_BPK.device)
            return self.text[:, :longest].flatten(1).clone(), seen_P.expand(rows, -1)
        place_BP = self.lengths[:, None] + torch.arange(positions)
        longest = int(place_BP[:, -1].max()) + 1
        self._check_room(longest)
        place_BP = place_BP.to(ids_BPK.device)
        self.text[torch.arange(rows, device=ids_BPK.device)[:, None], place_BP] = ids_BPK
        return self.text[:, :longest].flatten(1).clone(), (place_BP + 1) * size

    def clear(self, row: int) -> None:
        """Row `row` holds nothing any more."""
        self.lengths[row] = 0

    def _check_room(self, positions: int) -> None:
        if positions > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; got {positions}: make a larger one")

    def reading(self, positions: int) -> Reading:
        """What all layers need to read the next positions of every row. Raises ValueError when there is no room for them."""
        lengths = self.lengths.tolist()
        longest, device = max(lengths) + positions, self.store.device
        self._check_room(longest)
        if min(lengths) == max(lengths) and self.apart is None:
            start = lengths[0]
            cos, sin = (table[start:longest] for table in self._rotations)
            mask = None
            if start and positions > 1:
                mask = torch.ones(positions, longest, dtype=torch.bool, device=device).tril(start)
            return Reading(self, start, longest, None, cos, sin, mask)
        place_BP = (self.lengths[:, None] + torch.arange(positions)).to(device)
        cos, sin = (table[place_BP] for table in self._rotations)
        if self.apart is not None:
            rows, read = self.apart
            seen = tuple(tuple(range(length + 1, length + read + 1)) for length in lengths[:rows])
            return Reading(self, None, longest, place_BP, cos, sin, None, seen)
        mask_B1PC = (torch.arange(longest, device=device) <= place_BP[..., None])[:, None]
        return Reading(self, None, longest, place_BP, cos, sin, mask_B1PC)


class Reading(NamedTuple):
    """One pass over new positions: cos and sin of them, (P, E/2) or (B, P, E/2), and which positions each may see.

    start: positions held before, None where rows differ, which then have their places in `place`. longest: held afterwards.
    mask: true where a position is seen; None where all are, or where the new positions alone are causal (`start` is 0).
    apart: where each position attends by itself, how many it sees, for those of each row that attend; else None.
    """

    cache: KVCache
    start: int | None
    longest: int
    place: Tensor | None
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    apart: tuple[tuple[int, ...], ...] | None = None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H_kv, P, E) keys and values behind those held; all of this layer up to the longest row."""
        keys, values = self.cache.store[layer].unbind(0)
        if self.place is None:
            keys[:, :, self.start : self.longest] = key
            values[:, :, self.start : self.longest] = value
        else:
            row_B1 = torch.arange(len(key), device=key.device)[:, None]
            keys[row_B1, :, self.place] = key.transpose(1, 2).to(keys.dtype)
            values[row_B1, :, self.place] = value.transpose(1, 2).to(values.dtype)
        return keys[:, :, : self.longest], values[:, :, : self.longest]
