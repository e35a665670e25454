"""The answer to a request for text: it hands the job in, tells what comes, and takes the job back when the client leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nextvec.serve.errors import ApiError
from nextvec.serve.formats import DONE, REASONS, Form, as_event
from nextvec.serve.metrics import Metrics
from nextvec.serve.worker import Job, Update, Worker

LEFT = 499  # the status that logs show for a client that left before the end


class Reply(Response):
    """Status and headers are sent with the first patch, so that an error before it is an HTTP error."""

    def __init__(self, worker: Worker, job: Job, form: Form, stream: bool, metrics: Metrics) -> None:
        self._worker, self._job, self._form, self._stream, self._metrics = worker, job, form, stream, metrics
        self._usage = {"prompt_tokens": sum(map(len, job.prompts)), "completion_tokens": 0, "total_tokens": 0}
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        log = scope.setdefault("nextvec", {})
        log |= {"model": self._worker.name, "texts": self._job.rows, "id": self._form.id}
        gone = asyncio.create_task(_gone(receive))
        telling = asyncio.create_task(self._tell(send))
        try:
            self._worker.submit(self._job)
            await asyncio.wait({gone, telling}, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
            else:
                log["status"] = LEFT
                self._metrics.cancelled.labels(self._worker.name).inc()
        finally:
            self._worker.cancel(self._job)
            gone.cancel()
            telling.cancel()
            await asyncio.gather(gone, telling, return_exceptions=True)
            self._metrics.whole.labels(self._worker.name).observe(time.perf_counter() - self._job.began)
            log |= self._usage

    async def _tell(self, send: Send) -> None:
        updates = self._updates()
        first = await anext(updates)
        if self._stream:
            await self._tell_stream(send, first, updates)
        else:
            await self._tell_whole(send, first, updates)

    async def _updates(self) -> AsyncIterator[Update]:
        """Patches of all rows as they come. Raises the ApiError that ends a job."""
        left = self._job.rows
        while left:
            update = await self._job.updates.get()
            if isinstance(update, ApiError):
                raise update
            self._usage["completion_tokens"] += update.piece.tokens
            left -= update.piece.finished is not None
            yield update
        self._usage["total_tokens"] = self._usage["prompt_tokens"] + self._usage["completion_tokens"]

    async def _tell_stream(self, send: Send, first: Update, rest: AsyncIterator[Update]) -> None:
        await send(self._start(b"text/event-stream", (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")))

        async def event(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await event(b"".join(map(as_event, [*self._form.opening(), self._form.chunk(first)])))
        try:
            async for update in rest:
                await event(as_event(self._form.chunk(update)))
        except ApiError as error:  # the status is sent: the error is an event
            await event(b"data: " + error.body() + b"\n\n")
        else:
            await event(b"".join(map(as_event, self._form.closing(self._usage))))
        await event(DONE, more=False)

    async def _tell_whole(self, send: Send, first: Update, rest: AsyncIterator[Update]) -> None:
        texts, reasons = [""] * self._job.rows, [""] * self._job.rows

        def take(update: Update) -> None:
            texts[update.piece.row] += update.piece.text
            reasons[update.piece.row] = REASONS[update.piece.finished] or ""

        take(first)
        async for update in rest:
            take(update)
        body = json.dumps(self._form.whole(texts, reasons, self._usage)).encode("ascii")
        await send(self._start(b"application/json", (b"content-length", str(len(body)).encode())))
        await send({"type": "http.response.body", "body": body})

    def _start(self, kind: bytes, *more: tuple[bytes, bytes]) -> dict[str, object]:
        headers = [(b"content-type", kind), (b"x-nextvec-seed", str(self._job.settings.seed).encode()), *more]
        return {"type": "http.response.start", "status": 200, "headers": headers}


async def _gone(receive: Receive) -> None:
    """Until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
