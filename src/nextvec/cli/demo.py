"""`nextvec demo`: the main job on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nextvec.cli import app


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Wall-clock time for everything.")] = 8.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the demo.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws all parameters and noise.")] = 0,
    recipe: Annotated[
        Literal["fast", "paper"],
        typer.Option(
            help="fast: our mixture head on a factored autoencoder; paper: the paper's energy head, its loss alone, on the "
            "paper's autoencoder."
        ),
    ] = "fast",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Train an autoencoder, a CALM and its token baseline on the standard library; score both; write a report."""
    from nextvec.demo import Demo, run_demo

    run_demo(Demo(out, minutes, seed, recipe, device))
