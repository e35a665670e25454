"""`nextvec tokenizer train` and `nextvec prepare`: text to a tokenizer and to token shards."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from nextvec.cli import app

tokenizer_app = typer.Typer(help="Make a tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SRC...", help="Files, folders, globs, hf:owner/name[:config][:split], or python-stdlib."),
]
TextKey = Annotated[str, typer.Option(help="Key (JSON) or column (parquet, datasets) that holds the text.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count unreadable documents and go on.")]


@tokenizer_app.command("train")
def train_tokenizer(
    sources: Sources,
    vocab_size: Annotated[int, typer.Option(help="Ids in all: 3 special tokens, 256 bytes and the merges.")],
    out: Annotated[Path, typer.Option(help="Folder that gets tokenizer.json.")],
    text_key: TextKey = "text",
    skip_bad: SkipBad = False,
) -> None:
    """Train a byte-level BPE with the tokens <|pad|>, <|mask|> and <|endoftext|>."""
    from rich.console import Console

    from nextvec.errors import ConfigError, DataError
    from nextvec.text.readers import documents, expand
    from nextvec.text.tokenizer import train_tokenizer as train

    if out.is_file():
        raise ConfigError(f"--out is a folder, which gets tokenizer.json; {out} is a file")
    console = Console(stderr=True)
    skipped = 0

    def bad(message: str) -> None:
        nonlocal skipped
        if not skip_bad:
            raise DataError(f"{message} (--skip-bad leaves such documents out)")
        skipped += 1

    with console.status("Counting words and merging pairs"):
        tokenizer = train(documents(expand(sources), text_key, bad), vocab_size)
    tokenizer.save(out)
    note = f", {skipped} bad documents skipped" if skipped else ""
    print(f"{out / 'tokenizer.json'}: {tokenizer.vocab_size} ids, hash {tokenizer.hash[:12]}{note}")
    if tokenizer.vocab_size < vocab_size:
        print(f"The text holds no more pairs to merge: {tokenizer.vocab_size} of {vocab_size} ids were made.")


@app.command()
def prepare(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option(help='tokenizer.json, a folder that holds one, or "bytes".')],
    out: Annotated[Path, typer.Option(help="Folder that gets train/ and valid/.")],
    packing: Annotated[
        Literal["aligned", "packed"],
        typer.Option(help="aligned: documents padded to whole patches; packed: one after the other, as the paper."),
    ] = "aligned",
    valid_fraction: Annotated[float, typer.Option(help="Share of documents held out, by hash; 0: none.")] = 0.01,
    skip_bad: SkipBad = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    text_key: TextKey = "text",
    dtype: Annotated[Literal["auto", "uint16", "uint32"], typer.Option(help="Type of the ids on disk.")] = "auto",
    shard_tokens: Annotated[int, typer.Option(help="Tokens of one shard file.")] = 1 << 24,
) -> None:
    """Turn text into token shards. Interrupted, the same command goes on where it stopped."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from nextvec.text.prepare import prepare as run
    from nextvec.text.tokenizer import load_tokenizer

    columns = (
        TextColumn("Preparing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("prepare", total=1.0, note="")

            shown = 0.0

            def show(fraction: float, documents: int, tokens: int) -> None:
                nonlocal shown
                if time.monotonic() - shown < 0.1:  # called for every document
                    return
                shown = time.monotonic()
                bar.update(task, completed=fraction, note=f"{documents:,} documents, {tokens / 1e6:,.1f}M tokens")

            result = run(
                sources,
                load_tokenizer(tokenizer),
                out,
                packing=packing,
                valid_fraction=valid_fraction,
                skip_bad=skip_bad,
                workers=workers,
                text_key=text_key,
                dtype=dtype,
                shard_tokens=shard_tokens,
                show=show,
            )
    except KeyboardInterrupt:
        print("nextvec: interrupted; finished shards are kept, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    print(result)
