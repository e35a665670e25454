"""`nextvec bound`: bits per byte of a CALM, from above, and of a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app
from nextvec.cli.shared import Solver, Steps, change_solver, progress_bars, trained_context


@app.command()
def bound(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: calm or token_lm.")],
    data: Annotated[str, typer.Option(help="Held-out text: a shard directory, or whatever `prepare` reads.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A token_lm run, scored exactly at the same positions.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
    draws: Annotated[int, typer.Option(help="S, a power of two: the curve goes 1, 2, 4 .. S.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Of the decoder. Default: fitted on every fourth document.")
    ] = None,
    patches: Annotated[
        int | None, typer.Option(help="Score only so many patches, evenly spread over all. Default: all.")
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="Window N of the protocol documents-N; by default that of training.")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(help="Without a CALM: K of the CALM compared with, whose positions are scored; 4.")
    ] = None,
    solver: Solver = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same figures.")] = 0,
    max_documents: Annotated[int | None, typer.Option(help="Only the first documents of the data.")] = None,
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    rows: Annotated[int, typer.Option(min=1, help="Windows per pass.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Upper bound on the bits per byte of a soft-decoded CALM by the number of draws; exact bits per byte of models of tokens."""
    import torch

    from nextvec import __version__
    from nextvec.errors import ConfigError, DataError
    from nextvec.evaluate.bound import evaluate_likelihood
    from nextvec.evaluate.documents import read_documents
    from nextvec.evaluate.windows import BASELINE_STRIDE
    from nextvec.files import check_target, write_json
    from nextvec.hardware import choose_device
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.rundir import load_run

    check_target(json)
    where = choose_device(device)
    loaded = load_run(run, where)
    change_solver(loaded, solver, steps)
    tokenizer = loaded.text_tokenizer
    model = loaded.model
    if not isinstance(model, Calm | TokenLM):
        raise ConfigError(f"{run} holds an autoencoder, which predicts nothing: give a calm or token_lm run")
    if isinstance(model, Calm) and patch_size is not None and patch_size != model.patch_size:
        raise ConfigError(
            f"--patch-size is for a baseline alone; {run} has patches of {model.patch_size}: leave it out"
        )
    calm = model if isinstance(model, Calm) and model.has_latents else None
    exact = model if calm is None else None  # its probabilities are known
    if baseline is not None:
        if exact is not None:
            raise ConfigError(f"{run} is a baseline itself; give a calm run with --baseline {baseline}")
        beside = load_run(baseline, where)
        if not isinstance(beside.model, TokenLM) and not (
            isinstance(beside.model, Calm) and not beside.model.has_latents
        ):
            raise ConfigError(
                f"--baseline must be a token_lm run, or one whose head draws tokens; {baseline} holds a "
                f"{type(beside.model).__name__}"
            )
        exact = beside.model
        if beside.text_tokenizer.hash != tokenizer.hash:
            raise DataError(f"{run} and {baseline} have different tokenizers, so they do not score the same tokens")
    documents = read_documents(data, tokenizer, limit=max_documents, text_key=text_key)
    with progress_bars() as report:
        found = evaluate_likelihood(
            calm,
            exact,
            documents,
            tokenizer,
            context_tokens=trained_context(loaded.config) if context_tokens is None else context_tokens,
            generator=torch.Generator(where).manual_seed(seed),
            patch_size=BASELINE_STRIDE if patch_size is None else patch_size,
            draws=draws,
            temperature=temperature,
            patches=patches,
            batch_rows=rows,
            progress=report,
        )
    print(found)
    if json is not None:
        names = {"run": str(run), "baseline": None if baseline is None else str(baseline), "data": data}
        write_json(json, {"nextvec": __version__, **names, "likelihood": found.to_dict()})
