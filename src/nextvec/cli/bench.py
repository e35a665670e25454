"""`nextvec bench`: speed, memory and where the time goes, against the machine's limits and a textbook implementation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app

WHAT = ("train", "autoencoder", "baseline", "generate", "evaluate")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help=f"{', '.join(WHAT)}.")] = "train",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Training: single settings, as data.rows=8.")
    ] = None,
    config: Annotated[
        str, typer.Option(metavar="reference|PRESET|FILE", help="Training: what to measure; the text is synthetic.")
    ] = "reference",
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write all figures here.")] = None,
    plain: Annotated[bool, typer.Option(help="Training: the textbook implementation too, for the ratio.")] = True,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians count.")] = 7,
    seconds: Annotated[
        float, typer.Option(help="Timed work over all arms and repeats; at least one step each.")
    ] = 30.0,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="generate, evaluate: a trained run.")] = None,
    data: Annotated[
        str | None, typer.Option(help="evaluate: held-out text; default: what lies beside the run's training shards.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="generate: text to continue.")] = "",
    candidates: Annotated[int, typer.Option(help="generate: pool N at T = 0.5.")] = 200,
    draws: Annotated[int, typer.Option(help="evaluate: model draws per position.")] = 8,
    tokens: Annotated[
        int | None, typer.Option(help="generate: tokens drawn in a unit (128); evaluate: tokens of documents (16384).")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto, bf16 or fp32; auto: as the settings say, and fp32 for generate and evaluate.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Measure training steps, generation or evaluation: tokens/s, share of the machine's limit, peak memory, parts.

    train, autoencoder and baseline need no data and no trained model; generate and evaluate need a trained RUN.
    """
    from nextvec.bench.run import Settings, bench_evaluate, bench_generate, bench_training
    from nextvec.bench.show import lines
    from nextvec.config import unknown_name
    from nextvec.errors import ConfigError
    from nextvec.files import check_target, write_json

    check_target(json)
    if what not in WHAT:
        raise ConfigError(unknown_name("benchmark", what, list(WHAT)))
    settings = Settings(device, precision, plain, repeats, seconds)
    if what in ("generate", "evaluate"):
        if run is None:
            raise ConfigError(f"bench {what} measures a trained run: give --run RUN")
        if config != "reference" or overrides:
            raise ConfigError(f"bench {what} takes its settings from --run; leave --config and KEY=VALUE out")
        if what == "generate":
            found = bench_generate(run, prompt, candidates, 128 if tokens is None else tokens, settings, _say)
        else:
            found = bench_evaluate(run, data, draws, 16384 if tokens is None else tokens, settings, _say)
    else:
        if run is not None:
            raise ConfigError(f"bench {what} measures training steps of a new model; leave --run out")
        found = bench_training(what, config, overrides or [], settings, _say)
    if json is not None:
        write_json(json, found)
    print("\n".join(lines(found)))


def _say(line: str) -> None:
    """What is being done, on a terminal's standard error."""
    if sys.stderr.isatty():
        print(f"{line} ...", file=sys.stderr)
