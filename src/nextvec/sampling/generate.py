"""The one generation loop: command line and Python get their text from here, patch by patch.

A row's model input is  [eos, pad .. pad] [whole patches of the prompt] [patches drawn so far].  The first is the boundary
that ends a document in aligned packing, so that an empty prompt, too, has a state to start from; a model trained on packed
documents never saw it, so there a prompt of at least one whole patch stands alone. A prompt whose length is no multiple of K
leaves r tokens over; the first patch drawn is conditioned on them: of its pool, the draws that begin with these tokens are
kept (`temperature.condition`), and what they say after them is new text. No pad ever stands inside a text.

Legend: B rows, P patches, K tokens per patch, D width, N candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from nextvec.errors import DataError, UserError
from nextvec.model.interface import LanguageModel
from nextvec.model.packed import pack_linears
from nextvec.sampling.pools import PlaceDecoder, choose_patch
from nextvec.sampling.stream import TextStream
from nextvec.sampling.temperature import batch_temperature, check_pool, check_temperature, condition, sample_logits
from nextvec.text.tokenizer import Tokenizer

Finish = Literal["eos", "length"]  # the model ended the text, or max_tokens was reached


@dataclass(frozen=True)
class Sampling:
    """How patches are drawn. Raises UserError for values out of range."""

    temperature: float = 0.5  # in (0, 1]; 1 is the model's own law [P: fluent text needs at most 0.5]
    candidates: int = 200  # N, draws in a pool; unused where the model has likelihoods [P]
    max_tokens: int = 256  # new tokens per row at most
    seed: int = 0  # row i draws from a generator seeded by (seed, i)

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("candidates", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class Step:
    """One patch per unfinished row, in the order of the prompts.

    tokens: each row's new text ids, without the prompt's, the end-of-text token and what follows it; empty for a row that
    finished earlier. finished: None while a row goes on; the reason from the step on in which it ended.
    """

    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[Finish | None, ...]


class TextModel(LanguageModel, Protocol):
    """A language model that knows its tokenizer and how its documents were laid out, as one loaded from a run does."""

    tokenizer: Tokenizer | None
    packed: bool


@runtime_checkable
class HasLogits(Protocol):
    """A model with likelihoods of the next token (the baseline): its temperature needs no pool of candidates."""

    def logits(self, state_ND: Tensor) -> Tensor: ...


@runtime_checkable
class HasLatents(Protocol):
    """A model that draws latents, which a decoder turns into patches: only those that matter need be decoded."""

    autoencoder: PlaceDecoder
    patch_size: int

    def draw_latents(self, state_ND: Tensor, draws: int, generator: Sequence[torch.Generator]) -> Tensor: ...


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    packed: bool = False,
) -> Iterator[Step]:
    """Continue each prompt (token ids of any length, also none), one patch per row and step, until all rows finished.

    A row ends at the end-of-text token, wherever it stands in its patch, or at `max_tokens`. A row's text does not depend on
    the other rows (up to the rounding of batched products). `packed`: the model was trained on packed documents.
    Raises UserError, at the call, for fewer candidates than the temperature needs and for ids outside the vocabulary.
    """
    if not isinstance(model, HasLogits):
        check_pool(settings.temperature, settings.candidates)
    for prompt in prompts:
        for token in prompt:
            if not 0 <= token < model.vocab_size:
                raise UserError(
                    f"prompt tokens must be in [0, {model.vocab_size}), the model's vocabulary; got {token}: "
                    "encode the prompt with the model's own tokenizer"
                )
    return _run(model, prompts, settings, eos_id, pad_id, packed)


def stream_text(
    model: TextModel,
    prompt: str,
    *,
    temperature: float = Sampling.temperature,
    candidates: int = Sampling.candidates,
    max_tokens: int = Sampling.max_tokens,
    seed: int = Sampling.seed,
) -> Iterator[str]:
    """The continuation of `prompt`, one piece per patch; the pieces joined are the whole text (the prompt is not repeated).

    A piece is empty while the bytes of a character are incomplete. Arguments as `Sampling`. Raises UserError, at the call.
    """
    settings = Sampling(temperature, candidates, max_tokens, seed)
    return (pieces[0] for pieces in _stream(model, [prompt], settings))


def generate_texts(model: TextModel, prompts: Sequence[str], settings: Sampling) -> list[str]:
    """The continuation of each prompt, drawn together. The first equals `"".join(stream_text(model, prompts[0], ..))`."""
    pieces = list(_stream(model, prompts, settings))
    return ["".join(column) for column in zip(*pieces, strict=True)]


def _stream(model: TextModel, prompts: Sequence[str], settings: Sampling) -> Iterator[list[str]]:
    """Per step the text of each row's patch; a row's last piece completes its text."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("this model has no tokenizer: load it with from_pretrained, or set model.tokenizer")
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise DataError(
                "the prompt must be valid Unicode text; it holds bytes that are not UTF-8: encode it as UTF-8"
            )
    encoded = tokenizer.encode_batch(prompts)
    ends = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    steps = generate(model, encoded, settings, packed=model.packed, **ends)
    streams = [TextStream(tokenizer, before=ids) for ids in encoded]
    return (
        [
            stream.push(ids) + (stream.finish() if end else "")
            for stream, ids, end in zip(streams, step.tokens, step.finished, strict=True)
        ]
        for step in steps
    )


