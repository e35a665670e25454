"""How a job's texts are told: as a completion, a chat or the page's patches; whole, or a chunk for each patch."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from nextvec.sampling.settings import Finish
from nextvec.serve.worker import Update
from nextvec.text.tokenizer import Tokenizer

REASONS: dict[Finish | None, str | None] = {"eos": "stop", "stop": "stop", "length": "length", None: None}
DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """One way to tell. A chunk becomes one event of a stream."""

    id: str

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first patch."""
        ...

    def chunk(self, update: Update) -> dict[str, Any]: ...

    def closing(self, usage: dict[str, int]) -> list[dict[str, Any]]:
        """Chunks after the last patch; the prompt's and the new tokens are told where the client asked."""
        ...

    def whole(self, texts: Sequence[str], reasons: Sequence[str | None], usage: dict[str, int]) -> dict[str, Any]: ...


class TextForm:
    """`text_completion`. echo: the prompt of each text, to be repeated before it."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, include_usage: bool = False, echo: Sequence[str] = ()) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._model, self._usage, self._echo, self._created = model, include_usage, echo, int(time.time())

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk([self._choice(row, text, None)]) for row, text in enumerate(self._echo)]

    def chunk(self, update: Update) -> dict[str, Any]:
        piece = update.piece
        return self._chunk([self._choice(piece.row, piece.text, REASONS[piece.finished])])

    def closing(self, usage: dict[str, int]) -> list[dict[str, Any]]:
        return [{**self._head(self.chunk_kind), "choices": [], "usage": usage}] if self._usage else []

    def whole(self, texts: Sequence[str], reasons: Sequence[str | None], usage: dict[str, int]) -> dict[str, Any]:
        before = self._echo or [""] * len(texts)
        choices = [
            self._whole_choice(row, before[row] + text, reason)
            for row, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        return {**chunk, "usage": None} if self._usage else chunk

    def _choice(self, row: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": row, "text": text, "finish_reason": reason, "logprobs": None}

    def _whole_choice(self, row: int, text: str, reason: str | None) -> dict[str, Any]:
        return self._choice(row, text, reason)


class ChatForm(TextForm):
    """`chat.completion`; a stream begins with the role."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, include_usage: bool, rows: int) -> None:
        super().__init__(model, include_usage)
        self._rows = rows

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": row, "delta": delta, "finish_reason": None, "logprobs": None}])
            for row in range(self._rows)
        ]

    def _choice(self, row: int, text: str, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        return {"index": row, "delta": delta, "finish_reason": reason, "logprobs": None}

    def _whole_choice(self, row: int, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": row, "message": message, "finish_reason": reason, "logprobs": None}


class PatchForm:
    """The page's stream (docs/serve.md): an event for each patch, with the vote that chose it where the model votes."""

    def __init__(self, tokenizer: Tokenizer, rest: int) -> None:
        self.id = f"patches-{secrets.token_hex(12)}"
        self._tokenizer, self._rest = tokenizer, rest

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunk(self, update: Update) -> dict[str, Any]:
        piece, rest = update.piece, update.piece.pool.given
        told: dict[str, Any] = {
            "text": piece.text,
            "tokens": piece.tokens,
            "seconds": round(update.seconds, 6),
            "draws": piece.pool.draws,
            "finish_reason": REASONS[piece.finished],
        }
        detail = update.detail
        if detail is None:
            return told
        others = detail.others
        return told | {
            "vote": {
                "draws": detail.draws,
                "kept": detail.kept,
                "candidates": [
                    {
                        "text": self._tokenizer.decode(each.ids),
                        "votes": each.votes,
                        "probability": round(each.probability, 4),
                        "chosen": each.ids == detail.patch[rest:],
                    }
                    for each in detail.candidates
                ],
                "others": {"candidates": others[0], "votes": others[1], "probability": round(others[2], 4)},
            },
            "latent": detail.latent,
            "points": detail.points,
            "point": detail.point,
            "share": detail.share,
        }

    def closing(self, usage: dict[str, int]) -> list[dict[str, Any]]:
        return [{"usage": usage}]

    def whole(self, texts: Sequence[str], reasons: Sequence[str | None], usage: dict[str, int]) -> dict[str, Any]:
        raise AssertionError("patches are told as a stream alone")


def as_event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event. ASCII, so that no decoder takes a rare line separator for the end of a line."""
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode("ascii") + b"\n\n"
