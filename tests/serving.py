"""Servers on a real socket for the tests: tiny models in a thread of this process, and a plain client that can misbehave."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch

from bench_runs import RUNS
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import build_model, save_run
from nextvec.serve.api import build_app
from nextvec.serve.chat import ChatTemplate
from nextvec.serve.metrics import Metrics
from nextvec.serve.models import Served
from nextvec.serve.server import make_server, serve, take_address
from nextvec.serve.settings import ServeSettings
from nextvec.serve.worker import Worker
from sampling_models import TOKENIZER, calm, token_lm

CONTEXT = 240  # tokens
PROMPT = "The quick brown fox"


class Running:
    """A server that answers at `url`."""

    def __init__(self, models: dict[str, Served], settings: ServeSettings, metrics: Metrics, url: str) -> None:
        self.models, self.settings, self.metrics, self.url = models, settings, metrics, url
        self.address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))

    def held(self) -> int:
        return sum(served.worker.held for served in self.models.values())

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until no model holds a row."""
        limit = time.monotonic() + seconds
        while self.held():
            assert time.monotonic() < limit, f"{self.held()} rows are still held"
            time.sleep(0.005)

    def raw(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def post(self, path: str, body: dict[str, Any] | bytes, **headers: str) -> socket.socket:
        """Send a request and leave the answer to be read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"host": "x", "content-type": "application/json", "content-length": str(len(data))}
        head |= {name.replace("_", "-"): value for name, value in headers.items()}
        made = self.raw()
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        made.sendall(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data)
        return made


@contextmanager
def running(
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
    models: dict[str, Calm | TokenLM] | None = None,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A CALM and a baseline, called calm and baseline, behind a socket of loopback."""
    options = {"port": 0, "context_tokens": CONTEXT, "drain_seconds": 1.0, **options}
    settings, metrics = ServeSettings(**options), Metrics()
    made = {"calm": calm(2, dtype), "baseline": token_lm(dtype)} if models is None else models
    chat = None
    if template is not None:
        chat = ChatTemplate(template, {"eos_token": "<|endoftext|>"}, Path("test"))
    served = {
        name: Served(
            name, model, TOKENIZER, chat, Worker(name, model, TOKENIZER, settings, metrics, CONTEXT), CONTEXT, 1
        )
        for name, model in made.items()
    }
    server = make_server(build_app(served, settings, metrics), settings)
    address: list[str] = []
    with take_address(settings) as taken:
        if send_buffer is not None:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=serve, args=(server, taken, address.append))
        thread.start()
        while not address and thread.is_alive():
            time.sleep(0.005)
        try:
            yield Running(served, settings, metrics, address[0])
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive(), "the server ends"
            assert not any(each.worker.alive for each in served.values()), "its engines end"


def save_runs(folder: Path) -> Path:
    """Run directories of every kind, for servers in processes of their own."""
    for name, config in RUNS.items():
        model = build_model(config, torch.Generator().manual_seed(1))
        save_run(folder / name, config, model, TOKENIZER)
    return folder


def started(*words: str | Path, log: Path, port: int = 0, env: dict[str, str] | None = None) -> tuple[Popen[str], str]:
    """`nextvec serve` in a process of its own, and its address. log: a file for what it logs, since a pipe that nobody
    reads is full after some hundred requests, and then the server stands still."""
    command = [sys.executable, "-c", "from nextvec.cli import main; main()", "serve", "--port", str(port)]
    with open(log, "ab") as out:
        child = Popen(
            [*command, *map(str, words)], stdout=PIPE, stderr=out, text=True, env={**os.environ, **(env or {})}
        )
    assert child.stdout is not None
    with child.stdout:
        line = child.stdout.readline()
    assert " at http://" in line, log.read_text()
    return child, line.split(" at ")[1].split("/v1")[0]


def read_answer(made: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body (chunks joined) of the answer on a connection, which is closed."""
    from http.client import HTTPResponse

    with made:
        answer = HTTPResponse(made)
        answer.begin()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def events(body: bytes) -> list[Any]:
    """The JSON of a stream's events, without the last, which must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-3:]
    return [json.loads(line) for line in lines[:-1]]
