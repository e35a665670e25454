"""`nextvec plan`: K, width and tokens for a training budget, by a law fitted to finished rows of the sweep `law`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app

FOLDER = Path("runs/sweeps/law")


@app.command()
def plan(
    flops: Annotated[float | None, typer.Option(help="Operations of training, the autoencoder's with them.")] = None,
    seconds: Annotated[float | None, typer.Option(help="In their place: seconds of training, with --rate.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Operations a second that training sustains, of all devices.")
    ] = None,
    law: Annotated[
        Path, typer.Option(metavar="DIR", help="Results of `nextvec sweep law`, or of a sweep of its kind.")
    ] = FOLDER,
    score: Annotated[
        str | None, typer.Option(help="BrierLM or Brier-1. Default: BrierLM where every row has it, else Brier-1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Recommend K, width and tokens for a training budget, with the score to expect and how sure that is (docs/law.md)."""
    import json

    import torch

    from nextvec.errors import ConfigError
    from nextvec.law.fit import RESAMPLES, fit
    from nextvec.law.plan import plan as make_plan
    from nextvec.law.points import read_grid
    from nextvec.settings import unknown_name

    if (flops is None) is (seconds is None):
        raise ConfigError("plan takes either --flops or --seconds with --rate")
    if (seconds is None) is not (rate is None):
        raise ConfigError("--seconds and --rate go together: their product is the budget in operations")
    if score not in (None, "BrierLM", "Brier-1"):
        raise ConfigError(unknown_name("score", str(score), ["BrierLM", "Brier-1"]))
    budget = flops if flops is not None else (seconds or 0.0) * (rate or 0.0)
    grid = read_grid(law)
    generator = torch.Generator().manual_seed(seed)
    found = fit(grid, generator, score)  # type: ignore[arg-type]
    made = make_plan(grid, found, budget)
    if as_json:
        errors = {str(family): error for family, error in found.errors}
        about = {"rows": found.points, "family": str(found.solution.family), "leave_one_out": errors}
        print(json.dumps({**made.to_dict(), "law": about}, indent=2))
        return
    unfinished = f", {grid.missing} not finished" if grid.missing else ""
    print(f"law: {found.points} rows of {law}{unfinished}; {grid.text}; {found.score}")
    for family, error in found.errors:
        chosen = f", taken; {found.residual:.2f} in the fit" if family == found.solution.family else ""
        print(f"  {family}: leave-one-out error {error:.2f}{chosen}")
    print(f"resamples: {RESAMPLES:,}, of documents and rows\n")
    print(made)
    for note in grid.notes:
        print(f"Note: {note}.")
