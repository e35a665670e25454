"""The sections on learning: Brier and loss curves of CALM and the baseline, over tokens and over seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nextvec.report.figures import Series, plot, thin
from nextvec.report.inputs import Inputs, Metrics, number
from nextvec.report.markup import absent, figure, fold, legend, pair, paragraph, table
from nextvec.report.words import TIMES_100, count, duration, minus, plus_minus

MODELS = (("calm", "CALM"), ("baseline", "token Transformer"))
SETTLE = 0.02  # the first fraction of a loss curve that may leave the frame


class Axis:
    """What runs along the bottom: training tokens in millions or training time in seconds or minutes."""

    def __init__(self, key: str, metrics: Sequence[Metrics]) -> None:
        rows = [row for m in metrics for row in (*m.train, *m.eval)]
        top = max((number(row.get(key)) or 0.0 for row in rows), default=0.0)
        self.key = key
        if key == "tokens":
            scale, unit = (1e6, "millions") if top >= 1e6 else (1e3, "thousands") if top >= 1e3 else (1.0, "")
            self.label = f"training tokens ({unit})" if unit else "training tokens"
        else:
            scale, unit = (60.0, "minutes") if top >= 300 else (1.0, "seconds")
            self.label = f"training time ({unit})"
        self.scale = scale

    def points(self, metrics: Metrics, kind: str, y: str, order: int | None = None) -> tuple[list[float], list[float]]:
        xs, ys = metrics.curve(kind, self.key, y, order)
        return [x / self.scale for x in xs], ys


def brier_curves(runs: Mapping[str, Metrics]) -> str:
    """BrierLM and the four orders as they grew, over tokens and over seconds; of one model or both, by the names in MODELS."""
    models = _models(runs)
    scored = [bool(runs[name].curve("eval", "tokens", "brier", 0)[0]) for name, _ in models]
    if not any(scored):
        return absent(
            "No curve: neither run was scored during training. A run that stops before its first evaluation has none."
        )
    lines = [_missing(label, "scored during training") for (_, label), ok in zip(models, scored, strict=True) if not ok]
    key = legend([(name, label) for (name, label), ok in zip(models, scored, strict=True) if ok])
    caption = (
        "Held-out files; bars are one standard error, clustered by document. "
        "First over the tokens read, then over the time spent training."
    )
    first = "".join(_brier_row(runs, order) for order in (0, 1))
    rest = "".join(_brier_row(runs, order) for order in (2, 3))
    more = fold("Brier-3 and Brier-4", key + rest) + fold("The figures behind the curves", _brier_table(runs))
    return "\n".join([*lines, key, paragraph(caption, "note"), _brier_lm_row(runs), first, more])


LOSSES = {  # of the heads of latents, by the metric's name: what a picture calls it, its unit, what it is
    "energy": ("energy loss", "latent units", "an energy score (a distance between its draws and the true latent)"),
    "flow": (
        "flow-matching loss",
        "square latent units",
        "the square error of what its head predicts on the way from noise to the true latent",
    ),
    "diffusion": ("diffusion loss", "square units of noise", "the square error of the noise in a noisy true latent"),
    "cross_entropy": (
        "cross-entropy of patches",
        "nats per token",
        "the cross-entropy of the next patch's tokens, each given what its head sees of that patch",
    ),
}


def loss_curves(inputs: Inputs) -> str:
    """What each model minimises, over tokens and over seconds, and what tells that CALM uses its state."""
    calm, baseline = inputs.metrics["calm"], inputs.metrics["baseline"]
    key = next((name for name in LOSSES if calm.curve("train", "tokens", name)[0]), "energy")
    name, unit, meaning = LOSSES[key]
    compared = (
        "With the mixture head the two compare, both being nats per token given all text before it; with another they do not."
        if key == "cross_entropy"
        else "The two have different units and cannot be compared with each other."
    )
    parts = [
        paragraph(
            f"CALM minimises {meaning}, lower is better, and the token Transformer the cross-entropy of one token after the "
            f"other. {compared}"
        )
    ]
    if not calm.train:
        parts.append(_missing("CALM", "logged"))
    own = loss_pair(f"{key}-loss", f"{name} ({unit})", [("calm", "CALM", calm, key)])
    if own:
        parts += [f"<h3>{name.capitalize()} of CALM</h3>", legend([("calm", "training; marks: held out")]), own]
    if not baseline.train:
        parts.append(_missing("the token Transformer", "logged"))
    drawn = [
        ("baseline", "token Transformer", baseline, "cross_entropy"),
        ("auxiliary", "CALM, auxiliary", calm, "auxiliary"),
    ]
    looks = [("baseline", "token Transformer; marks: held out")]
    has_auxiliary = bool(calm.curve("train", "tokens", "auxiliary")[0])
    if has_auxiliary:
        looks.append(("auxiliary", f"CALM's auxiliary, the next {inputs.summary.K} tokens at once"))
    entropy = loss_pair("cross-entropy", "cross-entropy (nats per token)", drawn)
    if entropy:
        note = (
            "The auxiliary predicts all tokens of the next patch from one state, a harder task than one token at a time; "
            "it serves in training only."
        )
        parts += ["<h3>Cross-entropy</h3>", legend(looks), entropy, paragraph(note, "note") if has_auxiliary else ""]
    parts.append(inside(calm))
    return "\n".join(parts)


def _brier_lm_row(runs: Mapping[str, Metrics]) -> str:
    axes = _axes(runs)
    series = {axis.key: _marks(runs, axis, "brier_lm", "brier_lm_stderr", None) for axis in axes}
    gaps = [
        f"{len(rows) - len(defined)} of {len(rows)} for {label}"
        for name, label in _models(runs)
        if (rows := runs[name].curve("eval", "step", "brier", 0)[0])
        and len(defined := runs[name].curve("eval", "step", "brier_lm")[0]) < len(rows)
    ]
    note = f"Not defined, so not drawn, at {' and '.join(gaps)}: an order was not positive there." if gaps else ""
    if not any(series["tokens"]) and not any(series["seconds"]):
        return absent(
            "BrierLM was never defined during training: at every evaluation one of the four orders was not positive."
        )
    pictures = [
        figure(plot(f"brier-lm-{axis.key}", series[axis.key], axis.label, "BrierLM (higher is better)", zero=True))
        for axis in axes
    ]
    return "<h3>BrierLM</h3>" + pair(*pictures) + (paragraph(note, "note") if note else "")


def _brier_row(runs: Mapping[str, Metrics], order: int) -> str:
    name = f"Brier-{order + 1}"
    pictures = []
    for axis in _axes(runs):
        series = _marks(runs, axis, "brier", "brier_stderr", order)
        pictures.append(
            figure(plot(f"brier-{order + 1}-{axis.key}", series, axis.label, f"{name} {TIMES_100}", zero=True))
        )
    return f"<h3>{name}</h3>" + pair(*pictures)


def _marks(runs: Mapping[str, Metrics], axis: Axis, key: str, error_key: str, order: int | None) -> list[Series]:
    found = []
    scale = 1.0 if order is None else 100.0
    for name, label in _models(runs):
        x, y = axis.points(runs[name], "eval", key, order)
        if not x:
            continue
        _, e = axis.points(runs[name], "eval", error_key, order)
        errors = [scale * value for value in e] if len(e) == len(y) else None
        found.append(Series(label, x, [scale * value for value in y], name, errors, "joined"))
    return found


def _brier_table(runs: Mapping[str, Metrics]) -> str:
    rows = []
    for name, label in _models(runs):
        for row in runs[name].eval:
            if number(row.get("brier"), 0) is None:
                continue
            values = [
                plus_minus(
                    None if (v := number(row.get("brier"), i)) is None else 100 * v,
                    _hundred(row.get("brier_stderr"), i),
                )
                for i in range(4)
            ]
            total = number(row.get("brier_lm"))
            seen, spent = count(number(row.get("tokens"))), duration(number(row.get("seconds")))
            rows.append([label, seen, spent, *values, "not defined" if total is None else plus_minus(total, None)])
    head = ["model", "tokens", "training time", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "BrierLM"]
    return table(f"Evaluations during training; orders {TIMES_100}, ± one standard error", head, rows)


def loss_pair(name: str, label: str, lines: Sequence[tuple[str, str, Metrics, str]]) -> str:
    """A term over tokens and over seconds, training as a line and held out as marks; lines of (look, text, metrics, key)."""
    pictures = []
    used = [metrics for _, _, metrics, key in lines if metrics.curve("train", "tokens", key)[0]]
    for axis in (Axis("tokens", used), Axis("seconds", used)):
        series = []
        for look, text, metrics, key in lines:
            x, y = axis.points(metrics, "train", key)
            if x:
                series.append(Series(f"{text}, training", *thin(x, y), look))
            x, y = axis.points(metrics, "eval", key)
            if x:
                series.append(Series(f"{text}, held out", x, y, look, kind="marks"))
        if series:
            pictures.append(figure(plot(f"{name}-{axis.key}", series, axis.label, label, settle=SETTLE)))
    return pair(*pictures) if pictures else ""


def inside(calm: Metrics) -> str:
    """The two terms of the energy loss, and the conditioning gap."""
    axis = Axis("tokens", [calm])
    pictures = []
    series = [
        Series(text, *thin(x, y), look)
        for look, text, key in (("calm", "fidelity", "fidelity"), ("auxiliary", "diversity", "diversity"))
        if (xy := axis.points(calm, "train", key))[0]
        for x, y in [xy]
    ]
    if series:
        key = legend(
            [
                ("calm", "fidelity: distance to the true latent, twice"),
                ("auxiliary", "diversity: distance between draws"),
            ],
            mark=False,
        )
        picture = figure(plot("terms", series, axis.label, "terms of the energy loss (latent units)", settle=SETTLE))
        pictures.append(f"<div>{key}{picture}</div>")
    x, y = axis.points(calm, "eval", "conditioning_gap")
    if x:
        picture = plot(
            "gap", [Series("conditioning gap", x, y, "calm", kind="joined")], axis.label, "conditioning gap", zero=True
        )
        caption = (
            f"Loss with shuffled states minus loss; last {minus(f'{y[-1]:.3g}')}. "
            "Zero would mean that the head ignores the text."
        )
        pictures.append(figure(picture, caption))
    return "<h3>Inside CALM's loss</h3>" + pair(*pictures) if pictures else ""


def _models(runs: Mapping[str, Metrics]) -> list[tuple[str, str]]:
    return [(name, label) for name, label in MODELS if name in runs]


def _axes(runs: Mapping[str, Metrics]) -> tuple[Axis, Axis]:
    found = [runs[name] for name, _ in _models(runs)]
    return Axis("tokens", found), Axis("seconds", found)


def _hundred(values: object, order: int) -> float | None:
    value = number(values, order)
    return None if value is None else 100 * value


def _missing(label: str, what: str) -> str:
    return absent(f"No curve for {label}: this run was not {what}; it may have stopped early.")
