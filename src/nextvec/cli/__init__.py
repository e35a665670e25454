"""The one console command, `nextvec`. Verbs live in this folder's modules; heavy imports happen inside them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nextvec import __version__
from nextvec.errors import UserError
from nextvec.process import keep_freed_memory, leave, yield_waiting_threads

app = typer.Typer(
    name="nextvec",
    help="Train, score and sample continuous autoregressive language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"nextvec {__version__}")
        raise typer.Exit


@app.callback()
def _verbs(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keeps `nextvec VERB` as it is however many verbs are registered."""


def main() -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit status 2, never a traceback."""
    yield_waiting_threads()
    keep_freed_memory()
    from nextvec.cli import commands  # noqa: F401  (registers the verbs)

    leave(_run())


def _run() -> int:
    """The exit status of what was asked for."""
    try:
        app()
    except UserError as error:
        print(f"nextvec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nextvec: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"nextvec: {error}", file=sys.stderr)
        return 1
    except SystemExit as asked:  # how typer ends
        if isinstance(asked.code, str):
            raise
        return asked.code or 0
    return 0
