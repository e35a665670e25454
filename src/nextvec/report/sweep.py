"""The report of sweeps: one table and picture per stage, a race to a loss where asked for, as a page and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvec.files import atomic_open
from nextvec.report.figures import ROWS, Series, dots, plot
from nextvec.report.markup import absent, document, facts, figure, fold, legend, pair, paragraph, table
from nextvec.report.words import MISSING, TIMES_100, count, duration, minus, plus_minus, safe
from nextvec.sweep.tables import (
    NAMES,
    Figure,
    Sweep,
    TableRow,
    difference,
    encoder,
    held_out,
    loss_key,
    losses_compare,
    measured,
    orderings,
    races,
    score,
    target,
)

TITLE = "nextvec sweep report"
STAGES = {"autoencoder": "Autoencoders", "lm": "CALMs", "baseline": "Token Transformers"}
LOSS_NAMES = {
    "autoencoder": "held-out cross-entropy (nats per token)",
    "lm": "held-out loss of the head",
    "baseline": "held-out cross-entropy (nats per token)",
}
Cell = Callable[[TableRow], str]


@dataclass(frozen=True)
class Table:
    """A table as text, for a page and for Markdown alike."""

    caption: str
    head: list[str]
    rows: list[list[str]]

    def html(self) -> str:
        return table(self.caption, self.head, self.rows)

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_page(sweeps: Sequence[Sweep], path: Path) -> None:
    """One self-contained page: no script, no request."""
    named = [
        (f"sweep-{number}", sweep.spec["name"], _section(sweep, f"s{number}")) for number, sweep in enumerate(sweeps)
    ]
    with atomic_open(path) as handle:
        handle.write(document(TITLE, _lede(sweeps), "", named))


def markdown(sweep: Sweep) -> str:
    """The tables of one sweep, with what they stand on."""
    parts = [f"## {sweep.spec['name']}", sweep.spec["about"]]
    for stage in sweep.stages():
        rows = sweep.of(stage)
        parts += [f"### {STAGES[stage]}"] if len(sweep.stages()) > 1 else []
        if not any(row.results for row in rows):
            parts.append("No row is finished yet.")
            continue
        parts += [_main_table(sweep, stage).markdown(), _stands_on(sweep, stage), *_failures(rows)]
        race = _race_table(sweep, stage)
        parts += [race.markdown(), race.caption + "."] if race is not None else []
    parts += [_against_paper(sweep), provenance(sweep)]
    return "\n\n".join(part for part in parts if part)


def _section(sweep: Sweep, name: str) -> str:
    html = [paragraph(sweep.spec["about"])] if sweep.spec["about"] else []
    for stage in sweep.stages():
        rows = sweep.of(stage)
        html += [f"<h3>{safe(STAGES[stage])}</h3>"]
        if not any(row.results for row in rows):
            html.append(absent("No row is finished yet."))
            continue
        html += [_main_table(sweep, stage).html(), paragraph(_stands_on(sweep, stage), "note")]
        html += [paragraph(line, "note") for line in _failures(rows)]
        html.append(_pictures(sweep, stage, f"{name}-{stage}"))
        race = _race_table(sweep, stage)
        html += [race.html()] if race is not None else []
    html += [paragraph(text) for text in (_against_paper(sweep),) if text]
    html.append(fold("Settings, machine and command", record_of(sweep)))
    return "\n".join(html)


def _main_table(sweep: Sweep, stage: str) -> Table:
    rows = sweep.of(stage)
    first, paper = rows[0], sweep.spec["paper"]
    several = len({encoder(row) for row in rows} - {""}) > 1
    columns: list[tuple[str, Cell]] = []
    if stage != "autoencoder":
        columns += [
            ("BrierLM", lambda row: _shown(row, score(row, "BrierLM"))),
            ("minus first", lambda row: "" if row is first else _gap(difference(first, row, "BrierLM"))),
        ]
        columns += [("paper", lambda row: f"{paper[row.name]:.2f}" if row.name in paper else "")] if paper else []
        columns += [
            (f"Brier-1 {TIMES_100}", lambda row: _shown(row, score(row, "Brier-1"))),
            ("minus first", lambda row: "" if row is first else _gap(difference(first, row, "Brier-1"))),
            ("Brier-2, 3, 4", lambda row: "  ".join(_shown(row, _bare(score(row, name))) for name in NAMES[1:4])),
        ]
    if losses_compare(rows):
        columns.append((LOSS_NAMES[stage], lambda row: _shown(row, measured(row, held_out), 4)))
    if stage == "autoencoder" or several:
        columns += [
            ("tokens right, draw (%)", _of_autoencoder(lambda a: 100 * a["accuracy"]["draw"]["token"])),
            ("noise doubled (%)", _of_autoencoder(lambda a: 100 * a["accuracy"]["doubled"]["token"])),
            ("sigma", _of_autoencoder(lambda a: a["sigma"])),
            ("KL (nats)", _of_autoencoder(lambda a: a["kl"])),
            ("collapsed", _of_autoencoder(lambda a: a["collapsed_dimensions"])),
        ]
    columns += [
        ("tokens", lambda row: count(measured(row, lambda result: result["tokens"]).value)),
        ("CPU s", lambda row: _seconds(measured(row, lambda result: result["cpu_seconds"]))),
    ]
    done = [row for row in rows if row.results]
    body = [[row.name, *(cell(row) for _, cell in columns)] for row in done]
    return Table(f"{sweep.spec['name']}: {STAGES[stage]}", ["row", *(head for head, _ in columns)], body)


def _bare(found: Figure) -> Figure:
    return Figure(found.value)


def _of_autoencoder(get: Callable[[dict[str, Any]], float]) -> Cell:
    def cell(row: TableRow) -> str:
        found = measured(row, lambda result: None if result["autoencoder"] is None else get(result["autoencoder"]))
        return _shown(row, found)

    return cell


def _shown(row: TableRow, found: Figure, digits: int = 2) -> str:
    if found.value is None:
        return "failed" if row.failed else "not defined" if row.results else MISSING
    return _number(found, digits)


def _number(found: Figure, digits: int = 2) -> str:
    assert found.value is not None
    return plus_minus(found.value, found.error) if found.error else minus(f"{found.value:.{digits}f}")


def _gap(found: Figure) -> str:
    if found.value is None:
        return "not defined"
    sign = "+" if found.value > 0 else ""
    return f"{sign}{_number(found)}"


def _seconds(found: Figure) -> str:
    """Whole seconds from ten on."""
    if found.value is None:
        return MISSING
    digits = 0 if found.value >= 10 else 1
    return f"{found.value:,.{digits}f}" + (f" ± {found.error:.{digits}f}" if found.error else "")


def _stands_on(sweep: Sweep, stage: str) -> str:
    """What the errors in a table are over, and what is missing."""
    rows = [row for row in sweep.of(stage) if row.results]
    numbers = {len(row.results) for row in rows}
    seeds = sorted({seed for row in rows for seed in row.results})
    listed = ", ".join(map(str, seeds))
    if numbers == {1}:
        text = f"One seed ({listed}): "
        text += (
            "no error can be given for another seed."
            if stage == "autoencoder"
            else "errors are over held-out documents (of differences: paired bootstrap) and say nothing about another seed."
        )
    else:
        text = f"Seeds {listed}: ± one standard error of the mean over seeds; differences are paired by seed."
        if numbers == {2}:
            text += " With two seeds the error itself is known to a factor of two at best."
        if len(numbers) > 1:
            text += " Rows with one seed so far have errors over held-out documents."
    missing = sum(len(sweep.spec["seeds"]) - len(row.results) for row in sweep.of(stage))
    return text + (f" {missing} rows times seeds are not finished yet." if missing else "")


def _failures(rows: Sequence[TableRow]) -> list[str]:
    return [f"{row.name} failed: {sentence}." for row in rows for sentence in row.failed[:1]]


def _against_paper(sweep: Sweep) -> str:
    """Which of the paper's orderings hold here."""
    found = orderings(sweep)
    if not found:
        return ""
    by = {
        verdict: [item for item in found if item.verdict == verdict] for verdict in ("holds", "reversed", "tie", "open")
    }
    text = f"Pairs of rows that the paper orders: {len(found)}. Of these {len(by['holds'])} hold here, "
    text += f"{len(by['reversed'])} reversed, {len(by['tie'])} tied (within one standard error of the difference)"
    text += f", {len(by['open'])} open (no error, or not defined)." if by["open"] else "."
    for verdict in ("holds", "reversed"):
        if by[verdict]:
            listed = "; ".join(
                f"{item.better} over {item.worse} ({_gap(item.gap)}{'' if item.figure == 'BrierLM' else f' in {item.figure}'})"
                for item in by[verdict]
            )
            text += f" {verdict.capitalize()}: {listed}."
    return text


