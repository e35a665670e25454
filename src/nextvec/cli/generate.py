"""`nextvec generate`: continue a prompt with a trained run."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app

BOUNDARY = "│"  # drawn between patches by --show-patches


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a CALM or a token baseline.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, of any length; empty starts a document.")] = "",
    temperature: Annotated[float, typer.Option(help="In (0, 1]; 1 is the model's own law.")] = 0.5,
    candidates: Annotated[int, typer.Option(help="Draws in the pool of each patch (CALM below 1).")] = 200,
    max_tokens: Annotated[int, typer.Option(help="Tokens to draw at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
    show_patches: Annotated[bool, typer.Option("--show-patches", help=f"Draw {BOUNDARY} between patches.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Print a prompt and its continuation, patch by patch as it is drawn."""
    from nextvec.config import AutoencoderConfig, RunConfig
    from nextvec.errors import ConfigError
    from nextvec.hardware import choose_device
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.rundir import load_run, read_config
    from nextvec.sampling.generate import stream_text
    from nextvec.sampling.settings import Sampling
    from nextvec.sampling.stream import patch_texts

    Sampling(temperature, candidates, max_tokens, seed)  # a bad value is told before a large model loads
    if isinstance(read_config(run).model, AutoencoderConfig):
        raise ConfigError(
            f"{run} is an autoencoder, which has no next patch to draw: give the run of a calm or token_lm"
        )
    loaded = load_run(run, choose_device(device))
    model = loaded.model
    assert isinstance(model, Calm | TokenLM)
    tokenizer = loaded.text_tokenizer
    pieces = stream_text(
        model, prompt, temperature=temperature, candidates=candidates, max_tokens=max_tokens, seed=seed
    )
    mark = BOUNDARY if show_patches else ""
    ids = tokenizer.encode(prompt)
    trained = loaded.config.data.context_tokens if isinstance(loaded.config, RunConfig) else None
    if trained is not None and len(ids) + max_tokens > trained:
        print(
            f"prompt and --max-tokens make {len(ids) + max_tokens:,} tokens; the model was trained on {trained:,}, and "
            "beyond them its text may decay",
            file=sys.stderr,
        )
    shown = patch_texts(tokenizer, ids, model.patch_size)
    if len(ids) % model.patch_size == 0:
        shown.append("")  # the prompt ends at a boundary; otherwise its last patch goes on with the first one drawn
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ?, it does not end the text
    print(mark.join(shown) if show_patches else prompt, end="", flush=True)
    for number, piece in enumerate(pieces):
        print((mark if number else "") + piece, end="", flush=True)
    print()
