"""Bodies as large as the server takes, wrong in every part: each is refused, nobody beside it waits, and no memory stays held."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from serving import PROMPT, Running, read_answer, running

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
MIB = 1 << 20
STALL = 1.0  # seconds that /health may take: tens of ms here, and 4 to 10 s where each part has its error


def filled(before: str, part: str, after: str, size: int = MIB - 100) -> bytes:
    """A body of about this size: the part, again and again, numbered at its %."""
    count = (size - len(before + after)) // (len(part) + 1)
    return (before + ",".join(part.replace("%", str(number)) for number in range(count)) + after).encode()


PROMPTS = '{"model": "calm", "prompt": ['
CHAT = '{"model": "calm", "messages": ['
ONE = '{"model": "calm", "prompt": "a", '
BODIES = [
    ("ids below zero", filled(PROMPTS, "-1", "]}"), "prompt must be text, token ids"),
    ("one id of many", filled(PROMPTS, "1", ", -1]}"), "prompt must be text, token ids"),
    ("booleans", filled(PROMPTS, "true", "]}"), "prompt must be text, token ids"),
    ("lists of booleans", filled(PROMPTS, "[true]", "]}"), "prompt must be text, token ids"),
    ("lists", filled(PROMPTS, "[]", "]}"), "a request has at most 80 prompts here; got"),
    ("ids", filled(PROMPTS, "1", "]}"), "shorten the prompt or lower max_tokens"),
    ("whole numbers", filled(PROMPTS, "1.0", "]}"), "shorten the prompt or lower max_tokens"),
    ("text", filled('{"model": "calm", "prompt": "', "x", '"}'), "characters, and the 240 tokens that calm"),
    ("stops", filled(ONE + '"stop": [', "1", "]}"), "stop must be a text or"),
    ("stop texts", filled(ONE + '"stop": [', '""', "]}"), "stop is at most 16"),
    ("metadata", filled(ONE + '"top_p": 2, "metadata": {', '"%": 1', "}}"), "top_p must be in (0, 1]"),
    ("biases", filled(ONE + '"logit_bias": {', '"%": []', "}}"), "logit_bias cannot be had"),
    ("unknown fields", filled(ONE, '"%": 1', "}"), "there is no field '0' here: leave it out"),
    ("nested", b'{"model": "calm", "prompt": ' + b"[" * (MIB - 100) + b"}", "nested too deeply"),
    ("digits", b'{"model": "calm", "prompt": ' + b"1" * (MIB - 100) + b"}", "a number is too long"),
    ("messages", filled(CHAT, "{}", "]}"), "messages.0.role: field required"),
    ("many messages", filled(CHAT, '{"role": "user", "content": ""}', "]}"), "messages: list should have at most 2048"),
    (
        "parts",
        filled(CHAT + '{"role": "user", "content": [', "{}", "]}]}"),
        "messages.0.content must be text or a list",
    ),
    ("a long message", filled(CHAT + '{"role": "user", "content": "', "x", '"}]}'), "messages has"),
]
LARGE = {name: (body, said) for name, body, said in BODIES}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(template=TEMPLATE, body_bytes=2 * MIB) as one:
        yield one


def refused(server: Running, name: str) -> None:
    body, said = LARGE[name]
    path = "/v1/chat/completions" if b'"messages"' in body[:40] else "/v1/completions"
    assert len(body) > MIB // 2
    status, _, answer = read_answer(server.post(path, body))
    assert status == 400, answer[:200]
    assert said in json.loads(answer)["error"]["message"], answer[:200]


@contextmanager
def pinged(server: Running) -> Iterator[list[float]]:
    """Seconds that /health takes meanwhile, asked again and again."""
    seconds: list[float] = []
    done = threading.Event()

    def ping() -> None:
        made = http.client.HTTPConnection(*server.address)
        while not done.is_set():
            begin = time.monotonic()
            made.request("GET", "/health")
            made.getresponse().read()
            seconds.append(time.monotonic() - begin)
        made.close()

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", list(LARGE))
def test_a_large_body_is_refused_and_nobody_waits_for_it(server: Running, name: str) -> None:
    with pinged(server) as seconds:
        refused(server, name)
    assert seconds
    assert max(seconds) < STALL


def test_many_large_bodies_at_once_leave_streams_and_memory_alone(server: Running) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    asked: dict[str, Any] = {"model": "baseline", "prompt": PROMPT, "max_tokens": 200, "temperature": 1, "stream": True}
    with ThreadPoolExecutor(8) as pool, pinged(server) as seconds:
        flood = [pool.submit(refused, server, name) for _ in range(3) for name in LARGE]
        status, _, body = read_answer(server.post("/v1/completions", asked))
        for each in flood:
            each.result()
    assert (status, body.rstrip()[-6:]) == (200, b"[DONE]")
    assert max(seconds) < 2 * STALL
    assert process.memory_info().rss - before < 300 * MIB