def _race_table(sweep: Sweep, stage: str) -> Table | None:
    aim = target(sweep, stage)
    if aim is None:
        return None
    row, losses = aim
    base = next(race for race in races(sweep, stage) if race.row == row.name)
    body = []
    for race in races(sweep, stage):
        cells = [race.row, _number(race.final, 4) if race.final.value is not None else "failed"]
        if race.steps.value is None:
            cells += [
                f"not reached ({race.reached} of {race.seeds} seeds)" if race.seeds > 1 else "not reached",
                "",
                "",
                "",
            ]
        else:
            assert race.cpu_seconds.value is not None
            cells += [_seconds(race.steps), _ratio(race.steps, base.steps)]
            cells += [_seconds(race.cpu_seconds), _ratio(race.cpu_seconds, base.cpu_seconds)]
        body.append(cells)
    shown = ", ".join(f"{loss:.4f}" for loss in losses.values())
    caption = (
        f"Steps and CPU seconds until the {LOSS_NAMES[stage]} first is at the final one of {row.name} ({shown}"
        f"{' by seed' if len(losses) > 1 else ''}), on straight lines between evaluations"
    )
    head = ["row", "final loss", "steps", "of the target's", "CPU s", "of the target's"]
    return Table(caption, head, body)


def _ratio(found: Figure, base: Figure) -> str:
    return f"{found.value / base.value:.2f}" if found.value is not None and base.value else ""


