"""What clients meet that are nearly right: every mistake is told by its field, and what clients' libraries send is taken."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextvec.config import MixtureHeadConfig
from nextvec.errors import ConfigError
from nextvec.serve.logs import JsonFormatter
from nextvec.serve.settings import ServeSettings
from sampling_models import TOKENIZER, calm
from serving import CONTEXT, Running, read_answer, running, save_runs


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(origins=("http://a.example:3000",)) as one:
        yield one


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": {"a": 1}}, "prompt", "prompt must be text, token ids (0 or more), or a list of either"),
        ({"prompt": ["a", 3]}, "prompt", "prompt must be text, token ids (0 or more), or a list of either"),
        ({"prompt": [1, -3]}, "prompt", "prompt must be text, token ids (0 or more), or a list of either"),
        ({"prompt": "a", "stop": 3}, "stop", "stop must be a text or a list of texts"),
        ({"prompt": "a", "logprobs": "all"}, "logprobs", "logprobs must be left out, or false"),
        (
            {"prompt": "a", "temperature": 0},
            "temperature",
            "temperature must be in (0, 1]; got 0: there is no greedy limit",
        ),
        ({"prompt": "a", "top_p": 0.9}, "top_p", "top_p changes the law of the next token"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens: input should be greater than or equal to 1"),
        ({}, "prompt", "prompt: field required"),
        ([], None, "the body must be a JSON object"),
    ],
)
def test_a_mistake_is_told_by_its_field(server: Running, body: Any, param: str | None, said: str) -> None:
    asked = {"model": "calm", **body} if isinstance(body, dict) else body
    status, _, answer = read_answer(server.post("/v1/completions", asked))
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, param)
    assert error["message"].startswith(said)


def test_a_part_of_a_chat_is_told_by_its_place(server: Running) -> None:
    asked = {"model": "calm", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    status, _, answer = read_answer(server.post("/v1/chat/completions", asked))
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, "messages.0.content")
    assert error["message"] == "messages.0.content must be text or a list of parts of the type text"


@pytest.mark.parametrize("sent_as", ["application/x-www-form-urlencoded", ""])
def test_a_body_that_does_not_say_json_is_told_how(server: Running, sent_as: str) -> None:
    """As `curl -d` sends it."""
    made = http.client.HTTPConnection(*server.address)
    headers = {"content-type": sent_as} if sent_as else {}
    made.request("POST", "/v1/completions", b'{"model": "calm", "prompt": "a"}', headers)
    answer = made.getresponse()
    error = json.loads(answer.read())["error"]
    made.close()
    assert answer.status == 400
    assert error["message"] == f"the body is read as JSON: send content-type: application/json; got {sent_as!r}"


def test_what_cannot_be_had_of_a_token_model_is_not_blamed_on_vectors_alone(server: Running) -> None:
    asked = {"model": "baseline", "prompt": "a", "logprobs": 3}
    _, _, answer = read_answer(server.post("/v1/completions", asked))
    assert json.loads(answer)["error"]["message"].endswith("and all models answer alike here")


def got(server: Running, path: str) -> tuple[int, dict[str, str], Any]:
    made = server.raw()
    made.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    status, headers, body = read_answer(made)
    return status, headers, json.loads(body)


def test_a_name_with_a_slash_is_a_name_and_paths_are_counted_by_their_route() -> None:
    with running(models={"org/calm": calm(2)}) as server:
        status, _, card = got(server, "/v1/models/org/calm")
        assert (status, card["id"]) == (200, "org/calm")
        assert got(server, "/v1/models/calm")[0] == 404
        assert got(server, "/v1/nothing")[0] == 404
    counted = {  # after the end, since an answer is counted when it has been told
        (each.labels["path"], each.labels["status"]): each.value
        for family in server.metrics.requests.collect()
        for each in family.samples
        if each.name.endswith("_total")
    }
    assert counted == {("/v1/models/{model}", "200"): 1, ("/v1/models/{model}", "404"): 1, ("other", "404"): 1}


@pytest.mark.parametrize("where", ["nextvec.serve.api.abilities", "nextvec.serve.door.Door._check_key"])
def test_a_failure_is_told_by_the_id_that_is_logged(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    with running() as server, caplog.at_level(logging.INFO, "nextvec.serve"):
        monkeypatch.setattr(where, broken)
        status, headers, answer = got(server, "/v1/models")
    request = headers["x-request-id"]
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert answer["error"]["message"] == f"the server failed at this request ({request}); its log says how"
    lines = [json.loads(JsonFormatter().format(each)) for each in caplog.records if each.name == "nextvec.serve"]
    (failure,) = [line for line in lines if line["event"] == "failure"]
    assert failure["request"] == request
    assert "a fault of ours" in failure["traceback"]


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FEW = {"candidates": 2, "temperature": 1, "seed": 1}  # so few draws that none begins with a prompt's rest: it is padded


@pytest.mark.parametrize("length", range(5, 13))
def test_a_text_may_fill_the_context_after_a_prompt_of_any_length(length: int) -> None:
    """A prompt whose length is no multiple of K may take up to K - 1 pads, which must not count as the client's."""
    with running(models={"calm": calm(4)}, template=TEMPLATE) as server:
        rest, ids = CONTEXT - length, [77] * length

        def usage(path: str, more: dict[str, Any]) -> tuple[int, int]:
            status, _, body = read_answer(server.post(path, {"model": "calm", **FEW, **more}))
            answer = json.loads(body)
            assert status == 200, answer
            assert answer["choices"][0]["finish_reason"] == "length"
            return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]

        messages = [{"role": "user", "content": TOKENIZER.decode(ids)}]
        assert usage("/v1/chat/completions", {"messages": messages}) == (length, rest)
        assert usage("/v1/completions", {"prompt": ids, "max_tokens": rest}) == (length, rest)
        asked = {"model": "calm", **FEW, "prompt": ids, "max_tokens": rest + 1}
        status, _, body = read_answer(server.post("/v1/completions", asked))
        assert (status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")


def test_temperature_0_is_greedy_where_tokens_have_laws() -> None:
    with running(models={"calm": calm(2, head=MixtureHeadConfig(blocks=1))}, template=TEMPLATE) as server:

        def text(**more: Any) -> str:
            asked = {"model": "calm", "prompt": "go", "max_tokens": 20, **more}
            status, _, body = read_answer(server.post("/v1/completions", asked))
            assert status == 200, body
            return str(json.loads(body)["choices"][0]["text"])

        greedy = text(temperature=0, seed=1)
        assert greedy == text(temperature=0, seed=2) == text(temperature=0.7, top_k=1, seed=3)
        assert greedy != text(temperature=1, seed=1)
        asked = {"model": "calm", "prompt": "go", "temperature": 0, "candidates": 20}
        status, _, body = read_answer(server.post("/v1/completions", asked))
        told = "temperature 0 takes the likeliest token, which method pool does not look at: leave the candidates out"
        assert status == 400
        assert json.loads(body)["error"]["message"].startswith(told)


def test_a_chat_may_hold_what_changes_nothing() -> None:
    with running(template=TEMPLATE) as server:

        def answer(messages: list[Any], **more: Any) -> tuple[int, Any]:
            asked = {"model": "calm", "messages": messages, "max_tokens": 8, "seed": 1, **more}
            status, _, body = read_answer(server.post("/v1/chat/completions", asked))
            found = json.loads(body)
            return status, found["choices"][0]["message"]["content"] if status == 200 else found["error"]["message"]

        user = {"role": "user", "content": "hi"}
        empty = {"role": "assistant", "content": ""}
        plain = answer([user, empty, user])
        assert plain[0] == 200
        sent_back = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []}
        harmless = {"parallel_tool_calls": True, "service_tier": "auto", "store": False, "metadata": {"a": "b"}}
        assert answer([user, sent_back, user], **harmless) == plain
        assert answer([{"role": "user", "content": None}]) == (
            400,
            "messages.0.content must be text or a list of parts of the type text",
        )
        assert answer([{**empty, "tool_calls": [{"id": "1"}]}])[0] == 400


