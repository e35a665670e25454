"""Text from token ids as they arrive: a character whose bytes are spread over patches appears when it is complete."""

from __future__ import annotations

from collections.abc import Sequence

from nextvec.text.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are not, or not yet, UTF-8
_CONTEXT = 16  # ids kept before the next ones: a decoder may treat the very first token in its own way
_LONGEST = 64  # ids decoded at once before older ones are let go


class TextStream:
    """Incremental decoding: the pieces from `push` and `finish`, joined, are the text of all ids after `before`.

    Replacement characters at the end are held back, since the next ids may complete them; `finish` gives them out. Exact for
    byte-level tokenizers, whose text only grows: more ids never change a character before the last incomplete one.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)[-_CONTEXT:]
        self._shown = len(tokenizer.decode(self._ids))

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; empty while a character is incomplete."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        ready = max(len(text.rstrip(INCOMPLETE)), self._shown)
        piece = text[self._shown : ready]
        self._shown = ready
        if ready == len(text) and len(self._ids) > _LONGEST:
            self._ids = self._ids[-_CONTEXT:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """What was held back: bytes that no further id will complete, as replacement characters."""
        text = self._tokenizer.decode(self._ids)
        piece = text[self._shown :]
        self._shown = len(text)
        return piece


class StopStream:
    """A TextStream that ends before the first of the `stop` strings; what may be the beginning of one is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer, before), tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; nothing once stopped."""
        return self._pass(self._stream.push(ids), last=False)

    def finish(self) -> str:
        """What was held back."""
        return self._pass(self._stream.finish(), last=True)

    def _pass(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [text.find(stop) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, without being all of it."""
    return next(length for length in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:length]))


def patch_texts(tokenizer: Tokenizer, ids: Sequence[int], patch_size: int) -> list[str]:
    """The text of `ids` cut at patch boundaries; a character spread over patches stands in the one that completes it."""
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[start : start + patch_size]) for start in range(0, len(ids), patch_size)]
    return [*pieces[:-1], pieces[-1] + stream.finish()] if pieces else []
