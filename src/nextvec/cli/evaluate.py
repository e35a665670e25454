"""`nextvec eval`: score a trained run on held-out text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextvec.cli import app
from nextvec.cli.shared import Solver, Steps, change_solver, progress_bars, trained_context

if TYPE_CHECKING:
    from nextvec.evaluate.windows import Layout


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: autoencoder, calm or token_lm.")],
    data: Annotated[str, typer.Option(help="Held-out text: a shard directory, or whatever `prepare` reads.")],
    json: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="documents-N, or wikitext103-N (N 1024, 2048, 8192). Default: documents-N, N of training."),
    ] = None,
    context_tokens: Annotated[int | None, typer.Option(help="N: short for --protocol documents-N.")] = None,
    positions: Annotated[
        str, typer.Option(help="patch_starts, or every_offset: the text shifted by 0..K-1 tokens, K passes.")
    ] = "patch_starts",
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between scored positions: K of the CALM compared with. Default: its K; baseline 4."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Model draws per position.")] = 8,
    estimator: Annotated[
        str, typer.Option(help="all_pairs, two_draws (as in the paper), or exact_tail (baseline).")
    ] = "all_pairs",
    solver: Solver = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same figures.")] = 0,
    max_documents: Annotated[int | None, typer.Option(help="Only the first documents of the data.")] = None,
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    rows: Annotated[int, typer.Option(min=1, help="Windows per pass.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Reconstruction (autoencoder, CALM), Brier-1..4 and BrierLM (CALM, baseline), with errors clustered by document."""
    from typing import get_args

    import torch

    from nextvec import __version__
    from nextvec.errors import ConfigError
    from nextvec.evaluate.brier import evaluate_brier
    from nextvec.evaluate.documents import read_documents
    from nextvec.evaluate.reconstruction import evaluate_reconstruction
    from nextvec.evaluate.windows import BASELINE_STRIDE, parse_protocol
    from nextvec.files import check_target, write_json
    from nextvec.hardware import choose_device
    from nextvec.model.autoencoder import Autoencoder
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.rundir import load_run
    from nextvec.scoring.brier import Estimator

    check_target(json)
    if estimator not in get_args(Estimator):
        raise ConfigError(f"estimator must be one of {', '.join(get_args(Estimator))}; got {estimator!r}")
    if protocol is not None and context_tokens is not None:
        raise ConfigError(f"--protocol {protocol} says the context: leave --context-tokens {context_tokens} out")
    layout: Layout = "documents"
    if protocol is not None:
        layout, context_tokens = parse_protocol(protocol)
    where = choose_device(device)
    loaded = load_run(run, where)
    model, tokenizer = loaded.model, loaded.text_tokenizer
    change_solver(loaded, solver, steps)
    documents = read_documents(data, tokenizer, limit=max_documents, text_key=text_key, layout=layout)
    result: dict[str, Any] = {
        "nextvec": __version__,
        "run": str(run),
        "kind": loaded.config.kind,
        "data": data,
    }
    if isinstance(model, Calm):
        result["head"] = model.config.head.model_dump()

    def generator() -> torch.Generator:
        return torch.Generator(where).manual_seed(seed)

    if not isinstance(model, Autoencoder):
        default_stride = model.patch_size if isinstance(model, Calm) else BASELINE_STRIDE
        with progress_bars() as report:
            brier = evaluate_brier(
                model,
                documents,
                context_tokens=trained_context(loaded.config) if context_tokens is None else context_tokens,
                stride=default_stride if stride is None else stride,
                draws=draws,
                generator=generator(),
                tokenizer_hash=tokenizer.hash,
                layout=layout,
                positions=positions,  # type: ignore[arg-type]
                estimator=estimator,  # type: ignore[arg-type]
                batch_rows=rows,
                progress=partial(report, "BrierLM"),
            )
        print(f"{brier}")
        result["brier"] = brier.to_dict()
    if not isinstance(model, TokenLM):
        with progress_bars() as report:
            reconstruction = evaluate_reconstruction(
                model if isinstance(model, Autoencoder) else model.autoencoder,
                documents,
                generator=generator(),
                tokenizer_hash=tokenizer.hash,
                progress=partial(report, "reconstruction"),
            )
        print(("\n" if "brier" in result else "") + f"{reconstruction}")
        result["reconstruction"] = reconstruction.to_dict()
    if json is not None:
        write_json(json, result)
