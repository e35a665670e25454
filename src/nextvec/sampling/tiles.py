"""Products of one size, whatever is at work: what makes a text's bits the same in any company (`deterministic` engines).

A product rounds by how many rows it has. So patches are read and drawn in tiles of a fixed number of rows: patches of as many
texts side by side, or as many patches of one prompt; where there are fewer, a tile is filled up. A position attends by itself,
over a length of its own. What is left is a row's place in its tile. On processors that add up a row's products in one order
wherever it lies, that does not change its bits; this is tried out with the model itself, and where it does, a tile is one row.

Legend: B rows, P patches, K tokens per patch, D width, R rows of a tile, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.model.cache import KVCache
from nextvec.model.interface import LanguageModel
from nextvec.model.text_states import States, join, vector_of
from nextvec.sampling.draw import Drawn, HasLatents, HasLogits, draw_patches, has_latents
from nextvec.sampling.settings import Law
from nextvec.sampling.temperature import batch_temperature, count_equal

ROWS = 16  # of a tile (docs/serve.md)
DRAWS = 64  # in one tile at most, unless one row has more


class Tiles:
    """How one model reads and draws in tiles of `rows`, fewer where each row has many draws."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self.rows = model, ROWS
        key = (cast(_HasDtype, model).dtype, model.device, torch.get_num_threads(), ROWS, DRAWS)
        found = _TRIED.get(model)
        if found is None or found.key != key:
            found = _TRIED[model] = _Tried(key, self._try_reading())
        self._tried, self.rows = found, 1 if found.state is None else ROWS

    def read(self, ids_BK: Sequence[Sequence[int]], cache: KVCache) -> States:
        """States (B, D) after one more patch of each of B texts, which have the first rows of the cache.

        The cache has whole tiles of rows. Those behind the texts hold nothing afterwards.
        """
        states = []
        for start in range(0, len(ids_BK), self.rows):
            part, rows = ids_BK[start : start + self.rows], cache.rows(start, start + self.rows)
            rows.lengths[len(part) :], rows.apart = 0, (len(part), 1)
            states.append(self._model.states(self._fill(part)[:, None], rows)[: len(part), 0])
            rows.lengths[len(part) :] = 0
        return join(states)

    def read_on(self, ids_PK: Sequence[Sequence[int]], cache: KVCache) -> States:
        """States (P, D) after each of P more patches of one text; its cache of one row has room for whole tiles of patches."""
        states = []
        for start in range(0, len(ids_PK), self.rows):
            part, held = ids_PK[start : start + self.rows], int(cache.lengths[0])
            cache.apart = (1, len(part))
            states.append(self._model.states(self._fill(part)[None], cache)[0, : len(part)])
            cache.lengths[0] = held + len(part)
        return join(states)

    def draw(
        self, state_BD: States, law: Law, generators: Sequence[torch.Generator], counts_BV: Tensor | None = None
    ) -> Drawn:
        """`draw_patches`, in tiles."""
        size = self._rows_drawn(law)
        parts = []
        for start in range(0, len(state_BD), size):
            rows = slice(start, start + size)
            counts = None if counts_BV is None else counts_BV[rows]
            parts.append(self._draw_tile(state_BD[rows], law, generators[rows], size, counts))
        return _join(parts)

    def _draw_tile(
        self,
        state_BD: States,
        law: Law,
        generators: Sequence[torch.Generator],
        size: int,
        counts_BV: Tensor | None = None,
    ) -> Drawn:
        """Of B rows, at most `size`, which the tile has."""
        rows = len(state_BD)
        spare = [torch.Generator(state_BD.device).manual_seed(0) for _ in range(size - rows)]
        generators = [*generators, *spare]
        state_RD = join((state_BD, state_BD[:1].expand(size - rows, -1))) if rows < size else state_BD
        if size == 1 or law.single or law.method != "pool":
            counts_RV = None if counts_BV is None else F.pad(counts_BV, (0, 0, 0, size - rows))
            drawn = draw_patches(self._model, state_RD, law, generators, counts_RV)
        else:  # how much of a pool need be decoded depends on all its rows: here it is everything
            model = cast(HasLatents, self._model)
            latent_RNL = model.draw_latents(state_RD, law.candidates, generators).transpose(0, 1)
            token_RNK = model.autoencoder.decode_tokens(latent_RNL)
            patch_RK = batch_temperature(token_RNK, law.temperature, generators)
            drawn = Drawn(patch_RK, law.candidates, count_equal(token_RNK), latent_RNL)
        return Drawn(drawn.patch[:rows], drawn.draws, *(part if part is None else part[:rows] for part in drawn[2:]))

    def _rows_drawn(self, law: Law) -> int:
        """Rows that are drawn together; tried out the first time that a law is met."""
        known = self._tried.rows_of
        if law not in known:
            size = self._most_rows(law)
            known[law] = size if size == 1 or self._try_drawing(law, size) else 1
        return known[law]

    def _most_rows(self, law: Law) -> int:
        if isinstance(self._model, HasLogits):
            return self.rows
        if not has_latents(self._model) and law.method != "token":
            return 1  # a head of tokens draws pools row by row
        most = DRAWS // (1 if law.single else law.candidates)
        return min(self.rows, 1 << max(1, most).bit_length() - 1)  # an odd number of rows would often fail the trial

    @torch.inference_mode()
    def _try_reading(self) -> States | None:
        """States (R, D) of a text that is read at once; None where a row has other bits in another place of a tile."""
        size, generator = self.rows, torch.Generator().manual_seed(0)
        ids_RK = torch.randint(self._model.vocab_size, (size, self._model.patch_size), generator=generator).tolist()
        cache = self.new_cache(size, size)
        state_RD = self.read_on(ids_RK, cache.rows(0, 1))
        for order in (list(range(size - 1, -1, -1)), torch.randperm(size, generator=generator).tolist()):
            again = self.new_cache(size, size)
            again.repeat(cache, order)
            found_RD = self.read([ids_RK[place] for place in order], again)
            if not torch.equal(vector_of(found_RD), vector_of(state_RD)[order]):
                return None
        return state_RD

    @torch.inference_mode()
    def _try_drawing(self, law: Law, size: int) -> bool:
        """Whether every row of a tile has the bits that it has in another place."""
        state_RD = self._tried.state
        assert state_RD is not None, "tiles of several rows were tried"

        def draws(places: Sequence[int]) -> Drawn:
            device = self._model.device
            generators = [torch.Generator(device).manual_seed(place) for place in places]
            counts_RV = torch.zeros(size, self._model.vocab_size, device=device) if law.penalised else None
            return self._draw_tile(state_RD[list(places)], law, generators, size, counts_RV)

        straight, turned = draws(range(size)), draws(range(size - 1, -1, -1))
        pairs = [(a, b) for a, b in zip(straight, turned, strict=True) if isinstance(a, Tensor)]
        return all(torch.equal(a, cast(Tensor, b).flip(0)) for a, b in pairs)

    def new_cache(self, rows: int, patches: int) -> KVCache:
        """For so many texts of so many patches; there is room for what fills the last tiles up."""
        return self._model.new_cache(-(-rows // self.rows) * self.rows, patches + self.rows - 1)

    def _fill(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Ids (R, K) of a tile."""
        return torch.tensor([*ids, *[ids[0]] * (self.rows - len(ids))], device=self._model.device)


class _HasDtype(Protocol):
    dtype: torch.dtype


@dataclass
class _Tried:
    """What was found about a model in one dtype, on one device, with one number of threads: `key`. state (R, D): those that
    rows were tried with, None where tiles are one row."""

    key: object
    state: States | None
    rows_of: dict[Law, int] = field(default_factory=dict)


_TRIED: WeakKeyDictionary[LanguageModel, _Tried] = WeakKeyDictionary()  # trying takes as long as some steps


def _join(parts: Sequence[Drawn]) -> Drawn:
    """Tiles below each other."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part[2:] for part in parts), strict=True)
    patch = torch.cat([part.patch for part in parts])
    return Drawn(patch, parts[0].draws, *(None if each[0] is None else torch.cat(each) for each in columns))
