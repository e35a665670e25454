"""`nextvec verify`: whether shards, stored latents, weights and checkpoints on disk are still as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def verify(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="What `nextvec prepare` wrote, or run directories.")
    ],
) -> None:
    """Read everything again and compare checksums. The first file that is damaged is named, and the exit status is 2."""
    from nextvec.train.verify import verify as read_again

    for folder in folders:
        print("\n".join(read_again(folder)))
