"""How far the batch temperature sampler is from P^(1/T), by the number N of draws in a pool (docs/sampling.md).

    OMP_NUM_THREADS=1 python benchmarks/temperature_convergence.py --svg docs/figures/temperature.svg --json temperature.json

Total variation distance between the law of the sampler's result and P(x)^(1/T) / Z. The law of the result is the mean of
`pool_probabilities` over many random pools; its own noise is the column `noise`, the distance between the means of the two
halves of the pools, which no measured distance can go below by much.

Legend: B pools, N draws in a pool, X values of the law.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextvec.files import atomic_path, write_json
from nextvec.sampling.temperature import pool_probabilities

TEMPERATURES = (0.9, 0.75, 0.5, 0.4, 1 / 3, 0.25)
SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WORK = 1 << 23  # draws behind one point
MOST_POOLS = 20_000


def laws() -> dict[str, Tensor]:
    """P over X patches, by the name on the figure."""
    rank = torch.arange(1, 1001, dtype=torch.float64)
    sure = torch.cat((torch.tensor([0.6], dtype=torch.float64), 0.4 * (1 / rank[:999]) / (1 / rank[:999]).sum()))
    return {"Zipf's law, 1000 patches": (1 / rank) / (1 / rank).sum(), "one patch of 60 %, 999 after Zipf": sure}


def point(law_X: Tensor, temperature: float, size: int, work: int, generator: torch.Generator) -> tuple[float, float]:
    """Distance and noise of a pool of `size` draws."""
    target_X = law_X ** (1 / temperature)
    target_X = target_X / target_X.sum()
    pools = max(2, min(MOST_POOLS, work // size))
    half_2X = torch.zeros(2, len(law_X), dtype=torch.float64)
    chunk = max(1, (1 << 20) // size)
    done = [0, 0]
    for start in range(0, pools, chunk):
        rows = min(chunk, pools - start)
        draws_BN = torch.multinomial(law_X, rows * size, replacement=True, generator=generator).view(rows, size)
        chosen_BN = pool_probabilities(draws_BN[..., None], temperature)
        for side in (0, 1):
            half_2X[side].scatter_add_(0, draws_BN[side::2].flatten(), chosen_BN[side::2].flatten())
            done[side] += len(draws_BN[side::2])
    mean_X = half_2X.sum(0) / sum(done)
    first_X, second_X = (half_2X[side] / max(1, done[side]) for side in (0, 1))
    return float((mean_X - target_X).abs().sum() / 2), float((first_X - second_X).abs().sum() / 4)


def measure(sizes: Sequence[int], work: int, seed: int) -> dict[str, Any]:
    """All points, as plain values."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for name, law_X in laws().items():
        for temperature in TEMPERATURES:
            for size in sizes:
                distance, noise = point(law_X, temperature, size, work, generator)
                rows.append(
                    {"law": name, "temperature": temperature, "candidates": size, "distance": distance, "noise": noise}
                )
                print(f"{name}, T = {temperature:.3g}, N = {size}: total variation {distance:.4f} (noise {noise:.4f})")
    return {"seed": seed, "points": rows}


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per law, a line per temperature."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "nextvec"
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    names = list(dict.fromkeys(row["law"] for row in rows))
    panels = figure.subplots(1, len(names), sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for marker, temperature in zip("osD^vP", TEMPERATURES, strict=True):
            mine = [row for row in rows if (row["law"], row["temperature"]) == (name, temperature)]
            axes.plot(
                [row["candidates"] for row in mine],
                [row["distance"] for row in mine],
                marker=marker,
                markersize=3.5,
                linewidth=1,
                label=f"T = {temperature:.3g}",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("N, draws in a pool", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("total variation distance from $P^{1/T}$", fontsize=8)
    panels[0].legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="distance of the batch temperature sampler from P^(1/T)")
    parser.add_argument("--svg", type=Path, help="write the figure here")
    parser.add_argument("--json", type=Path, help="write all points here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrunk", action="store_true", help="a few points, to see that it runs")
    chosen = parser.parse_args(arguments)
    begin = time.perf_counter()
    found = measure((4, 64), 1 << 15, chosen.seed) if chosen.shrunk else measure(SIZES, WORK, chosen.seed)
    if chosen.svg:
        draw_figure(found["points"], chosen.svg)
    if chosen.json:
        write_json(chosen.json, found)
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
