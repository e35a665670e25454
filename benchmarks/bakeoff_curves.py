"""Draws what bake-offs learnt: BrierLM of CALM and of the token Transformer against seconds, tokens and operations.

    python benchmarks/bakeoff_curves.py docs/results/bakeoff-english-{3,10,30}min-tables --svg docs/figures/bakeoff_curves.svg

Each folder is one budget. Small marks are an arm's points on the way, of fewer positions and at a rate that has not decayed yet;
large ones its end, with one standard error (over seeds where there are several, else over documents). Seconds are shares of
the budget: CALM's begin where its autoencoder ends (by processor time), whose operations it has as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from nextvec.config import AutoencoderRun, parse_run
from nextvec.files import atomic_path
from nextvec.law.points import encoder_flops
from nextvec.sweep.tables import read_sweep_results

ARMS = {  # its row: name, colour, mark
    "calm": ("CALM", "#0b6e99", "o"),
    "token": ("token Transformer", "#b5540a", "s"),
    "multi-token": ("multi-token Transformer", "#4b7f2f", "^"),
}
AXES = ("seconds of training, the autoencoder's with them", "tokens read", "operations, the autoencoder's with them")


class Curve(NamedTuple):
    """One arm at one budget, means over seeds: seconds, tokens, operations and BrierLM of each point; the last is its end."""

    arm: str
    points: list[tuple[float, float, float, float]]
    error: float


def curves(folder: Path) -> list[Curve]:
    """Of a folder of results. Raises DataError or ConfigError for anything else."""
    sweep = read_sweep_results(folder)
    budget = float(sweep.spec["budget"]["seconds"])
    found = []
    for row in sweep.rows:
        results = [result for result in row.results.values() if result["failed"] is None]
        if row.name in ARMS and results:
            points = [_point(results, at, budget) for at in range(len(results[0]["held_out"]))]
            ends = [float(result["brier"]["brier_lm"]) for result in results]
            error = stdev(ends) / len(ends) ** 0.5 if len(ends) > 1 else results[0]["brier"]["brier_lm_stderr"]
            found.append(Curve(row.name, [*points[:-1], (*points[-1][:3], fmean(ends))], float(error)))
    return found


def _point(results: Sequence[Mapping[str, Any]], at: int, budget: float) -> tuple[float, float, float, float]:
    """The figures of one point on the way; a seed without a BrierLM there counts as 0."""
    first = results[0]
    before, flops = 0.0, 0.0
    if first["autoencoder"] is not None:
        encoder = parse_run(first["identity"]["autoencoder"], "the autoencoder of a row")
        assert isinstance(encoder, AutoencoderRun)
        spent = [float(part["cpu_seconds"]) for part in (first["autoencoder"], first)]
        before, flops = budget * spent[0] / sum(spent), encoder_flops(encoder)
    row = first["held_out"][at]
    seconds = before + (budget - before) * row["step"] / first["steps"]
    score = fmean(float(result["held_out"][at]["brier_lm"] or 0.0) for result in results)
    return seconds, float(row["tokens"]), flops + row["tokens"] * first["flops_per_token"], score


def draw(found: Sequence[Curve], path: Path) -> None:
    """Three panels, the same file for the same points."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "nextvec"
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axis, (axes, title) in enumerate(zip(panels, AXES, strict=True)):
        for curve in found:
            name, colour, mark = ARMS[curve.arm]
            xs, ys = [point[axis] for point in curve.points], [point[3] for point in curve.points]
            axes.plot(xs, ys, "-", marker=mark, color=colour, linewidth=0.9, markersize=2.5, alpha=0.7)
            axes.errorbar(
                xs[-1:], ys[-1:], yerr=[curve.error], fmt=mark, color=colour, markersize=6, capsize=2, label=name
            )
        axes.set_xscale("log")
        axes.set_xlabel(title, fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    panels[0].legend(unique.values(), unique.keys(), fontsize=8, loc="upper left")
    panels[0].set_ylabel("BrierLM on held-out text", fontsize=8)
    panels[0].set_ylim(bottom=0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results of `nextvec bakeoff`")
    parser.add_argument("--svg", type=Path, help="write the figure here")
    chosen = parser.parse_args(arguments)
    found = [curve for folder in chosen.folders for curve in curves(folder)]
    for curve in found:
        seconds, tokens, flops, score = curve.points[-1]
        spent = f"{seconds:,.0f} s, {tokens / 1e6:.2f}M tokens, {flops:.2e} operations"
        print(f"{curve.arm}: {spent}, BrierLM {score:.2f} +- {curve.error:.2f}")
    if chosen.svg:
        draw(found, chosen.svg)


if __name__ == "__main__":
    main()
