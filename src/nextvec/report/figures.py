"""Panels drawn by matplotlib (its SVG canvas, no pyplot) as inline SVG whose colours are CSS variables.

One panel is one small picture, about as wide as a phone, so that its text stays readable when it fills the screen;
the page sets them side by side where there is room. Colours are placeholders while matplotlib draws and become
var(--name) in the markup, so one picture serves the light and the dark theme. Lines also differ in dash and
marker, never in colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nextvec.report.words import TIMES_100, safe

WIDTH, HEIGHT = 4.6, 2.9  # inches at 72 units: 331 x 209 user units
POINTS = 150  # a training curve is drawn as the means of at most this many stretches of the run
# placeholder while drawing -> CSS variable in the page
COLOURS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--calm",
    "#050505": "--baseline",
    "#060606": "--latent",
    "#070707": "--accent",
    "#080808": "--page",
}
_NAME = {variable.removeprefix("--"): colour for colour, variable in COLOURS.items()}


@dataclass(frozen=True)
class Look:
    """How one model's line looks, in the plot and in the legend."""

    colour: str  # a CSS variable's name without the dashes
    dash: str  # matplotlib line style
    marker: str


LOOKS = {
    "calm": Look("calm", "-", "o"),
    "baseline": Look("baseline", (0, (5, 2)), "s"),  # type: ignore[arg-type]
    "auxiliary": Look("calm", (0, (1.5, 1.2)), "^"),  # type: ignore[arg-type]
    "latent": Look("latent", "-", "o"),
    "patch": Look("accent", (0, (5, 2)), "s"),  # type: ignore[arg-type]
}
ROWS = [f"row-{number}" for number in range(12)]  # looks of many lines in one picture, in order
LOOKS |= {
    name: Look(("calm", "baseline", "latent", "accent")[number % 4], dash, marker)  # type: ignore[arg-type]
    for number, name in enumerate(ROWS)
    for dash, marker in [(("-", "o"), ((0, (5, 2)), "s"), ((0, (1.5, 1.2)), "^"))[number // 4]]
}


@dataclass(frozen=True)
class Series:
    """A curve drawn with the look named `look`: a plain line, marks joined by it, or marks alone; marks carry error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    look: str
    error: Sequence[float] | None = None  # one standard error of each y
    kind: Literal["line", "joined", "marks"] = "line"


def thin(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Means over at most `points` equal stretches of the rows: a long training log as a readable line."""
    if len(x) <= points:
        return list(x), list(y)
    edges = np.linspace(0, len(x), points + 1).astype(int)
    counts = np.diff(edges)
    means = [np.add.reduceat(np.asarray(values, float), edges[:-1]) / counts for values in (x, y)]
    return means[0].tolist(), means[1].tolist()


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults whatever the user's settings, text kept as text, and the same file for the same input."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "nextvec"
        yield


@_style()
def plot(
    name: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    zero: bool = False,
    line_at: tuple[float, str] | None = None,
    settle: float = 0.0,
) -> str:
    """Curves as SVG, x from 0 on. `zero` marks y = 0; `line_at` is a labelled vertical line; `settle` is the first
    fraction of each line that may leave the frame, so that the steep start does not flatten the rest."""
    figure, axes = _new()
    for item in series:
        look = LOOKS[item.look]
        colour = _NAME[look.colour]
        if item.kind != "line":
            axes.errorbar(
                item.x,
                item.y,
                yerr=item.error,
                color=colour,
                linestyle=look.dash if item.kind == "joined" else "",
                linewidth=1.3,
                marker=look.marker,
                markersize=4.2,
                capsize=2.2,
                elinewidth=1.1,
            )
        else:
            axes.plot(
                item.x, item.y, color=colour, linestyle=look.dash, linewidth=1.5, marker="", solid_capstyle="round"
            )
            if len(item.x) == 1:
                axes.plot(item.x, item.y, color=colour, linestyle="", marker=look.marker, markersize=4.2)
    if log_y and any(y > 0 for item in series for y in item.y):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    if zero:
        _zero(axes, [low for item in series for low in _lows(item.y, item.error)])
    if line_at is not None:
        axes.axvline(line_at[0], color=_NAME["ink"], linewidth=1.0, linestyle=(0, (3, 2)))
        axes.annotate(
            line_at[1],
            (line_at[0], 0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=11,
            color=_NAME["ink"],
        )
    if settle > 0:
        _settle(axes, series, settle)
    right = max((x for item in series for x in item.x), default=0.0)
    if right > 0:
        axes.set_xlim(-0.015 * right, 1.03 * right)
    return _finish(name, figure, axes, x_label, y_label, _alt(series, x_label, y_label), few_y=not log_y)


@_style()
def bars(name: str, values: Sequence[float], x_label: str, y_label: str, alt: str) -> str:
    """One bar per latent dimension as SVG."""
    figure, axes = _new()
    axes.bar(range(1, len(values) + 1), values, width=0.8, color=_NAME["latent"], linewidth=0)
    axes.set_xlim(0.2, len(values) + 0.8)
    return _finish(name, figure, axes, x_label, y_label, alt)


@_style()
def orders(name: str, rows: Sequence[tuple[str, Sequence[float], Sequence[float] | None]], alt: str) -> str:
    """Brier-1 to Brier-4 of each model as marks with bars of two standard errors; rows of (look, values, errors)."""
    figure, axes = _new()
    for index, (look_name, values, errors) in enumerate(rows):
        look = LOOKS[look_name]
        shift = 0.16 * (index - (len(rows) - 1) / 2)
        axes.errorbar(
            [i + 1 + shift for i in range(len(values))],
            values,
            yerr=None if errors is None else [2 * e for e in errors],
            color=_NAME[look.colour],
            linestyle="",
            marker=look.marker,
            markersize=5.5,
            capsize=3,
            elinewidth=1.4,
        )
    _zero(axes, [low for _, values, e in rows for low in _lows(values, e and [2 * error for error in e])])
    axes.set_xlim(0.5, 4.5)
    axes.set_xticks([1, 2, 3, 4], [f"Brier-{n}" for n in (1, 2, 3, 4)])
    return _finish(name, figure, axes, "", f"score {TIMES_100}", alt, few_x=False)


@_style()
def dots(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float | None],
    x_label: str,
    alt: str,
) -> str:
    """One mark per row with its standard error, the first row on top and as a dotted line through all."""
    figure, axes = _new(0.9 + 0.27 * len(labels))
    colour = _NAME["calm"]
    places = [-index for index in range(len(labels))]
    bars = [error or 0.0 for error in errors]
    axes.errorbar(values, places, xerr=bars, color=colour, linestyle="", marker="o", markersize=5, capsize=2.5)
    axes.axvline(values[0], color=_NAME["muted"], linewidth=1.0, linestyle=(0, (1.5, 1.5)))
    axes.set_yticks(places, labels)
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    return _finish(name, figure, axes, x_label, "", alt, few_x=False, few_y=False)


def swatch(look_name: str, line: bool = True, mark: bool = True) -> str:
    """A legend's sample of line and marker, drawn by hand to match `LOOKS`."""
    look = LOOKS[look_name]
    dash = "" if isinstance(look.dash, str) else f' stroke-dasharray="{" ".join(f"{1.5 * n:g}" for n in look.dash[1])}"'
    colour = f"var(--{look.colour})"
    shape = {
        "o": f'<circle cx="15" cy="6" r="3.2" fill="{colour}"/>',
        "s": f'<rect x="12" y="3" width="6" height="6" fill="{colour}"/>',
        "^": f'<path d="M15 2.5 18.5 9h-7z" fill="{colour}"/>',
    }[look.marker]
    stroke = f'<path d="M1 6h28" stroke="{colour}" stroke-width="2"{dash}/>' if line else ""
    return f'<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">{stroke}{shape if mark else ""}</svg>'


def _new(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(True, axis="y", color=_NAME["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_NAME["muted"])
    axes.tick_params(colors=_NAME["muted"], labelcolor=_NAME["ink"], labelsize=11, length=3)
    axes.tick_params(axis="y", which="both", length=0)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _finish(
    name: str, figure: Figure, axes: Axes, x_label: str, y_label: str, alt: str, few_x: bool = True, few_y: bool = True
) -> str:
    axes.set_xlabel(x_label, fontsize=11.5, color=_NAME["ink"])
    axes.set_title(y_label, fontsize=11.5, color=_NAME["ink"], loc="left", pad=9)  # above, level: readable on a phone
    if few_x:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if few_y:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    figure.tight_layout(pad=0.4)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name, alt)


def _tick(value: float, _: int) -> str:
    return f"{value:.6g}".replace("-", "\u2212")


def _inline(svg: str, name: str, alt: str) -> str:
    """A standalone SVG file as an element of the page: no prolog, no namespaces, ids of its own, CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)  # a hundredth of a pixel is enough
    svg = re.sub(
        r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{safe(alt)}">', svg, count=1
    )
    svg = re.sub(r"<style[^>]*>\*\{[^}]*\}</style>", "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="(?!p[0-9a-f]{10}|m[0-9a-f]{10})[^"]*"', "", svg)  # keep only clip paths and markers
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)  # the page's own font
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", "\n", svg)


def _lows(values: Sequence[float], errors: Sequence[float] | None) -> list[float]:
    return [v - e for v, e in zip(values, errors or [0.0] * len(values), strict=True)]


def _zero(axes: Axes, lows: Sequence[float]) -> None:
    """A line at 0: the bottom of the frame when nothing, error bars included, reaches below it."""
    if min(lows, default=0.0) <= 0:
        axes.axhline(0, color=_NAME["muted"], linewidth=1.0)
    else:
        axes.set_ylim(bottom=0)


def _settle(axes: Axes, series: Sequence[Series], fraction: float) -> None:
    later = []
    for item in series:
        if item.x:
            start = max(item.x) * fraction
            later += [y for x, y in zip(item.x, item.y, strict=True) if x >= start]
    if later:
        low, high = min(later), max(later)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, low - margin), min(top, high + margin))


def _alt(series: Sequence[Series], x_label: str, y_label: str) -> str:
    parts = [f"{item.label}: from {item.y[0]:.3g} to {item.y[-1]:.3g}" for item in series if len(item.y)]
    return f"{y_label} over {x_label}. {'; '.join(parts)}."
