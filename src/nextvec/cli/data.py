"""`nextvec tokenizer train` and `nextvec prepare`: text to a tokenizer and to token shards."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nextvec.cli import app

if TYPE_CHECKING:
    from nextvec.model.autoencoder import Autoencoder

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
    executor: Annotated[
        Literal["local", "slurm", "ray"] | None,
        typer.Option(help="Make the same shards by tasks of datatrove (extra `datatrove`) instead."),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(help="With --executor: pieces; default: one for each 16 MiB, up to one per file and 1,000."),
    ] = None,
    executor_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="With --executor: an argument of it; slurm needs partition=NAME and time=HH:MM:SS.",
        ),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Store what this autoencoder says of each patch, for data.latents=true."),
    ] = None,
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

    shared: dict[str, Any] = {
        "packing": packing,
        "valid_fraction": valid_fraction,
        "skip_bad": skip_bad,
        "workers": workers,
        "text_key": text_key,
        "dtype": dtype,
        "shard_tokens": shard_tokens,
    }
    if executor is not None or tasks is not None or executor_option:
        _by_tasks(executor, sources, tokenizer, out, tasks, executor_option or [], latents, shared)
        return
    teacher = _teacher(latents, tokenizer) if latents is not None else None
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

            result = run(sources, load_tokenizer(tokenizer), out, show=show, **shared)
    except KeyboardInterrupt:
        print("nextvec: interrupted; finished shards are kept, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    print(result)
    if teacher is not None:
        _store_latents(teacher, result.train)


def _by_tasks(
    executor: Literal["local", "slurm", "ray"] | None,
    sources: list[str],
    tokenizer: str,
    out: Path,
    tasks: int | None,
    options: list[str],
    latents: Path | None,
    shared: dict[str, Any],
) -> None:
    from nextvec.errors import ConfigError
    from nextvec.text.cluster import prepare_by_tasks
    from nextvec.text.tokenizer import load_tokenizer

    if executor is None:
        raise ConfigError("--tasks and --executor-option are for --executor local, slurm or ray")
    if latents is not None:
        raise ConfigError(
            "--latents is not for --executor: run the same command without it afterwards, which only encodes"
        )
    given = dict(map(_option, options))
    if executor != "slurm":
        print(f"nextvec: what the tasks of datatrove say goes to {out / 'executor'}", file=sys.stderr)
    result = prepare_by_tasks(executor, sources, load_tokenizer(tokenizer), out, options=given, tasks=tasks, **shared)
    print(result or f"{out}: Slurm has the jobs; the last one writes the manifests (logs in {out / 'executor'})")


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE; a value is text but for whole numbers, true, false and {...} (to YAML, 14:00:00 is a number)."""
    from nextvec.errors import ConfigError
    from nextvec.settings import yaml_value

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"an option of the executor is written key=value, for instance partition=cpu; got {text!r}")
    return key, yaml_value(key, value) if value.isdigit() or value in ("true", "false") or value[:1] == "{" else value


def _teacher(run: Path, tokenizer: str) -> Autoencoder:
    """The autoencoder of a run. Raises ConfigError when it reads other tokens."""
    from nextvec.errors import ConfigError
    from nextvec.hardware import choose_device
    from nextvec.rundir import load_autoencoder
    from nextvec.text.tokenizer import load_tokenizer

    autoencoder, own = load_autoencoder(run, choose_device("auto"))
    if own.hash != load_tokenizer(tokenizer).hash:
        raise ConfigError(
            f"the autoencoder of {run} was trained with another tokenizer than {tokenizer}; give its own: {run}"
        )
    return autoencoder


def _store_latents(autoencoder: Autoencoder, shards: Path) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from nextvec.text.layout import Stream
    from nextvec.text.shards import TokenShards
    from nextvec.train.latents import write_latents

    console = Console(stderr=True)
    stream = Stream(TokenShards.open(shards), autoencoder.config.patch_size)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("Encoding patches", total=1.0)
            folder = write_latents(stream, autoencoder, lambda done: bar.update(task, completed=done))
    except KeyboardInterrupt:
        print("nextvec: interrupted; finished files are kept, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"latents  {folder} ({size / 2**20:,.0f} MiB, {size / stream.length:.0f} bytes per token): train with data.latents=true"
    )
