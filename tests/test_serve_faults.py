"""The server under load and under clients that misbehave: no cross-talk, no slot lost, no memory held, an end in good order."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nextvec.sampling.generate import generate_texts
from nextvec.sampling.settings import Sampling
from sampling_models import TOKENIZER
from serving import PROMPT, Running, events, read_answer, running, save_runs, started


def text_of(server: Running, model: str, seed: int, **more: Any) -> tuple[str, int]:
    """The text of a stream, and its status."""
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 24, "seed": seed, "candidates": 20, "stream": True, **more}
    status, _, body = read_answer(server.post("/v1/completions", asked))
    return ("".join(event["choices"][0]["text"] for event in events(body)) if status == 200 else "", status)


def slowed(server: Running, model: str, seconds: float) -> None:
    """Every step of the model's engine takes this much longer, also after the engine is made anew."""
    worker = server.models[model].worker
    original = worker._step

    def step() -> None:
        time.sleep(seconds)
        original()

    worker._step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_text_is_the_same_alone_and_among_31_others(deterministic: bool) -> None:
    dtype = torch.bfloat16 if deterministic else torch.float64
    with running(dtype, slots=32, deterministic=deterministic) as server:
        alone = [text_of(server, "calm", seed)[0] for seed in range(12)]
        assert len(set(alone)) > 8
        with ThreadPoolExecutor(40) as pool:
            jobs = [("calm", seed) for seed in range(32)] + [("baseline", seed) for seed in range(8)]
            together = dict(zip(jobs, pool.map(lambda job: text_of(server, *job)[0], jobs), strict=True))
        assert [together["calm", seed] for seed in range(12)] == alone
        model = server.models["baseline"].model
        settings = [Sampling(0.5, 20, 24, seed) for seed in range(4)]
        for seed, each in enumerate(settings):
            texts = (
                generate_texts(model, [PROMPT], each) if not deterministic else [text_of(server, "baseline", seed)[0]]
            )
            assert together["baseline", seed] == texts[0]


def test_rows_wait_for_slots_and_beyond_the_queue_clients_are_told_when_to_come_back() -> None:
    with running(slots=2, queue=3) as server:
        slowed(server, "calm", 0.02)
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda seed: text_of(server, "calm", seed), range(12)))
            statuses = [status for _, status in found]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 5
        server.wait_idle()
        first = server.post("/v1/completions", {"model": "calm", "prompt": "a", "n": 5, "max_tokens": 90})
        while server.held() < 5:
            time.sleep(0.001)
        status, headers, body = read_answer(server.post("/v1/completions", {"model": "calm", "prompt": "a"}))
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "calm has 5 texts at work or waiting and takes 5" in error["message"]
        assert text_of(server, "baseline", 1)[1] == 200, "the other model is free"
        first.close()
        server.wait_idle()
        assert text_of(server, "calm", 1)[1] == 200


def test_a_client_may_leave_at_every_patch() -> None:
    with running(slots=4) as server:
        calm = server.models["calm"]
        slowed(server, "calm", 0.01)
        steps = 0
        for after in range(21):
            made = server.post(
                "/v1/completions",
                {"model": "calm", "prompt": PROMPT, "max_tokens": 200, "stream": True, "temperature": 1},
            )
            if after:
                seen = b""
                while seen.count(b"data: ") < after:
                    seen += made.recv(1 << 16)
            before = calm.worker._engine._rows and calm.worker._engine._rows[0].produced
            made.close()
            server.wait_idle()
            assert len(calm.worker._engine) == 0
            assert not calm.worker._texts
            steps += bool(before)
        assert steps > 15
        assert server.metrics.cancelled.labels("calm")._value.get() >= 20
        alone = generate_texts(calm.model, [PROMPT], Sampling(1.0, 20, 20, seed=7))[0]
        assert text_of(server, "calm", 7, max_tokens=20, temperature=1)[0] == alone


def test_a_slot_is_free_within_a_patch_of_the_client_leaving() -> None:
    with running(slots=1) as server:
        slowed(server, "calm", 0.1)
        made = server.post("/v1/completions", {"model": "calm", "prompt": "a", "max_tokens": 200})
        while not server.models["calm"].worker._texts:
            time.sleep(0.001)
        made.close()
        begin = time.monotonic()
        server.wait_idle()
        assert time.monotonic() - begin < 1.0, "the whole text takes 10 s"


