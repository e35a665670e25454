"""Two servers behind a real nginx with the configuration of deploy/serve: streams, clients that leave, a drain, a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serving import Running, read_answer, save_runs, started
from test_deploy import DEPLOY

FOUND = shutil.which(
    "nginx", path=f"{os.environ['PATH']}:/usr/sbin"
)  # where Debian puts it, which is not on every PATH
if FOUND is None:
    pytest.skip("nginx is not installed; its configuration is read in test_serve_deploy.py", allow_module_level=True)

LONG = {"model": "baseline", "prompt": "a", "max_tokens": 1000, "top_k": 1, "stream": True}  # which no end of text cuts
pytestmark = pytest.mark.slow


class Replica:
    """A server process."""

    def __init__(self, runs: Path, log: Path, port: int = 0) -> None:
        words = (runs / "train", runs / "baseline", "--context-tokens", "4096")
        self.child, self.url = started(*words, log=log, port=port)
        self.port = int(self.url.rsplit(":", 1)[1])

    def held(self) -> int:
        """Texts at work and waiting, by /health."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            return int(json.loads(answer.read())["models"]["baseline"])

    def end(self, how: signal.Signals | None = None) -> int:
        """The exit code, after a signal or after the one that it has had."""
        if how is not None:
            self.child.send_signal(how)
        return self.child.wait(timeout=40)


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Starts one; what still runs at the end is ended."""
    runs, made = save_runs(tmp_path), list[Replica]()

    def start(port: int = 0) -> Replica:
        made.append(Replica(runs, tmp_path / f"log-{len(made)}", port))
        return made[-1]

    yield start
    for each in made:
        if each.child.poll() is None:
            each.end(signal.SIGKILL)


@contextmanager
def balanced(folder: Path, ports: list[int]) -> Iterator[Running]:
    """nginx before servers at these ports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (DEPLOY / "serve" / "nginx.conf").read_text().replace("/tmp/", f"{folder}/")
    for number, each in enumerate(ports, 1):
        text, changed = re.subn(rf"server nextvec-{number}:8000 ", f"server 127.0.0.1:{each} ", text)
        assert changed == 1
    text, changed = re.subn(r"listen 8000;", f"listen 127.0.0.1:{port};", text)
    assert changed == 1
    (folder / "nginx.conf").write_text(text)
    user = "user root; " if os.geteuid() == 0 else ""
    assert FOUND is not None
    words = [FOUND, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr", "-g", f"{user}daemon off;"]
    with open(folder / "nginx.log", "wb") as log:
        child = subprocess.Popen(words, stderr=log)
    try:
        until(lambda: reached(port))
        yield Running({}, None, None, f"http://127.0.0.1:{port}")  # type: ignore[arg-type]
    finally:
        child.send_signal(signal.SIGQUIT)
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:  # a connection of a test that failed is still open
            child.kill()
            child.wait()


def reached(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "never came true"
        time.sleep(0.02)


def begun(front: Running, seed: int, **more: Any) -> socket.socket:
    """A stream whose first bytes have come."""
    made = front.post("/v1/completions", {**LONG, "seed": seed, **more}, connection="close")
    assert made.recv(12) == b"HTTP/1.1 200"
    return made


def rest(made: socket.socket) -> bytes:
    """What a stream still brings; less than all of it where it breaks."""
    body = b""
    with made:
        try:
            while block := made.recv(1 << 16):
                body += block
        except ConnectionResetError:
            pass
    return body


def test_two_replicas_behind_nginx(replica: Callable[..., Replica], tmp_path: Path) -> None:
    first, second = replica(), replica()
    with balanced(tmp_path, [first.port, second.port]) as front:
        # Nothing is held back, and what the replica says comes through.
        begin = time.monotonic()
        made = begun(front, 0)
        came = time.monotonic() - begin
        text = rest(made)
        assert came < (time.monotonic() - begin) / 2
        assert text.count(b"data: {") == 1000
        assert b"[DONE]" in text
        status, headers, body = read_answer(front.post("/v1/completions", {"model": "gone", "prompt": "a"}))
        assert (status, "x-request-id" in headers, json.loads(body)["error"]["code"]) == (404, True, "model_not_found")
        status, _, body = read_answer(front.post("/v1/completions", b'{"prompt": "' + b"x" * 2_000_000 + b'"}'))
        assert (status, json.loads(body)["error"]["type"]) == (413, "invalid_request_error")

        # Requests go where there are fewest; a client that leaves is gone from its replica too.
        streams = [begun(front, seed) for seed in range(4)]
        assert (first.held(), second.held()) == (2, 2)
        for each in streams:
            each.close()
        until(lambda: first.held() == second.held() == 0)

        # A replica that stops finishes what it has; new requests go to the other.
        streams = [begun(front, seed) for seed in range(6)]
        assert (first.held(), second.held()) == (3, 3)
        with ThreadPoolExecutor(16) as pool:
            first.child.send_signal(signal.SIGTERM)
            ends = [pool.submit(rest, each) for each in streams]
            short = [pool.submit(rest, begun(front, seed, max_tokens=20)) for seed in range(8)]
            assert all(b"[DONE]" in each.result() for each in ends + short)
        assert first.end() == 0
        with urllib.request.urlopen(f"{front.url}/health") as answer:
            assert json.loads(answer.read())["status"] == "ok"

        # One that comes back takes part again.
        first = replica(first.port)

        def takes_part() -> bool:
            pair = [begun(front, seed, max_tokens=400) for seed in range(2)]
            found = first.held()
            for each in pair:
                each.close()
            time.sleep(0.1)
            return found > 0

        until(takes_part)
        until(lambda: first.held() == second.held() == 0)

        # One that is killed takes its own streams with it and no other.
        streams = [begun(front, seed) for seed in range(8)]
        lost = second.held()
        assert lost == 4
        assert second.end(signal.SIGKILL) == -signal.SIGKILL
        with ThreadPoolExecutor(16) as pool:
            short = [pool.submit(rest, begun(front, seed, max_tokens=20)) for seed in range(8)]
            whole = [b"[DONE]" in text for text in pool.map(rest, streams)]
            assert all(b"[DONE]" in each.result() for each in short)
        assert whole.count(False) == lost
        assert first.end(signal.SIGTERM) == 0
