"""Load on a running `nextvec serve`: throughput and latency percentiles, closed and open loop, and a storm of bad requests.

    nextvec serve runs/demo/calm runs/demo/baseline
    python benchmarks/serve_load.py --model calm --clients 1 --clients 16 --temperature 1 --json load.json
    python benchmarks/serve_load.py --model calm --rate 4 --rate 8
    python benchmarks/serve_load.py --model calm --bad 10000
    python benchmarks/serve_load.py --model calm --temperature 1 --run runs/demo/calm

closed    each of N clients asks for its next stream when its last one has ended: what the server can do.
open      streams begin at random times, RATE a second on average, whether or not earlier ones have ended: what clients see.
bad       invalid JSON, UTF-8 and values, unknown models, bodies too large, clients that leave in the middle; then the server's
          resident memory against what it was after the first tenth of them.
run       one stream after another in this process, without a server: what batching is compared with.

Every stream has its own seed. first: seconds from sending a request to its first text; whole: to its end; gap: between two
chunks. tokens/s counts the tokens that streams report, over the time from the first request to the last end. The client is
one process on plain sockets and shares the machine with the server; tokens per CPU second of the server, which other work on the
machine lengthens little, compare loads where the machine is not free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from nextvec.files import write_json
from nextvec.hardware import DTYPES
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sampling.generate import stream_pieces
from nextvec.sampling.settings import Sampling

PERCENTILES = (50, 90, 99)


@dataclass
class Stream:
    """One request. ended: it came to its end, which may be before its first token."""

    status: int = 0
    ended: bool = False
    tokens: int = 0
    first: float = 0.0
    whole: float = 0.0
    gaps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    key: str | None

    async def ask(
        self, body: bytes, path: str = "/v1/completions"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\nconnection: close\r\n{key}"
        )
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


async def stream(target: Target, asked: dict[str, Any]) -> Stream:
    """Read one stream to its end."""
    found, begin = Stream(), time.perf_counter()
    reader, writer = await target.ask(json.dumps(asked).encode())
    try:
        found.status = int((await reader.readline()).split()[1])
        last = begin
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if event.get("usage"):
                found.tokens, found.ended = event["usage"]["completion_tokens"], True
                continue
            if last is not begin:
                found.gaps.append(now - last)
            if not found.first and event.get("choices") and event["choices"][0]["text"]:
                found.first = now - begin
            last = now
        found.whole = time.perf_counter() - begin
    finally:
        writer.close()
    return found


async def closed(target: Target, asked: dict[str, Any], clients: int, seconds: float) -> tuple[list[Stream], float]:
    begin, seeds = time.perf_counter(), iter(range(10**9))

    async def client() -> list[Stream]:
        found = []
        while time.perf_counter() - begin < seconds:
            found.append(await stream(target, {**asked, "seed": next(seeds)}))
        return found

    found = await asyncio.gather(*(client() for _ in range(clients)))
    return [each for one in found for each in one], time.perf_counter() - begin


async def opened(target: Target, asked: dict[str, Any], rate: float, seconds: float) -> tuple[list[Stream], float]:
    times, begin, seed = random.Random(0), time.perf_counter(), 0
    tasks: list[asyncio.Task[Stream]] = []
    while time.perf_counter() - begin < seconds:
        tasks.append(asyncio.create_task(stream(target, {**asked, "seed": seed})))
        seed += 1
        await asyncio.sleep(times.expovariate(rate))
    return list(await asyncio.gather(*tasks)), time.perf_counter() - begin


def measured(target: Target, load: Coroutine[Any, Any, tuple[list[Stream], float]]) -> dict[str, Any]:
    """Run a load; the server's processor seconds are counted too."""
    before = target.metrics()["process_cpu_seconds_total"]
    found = summary(*asyncio.run(load))
    spent = target.metrics()["process_cpu_seconds_total"] - before
    return {**found, "cpu_seconds": spent, "tokens_per_cpu_s": found["tokens_per_s"] * found["seconds"] / spent}


def alone(run: Path, precision: str, asked: dict[str, Any], seconds: float) -> dict[str, float]:
    """One text after another by the model itself, on one thread."""
    torch.set_num_threads(1)
    model = load_run(run, "cpu", DTYPES[precision]).model
    assert isinstance(model, Calm | TokenLM)

    def draw(seed: int) -> int:
        settings = Sampling(asked["temperature"], asked.get("candidates"), asked["max_tokens"], seed)
        return sum(piece.tokens for piece in stream_pieces(model, [asked["prompt"]], settings))

    draw(0)
    begin, spent, tokens, seed = time.perf_counter(), time.process_time(), 0, 0
    while time.perf_counter() - begin < seconds:
        tokens, seed = tokens + draw(seed), seed + 1
    found = {"tokens_per_s": tokens / (time.perf_counter() - begin)}
    return found | {"tokens_per_cpu_s": tokens / (time.process_time() - spent)}


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, Any]:
    good = [each for each in streams if each.ended]
    found: dict[str, Any] = {
        "streams": len(good),
        "refused": sum(each.status == 429 for each in streams),
        "failed": sum(not each.ended and each.status != 429 for each in streams),
        "seconds": seconds,
        "tokens_per_s": sum(each.tokens for each in good) / seconds,
        "streams_per_s": len(good) / seconds,
    }
    values = {
        "first": [each.first for each in good if each.first],
        "gap": [gap for each in good for gap in each.gaps],
        "whole": [each.whole for each in good],
    }
    for name, each in values.items():
        ordered = sorted(each)
        found[name] = {
            f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] if ordered else None
            for share in PERCENTILES
        }
    return found


