"""`nextvec convert`: published checkpoints to run directories, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nextvec.cli import app


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Published checkpoint: a directory or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New directory to write.")],
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="SRC2", help="Published autoencoder to use instead of the one inside SRC."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer.json, or a directory holding one, where SRC has none; text needs it."),
    ] = None,
    to: Annotated[
        Literal["nextvec", "reference"],
        typer.Option(help="reference: back from the run directory SRC to the published format."),
    ] = "nextvec",
) -> None:
    """Make a run directory of a published autoencoder or CALM (energy, flow, diffusion head); every tensor stays bit for bit."""
    from nextvec.errors import ConfigError
    from nextvec.reference.convert import convert as convert_checkpoint
    from nextvec.reference.convert import convert_back

    if to == "reference":
        if autoencoder is not None or tokenizer is not None:
            raise ConfigError(
                "--autoencoder and --tokenizer do not go with --to reference: a run directory holds its own"
            )
        config = convert_back(source, destination)
        print(f"{destination}: the {config.kind} of {source} in the published format")
        return
    done = convert_checkpoint(source, destination, autoencoder=autoencoder, tokenizer=tokenizer)
    model = done.config.model
    print(
        f"{destination}: {done.config.kind} of {done.parameters:,} parameters, K = {model.patch_size}, "
        f"V = {model.vocab_size:,}, from {source}"
    )
    if not done.has_tokenizer:
        print(
            f"{source} has no tokenizer.json: to read or write text, convert again with --tokenizer, or put the "
            f"tokenizer.json that the model was trained with into {destination}"
        )
