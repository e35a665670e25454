"""Logs of a server whose reader stands still: the server goes on, what was lost is counted, and the end comes."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request

import pytest

from nextvec.serve import logs
from nextvec.serve.logs import LOGGER, LineWriter, event, logs_to
from serving import running


def read_all(descriptor: int) -> list[dict[str, object]]:
    with open(descriptor, "rb") as pipe:
        return [json.loads(line) for line in pipe.read().splitlines()]


def test_a_pipe_that_nobody_reads_does_not_stop_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "WAITING", 100)
    reader, writer = os.pipe()
    size = 1000  # requests, whose lines are more than a pipe holds (64 KiB) and than may wait
    with running() as server, logs_to(writer):
        for _ in range(size):
            with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
                assert answer.status == 200
        found: list[dict[str, object]] = []
        reading = threading.Thread(target=lambda: found.extend(read_all(reader)))
        reading.start()
        handler = LOGGER.handlers[0]
        assert isinstance(handler, LineWriter)
        while not handler._lines.empty():
            time.sleep(0.01)
        event("last")
    os.close(writer)
    reading.join(timeout=20)
    lost = [line for line in found if line["event"] == "log lines lost"]
    assert [line["level"] for line in lost] == ["warning"]
    written = [line for line in found if line["event"] == "request"]
    assert len(written) + int(str(lost[0]["lines"])) == size
    assert len(written) > 100
    assert found[-1]["event"] == "last"


def test_the_end_comes_though_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "WAITING", 10)
    monkeypatch.setattr(logs, "PATIENCE", 0.1)
    before = LOGGER.handlers, LOGGER.propagate
    reader, writer = os.pipe()
    with logs_to(writer):
        for number in range(100):
            event("x" * 5000, number=number)
    assert (LOGGER.handlers, LOGGER.propagate) == before
    os.close(reader)  # the thread that still waits is let go: its pipe is broken
    for thread in threading.enumerate():
        if thread.name == "logs":
            thread.join(timeout=20)
    os.close(writer)


def test_a_reader_that_has_gone_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with logs_to(writer):
        for _ in range(10):
            event("x")
    os.close(writer)
    assert not any(thread.name == "logs" for thread in threading.enumerate())
