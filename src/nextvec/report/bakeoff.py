"""The report of a bake-off: verdict, arms, learning curves and generation, as a page and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextvec.bakeoff.curve import points
from nextvec.bakeoff.run import Outcome
from nextvec.bakeoff.settings import ARMS
from nextvec.bakeoff.speed import ONE, TOGETHER
from nextvec.bakeoff.verdict import MILLION, UNITS, WAYS, sentences
from nextvec.evaluate.collision import BATCH, CENTRE, TOKENS
from nextvec.files import atomic_open
from nextvec.report.figures import ROWS, Series, plot
from nextvec.report.markup import absent, document, figure, fold, legend, pair, paragraph
from nextvec.report.sweep import Table, provenance, record_of
from nextvec.report.words import TIMES_100, count, duration, plus_minus, safe
from nextvec.sweep.tables import TableRow, mean, measured, score

TITLE = "nextvec bake-off"
LOOKS = dict(zip(ARMS, ROWS, strict=False))
COUNTED = (
    "A budget is turned into steps by rates measured on this machine before training; the autoencoder's steps are part of CALM's "
    "budget, and the multi-token Transformer has none. Bits per byte of CALM are an upper bound of the softly decoded model "
    "(docs/bound.md): above another model's exact value it ranks nothing."
)
WRITTEN = (
    "One text at a time. Accuracy is the chance to draw the true text after a held-out context, collision the chance to draw "
    "the same twice. The token Transformers generate at one speed at every temperature, and so does a CALM whose head draws "
    "token by token. Operations are counted as `nextvec flops` does."
)
METHODS = {BATCH: "batch sampler", CENTRE: "centre of n", TOKENS: "token by token"}
TREND = (
    "Held-out figures on the way, over seconds of training with the autoencoder's, at rates that have not decayed yet; the last "
    "point is the finished model. The break-even extrapolates straight lines over the logarithm of the seconds."
)


def write_page(outcome: Outcome, path: Path) -> None:
    """One self-contained page: no script, no request."""
    sections = [
        ("arms", "Arms", _arms(outcome).html() + paragraph(COUNTED, "note")),
        ("curves", "Learning curves", _curves(outcome)),
        ("generation", "Generation", _generation(outcome).html() + paragraph(WRITTEN, "note") + _collisions(outcome)),
        (
            "settings",
            "Settings, machine and command",
            paragraph(provenance(outcome.sweep)) + fold("All of it", record_of(outcome.sweep)),
        ),
    ]
    opening = "".join(f'<p class="note">{safe(line)}</p>' for line in verdict(outcome)[1:])
    with atomic_open(path) as handle:
        handle.write(document(TITLE, verdict(outcome)[0], opening, sections))


def markdown(outcome: Outcome) -> str:
    """Verdict and tables."""
    parts = ["## Verdict", *verdict(outcome)]
    parts += ["## Arms", _arms(outcome).markdown(), COUNTED]
    parts += ["## Generation", _generation(outcome).markdown(), WRITTEN, provenance(outcome.sweep)]
    return "\n\n".join(parts)


def verdict(outcome: Outcome) -> list[str]:
    """In plain words, of CALM against each rival."""
    if not outcome.duels:
        return ["No comparison: CALM and a rival of it are needed for one."]
    lines = [line for duel in outcome.duels for line in sentences(duel, outcome.asked.minutes)]
    plan = outcome.planned["calm"]
    parts = (
        f"Of CALM's {outcome.asked.seconds:,.0f} s its autoencoder has {plan.autoencoder_seconds:,.0f} s "
        f"({plan.autoencoder_steps:,} steps) and the model {plan.seconds:,.0f} s ({plan.steps:,} steps); "
        "a rival has all of them for itself."
    )
    return [*lines, parts]


def _arms(outcome: Outcome) -> Table:
    head = [
        "arm",
        "layers",
        "steps",
        "tokens",
        "model, s",
        "autoencoder, s",
        "measured, s (CPU s)",
        "BrierLM",
        f"Brier-1 {TIMES_100}",
    ]
    body = []
    for row in outcome.sweep.rows:
        plan = outcome.planned[row.name]
        spent = [measured(row, lambda result, key=key: _spent(result, key)).value for key in ("seconds", "cpu_seconds")]  # type: ignore[misc]
        body.append(
            [
                row.name,
                str(outcome.asked.layers[row.name]),
                f"{plan.steps:,}",
                count(plan.steps * plan.tokens_per_step),
                f"{plan.seconds:.0f}",
                f"{plan.autoencoder_seconds:.0f}" if plan.autoencoder_steps else "none",
                "not measured" if spent[0] is None else f"{spent[0]:.0f} ({spent[1] or 0:.0f})",
                _score(row, "BrierLM"),
                _score(row, "Brier-1"),
                _bits(outcome.figures[row.name]),
            ]
        )
    return Table(f"After {outcome.asked.minutes:g} minutes of training each", [*head, "bits per byte"], body)


def _spent(result: Mapping[str, Any], key: str) -> float | None:
    """Of model and autoencoder."""
    if result[key] is None:
        return None
    encoder = result["autoencoder"]
    return float(result[key]) + (float(encoder.get(key) or 0.0) if encoder is not None else 0.0)


def _score(row: TableRow, name: str) -> str:
    found = score(row, name)
    if found.value is None:
        return "failed" if row.failed else "not defined"
    return plus_minus(found.value, found.error)


def _bits(figures: Any) -> str:
    """Exact, or the bound at its largest S; mean over seeds, or of one with its error over documents."""
    found = [each["likelihood"] for each in figures]
    if not found:
        return "not measured"
    if found[0]["bound"] is None:
        values = [each["exact"]["bits_per_byte"] for each in found]
        error, words = found[0]["exact"]["stderr"], ""
    else:
        values = [each["bound"]["bits_per_byte"][-1] for each in found]
        errors = found[0]["bound"]["stderr"]
        error, words = None if errors is None else errors[-1], f"at most (S = {found[0]['bound']['draws'][-1]}) "
    middle = mean(values)
    assert middle.value is not None
    error = error if len(values) == 1 else middle.error
    return words + f"{middle.value:.3f}" + (f" ± {error:.3f}" if error else "")


def _generation(outcome: Outcome) -> Table:
    together = any("together" in found for ways in outcome.speeds.values() for found in ways.values())
    head = [
        "arm",
        "drawn by",
        "tokens/s (of 5 repeats)",
        *([f"of {TOGETHER} texts at once"] if together else []),
        *(f"{what}: accuracy at collision" for what in UNITS.values()),
    ]
    body = []
    for arm, ways in outcome.speeds.items():
        for way, found in ways.items():
            rate = found["tokens_per_s"]
            at_once = [_rate(found["together"]) if "together" in found else ""] if together else []
            point = _point(outcome.figures[arm][0]["collision"], way) if outcome.figures[arm] else None
            body.append(
                [
                    arm,
                    way,
                    _rate(found),
                    *at_once,
                    *("" if point is None else _at(point, unit) for unit in UNITS),
                    duration(MILLION / rate),
                    f"{MILLION * found['operations']:.3g}",
                ]
            )
    return Table("Generation", [*head, "time of a million tokens", "operations of a million tokens"], body)


def _rate(found: Mapping[str, Any]) -> str:
    return f"{found['tokens_per_s']:,.0f} ({found['low']:,.0f} to {found['high']:,.0f})"


def _point(found: list[dict[str, Any]], way: str) -> dict[str, Any] | None:
    """The point of accuracy and collision that a sampler has."""
    methods = (WAYS[way], (TOKENS, 1.0)) if way == ONE else (WAYS[way],)
    return next((point for point in found if (point["method"], point["strength"]) in methods), None)


def _at(point: Mapping[str, Any], unit: str) -> str:
    error = point[f"{unit}_accuracy_stderr"]
    accuracy = plus_minus(100 * point[f"{unit}_accuracy"], None if error is None else 100 * error)
    return f"{accuracy} % at {100 * point[f'{unit}_collision']:.1f} %"


def _curves(outcome: Outcome) -> str:
    drawn = []
    for name, label in (("BrierLM", "BrierLM"), ("Brier-1", f"Brier-1 {TIMES_100}")):
        series = []
        for arm, curve in outcome.curves.items():
            known = [(x, y) for x, y in zip(*points(curve, name), strict=True) if y is not None]
            if known:
                xs, ys = [x / 60 for x, _ in known], [y for _, y in known]
                series.append(Series(arm, xs, ys, LOOKS[arm], kind="joined"))
        if series:
            drawn.append(figure(plot(f"curve-{name}", series, "minutes of training", label, zero=True)))
    if not drawn:
        return absent("No curve: no arm was scored during training.")
    return legend([(LOOKS[arm], arm) for arm in outcome.curves]) + pair(*drawn) + paragraph(TREND, "note")


def _collisions(outcome: Outcome) -> str:
    """Accuracy over collision, in per cent, of the first seed's models."""
    drawn, items = [], dict[str, str]()
    for unit, what in UNITS.items():
        series = []
        for arm, figures in outcome.figures.items():
            of_arm = figures[0]["collision"] if figures else []
            found = [method for method in METHODS if any(point["method"] == method for point in of_arm)]
            for method in found:
                line = [point for point in of_arm if point["method"] == method]
                line.sort(key=lambda point: float(point[f"{unit}_collision"]))
                look = LOOKS[arm] if method == found[0] else ROWS[len(LOOKS) + list(METHODS).index(method)]
                items[look] = arm if len(found) == 1 else f"{arm}, {METHODS[method]}"
                xs, ys = ([100 * point[f"{unit}_{key}"] for point in line] for key in ("collision", "accuracy"))
                errors = [100 * (point[f"{unit}_accuracy_stderr"] or 0.0) for point in line]
                series.append(Series(items[look], xs, ys, look, errors, "joined"))
        if series:
            drawn.append(figure(plot(f"collision-{unit}", series, "collision (%)", f"accuracy (%), {what}", zero=True)))
    return legend(items.items()) + pair(*drawn) if drawn else ""