def _pictures(sweep: Sweep, stage: str, name: str) -> str:
    """BrierLM (or Brier-1) by row; below, under their legend, the held-out loss over steps and CPU seconds side by side."""
    html, panels = "", []
    if stage != "autoencoder":
        for what in ("BrierLM", "Brier-1"):
            drawn = [(row.name, found) for row in sweep.of(stage) if (found := score(row, what)).value is not None]
            if len(drawn) > 1:
                label = what if what == "BrierLM" else f"{what} {TIMES_100}"
                alt = f"{label} by row: " + ", ".join(f"{label} {_number(found)}" for label, found in drawn)
                values = [found.value for _, found in drawn if found.value is not None]
                errors = [found.error for _, found in drawn]
                html = pair(figure(dots(f"{name}-{what}", [label for label, _ in drawn], values, errors, label, alt)))
                break
    curves = [row for row in sweep.of(stage) if any(len(result["held_out"]) > 2 for result in row.results.values())]
    looks = dict(zip([row.name for row in curves[: len(ROWS)]], ROWS, strict=False))
    if curves and losses_compare(curves):
        key = loss_key(next(iter(curves[0].results.values())))
        for axis, label in (("step", "optimiser steps"), ("cpu_seconds", "CPU seconds of training")):
            series = []
            for row in curves[: len(ROWS)]:
                points = [point for point in next(iter(row.results.values()))["held_out"] if point.get(key) is not None]
                series.append(
                    Series(row.name, [p[axis] for p in points], [p[key] for p in points], looks[row.name], kind="line")
                )
            panels.append(figure(plot(f"{name}-{axis}", series, label, LOSS_NAMES[stage], settle=0.1)))
        html += legend([(looks[row.name], row.name) for row in curves[: len(ROWS)]], mark=False) + pair(*panels)
    return html


def _results(sweep: Sweep) -> list[Any]:
    return [result for row in sweep.rows for result in row.results.values()]


def provenance(sweep: Sweep) -> str:
    """Machine, version, text and command in a paragraph."""
    found = _results(sweep)
    if not found:
        return ""
    result, machines = found[-1], {item["machine"]["processor"] for item in found}
    precisions = sorted({item["machine"]["precision"] for item in found if "precision" in item["machine"]})
    machine = result["machine"]
    lines = [
        f"Text: {', '.join(sweep.spec['data']['source']) or 'prepared shards'}. Machine: {', '.join(sorted(machines))}, "
        f"{machine['cores']} cores, {machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}, "
        f"{''.join(f'{each}, ' for each in precisions)}torch {machine['torch']}, nextvec {result['nextvec']}; "
        f"{duration(sum(item['seconds'] or 0 for item in found))} of training in all rows "
        f"({duration(sum(item['cpu_seconds'] or 0 for item in found))} of processor time)."
    ]
    brier = next((item["brier"] for item in found if item["brier"] is not None), None)
    if brier is not None:
        p = brier["protocol"]
        lines.append(
            f"Scores: {p['name']}, every {p['stride']} tokens, {p['draws']} draws, decoding {p['decode']}, "
            f"{brier['documents']} documents, {brier['positions'][0]:,} positions."
        )
    return " ".join(lines) + f" Command: `{result['command']}`."


def record_of(sweep: Sweep) -> str:
    """Spec, protocol, machine and command as tables."""
    found = _results(sweep)
    spec = facts("Spec", {key: value for key, value in sweep.spec.items() if value not in (None, {}, [], "")})
    if not found:
        return spec
    brier = next((item["brier"] for item in found if item["brier"] is not None), None)
    stamp = facts("Evaluation protocol", brier["protocol"]) if brier is not None else ""
    command = facts("Run by", {"command": found[-1]["command"], "nextvec": found[-1]["nextvec"]})
    return spec + stamp + facts("Machine of the last row", found[-1]["machine"]) + command


def _lede(sweeps: Sequence[Sweep]) -> str:
    rows = sum(len(row.results) for sweep in sweeps for row in sweep.rows)
    missing = sum(sweep.missing for sweep in sweeps)
    names = ", ".join(str(sweep.spec["name"]) for sweep in sweeps)
    return f"{names}: {rows} finished rows" + (f", {missing} still to run." if missing else ".")
