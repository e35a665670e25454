"""`nextvec compare`: two results of `nextvec eval` beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result of `nextvec eval --json`.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another, of the same protocol, text and tokenizer.")],
    json: Annotated[Path | None, typer.Option(help="Also write the differences here.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the bootstrap.")] = 0,
) -> None:
    """Brier figures of two models and their difference, B minus A, with a paired bootstrap by document.

    Refused where protocol, documents, tokenizer, positions or decode rule differ; draws and estimator may.
    """
    import torch

    from nextvec.evaluate import compare as comparing
    from nextvec.files import check_target, write_json

    check_target(json)
    results = comparing.read_result(a), comparing.read_result(b)
    comparing.check_same(*results, (str(a), str(b)))
    found = comparing.compare(*results, generator=torch.Generator().manual_seed(seed))
    for name, path, result in zip("AB", (a, b), results, strict=True):
        print(f"{name}: {path}\n{result}\n")
    print(f"B - A:\n{found}")
    if json is not None:
        write_json(json, {"a": str(a), "b": str(b), "seed": seed, **found.to_dict()})