def _run(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    eos_id: int,
    pad_id: int,
    packed: bool,
) -> Iterator[Step]:
    if isinstance(model, torch.nn.Module) and not model.training:
        pack_linears(model)
    boundary = [eos_id] + [pad_id] * (model.patch_size - 1)
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt) // model.patch_size, []).append(row)
    groups = [
        _Group(model, rows, [prompts[row] for row in rows], settings, [] if packed and patches else boundary)
        for patches, rows in by_length.items()
    ]
    produced = [0] * len(prompts)
    finished: list[Finish | None] = [None] * len(prompts)
    while groups:
        tokens: list[tuple[int, ...]] = [()] * len(prompts)
        for group in groups:
            for row, new in zip(group.rows, group.advance(), strict=True):
                if finished[row] is not None:
                    continue
                kept, finished[row] = _cut(new, eos_id, settings.max_tokens - produced[row])
                produced[row] += len(kept)
                tokens[row] = tuple(kept)
        groups = [group for group in groups if any(finished[row] is None for row in group.rows)]
        yield Step(tuple(tokens), tuple(finished))


def _cut(new: list[int], eos_id: int, room: int) -> tuple[list[int], Finish | None]:
    """A patch's new ids before its end-of-text token and within `room`, and whether that ends the row."""
    if eos_id in new[:room]:
        return new[: new.index(eos_id)], "eos"
    return new[:room], "length" if len(new) >= room else None


class _Group:
    """Rows whose prompts have equally many whole patches: one cache, no padding, all advance together."""

    def __init__(
        self,
        model: LanguageModel,
        rows: list[int],
        prompts: list[Sequence[int]],
        settings: Sampling,
        boundary: list[int],
    ) -> None:
        size = model.patch_size
        whole = len(prompts[0]) // size * size
        rest = [list(prompt[whole:]) for prompt in prompts]
        longest = max(map(len, rest))
        self.rows, self._model, self._settings = rows, model, settings
        self._generators = [row_generator(settings.seed, row, model.device) for row in rows]
        inputs = torch.tensor([boundary + list(prompt[:whole]) for prompt in prompts], device=model.device)
        self._input_BPK = inputs.unflatten(1, (-1, size))  # patches that the cache does not hold yet
        # The last patch drawn is never an input, so this many steps fit: one for the rest, then whole patches.
        self._cache = model.new_cache(len(rows), 1 + whole // size + -(-(longest + settings.max_tokens) // size))
        self._given = [len(r) for r in rest]  # tokens of the next patch that the prompt gives
        self._prefix = None
        if longest:
            prefix_BK = torch.tensor([r + [0] * (size - len(r)) for r in rest], device=model.device)
            self._prefix = (prefix_BK, torch.tensor(self._given, device=model.device))

    @torch.inference_mode()
    def advance(self) -> list[list[int]]:
        """Draw the next patch of every row; its ids without those that the prompt gave."""
        state_BD = self._model.states(self._input_BPK, self._cache)[:, -1]
        patch_BK = _draw_patch(self._model, state_BD, self._settings, self._generators, self._prefix)
        self._input_BPK = patch_BK[:, None]
        new = [patch[given:] for patch, given in zip(patch_BK.tolist(), self._given, strict=True)]
        self._given, self._prefix = [0] * len(self.rows), None
        return new


def _draw_patch(
    model: LanguageModel,
    state_BD: Tensor,
    settings: Sampling,
    generators: list[torch.Generator],
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One patch per row, (B, K), at the settings' temperature; `prefix`: tokens (B, K) it starts with, and how many (B,)."""
    if isinstance(model, HasLogits):
        return sample_logits(model.logits(state_BD), settings.temperature, generators)[:, None]
    draws = 1 if settings.temperature == 1 and prefix is None else settings.candidates
    if prefix is None and isinstance(model, HasLatents):
        latent_BNL = model.draw_latents(state_BD, draws, generators).transpose(0, 1)
        decoder, size = model.autoencoder, model.patch_size
        return choose_patch(decoder, latent_BNL, size, settings.temperature, generators).patch
    pools = [model.draw_tokens(state_BD[row], draws, each) for row, each in enumerate(generators)]
    candidates_BNK = torch.stack(pools)
    if prefix is None:
        return batch_temperature(candidates_BNK, settings.temperature, generators)
    candidates_BNK, keep_BN = condition(candidates_BNK, *prefix)
    return batch_temperature(candidates_BNK, settings.temperature, generators, keep_BN)


def row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A row's own generator: a hash of (seed, row), so that neighbouring seeds and rows are unrelated."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
