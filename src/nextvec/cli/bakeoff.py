"""`nextvec bakeoff`: CALM against token Transformers on a user's own text, at equal seconds of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def bakeoff(
    minutes: Annotated[float, typer.Option(help="Of training for each arm and seed; CALM's autoencoder counts.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", help="Text, as `prepare` reads it; repeatable. Documents are held out by hash."),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="What `prepare` wrote, with held-out documents, instead of --data."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the bake-off.")] = Path("runs/bakeoff"),
    arms: Annotated[
        str,
        typer.Option(metavar="NAME,..", help="Of calm, token (a token Transformer), multi-token (K tokens a step)."),
    ] = "calm,token,multi-token",
    seeds: Annotated[
        int, typer.Option(help="Seeds of every arm: 0, 1, .. With one, errors are over documents alone.")
    ] = 1,
    vocab_size: Annotated[int, typer.Option(help="Of the byte-level BPE that is trained on the text.")] = 2048,
    tokenizer: Annotated[
        str | None, typer.Option(help='Instead: tokenizer.json, a folder that holds one, or "bytes".')
    ] = None,
    valid_fraction: Annotated[float, typer.Option(help="Share of documents held out, by hash.")] = 0.05,
    text_key: Annotated[
        str, typer.Option(help="Key (JSON) or column (parquet, datasets) that holds the text.")
    ] = "text",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    layers: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Of every arm's backbone, or of some: calm=2,token=3. Default: as many as each arm's budget feeds "
            "(docs/bakeoff.md).",
        ),
    ] = "",
    patch_size: Annotated[
        int | None, typer.Option(help="K, tokens per patch of calm and multi-token: 2, 4, 8 or 16. Default: 4.")
    ] = None,
) -> None:
    """Train CALM and token Transformers on your text for equal seconds, score them, and say which to use.

    Interrupted, the same command goes on where it was; started again in a second terminal it takes other rows.
    """
    import shlex
    import sys

    from nextvec.bakeoff.run import run_bakeoff
    from nextvec.bakeoff.settings import Bakeoff, layers_of

    names = tuple(name.strip() for name in arms.split(",") if name.strip())
    asked = Bakeoff(
        tuple(data or ()), minutes, out, names, seeds, vocab_size, tokenizer, shards, valid_fraction, text_key, device,
        layers_of(layers, names), patch_size,
    )  # fmt: skip
    outcome = run_bakeoff(asked, command=shlex.join(["nextvec", *sys.argv[1:]]), say=_say)
    if outcome is None:
        return
    from nextvec.report.bakeoff import markdown, write_page

    print(markdown(outcome))
    write_page(outcome, out / "report.html")
    _say(f"page: {out / 'report.html'}")


def _say(line: str) -> None:
    """Progress goes to standard error: standard output is the report's."""
    import sys

    print(line, file=sys.stderr, flush=True)