@pytest.mark.parametrize("noticed_by", ["the system", "us"])
def test_clients_that_do_not_read_are_let_go(noticed_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if noticed_by == "us":  # as where the system has no clock for data that nobody takes
        monkeypatch.setattr("nextvec.serve.server.sys", types.SimpleNamespace(platform="other"))
    with running(
        write_seconds=0.5, slots=4, send_buffer=4096
    ) as server:  # a stream does not fit into the system's buffers
        asked = {"model": "calm", "prompt": "", "max_tokens": 200, "temperature": 0.5, "candidates": 1000}
        data = json.dumps(asked).encode()
        head = "POST /nextvec/patches HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        lazy = []
        for _ in range(3):
            made = socket.socket()
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            made.connect(server.address)
            made.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            lazy.append(made)
        whole = generate_texts(server.models["calm"].model, [PROMPT], Sampling(0.5, 20, 24, 3))[0]
        assert text_of(server, "calm", 3)[0] == whole, "others go on"
        limit = time.monotonic() + 60
        while server.metrics.cancelled.labels("calm")._value.get() < 3:
            assert time.monotonic() < limit, "a client that takes nothing is held"
            time.sleep(0.02)
        server.wait_idle()
        for made in lazy:
            made.close()


def test_half_sent_requests_end_in_time() -> None:
    with running(request_seconds=0.3, connections=5) as server:
        begin = time.monotonic()
        for half in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"):
            made = server.raw()
            made.sendall(half)
            assert made.recv(100) == b""
            made.close()
        made = server.raw()
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        status, _, body = read_answer(made)
        assert (status, json.loads(body)["error"]["code"]) == (408, "timeout")
        assert time.monotonic() - begin < 10


def test_connections_beyond_the_bound_are_closed_at_once() -> None:
    with running(connections=5) as server:
        many = [server.raw() for _ in range(9)]
        closed = 0
        for made in many:
            made.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                closed += made.recv(1) == b""
        assert closed == 4
        for made in many:
            made.close()
        limit = time.monotonic() + 10
        while text_of_or_none(server) is None:
            assert time.monotonic() < limit, "there is room again"


def text_of_or_none(server: Running) -> str | None:
    try:
        return text_of(server, "calm", 1)[0]
    except OSError:
        return None


BAD: list[tuple[bytes, int, str]] = [
    (b"", 400, "the body must be a JSON object"),
    (b"{", 400, "the body is not valid JSON"),
    (b'{"model": "calm", "prompt": "\xff"}', 400, "the body must be a JSON object in UTF-8"),
    (b"[1, 2]", 400, "the body must be a JSON object"),
    (b"null", 400, "the body"),
    (b'{"model": "calm", "prompt": NaN}', 400, "prompt"),
    (b'{"model": "calm", "prompt": "a", "temperature": NaN}', 400, "temperature must be in (0, 1]; got nan"),
    (b'{"model": "calm", "prompt": "a", "temperature": 1e999}', 400, "temperature must be in (0, 1]; got inf"),
    (b'{"model": "calm", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, ""),
    (b'{"model": "calm", "prompt": ' + b"[" * 50_000 + b"}", 400, ""),
    (b'{"model": "\\ud800", "prompt": "a"}', 404, "there is no model"),
    (b'{"model": "../../etc/passwd", "prompt": "a"}', 404, "there is no model"),
    (b'{"model": "calm", "prompt": [[], [-1]]}', 400, "prompt"),
    (b'{"model": "calm", "prompt": [1e30]}', 400, "prompt"),
    (b'{"model": "calm", "prompt": "' + b"x" * 70_000 + b'"}', 413, "a request has at most 65,536 bytes"),
    (
        b'{"model": "calm", "prompt": "' + b"x" * 60_000 + b'"}',
        400,
        "prompt has 60,000 characters, and the 240 tokens that calm reads",
    ),
]


def test_bad_requests_are_answered_in_the_shape_of_the_api_and_leave_nothing_behind() -> None:
    process = psutil.Process()
    with running(body_bytes=1 << 16) as server:

        def all_of_them() -> None:
            for body, expected, sentence in BAD:
                status, headers, answer = read_answer(server.post("/v1/completions", body))
                assert (status, headers["content-type"]) == (expected, "application/json"), (body[:60], answer)
                error = json.loads(answer)["error"]
                assert sentence in error["message"], (body[:60], error)
                assert set(error) == {"message", "type", "param", "code"}

        all_of_them()
        for _ in range(3):
            all_of_them()
        before = process.memory_info().rss
        for _ in range(20):
            all_of_them()
        assert process.memory_info().rss - before < 16 << 20
        chunked = server.raw()
        chunked.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        block = b"%x\r\n" % (1 << 15) + b"x" * (1 << 15) + b"\r\n"
        chunked.sendall(block * 3 + b"0\r\n\r\n")
        assert read_answer(chunked)[0] == 413
        endless = server.raw()
        endless.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{")
        assert read_answer(endless)[0] == 413
        for line in (
            b"GARBAGE\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n",
        ):
            made = server.raw()
            made.sendall(line)
            assert made.recv(1 << 16).startswith(b"HTTP/1.1 400")
            made.close()
        for method, path, status in (
            ("GET", "/v1/completions", 405),
            ("GET", "/../../etc/passwd", 404),
            ("GET", "/%00", 404),
        ):
            made = server.raw()
            made.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            found, headers, answer = read_answer(made)
            assert found == status
            assert json.loads(answer)["error"]["message"]
            assert headers.get("allow") == ("POST" if status == 405 else None)
        assert text_of(server, "calm", 1)[1] == 200
        assert server.held() == 0


def test_a_step_that_fails_is_an_error_for_its_requests_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(slots=4) as server:
        model = server.models["calm"].model
        alone = text_of(server, "calm", 1)[0]
        original, calls = model.states, 0

        def failing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise RuntimeError("out of memory")
            return original(*arguments)

        monkeypatch.setattr(model, "states", failing)
        asked = {"model": "calm", "prompt": "ab", "max_tokens": 100, "seed": 1, "temperature": 1}
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(lambda: read_answer(server.post("/v1/completions", asked)))
            stream = pool.submit(lambda: read_answer(server.post("/v1/completions", {**asked, "stream": True})))
        status, _, body = whole.result()
        assert status == 500
        assert json.loads(body)["error"]["type"] == "server_error"
        status, _, body = stream.result()
        assert status == 500 or "error" in events(body)[-1]
        server.wait_idle()
        assert text_of(server, "calm", 1)[0] == alone
        assert server.metrics.failures.labels("calm")._value.get() == 1
        made = server.raw()
        made.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_answer(made)[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_has_ended_is_told_to_the_balancer() -> None:
    """At /health, and to each request, so that another replica is asked; the other model goes on."""
    with running() as server:
        worker = server.models["calm"].worker

        def end() -> None:
            raise SystemExit  # ends the thread without a word

        worker._step = end  # type: ignore[method-assign]
        asked = {"model": "calm", "prompt": "a"}
        server.post("/v1/completions", asked).close()
        worker._thread.join(timeout=20)
        made = server.raw()
        made.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        status, _, body = read_answer(made)
        assert (status, json.loads(body)["status"]) == (503, "failed")
        status, headers, body = read_answer(server.post("/v1/completions", asked))
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["error"]["message"] == "the engine of calm has ended: try another replica"
        assert text_of(server, "baseline", 1)[1] == 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_sigterm_finishes_the_requests_in_hand(runs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = (runs / "train", f"other={runs / 'baseline'}", "--context-tokens", "4096")
    child, url = started(*words, log=log, env={"NEXTVEC_API_KEY": "key"})
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    one = Running({}, None, None, url)  # type: ignore[arg-type]
    asked = {"model": "other", "prompt": "a", "max_tokens": 800, "seed": 2, "stream": True, "temperature": 1}
    made = one.post("/v1/completions", asked, authorization="Bearer key")
    assert made.recv(10).startswith(b"HTTP/1.1 2")
    idle = one.raw()
    child.send_signal(signal.SIGTERM)
    body = b""
    while block := made.recv(1 << 16):
        body += block
    assert body.rstrip().endswith(b"0"), "the last chunk came"
    assert b"[DONE]" in body
    tokens = sum(1 for line in body.split(b"\n") if line.startswith(b"data: {"))
    assert tokens > 100
    assert child.wait(timeout=30) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    idle.close()
    made.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["listening", "draining", "request", "stopped"]
    assert lines[0]["models"] == ["train", "other"]


def test_the_command_line_tells_mistakes_in_a_sentence(runs: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nextvec.cli import app, commands  # noqa: F401  (registers the verbs)
    from nextvec.errors import UserError

    def told(*words: str | Path) -> str:
        found = CliRunner().invoke(app, ["serve", *map(str, words)])
        assert isinstance(found.exception, UserError), found.exception
        return str(found.exception)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in told(runs / "train", "--port", port)
    free = ("--port", "0")
    assert "is an autoencoder, which draws no text" in told(runs / "autoencoder", *free)
    assert "is not a run directory" in told(tmp_path, *free)
    assert "two runs are called 'train'" in told(runs / "train", runs / "train", *free)
    assert "slots must be at least 1; got 0" in told(runs / "train", "--slots", "0", *free)
    assert "precision must be fp32 or bf16; got 'fp8'" in told(runs / "train", "--precision", "fp8", *free)
    assert "the API key is empty" in told(runs / "train", "--api-key", "", *free)


def test_without_the_extra_one_sentence_names_it(runs: Path) -> None:
    script = "import sys; sys.modules['fastapi'] = None; from nextvec.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", str(runs / "train")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "nextvec: nextvec serve needs the serve extra (fastapi is not installed): pip install 'nextvec[serve]'\n"
    )


def test_a_chat_template_is_found_in_the_runs_folder(tmp_path: Path) -> None:
    from nextvec.errors import DataError
    from nextvec.serve.chat import find_template

    assert find_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"}'
    )
    template = find_template(tmp_path)
    assert template is not None
    from nextvec.serve.schema import Message

    assert template.encode([Message(role="user", content="hi")], TOKENIZER) == TOKENIZER.encode("hi")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}")
    from nextvec.serve.errors import ApiError

    harsh = find_template(tmp_path)
    assert harsh is not None
    with pytest.raises(ApiError, match="the chat template refuses these messages: no system, please"):
        harsh.encode([Message(role="user", content="hi")], TOKENIZER)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"the chat template of .* cannot be read"):
        find_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    sly = find_template(tmp_path)
    assert sly is not None
    with pytest.raises(ApiError, match="refuses"):
        sly.encode([Message(role="user", content="hi")], TOKENIZER)
