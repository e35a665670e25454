"""The OpenAPI document is what the server does: requests made from it by schemathesis, and requests that break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serving import Running, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
CAN = ("prompt", "max_tokens", "seed", "user", "echo", "candidates")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.mark.slow
def test_every_operation_keeps_to_its_description(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    seen: dict[str, set[int]] = {}
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            statuses = seen.setdefault(f"{operation.method.upper()} {operation.path}", set())

            def check(case: schemathesis.Case, statuses: set[int] = statuses) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                    case.body["max_tokens"] = min(case.body["max_tokens"], 20)  # texts need not be long here
                simplify(case)
                answer = case.call(base_url=server.url, session=session, timeout=30)
                statuses.add(answer.status_code)
                case.validate_response(answer, checks=CHECKS)

            fuzz = settings(
                max_examples=25,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            run(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), check, fuzz)
            if operation.method == "post":  # nothing of the others can be broken
                run(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), check, fuzz)
    assert set(seen) == {
        "GET /health",
        "GET /metrics",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /nextvec/patches",
    }
    assert {200, 400} <= seen["POST /v1/completions"], seen
    assert {200, 400} <= seen["POST /nextvec/patches"], seen
    server.wait_idle()


def simplify(case: schemathesis.Case) -> None:
    """Name a model that is there, and in some bodies leave only what it can do: no text would be drawn otherwise."""
    if not isinstance(case.body, dict) or "model" not in case.body:
        return
    if len(str(case.body)) % 2:
        case.body["model"] = "calm"
    elif case.meta.generation.mode is GenerationMode.POSITIVE and len(str(case.body)) % 4:
        case.body = {name: value for name, value in case.body.items() if name in CAN} | {"model": "calm"}


def run(strategy: object, check: object, fuzz: settings) -> None:
    from hypothesis import given

    @fuzz
    @given(case=strategy)  # type: ignore[arg-type]
    def every(case: schemathesis.Case) -> None:
        check(case)  # type: ignore[operator]

    every()
