"""The process: a socket, uvicorn around the application, connections that cannot be held open, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sys
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nextvec.errors import ConfigError
from nextvec.serve.logs import event
from nextvec.serve.settings import ServeSettings


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. Unlike uvicorn's, it is not raised again: the exit code is 0."""
        if self.should_exit:
            self.force_exit = True
        else:
            event("draining", signal=sig)
        self.should_exit = True


def guarded(settings: ServeSettings) -> type[H11Protocol]:
    """uvicorn's connection with three bounds: how many there are, how long a request's head may take, how long a client may
    take nothing of what is sent to it."""

    class Guarded(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _full: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.connections:
                event("connection refused", open=len(self.connections))
                transport.abort()
                return
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._head, self._full):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._full = self.loop.call_later(settings.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._full is not None:
                self._full.cancel()
                self._full = None

        def _watch_head(self) -> None:
            """A clock runs while a request's head is awaited; between requests uvicorn's own, shorter one runs as well."""
            waiting = self.conn.their_state is h11.IDLE
            if waiting and self._head is None:
                self._head = self.loop.call_later(settings.request_seconds, self.transport.close)
            elif not waiting and self._head is not None:
                self._head.cancel()
                self._head = None

    return Guarded


def take_address(settings: ServeSettings) -> socket.socket:
    """A socket at the address, which does not listen yet. Raises ConfigError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family[0], socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(made.close)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted connections inherit it
            if sys.platform.startswith("linux"):  # a client that vanished without a word is noticed
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.write_seconds))
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(settings.write_seconds)))
            made.bind(family[4])
            undo.pop_all()
        return made
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port} ({error}): give another --host or --port"
        ) from None


def make_server(app: ASGIApp, settings: ServeSettings) -> uvicorn.Server:
    """A server that has not started; `should_exit` ends it as SIGTERM does."""
    config = uvicorn.Config(
        app,
        http=guarded(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    return _Server(config)


def serve(server: uvicorn.Server, made: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish those in hand within `drain_seconds`. ready: told the address."""

    async def run() -> None:
        task = asyncio.create_task(server.serve(sockets=[made]))
        while not (server.started or task.done()):
            await asyncio.sleep(0.01)
        if server.started:
            host, port = made.getsockname()[:2]
            ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        await task

    gc.freeze()  # modules and models are no garbage: each collection that walks them stops every stream for tenths of a second
    try:
        asyncio.run(run())
    finally:
        gc.unfreeze()
    event("stopped")
