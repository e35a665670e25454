"""`nextvec watch`: a training run on the terminal, while it goes on and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that `nextvec train` writes.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print one look and leave; so does output that is no terminal.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Progress, terms and trends, speed, held-out figures, checkpoints and anomalies of a run. Ctrl-C leaves it training."""
    from rich.console import Console

    from nextvec.watch.screen import View, follow, print_whole
    from nextvec.watch.status import Reader

    console, reader = Console(highlight=False), Reader(run)
    reader.check()
    if once or not console.is_terminal:
        print_whole(console, View(reader.look()))
    else:
        follow(reader, console, every)
