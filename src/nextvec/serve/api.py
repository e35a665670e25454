"""The routes: OpenAI's completions, chats and models, health, metrics, the page and its own endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import nextvec
from nextvec.errors import UserError
from nextvec.sampling.draw import abilities
from nextvec.serve import schema
from nextvec.serve.asked import asked_job, chat_ids, find, prompt_ids
from nextvec.serve.body import Reader
from nextvec.serve.door import Door, broken
from nextvec.serve.errors import ApiError
from nextvec.serve.formats import ChatForm, PatchForm, TextForm
from nextvec.serve.metrics import Metrics
from nextvec.serve.models import Served
from nextvec.serve.page import page
from nextvec.serve.reply import Reply
from nextvec.serve.settings import ServeSettings

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # one of a stream
REF = "#/components/schemas/{model}"
BODIES = (schema.CompletionRequest, schema.ChatRequest, schema.PatchRequest)
STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}


def build_app(models: Mapping[str, Served], settings: ServeSettings, metrics: Metrics) -> ASGIApp:
    """The whole application; its lifespan starts and stops the engines."""
    reader = Reader()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        for served in models.values():
            served.worker.start(loop)
        yield
        for served in models.values():
            await asyncio.to_thread(served.worker.stop)
        reader.stop()

    app = FastAPI(title="nextvec", version=nextvec.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_state(app, models, metrics)
    _add_texts(app, models, settings, metrics, reader)
    _describe(app, settings)
    outside: ASGIApp = Door(app, settings, metrics, [route for route in app.routes if isinstance(route, Route)])
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

    @app.get("/v1/models/{model:path}", responses=_errors(404))
    async def get_model(model: str) -> schema.ModelCard:
        return card(find(models, model))


def _add_texts(
    app: FastAPI, models: Mapping[str, Served], settings: ServeSettings, metrics: Metrics, reader: Reader
) -> None:
    refusals = _errors(400, 401, 404, 408, 413, 429, 500, 503)

    @app.post(
        "/v1/completions",
        response_class=Response,
        responses={200: {"model": schema.TextAnswer, **STREAM}, **refusals},
        openapi_extra=_body(schema.CompletionRequest),
    )
    async def complete(request: Request) -> Response:
        def reply(asked: schema.CompletionRequest) -> Reply:
            served = find(models, asked.model)
            schema.refuse_impossible(asked)
            prompts = prompt_ids(served, asked.prompt, settings)
            job = asked_job(served, asked, prompts, asked.max_tokens or schema.MAX_TOKENS, settings)
            echo: list[str] = []
            if asked.echo:
                echo = [text for ids in prompts for text in [served.tokenizer.decode(ids)] * job.samples]
            form = TextForm(served.id, asked.include_usage, echo)
            return Reply(served.worker, job, form, bool(asked.stream), metrics)

        return await reader.read(request, schema.CompletionRequest, reply)

    @app.post(
        "/v1/chat/completions",
        response_class=Response,
        responses={200: {"model": schema.ChatAnswer, **STREAM}, **refusals},
        openapi_extra=_body(schema.ChatRequest),
    )
    async def chat(request: Request) -> Response:
        def reply(asked: schema.ChatRequest) -> Reply:
            served = find(models, asked.model)
            schema.refuse_impossible(asked)
            ids = chat_ids(served, asked.messages)
            limit = asked.max_completion_tokens or asked.max_tokens or max(1, served.context - len(ids))
            job = asked_job(served, asked, [ids], limit, settings)
            form = ChatForm(served.id, asked.include_usage, job.rows)
            return Reply(served.worker, job, form, bool(asked.stream), metrics)

        return await reader.read(request, schema.ChatRequest, reply)

    @app.post(
        "/nextvec/patches",
        response_class=Response,
        responses={200: {"description": "A stream", **STREAM}, **refusals},
        openapi_extra=_body(schema.PatchRequest),
    )
    async def patches(request: Request) -> Response:
        def reply(asked: schema.PatchRequest) -> Reply:
            served = find(models, asked.model)
            (ids,) = prompt_ids(served, asked.prompt, settings)
            law = {name: getattr(asked, name) for name in schema.Law.model_fields}
            plain = schema.Drawing(**law, seed=asked.seed)
            job = asked_job(served, plain, [ids], asked.max_tokens, settings)
            job.detail = asked.detail
            form = PatchForm(served.tokenizer, len(ids) % served.model.patch_size)
            return Reply(served.worker, job, form, True, metrics)

        return await reader.read(request, schema.PatchRequest, reply)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: Exception) -> Response:
        word = str(error).partition(" ")[0]  # what is wrong, where it is a field
        return ApiError(400, str(error), param=word if word in schema.Drawing.model_fields else None).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
        message = words.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return broken(request.scope).response()


def _body(kind: type[schema.Asked]) -> dict[str, Any]:
    """Of an operation's description: the body, which a `Reader` reads and FastAPI does not know."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=kind.__name__)}}}
    return {"requestBody": {"content": content, "required": True}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorAnswer} for status in statuses}


def _describe(app: FastAPI, settings: ServeSettings) -> None:
    """The OpenAPI document: with the bodies, with the key where there is one, and without FastAPI's own 422, a 400 here."""
    document = app.openapi()
    _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REF)
    document["components"]["schemas"] |= bodies["$defs"]
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    if settings.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
