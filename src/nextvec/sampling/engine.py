"""Texts in the making, patch by patch: rows join and leave between patches, and each draws from a generator of its own.

What a row's model reads:  [eos, pad .. pad] [whole patches of the prompt] [patches drawn so far].  The first is the boundary
that ends a document in aligned packing, so that an empty prompt, too, has a state to start from; a model trained on packed
documents never saw it, so there a prompt of at least one whole patch stands alone. A prompt whose length is no multiple of K
leaves r tokens over; the first patch drawn is conditioned on them: they are given, where each token has a law of its own, and
of a pool the draws that begin with them are kept (`draw.complete_patch`). Where no draw does, the prompt is read anew with K - r
pads before its first token, so that it ends at the end of a patch. No pad ever stands inside a text.

Legend: B rows, P patches, K tokens per patch, D width, L latent, N candidates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.errors import UserError
from nextvec.model.interface import LanguageModel
from nextvec.model.packed import pack_linears
from nextvec.model.text_states import States, join
from nextvec.sampling.draw import Drawn, abilities, complete_patch, draw_patches
from nextvec.sampling.settings import Finish, Law, Sampling, check_samples, row_generator
from nextvec.sampling.tiles import Tiles

KEPT = 0.75  # share of the context that stays when the window slides


class Pool(NamedTuple):
    """Draws of the model behind one patch. copies (N,): of each draw, 0 for one that does not agree with the prompt's rest;
    None for a patch drawn without a pool. patch: the ids chosen; latents (N, L), tokens (N, K): as in `draw.Drawn`. given:
    ids of the patch that the prompt's rest gave. The figures are computed when they are asked for."""

    draws: int
    copies: Tensor | None
    patch: tuple[int, ...] = ()
    latents: Tensor | None = None
    tokens: Tensor | None = None
    given: int = 0

    @property
    def unanimous(self) -> bool:
        """All draws that count are the same patch; without a pool there is nothing to agree on."""
        return self.copies is not None and int(self.copies.max()) == int((self.copies > 0).sum())

    @property
    def unique(self) -> int:
        """Different patches among the draws that count."""
        return 1 if self.copies is None else round(float(self.copies[self.copies > 0].double().reciprocal().sum()))


class Event(NamedTuple):
    """A row's next patch. tokens: new text ids, without the prompt's, the end-of-text token and what follows it."""

    row: int
    tokens: tuple[int, ...]
    finished: Finish | None
    pool: Pool


@dataclass(eq=False)
class _Row:
    number: int
    prompt: tuple[int, ...]
    settings: Sampling
    sample: int  # its generator is that of (settings.seed, sample)
    patches: list[list[int]]  # whole patches to be seen; at the beginning of a step the last one is not read yet
    given: list[int]  # tokens that the next patch begins with
    produced: int = 0
    started: torch.Generator | None = None
    counts: Tensor | None = None  # of each token drawn, for penalties

    def generator(self, device: torch.device) -> torch.Generator:
        """Its own, made at its first draw: a long queue holds none."""
        if self.started is None:
            self.started = row_generator(self.settings.seed, self.sample, device)
        return self.started


