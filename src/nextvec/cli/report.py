"""`nextvec report`: the page of a training run, while it goes on or afterwards, or of finished sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextvec.cli import app


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="One run directory of `nextvec train`, or folders of `nextvec sweep`."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page to write. Default: report.html in DIR (a bake-off's: rows.html)."),
    ] = None,
) -> None:
    """A page that stands alone: curves and anomalies of a run, also while it trains, or tables and pictures of sweeps.

    On standard output: what `nextvec watch --once` shows of the run, or the sweeps' tables as Markdown.
    """
    import sys

    from nextvec.errors import ConfigError
    from nextvec.files import check_target

    check_target(out)
    # report.html of a bake-off is its own page, with the verdict
    name = "rows.html" if (folders[0] / "verdict.json").exists() else "report.html"
    path = out or (folders[0] / name if len(folders) == 1 else Path("report.html"))
    runs = [folder for folder in folders if (folder / "config.yaml").is_file()]
    if runs and len(folders) > 1:
        raise ConfigError(f"{runs[0]} is a training run: a report is of one run, or of sweeps")
    for folder in folders:
        _check(folder)
    if runs:
        from rich.console import Console

        from nextvec.report.run import write_page as write_run
        from nextvec.watch.screen import View, print_whole
        from nextvec.watch.status import Reader

        status = Reader(runs[0]).look()
        print_whole(Console(highlight=False), View(status))
        write_run(status, path)
    else:
        from nextvec.report.sweep import markdown, write_page
        from nextvec.sweep.tables import read_sweep_results

        sweeps = [read_sweep_results(folder) for folder in folders]
        print("\n\n".join(markdown(each) for each in sweeps))
        write_page(sweeps, path)
    print(f"page: {path}", file=sys.stderr)


def _check(folder: Path) -> None:
    """Raises DataError for what there can be no report of."""
    from nextvec.errors import DataError

    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: give a run directory, or a folder that `nextvec sweep` wrote")
    if not any((folder / name).is_file() for name in ("config.yaml", "sweep.json")):
        raise DataError(
            f"{folder} is neither a run directory (it has no config.yaml) nor a folder of `nextvec sweep` (no sweep.json)"
        )
