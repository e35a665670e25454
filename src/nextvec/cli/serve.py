"""`nextvec serve`: an OpenAI-compatible server for trained runs, with a page at its root."""

from __future__ import annotations

from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def serve(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|NAME=RUN...", help="Runs of a CALM or a token baseline.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="NEXTVEC_API_KEY", show_envvar=True, help="Clients must send it as a bearer token."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Texts at work at once, for each model.")] = 16,
    queue: Annotated[int, typer.Option(help="Texts that may wait, for each model; beyond it 429.")] = 64,
    context_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its continuation; default: what the model was trained on."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="A seed's text is the same in any company, also in bf16; slower.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages of this origin may call the server; * for all. Can be repeated.")
    ] = None,
    connections: Annotated[int, typer.Option(help="Connections open at once.")] = 256,
    drain_seconds: Annotated[float, typer.Option(help="After SIGTERM, for the requests in hand.")] = 30.0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, the numbers in which the models run.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Serve runs side by side: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics, and a page at /."""
    import sys

    from nextvec.errors import ConfigError

    try:
        import fastapi  # noqa: F401
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"nextvec serve needs the serve extra ({error.name} is not installed): pip install 'nextvec[serve]'"
        ) from None
    from nextvec.serve.settings import LOOPBACK, ServeSettings

    settings = ServeSettings(
        host=host,
        port=port,
        api_key=api_key,
        slots=slots,
        queue=queue,
        context_tokens=context_tokens,
        deterministic=deterministic,
        origins=tuple(cors_origin or ()),
        connections=connections,
        drain_seconds=drain_seconds,
    )
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision must be fp32 or bf16; got {precision!r}")
    from nextvec.hardware import DTYPES, choose_device, slow_precision
    from nextvec.serve.api import build_app
    from nextvec.serve.logs import event, logs_to
    from nextvec.serve.metrics import Metrics
    from nextvec.serve.models import load_models
    from nextvec.serve.server import make_server, take_address
    from nextvec.serve.server import serve as run_server

    socket, metrics = take_address(settings), Metrics()  # a port that is taken is told before models load
    with socket:
        dtype, place = DTYPES["bf16" if precision == "bf16" else "fp32"], choose_device(device)
        if (slow := slow_precision(precision, place)) is not None:
            print(slow, file=sys.stderr)
        models = load_models(runs, settings, metrics, place, dtype)
        if host not in LOOPBACK and api_key is None:
            print(
                f"{host} is open to other machines and there is no --api-key: anyone who reaches it can use it",
                file=sys.stderr,
            )

        def ready(address: str) -> None:
            event("listening", address=address, models=list(models))
            print(f"{', '.join(models)} at {address}/v1, a page at {address}/", flush=True)

        with logs_to(2):
            run_server(make_server(build_app(models, settings, metrics), settings), socket, ready)