@pytest.mark.parametrize("path", ["/", "/health"])
def test_probes_may_ask_for_the_head_alone(server: Running, path: str) -> None:
    made = http.client.HTTPConnection(*server.address)
    for method in ("HEAD", "GET", "HEAD"):  # on one connection: no body is left over
        made.request(method, path)
        answer = made.getresponse()
        body = answer.read()
        assert (answer.status, bool(body)) == (200, method == "GET")
    made.close()


def test_a_page_of_an_allowed_origin_may_send_the_headers_of_openais_client(server: Running) -> None:
    made = http.client.HTTPConnection(*server.address)
    wanted = "authorization,content-type,x-stainless-lang,x-stainless-os,x-stainless-retry-count,x-stainless-timeout"
    for origin, status in (("http://a.example:3000", 200), ("http://a.example", 400)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
        made.request("OPTIONS", "/v1/completions", headers=headers)
        answer = made.getresponse()
        answer.read()
        assert answer.status == status
        if status == 200:
            assert answer.getheader("access-control-allow-headers") == wanted
    made.close()


@pytest.mark.parametrize("origin", ["a.example", "http://a.example/", "http://a.example/page", "", "http:// a"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"an origin is written scheme://host or scheme://host:port, without a path"):
        ServeSettings(origins=(origin,))


@pytest.mark.parametrize(
    "origin", ["*", "null", "http://localhost:3000", "https://a.example", "chrome-extension://abc"]
)
def test_origins_that_browsers_send_are_taken(origin: str) -> None:
    assert ServeSettings(origins=(origin,)).origins == (origin,)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_to_drain_are_a_number(seconds: float) -> None:
    with pytest.raises(ConfigError, match="the seconds to drain must be a number of at least 0; got"):
        ServeSettings(drain_seconds=seconds)


@pytest.mark.parametrize(("flag", "value"), [("--slots", "100000000000"), ("--context-tokens", "1000000000000")])
def test_more_room_than_memory_is_one_sentence(tmp_path: Path, flag: str, value: str) -> None:
    from typer.testing import CliRunner

    from nextvec.cli import app, commands  # noqa: F401  (registers the verbs)

    run = save_runs(tmp_path) / "train"
    found = CliRunner().invoke(app, ["serve", str(run), "--port", "0", flag, value])
    assert isinstance(found.exception, ConfigError), found.exception
    assert "train does not fit into memory with room for" in str(found.exception)
    assert "lower --slots or --context-tokens" in str(found.exception)
