"""The one generation loop: command line and Python get their text from here, patch by patch.

`generate` speaks in token ids, `stream_pieces` and what is built on it in text; the rows themselves live in `engine.Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from nextvec.errors import DataError, UserError
from nextvec.model.interface import LanguageModel
from nextvec.sampling.engine import Engine, Event, Pool, inputs_needed
from nextvec.sampling.settings import Finish, Method, Sampling
from nextvec.sampling.stream import StopStream
from nextvec.text.tokenizer import Tokenizer

SLOTS = 32  # rows at work at once, at most; more prompts wait


@dataclass(frozen=True)
class Step:
    """One patch per unfinished row at work, in the order of the prompts (and of the samples of each).

    tokens: each row's new text ids, without the prompt's, the end-of-text token and what follows it; empty for a row that
    finished earlier or waits. finished: None while a row goes on; the reason from the step on in which it ended.
    """

    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[Finish | None, ...]


@dataclass(frozen=True)
class Piece:
    """A row's text of one patch. tokens: ids drawn, also those whose text a stop string cut; pool: what it was chosen from."""

    row: int
    text: str
    tokens: int
    finished: Finish | None
    pool: Pool


class TextModel(LanguageModel, Protocol):
    """A language model that knows its tokenizer and how its text was laid out, as one loaded from a run does."""

    tokenizer: Tokenizer | None
    packed: bool
    context_tokens: int | None


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    packed: bool = False,
    samples: int = 1,
    context: int | None = None,
    slide: bool = False,
    deterministic: bool = False,
    slots: int = SLOTS,
) -> Iterator[Step]:
    """Continue each prompt (token ids of any length, also none), one patch per row and step, until all rows finished.

    Rows are `samples` for each prompt, side by side: row i is sample i % samples of prompt i // samples. A row ends at the
    end-of-text token, wherever it stands in its patch, or at `max_tokens`. A row's text does not depend on the other rows
    (up to the rounding of batched products; `deterministic` without exception). `packed`: the model was trained on packed
    documents. `context`: tokens that it was trained to read; a longer prompt is refused unless `slide`, with which only as many
    are read (`engine.Engine`). Closing the iterator frees all memory.
    Raises UserError, at the call, for fewer candidates than the temperature needs, for ids outside the vocabulary, for top_k,
    top_p or penalties where tokens are not drawn one by one, and for a prompt beyond the context.
    """
    engine = _engine(model, prompts, settings, eos_id, pad_id, packed, samples, context, slide, deterministic, slots)
    return _steps(engine, len(prompts) * samples)


def stream_pieces(
    model: TextModel,
    prompts: Sequence[str],
    settings: Sampling,
    *,
    samples: int = 1,
    stop: Sequence[str] = (),
    slide: bool = False,
    deterministic: bool = False,
    slots: int = SLOTS,
) -> Iterator[Piece]:
    """The text of every row as its patches come, rows as in `generate`. A row's pieces, joined, are its whole text.

    A text ends before the first of the `stop` strings that appears in it, wherever patches meet. Text that may be the
    beginning of one, or of a character whose bytes are incomplete, is held back until it is decided. Raises UserError and
    DataError, at the call.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("this model has no tokenizer: load it with from_pretrained, or set model.tokenizer")
    if isinstance(stop, str) or not all(stop):
        raise UserError("stop must be a list of texts, none of them empty")
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise DataError(
                "the prompt must be valid Unicode text; it holds bytes that are not UTF-8: encode it as UTF-8"
            )
    encoded = tokenizer.encode_batch(prompts)
    engine = _engine(
        model, encoded, settings, tokenizer.eos_id, tokenizer.pad_id, model.packed, samples, model.context_tokens, slide,
        deterministic, slots,
    )  # fmt: skip
    streams = [StopStream(tokenizer, stop, before=ids) for ids in encoded for _ in range(samples)]
    return _pieces(engine, streams)


def stream_text(
    model: TextModel,
    prompt: str,
    *,
    temperature: float = Sampling.temperature,
    candidates: int | None = Sampling.candidates,
    max_tokens: int = Sampling.max_tokens,
    seed: int = Sampling.seed,
    top_k: int | None = None,
    top_p: float | None = None,
    method: Method = Sampling.method,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: Sequence[str] = (),
    slide: bool = False,
    deterministic: bool = False,
) -> Iterator[str]:
    """The continuation of `prompt`, one piece per patch; the pieces joined are the whole text (the prompt is not repeated).

    A piece is empty while the bytes of a character are incomplete. Arguments as `Sampling` and `stream_pieces`. Raises
    UserError, at the call.
    """
    settings = Sampling(
        temperature, candidates, max_tokens, seed, top_k, top_p, method, presence_penalty, frequency_penalty
    )
    pieces = stream_pieces(model, [prompt], settings, stop=stop, slide=slide, deterministic=deterministic)
    return (piece.text for piece in pieces)


def generate_texts(
    model: TextModel, prompts: Sequence[str], settings: Sampling, *, samples: int = 1, stop: Sequence[str] = ()
) -> list[str]:
    """The continuation of each prompt, drawn together, `samples` of each side by side.

    The first equals `"".join(stream_text(model, prompts[0], ..))`.
    """
    texts = [""] * (len(prompts) * samples)
    for piece in stream_pieces(model, prompts, settings, samples=samples, stop=stop):
        texts[piece.row] += piece.text
    return texts


def _engine(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    eos_id: int,
    pad_id: int,
    packed: bool,
    samples: int,
    context: int | None,
    slide: bool,
    deterministic: bool,
    slots: int,
) -> Engine:
    """An engine with all rows in its queue; row numbers are 0, 1, .."""
    longest = max(map(len, prompts), default=0)
    if context is not None and longest > context and not slide:
        raise UserError(
            f"a prompt has {longest:,} tokens, and the model was trained to read {context:,}: shorten it, or let the window "
            "slide over its end (--slide, slide=True)"
        )
    capacity = max(2, inputs_needed(longest, settings.max_tokens, model.patch_size))
    if slide and context is not None:
        capacity = min(capacity, max(2, context // model.patch_size))
    engine = Engine(
        model,
        eos_id=eos_id,
        pad_id=pad_id,
        slots=max(1, min(slots, len(prompts) * samples)),
        capacity=capacity,
        packed=packed,
        slide=slide,
        deterministic=deterministic,
    )
    for index, prompt in enumerate(prompts):
        engine.add(prompt, settings, samples=samples, row=index * samples)
    return engine


def _steps(engine: Engine, rows: int) -> Iterator[Step]:
    finished: list[Finish | None] = [None] * rows
    while len(engine):
        tokens: list[tuple[int, ...]] = [()] * rows
        for event in engine.step():
            tokens[event.row], finished[event.row] = event.tokens, event.finished
        yield Step(tuple(tokens), tuple(finished))


def _pieces(engine: Engine, streams: list[StopStream]) -> Iterator[Piece]:
    while len(engine):
        for event in engine.step():
            yield piece_of(engine, streams[event.row], event)


def piece_of(engine: Engine, stream: StopStream, event: Event) -> Piece:
    """An event as text. A row whose stop string appears in it is taken out of the engine."""
    text = stream.push(event.tokens)
    if event.finished is not None:
        text += stream.finish()
    finished = event.finished
    if stream.stopped:
        finished = "stop"
        engine.cancel(event.row)
    return Piece(event.row, text, len(event.tokens), finished, event.pool)
