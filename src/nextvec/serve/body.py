"""Bodies of requests, read beside the event loop, one at a time, up to a job; the first mistake in one as a sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from nextvec.errors import UserError
from nextvec.serve.errors import ApiError

SHORT = 1 << 16  # bytes: bodies of more have a thread of their own, so that they keep nobody waiting but each other
SEVERAL = {  # fields of several types
    "prompt": "text, token ids (0 or more), or a list of either",
    "stop": "a text or a list of texts",
    "logprobs": "left out, or false",
    "content": "text or a list of parts of the type text",
}
A = TypeVar("A", bound=BaseModel)
R = TypeVar("R")


class Reader:
    """Two threads that read bodies, short ones and long ones: a long one would stop every stream while it is read, and many
    at once would need as much memory each."""

    def __init__(self) -> None:
        self._short, self._long = (ThreadPoolExecutor(1, f"{kind} bodies") for kind in ("short", "long"))

    async def read(self, request: Request, kind: type[A], then: Callable[[A], R]) -> R:
        """What `then` makes of the body. Raises ApiError or UserError."""
        body = await request.body()
        sent_as = request.headers.get("content-type", "")
        thread = self._short if len(body) <= SHORT else self._long
        found = await asyncio.get_running_loop().run_in_executor(thread, _read, body, sent_as, kind, then)
        if isinstance(found, ApiError | UserError):
            raise found
        return found

    def stop(self) -> None:
        """End the threads."""
        for thread in (self._short, self._long):
            thread.shutdown()


def _read(body: bytes, sent_as: str, kind: type[A], then: Callable[[A], R]) -> R | ApiError | UserError:
    try:
        return then(_checked(kind, _parsed(body, sent_as)))
    except (ApiError, UserError) as error:
        error.__traceback__ = error.__context__ = None  # their frames hold the body's objects
        return error


def _parsed(body: bytes, sent_as: str) -> dict[str, Any]:
    main, _, name = sent_as.partition(";")[0].strip().lower().partition("/")
    if main != "application" or name.rpartition("+")[2] != "json":
        raise ApiError(400, f"the body is read as JSON: send content-type: application/json; got {sent_as[:100]!r}")
    try:
        found = json.loads(body) if body else None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body must be a JSON object in UTF-8") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body cannot be read: it is nested too deeply, or a number is too long") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    return found


def _checked(kind: type[A], body: dict[str, Any]) -> A:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _sentence(error) from None


def _sentence(error: ValidationError) -> ApiError:
    """The first mistake: where and what. Of a field that takes several types each complains: then it says all of them."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    of_several = next((number for number, part in enumerate(path[:-1]) if part in SEVERAL), None)
    if of_several is not None:
        where = ".".join(path[: of_several + 1])
        return ApiError(400, f"{where} must be {SEVERAL[path[of_several]]}", param=where)
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {where!r} here: leave it out", param=where, code="unknown_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{where}: {message}", param=where)