def line(name: str, found: dict[str, Any]) -> str:
    def part(key: str) -> str:
        values = [found[key][f"p{share}"] for share in PERCENTILES]
        return f"{key} " + "/".join("-" if value is None else f"{1000 * value:,.0f}" for value in values) + " ms"

    words = [
        f"{found['tokens_per_s']:,.0f} tokens/s, {found['tokens_per_cpu_s']:,.0f} per CPU second",
        f"{found['streams']} streams",
        part("first"),
        part("gap"),
        part("whole"),
    ]
    if found["refused"] or found["failed"]:
        words.append(f"{found['refused']} refused, {found['failed']} failed")
    return f"{name}: " + ", ".join(words)


BAD = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 20_000,
    b'{"model": "MODEL"}',
    b'{"model": "../..", "prompt": "a"}',
    b'{"model": "MODEL", "prompt": "a", "temperature": NaN}',
    b'{"model": "MODEL", "prompt": "\\ud800"}',
    b'{"model": "MODEL", "prompt": [[], [-1]]}',
    b'{"model": "MODEL", "prompt": "a", "n": 1000000}',
    b'{"model": "MODEL", "prompt": "' + b"x" * 500_000 + b'"}',
    b'{"model": "MODEL", "prompt": "' + b"x" * 2_000_000 + b'"}',
    b'{"model": "MODEL", "prompt": "' + b"x " * 500_000 + b'"}',
    b'{"model": "MODEL", "prompt": [' + b"-1," * 340_000 + b"1]}",
    b'{"model": "MODEL", "prompt": [' + b"1," * 500_000 + b"1]}",
    b'{"model": "MODEL", "prompt": "a", "stop": [' + b"[]," * 340_000 + b"1]}",
]


async def storm(target: Target, model: str, count: int) -> dict[str, Any]:
    """`count` bad requests, 16 at a time, every 17th a good one whose client leaves after its first bytes."""
    statuses: dict[str, int] = {}
    bodies = [body.replace(b"MODEL", model.encode()) for body in BAD]
    leaving = json.dumps({"model": model, "prompt": "a", "stream": True, "max_tokens": 200}).encode()
    memory: list[float] = []

    async def one(number: int) -> None:
        leave = number % (len(bodies) + 1) == len(bodies)
        try:
            reader, writer = await target.ask(leaving if leave else bodies[number % (len(bodies) + 1)])
            status = (await reader.readline()).split()[1:2]
            name = "left" if leave else (status[0].decode() if status else "closed")
            if not leave:
                await reader.read()
            writer.close()
        except OSError:
            name = "closed"
        statuses[name] = statuses.get(name, 0) + 1

    for start in range(0, count, count // 10):
        for first in range(start, min(count, start + count // 10), 16):
            await asyncio.gather(*(one(number) for number in range(first, min(first + 16, start + count // 10, count))))
        memory.append((await asyncio.to_thread(target.metrics))["process_resident_memory_bytes"])
    await asyncio.sleep(1)
    held = (await asyncio.to_thread(target.metrics))[f'nextvec_rows_running{{model="{model}"}}']
    return {"requests": count, "statuses": statuses, "resident_bytes": memory, "rows_held_at_the_end": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="the server's API key")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--clients", type=int, action="append", default=[], help="closed loop; again for more")
    parser.add_argument(
        "--rate", type=float, action="append", default=[], help="open loop, streams a second; again for more"
    )
    parser.add_argument("--bad", type=int, default=0, help="bad requests")
    parser.add_argument("--run", type=Path, help="draw texts of this run in this process; asks no server")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of --run")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--candidates", type=int, help="of a pool; default: the model's own way to draw")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load; streams that run then are finished")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    address = urlsplit(options.url)
    target = Target(address.hostname or "127.0.0.1", address.port or 80, options.key)
    asked = {
        "model": options.model,
        "prompt": options.prompt,
        "max_tokens": options.tokens,
        "temperature": options.temperature,
        **({} if options.candidates is None else {"candidates": options.candidates}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.run is not None:
        for name, value in alone(options.run, options.precision, asked, options.seconds).items():
            print(f"{options.run}, one stream in process, {options.precision}: {value:,.0f} {name}")
        return
    asyncio.run(closed(target, asked, 2, 1.0))  # warm-up
    found: dict[str, Any] = {"asked": asked, "closed": {}, "open": {}}
    for clients in options.clients:
        found["closed"][clients] = measured(target, closed(target, asked, clients, options.seconds))
        print(line(f"{options.model}, {clients} clients", found["closed"][clients]))
    for rate in options.rate:
        found["open"][rate] = measured(target, opened(target, asked, rate, options.seconds))
        print(line(f"{options.model}, {rate:g} streams/s", found["open"][rate]))
    if options.bad:
        found["bad"] = asyncio.run(storm(target, options.model, max(10, options.bad)))
        memory = [value / 2**20 for value in found["bad"]["resident_bytes"]]
        grown = f"resident {memory[0]:.0f} MiB after a tenth, {memory[-1]:.0f} at the end"
        print(f"{options.bad} bad requests: {found['bad']['statuses']}; {grown}")
    if options.json:
        write_json(options.json, found)
    bad = found.get("bad", {})
    if bad and bad["rows_held_at_the_end"]:
        sys.exit("rows are still held")


if __name__ == "__main__":
    main()
