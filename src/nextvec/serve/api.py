"""The routes: OpenAI's completions, chats and models, health, metrics, the page and its own endpoint."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import nextvec
from nextvec.errors import UserError
from nextvec.sampling.draw import abilities
from nextvec.serve import schema
from nextvec.serve.asked import asked_job, chat_ids, find, prompt_ids
from nextvec.serve.door import Door
from nextvec.serve.errors import ApiError
from nextvec.serve.formats import ChatForm, PatchForm, TextForm
from nextvec.serve.metrics import Metrics
from nextvec.serve.models import Served
from nextvec.serve.page import page
from nextvec.serve.reply import Reply
from nextvec.serve.settings import ServeSettings

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # one of a stream
SEVERAL = {  # fields of several types
    "prompt": "text, token ids (0 or more), or a list of either",
    "stop": "a text or a list of texts",
    "logprobs": "left out, or false",
    "content": "text or a list of parts of the type text",
}
STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}


def build_app(models: Mapping[str, Served], settings: ServeSettings, metrics: Metrics) -> ASGIApp:
    """The whole application; its lifespan starts and stops the engines."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        for served in models.values():
            served.worker.start(loop)
        yield
        for served in models.values():
            await asyncio.to_thread(served.worker.stop)

    app = FastAPI(title="nextvec", version=nextvec.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_state(app, models, metrics)
    _add_texts(app, models, settings, metrics)
    _describe(app, settings)
    paths = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    outside: ASGIApp = Door(app, settings, metrics, paths)
    if settings.origins:
        outside = CORSMiddleware(
            outside,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["x-request-id", "x-nextvec-seed", "retry-after"],
        )
    return outside


def _add_state(app: FastAPI, models: Mapping[str, Served], metrics: Metrics) -> None:
    html, policy = page()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def show_page() -> Response:
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=schema.Health, responses={503: {"model": schema.Health}})
    async def health() -> Response:
        alive = all(served.worker.alive for served in models.values())
        held = {name: served.worker.held for name, served in models.items()}
        return JSONResponse({"status": "ok" if alive else "failed", "models": held}, 200 if alive else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read_metrics() -> Response:
        return Response(metrics.text(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    def card(served: Served) -> schema.ModelCard:
        traits = schema.ModelTraits(
            kind=served.kind,
            patch_size=served.model.patch_size,
            context_tokens=served.context,
            latent=served.latent,
            by_token=abilities(served.model).by_token,
            chat=served.template is not None,
        )
        return schema.ModelCard(id=served.id, created=served.created, nextvec=traits)

    @app.get("/v1/models")
    async def list_models() -> schema.ModelList:
        return schema.ModelList(data=[card(served) for served in models.values()])

    @app.get("/v1/models/{model}", responses=_errors(404))
    async def get_model(model: str) -> schema.ModelCard:
        return card(find(models, model))


def _add_texts(app: FastAPI, models: Mapping[str, Served], settings: ServeSettings, metrics: Metrics) -> None:
    refusals = _errors(400, 401, 404, 408, 413, 429, 500, 503)

    @app.post(
        "/v1/completions", response_class=Response, responses={200: {"model": schema.TextAnswer, **STREAM}, **refusals}
    )
    async def complete(asked: schema.CompletionRequest) -> Response:
        served = find(models, asked.model)
        schema.refuse_impossible(asked)
        prompts = await asyncio.to_thread(prompt_ids, served, asked.prompt, settings)
        job = asked_job(served, asked, prompts, asked.max_tokens or schema.MAX_TOKENS, settings)
        echo: list[str] = []
        if asked.echo:
            echo = [text for ids in prompts for text in [served.tokenizer.decode(ids)] * job.samples]
        include = bool(asked.stream_options and asked.stream_options.include_usage)
        return Reply(served.worker, job, TextForm(served.id, include, echo), bool(asked.stream), metrics)

    @app.post(
        "/v1/chat/completions",
        response_class=Response,
        responses={200: {"model": schema.ChatAnswer, **STREAM}, **refusals},
    )
    async def chat(asked: schema.ChatRequest) -> Response:
        served = find(models, asked.model)
        schema.refuse_impossible(asked)
        ids = await asyncio.to_thread(chat_ids, served, asked.messages)
        limit = asked.max_completion_tokens or asked.max_tokens or max(1, served.context - len(ids))
        job = asked_job(served, asked, [ids], limit, settings)
        include = bool(asked.stream_options and asked.stream_options.include_usage)
        return Reply(served.worker, job, ChatForm(served.id, include, job.rows), bool(asked.stream), metrics)

    @app.post(
        "/nextvec/patches", response_class=Response, responses={200: {"description": "A stream", **STREAM}, **refusals}
    )
    async def patches(asked: schema.PatchRequest) -> Response:
        served = find(models, asked.model)
        (ids,) = await asyncio.to_thread(prompt_ids, served, asked.prompt, settings)
        law = {name: getattr(asked, name) for name in schema.Law.model_fields}
        plain = schema.Drawing(**law, seed=asked.seed)
        job = asked_job(served, plain, [ids], asked.max_tokens, settings)
        job.detail = asked.detail
        form = PatchForm(served.tokenizer, len(ids) % served.model.patch_size)
        return Reply(served.worker, job, form, True, metrics)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: Exception) -> Response:
        word = str(error).partition(" ")[0]  # what is wrong, where it is a field
        return ApiError(400, str(error), param=word if word in schema.Drawing.model_fields else None).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _sentence(error, request.headers.get("content-type", "")).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
        status = error.status_code
        message = words.get(status, "the body must be a JSON object in UTF-8" if status == 400 else str(error.detail))
        return ApiError(status, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, f"the server failed at this request ({secrets.token_hex(4)}); its log says how").response()


def _sentence(error: RequestValidationError, sent_as: str) -> ApiError:
    """The first mistake: where and what. Of a field that takes several types each complains: then it says all of them."""
    first = error.errors()[0]
    if len(first["loc"]) == 1 and "json" not in sent_as:
        return ApiError(400, f"the body is read as JSON: send content-type: application/json; got {sent_as[:100]!r}")
    if len(first["loc"]) == 1:
        return ApiError(400, "the body must be a JSON object")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}")
    path = [str(part) for part in first["loc"][1:]]
    of_several = next((number for number, part in enumerate(path[:-1]) if part in SEVERAL), None)
    if of_several is not None:
        where = ".".join(path[: of_several + 1])
        return ApiError(400, f"{where} must be {SEVERAL[path[of_several]]}", param=where)
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {where!r} here: leave it out", param=where, code="unknown_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{where}: {message}", param=where)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorAnswer} for status in statuses}


def _describe(app: FastAPI, settings: ServeSettings) -> None:
    """The OpenAPI document without FastAPI's own 422, which is a 400 here, and with the key where there is one."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    if settings.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
