"""What every request passes: its key, its size, the time it may take to arrive; and what is counted and logged of it."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nextvec.serve.errors import ApiError
from nextvec.serve.logs import LOGGER, event
from nextvec.serve.metrics import Metrics
from nextvec.serve.settings import ServeSettings

SWALLOWED = 8  # times the largest body is read, not kept: a client that still sends would not see the answer
REQUEST = "nextvec.request"  # of a scope: the request's id
OPEN = ("/", "/health", "/metrics")  # without a key; they hold no text and do no work


class Door:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, routes: Sequence[Route]) -> None:
        self._app, self._settings, self._metrics, self._routes = app, settings, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, log = time.perf_counter(), scope.setdefault("nextvec", {})
        request, status = f"req-{secrets.token_hex(8)}", 0
        scope[REQUEST] = request

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request.encode())]
            await send(message)

        try:
            try:
                self._check_key(scope)
                body = await self._read(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, answer)
            else:
                if body is not None:
                    await self._app(scope, _replay(body, receive), answer)
        except Exception:
            if not status:  # else the client has its answer, or half of it
                await broken(scope).response()(scope, receive, answer)
            LOGGER.exception("failure", extra={"fields": {"request": request}})
        finally:
            self._record(scope, request, log.pop("status", status), time.perf_counter() - begin, log)

    def _check_key(self, scope: Scope) -> None:
        key = self._settings.api_key
        if key is None or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        word, _, token = given.partition(b" ")
        # both sides have one length and one path through the comparison, whatever is given
        equal = hmac.compare_digest(hmac.digest(b"", token.strip(), "sha256"), hmac.digest(b"", key.encode(), "sha256"))
        if not (equal and word.lower() == b"bearer"):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client left. Raises ApiError for one too large or too slow."""
        limit = self._settings.body_bytes
        too_large = ApiError(413, f"a request has at most {limit:,} bytes here: send less at once")
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(told) > SWALLOWED * limit:  # h11 has checked that it is a number
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    more = message.get("more_body", False)
                    if size > SWALLOWED * limit or (size > limit and not more):
                        raise too_large
                    if size <= limit:
                        parts.append(part)
                    if not more:
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the request did not arrive within {self._settings.request_seconds:g} seconds", code="timeout"
            ) from None

    def _record(self, scope: Scope, request: str, status: int, seconds: float, log: dict[str, Any]) -> None:
        # labels must stay few: the route's own path, not the model's name in it
        path = next((each.path_format for each in self._routes if each.path_regex.match(scope["path"])), "other")
        self._metrics.requests.labels(path, str(status)).inc()
        event(
            "request",
            request=request,
            method=scope["method"],
            path=path,
            status=status,
            seconds=round(seconds, 4),
            **log,
        )


def broken(scope: Scope) -> ApiError:
    """500, with the id under which the log has the failure."""
    return ApiError(500, f"the server failed at this request ({scope[REQUEST]}); its log says how")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the connection says."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again