class Engine:
    """Rows over a slotted key/value cache. `add` puts rows into a queue; each `step` admits what fits and draws one patch for
    every row admitted; `cancel` takes a row out, wherever it is. A finished row leaves by itself.

    slots: rows at work at once. capacity: patches that the model may read of one row, prompt and boundary included.
    slide: a longer text goes on with the last three quarters of what the model has read, read anew as training saw windows of
    text; else `add` refuses what may not fit. deterministic: every product has the same shape whatever is at work (tiles.py), so
    that a row's text is the same, token for token, in any company, dtype included; slower. Without it this holds up to
    rounding, which in bf16 can turn a near tie.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        eos_id: int,
        pad_id: int,
        slots: int,
        capacity: int,
        packed: bool = False,
        slide: bool = False,
        deterministic: bool = False,
    ) -> None:
        if slots < 1 or capacity < 2:
            raise UserError(f"slots must be at least 1 and the context at least 2 patches; got {slots} and {capacity}")
        if isinstance(model, torch.nn.Module) and not model.training:
            pack_linears(model)
        self._model, self._eos, self._packed = model, eos_id, packed
        self._pad = pad_id
        self._boundary = [eos_id] + [pad_id] * (model.patch_size - 1)
        self._slots, self._capacity, self._slide = slots, capacity, slide
        self._tiles = Tiles(model) if deterministic else None
        self._cache = (self._tiles or model).new_cache(slots, capacity)
        self._rows: list[_Row] = []  # row i is in slot i
        self._queue: deque[_Row] = deque()
        self._next = 0

    def __len__(self) -> int:
        """Rows at work and in the queue."""
        return len(self._rows) + len(self._queue)

    def add(self, prompt: Sequence[int], settings: Sampling, *, samples: int = 1, row: int = 0) -> list[int]:
        """Numbers of the rows that will continue the prompt; sample i draws from the generator of (seed, row + i).

        Samples that are admitted together share one reading of the prompt. Raises UserError for a prompt outside the vocabulary
        or, without `slide`, a text that may outgrow the context.
        """
        settings, prompt = settings.for_model(abilities(self._model)), tuple(prompt)
        check_samples(samples)
        for token in prompt:
            if not 0 <= token < self._model.vocab_size:
                raise UserError(
                    f"prompt tokens must be in [0, {self._model.vocab_size}), the model's vocabulary; got {token}: "
                    "encode the prompt with the model's own tokenizer"
                )
        patches, given = self._lay_out(prompt)
        needed = inputs_needed(len(prompt), settings.max_tokens, self._model.patch_size)
        if needed > self._capacity and not self._slide:
            size = self._model.patch_size
            raise UserError(
                f"a prompt of {len(prompt):,} tokens and {settings.max_tokens:,} new ones take {needed * size:,} of context, and "
                f"there are {self._capacity * size:,}: shorten the prompt, lower max_tokens, or let the window slide"
            )
        added = []
        for sample in range(samples):
            self._queue.append(_Row(self._next, prompt, settings, row + sample, list(patches), given))
            added.append(self._next)
            self._next += 1
        return added

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Take a row out; one that has finished, or was never there, is no matter."""
        self._queue = deque(row for row in self._queue if row.number != number)
        for slot, row in enumerate(self._rows):
            if row.number == number:
                self._release([slot])
                return

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """The next patch of every row at work, in the order they were admitted until rows leave."""
        states = self._read_last() + self._admit()
        if not states:
            return []
        state_BD = join(states)
        events: dict[int, Event] = {}
        for slots in self._together():
            rows = [self._rows[slot] for slot in slots]
            state = state_BD if len(slots) == len(state_BD) else state_BD[slots]
            drawn = self._complete(rows[0], slots[0], state) if rows[0].given else self._draw(rows, state)
            for index, (slot, patch) in enumerate(zip(slots, drawn.patch.tolist(), strict=True)):
                row = self._rows[slot]
                events[slot] = self._take(row, patch, _pool(drawn, index, patch, len(row.given)))
        ordered = [events[slot] for slot in range(len(self._rows))]
        self._release([slot for slot, event in enumerate(ordered) if event.finished is not None])
        return ordered

    def _draw(self, rows: list[_Row], state_BD: States) -> Drawn:
        law, generators = rows[0].settings.law, [row.generator(self._model.device) for row in rows]
        counts_BV = self._counts(rows) if law.penalised else None
        if self._tiles is not None:
            return self._tiles.draw(state_BD, law, generators, counts_BV)
        return draw_patches(self._model, state_BD, law, generators, counts_BV)

    def _counts(self, rows: list[_Row]) -> Tensor:
        """How often each row has drawn each token, (B, V), to be written to."""
        counts = []
        for row in rows:
            if row.counts is None:
                row.counts = torch.zeros(self._model.vocab_size, device=self._model.device)
            counts.append(row.counts)
        return torch.stack(counts)

    def _complete(self, row: _Row, slot: int, state_1D: States) -> Drawn:
        """The patch that begins with the rest of a prompt; where none does, the one after the prompt padded on its left."""
        generator = row.generator(self._model.device)
        law = row.settings.law
        counts_1V = self._counts([row]) if law.penalised else None
        drawn = complete_patch(self._model, state_1D[0], law, generator, row.given, counts_1V)
        if drawn is None:
            pads = [self._pad] * (self._model.patch_size - len(row.given))
            row.patches, row.given = self._lay_out(pads + list(row.prompt))
            drawn = self._draw([row], self._read(row.patches, slot))
        return drawn

    def _lay_out(self, prompt: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """The patches to read, and the rest of the prompt."""
        size = self._model.patch_size
        whole = len(prompt) // size * size
        patches = [list(prompt[start : start + size]) for start in range(0, whole, size)]
        if not (self._packed and patches):
            patches.insert(0, self._boundary)
        if len(patches) > self._capacity:
            patches = patches[-self._kept :]
        return patches, list(prompt[whole:])

    @property
    def _kept(self) -> int:
        """Patches that stay when the window slides; there is then room for at least one more."""
        return min(self._capacity - 1, max(1, int(self._capacity * KEPT)))

    def _admit(self) -> list[States]:
        """Rows of the queue into free slots, and their states; neighbours with the same prompt share one reading of it."""
        states: list[States] = []
        while self._queue and len(self._rows) < self._slots:
            first, source = self._queue.popleft(), len(self._rows)
            states.append(self._read(first.patches, source))
            self._rows.append(first)
            while self._queue and len(self._rows) < self._slots and self._queue[0].prompt == first.prompt:
                self._cache.copy(source, len(self._rows))
                self._rows.append(self._queue.popleft())
                states.append(states[-1])
        return states

    def _read(self, patches: list[list[int]], slot: int) -> States:
        """The state (1, D) after patches read into an empty slot."""
        self._cache.clear(slot)
        cache = self._cache.rows(slot, slot + 1)
        if self._tiles is not None:
            return self._tiles.read_on(patches, cache)[-1:]
        return self._model.states(torch.tensor([patches], device=self._model.device), cache)[:, -1]

    def _read_last(self) -> list[States]:
        """Read the patches drawn in the step before; a row whose slot is full goes on with the end of its text."""
        for slot, row in enumerate(self._rows):
            if len(row.patches) > self._capacity:
                row.patches = row.patches[-self._kept :]
                self._cache.clear(slot)
                if len(row.patches) > 1:
                    self._read(row.patches[:-1], slot)
        if not self._rows:
            return []
        last = [row.patches[-1] for row in self._rows]
        if self._tiles is not None:
            return [self._tiles.read(last, self._cache)]
        ids_B1K = torch.tensor(last, device=self._model.device)[:, None]
        return [self._model.states(ids_B1K, self._cache.rows(0, len(last)))[:, -1]]

    def _together(self) -> list[list[int]]:
        """Slots that are drawn together: rows of one law, and each with a rest of a prompt alone."""
        groups: dict[Law | int, list[int]] = {}
        for slot, row in enumerate(self._rows):
            groups.setdefault(slot if row.given else row.settings.law, []).append(slot)
        return list(groups.values())

    def _take(self, row: _Row, patch: list[int], pool: Pool) -> Event:
        """Count a patch as drawn."""
        new = patch[len(row.given) :]
        room = row.settings.max_tokens - row.produced
        finished: Finish | None
        if self._eos in new[:room]:
            kept, finished = new[: new.index(self._eos)], "eos"
        else:
            kept, finished = new[:room], "length" if len(new) >= room else None
        row.produced += len(kept)
        if row.counts is not None:
            drawn = torch.tensor(kept, dtype=torch.int64, device=row.counts.device)
            row.counts += torch.bincount(drawn, minlength=len(row.counts))
        row.patches.append(patch)
        row.given = []
        return Event(row.number, tuple(kept), finished, pool)

    def _release(self, slots: list[int]) -> None:
        """Free slots; the last rows move into them, so that rows at work stand side by side."""
        for slot in sorted(slots, reverse=True):
            last = len(self._rows) - 1
            if slot != last:
                self._cache.copy(last, slot)
                self._rows[slot] = self._rows[last]
            self._rows.pop()


def inputs_needed(prompt: int, max_tokens: int, patch_size: int) -> int:
    """Patches that a model reads of a text at most: the boundary, and all whole patches but the last one drawn.

    A prompt with a rest may be padded on its left, and is then counted with its pads.
    """
    padded = -(-prompt // patch_size) * patch_size
    return 1 + max(0, -(-(padded + max_tokens) // patch_size) - 1)


def _pool(drawn: Drawn, index: int, patch: list[int], given: int) -> Pool:
    of_row = [None if part is None else part[index] for part in (drawn.copies, drawn.latents, drawn.tokens)]
    return Pool(drawn.draws, of_row[0], tuple(patch), of_row[1], of_row[2], given)
