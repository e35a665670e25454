"""`nextvec env`: what the machine offers."""

from __future__ import annotations

from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; rates per second, memory in bytes.")] = False,
) -> None:
    """Print cores, instruction sets, GPUs, measured matrix and memory rates, and the precision that training chooses."""
    import json

    from nextvec.hardware import environment

    found = environment()
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
