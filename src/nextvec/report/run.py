"""The page of one training run, finished or not: where it stands, its anomalies, curves, and settings."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from nextvec.files import atomic_open
from nextvec.report import autoencoder
from nextvec.report.curves import SETTLE, Axis, brier_curves, inside, loss_pair
from nextvec.report.figures import Series, plot, thin
from nextvec.report.inputs import Metrics, number
from nextvec.report.markup import absent, document, facts, figure, pair, paragraph, table, tiles
from nextvec.report.words import count, duration, minus, speed
from nextvec.train.progress import is_term
from nextvec.watch.screen import NAMES, SCALES, anomalies, checkpoint, headline, shown
from nextvec.watch.status import Status

TITLE = "nextvec training report"
LOOKS = {"autoencoder": "latent", "calm": "calm", "token_lm": "baseline"}
UNITS = {
    "cross_entropy": "nats per token",
    "auxiliary": "nats per token",
    "kl": "nats per patch",
    "sigma": "latent units",
}
UNITS |= dict.fromkeys(("energy", "fidelity", "diversity"), "latent units")
TOGETHER = ("fidelity", "diversity", "conditioning_gap")  # drawn by `inside`


def write_page(status: Status, path: Path) -> None:
    """One self-contained page of what the run holds now; no script, no request."""
    with atomic_open(path) as handle:
        handle.write(render(status))


def render(status: Status) -> str:
    """The page as text."""
    kind = "calm" if status.config is None else status.config.kind
    metrics = Metrics(status.train, status.eval)
    if not status.train:
        sections = [("curves", "Curves", absent("No curve yet: the run has not logged a step."))]
    else:
        sections = [("anomalies", "Anomalies", _anomalies(status)), ("terms", "Loss", _terms(metrics, kind))]
        if kind != "autoencoder" and metrics.curve("eval", "tokens", "brier", 0)[0]:
            runs = {"calm" if kind == "calm" else "baseline": metrics}
            sections.append(("quality", "Quality over training", brier_curves(runs)))
        if status.eval:
            sections.append(("held-out", "Held out", _evaluations(metrics)))
        sections.append(("course", "Steps", _course(metrics, kind)))
    if status.config is not None:
        settings = status.config.model_dump(mode="json")
        sections.append(("settings", "Settings", facts("As in config.yaml", settings)))
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return document(TITLE, f"{headline(status)}. Read at {now}.", _opening(status), sections)


def _opening(status: Status) -> str:
    if not status.train:
        return ""
    last, done = status.last, status.progress
    eta = "" if status.eta is None or done == 1.0 else f"about {duration(status.eta)} of training to go"
    loss = number(last.get("loss"))
    return tiles(
        [
            ("Done", "unknown" if done is None else f"{100 * done:.1f} %", [f"step {last['step']:,}", eta]),
            ("Loss", "not finite" if loss is None else minus(f"{loss:.4g}"), [f"{count(last.get('tokens'))} tokens"]),
            ("Tokens/s", speed(number(last.get("tokens_per_s"))), [f"{duration(last.get('seconds'))} of training"]),
            ("Anomalies", str(len(status.anomalies)), (checkpoint(status) or "").split("; ")),
        ]
    )


def _anomalies(status: Status) -> str:
    return "".join(paragraph(line) for line in anomalies(status))


def _terms(metrics: Metrics, kind: str) -> str:
    """Every term over the tokens read and over the seconds spent; those of the energy loss together."""
    if kind == "autoencoder":
        names, parts = ["collapsed"], [autoencoder.training(metrics)]
    else:
        apart = {*TOGETHER, "grad_norm", "skipped"}
        if "loss" not in shown(metrics.train[-1:]):  # a term stands for it
            apart.add("loss")
        every = dict.fromkeys(
            name for row in metrics.train for name in row
        )  # an auxiliary loss may end before training
        names, parts = [name for name in every if is_term(name) and name not in apart], []
    for name in names:
        label = f"{name.replace('_', ' ')} ({UNITS[name]})" if name in UNITS else name.replace("_", " ")
        drawn = loss_pair(f"term-{name}", label, [(LOOKS[kind], name, metrics, name)])
        parts += [f"<h3>{label}</h3>", drawn] if drawn else []
    note = "Line: training, means between log lines. Marks: held-out windows."
    return paragraph(note, "note") + "".join(parts) + (inside(metrics) if kind == "calm" else "")


def _evaluations(metrics: Metrics) -> str:
    names = list(dict.fromkeys(name for row in metrics.eval for name in row if is_term(name)))
    names = [name for name in names if any(number(row.get(name)) is not None for row in metrics.eval)]
    rows = [
        [f"{row['step']:,}", count(number(row.get("tokens"))), duration(number(row.get("seconds")))]
        + ["" if (value := number(row.get(name))) is None else minus(f"{value:.4g}") for name in names]
        for row in metrics.eval
    ]
    head = ["step", "tokens", "training time", *(name.replace("_", " ") for name in names)]
    return table("Held-out windows, the same ones each time", head, rows)


def _course(metrics: Metrics, kind: str) -> str:
    """What the steps themselves were like."""
    axis = Axis("tokens", [metrics])
    pictures = []
    for name in ("grad_norm", "tokens_per_s", "lr", "memory_bytes"):
        x, y = axis.points(metrics, "train", name)
        if x:
            line = Series(NAMES[name], *thin(x, [value / SCALES.get(name, 1.0) for value in y]), LOOKS[kind])
            label, rising = NAMES[name], name == "lr"
            drawn = plot(f"course-{name}", [line], axis.label, label, zero=not rising, settle=0.0 if rising else SETTLE)
            pictures.append(figure(drawn))
    return pair(*pictures)
