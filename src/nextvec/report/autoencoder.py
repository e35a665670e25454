"""The section on the patch autoencoder: its training curves, its latent dimensions, and what it reads back under noise."""

from __future__ import annotations

from nextvec.report.curves import Axis
from nextvec.report.figures import Series, bars, plot, thin
from nextvec.report.inputs import Inputs, Metrics, Reconstruction
from nextvec.report.markup import absent, figure, legend, pair, paragraph, table
from nextvec.report.words import share

PLACES = {"mean": "mean", "draw": "posterior draw", "doubled": "draw, noise doubled"}
CURVES = (  # metric, label, drawn on a log scale, shown as percent of tokens
    ("cross_entropy", "cross-entropy (nats per token)", True),
    ("accuracy", "tokens restored (%)", False),
    ("kl", "KL (nats per patch)", False),
    ("sigma", "sigma (latent units)", False),
)


def autoencoder_section(inputs: Inputs) -> str:
    """Reconstruction first, then the latent, then how it was learnt."""
    record = inputs.details.reconstruction
    if record is None:
        measured = absent("Reconstruction was not measured: the demo stopped before it evaluated the autoencoder.")
    else:
        measured = reconstruction(record) + dimensions(record)
    return measured + training(inputs.metrics["autoencoder"])


def reconstruction(record: Reconstruction) -> str:
    """Tokens and whole patches restored, at the mean, at a draw, and under growing noise."""
    steps = sorted((_noise(name), at) for name, at in record.accuracy.items() if name not in ("draw", "doubled"))
    x = [noise for noise, _ in steps]
    token, patch = [100 * at.token for _, at in steps], [100 * at.patch for _, at in steps]
    token_error = [100 * (at.token_stderr or 0.0) for _, at in steps]
    patch_error = [100 * (at.patch_stderr or 0.0) for _, at in steps]
    series = [
        Series("tokens", x, token, "latent", token_error, "joined"),
        Series("whole patches", x, patch, "patch", patch_error, "joined"),
    ]
    picture = plot(
        "noise", series, "noise added to the mean (latent units)", "restored (%)", line_at=(record.sigma, "sigma")
    )
    rows = [
        [_place(name), share(at.token, at.token_stderr), share(at.patch, at.patch_stderr)]
        for name, at in record.accuracy.items()
    ]
    numbers = table(
        "Restored from the latent in %, ± one standard error clustered by document",
        ["latent", "tokens", "whole patches"],
        rows,
    )
    caption = (
        f"{record.patches:,} patches of {record.documents:,} held-out documents. The dashed line is sigma, the "
        "posterior's own noise."
    )
    key = legend([("latent", "tokens"), ("patch", "whole patches")])
    return f"<h3>Reconstruction under noise</h3>{pair(f'<div>{key}{figure(picture, caption)}</div>', numbers)}"


def dimensions(record: Reconstruction) -> str:
    """KL and sigma of each latent dimension, most informative first."""
    order = sorted(range(len(record.kl_per_dimension)), key=lambda i: -record.kl_per_dimension[i])
    kl = [record.kl_per_dimension[i] for i in order]
    sigma = [record.sigma_per_dimension[i] for i in order]
    label = "latent dimension, most informative first"
    pictures = []
    for name, what, unit, values in (("kl", "KL", "nats", kl), ("sigma", "sigma", "latent units", sigma)):
        least, most = min(values), max(values)
        caption = f"Least {least:.2g}, most {most:.2g} {unit}."
        alt = f"{what} of each of {len(values)} latent dimensions. {caption}"
        pictures.append(figure(bars(f"dimensions-{name}", values, label, f"{what} ({unit})", alt), caption))
    note = (
        f"{record.kl:.1f} nats per patch in all, mean sigma {record.sigma:.3f}; {record.collapsed_dimensions} of {len(kl)} "
        "dimensions collapsed (KL below 0.01 nats)."
    )
    return "<h3>Latent dimensions</h3>" + paragraph(note, "note") + pair(*pictures)


def training(metrics: Metrics) -> str:
    """Loss terms, accuracy and noise level over the tokens read."""
    axis = Axis("tokens", [metrics])
    pictures = []
    for key, label, log_y in CURVES:
        scale = 100.0 if key == "accuracy" else 1.0
        series = []
        for kind, name in (("train", "training"), ("eval", "held out")):
            x, y = axis.points(metrics, kind, key)
            if kind == "train":
                x, y = thin(x, y)
            if x:
                series.append(
                    Series(
                        name, x, [scale * value for value in y], "latent", kind="line" if kind == "train" else "marks"
                    )
                )
        if series:
            settle = 0.0 if log_y else 0.02
            pictures.append(figure(plot(f"autoencoder-{key}", series, axis.label, label, log_y=log_y, settle=settle)))
    if not pictures:
        return absent("No curve for the autoencoder: this run logged nothing; it may have stopped early.")
    note = (
        "Line: training, where input tokens and latent values are dropped at random on purpose, so it stays below what the "
        "finished autoencoder does. Marks: held-out windows without that."
    )
    return "<h3>Training of the autoencoder</h3>" + pair(*pictures) + paragraph(note, "note")


def _place(name: str) -> str:
    return PLACES[name] if name in PLACES else f"mean + {_noise(name):g} eps"


def _noise(name: str) -> float:
    return 0.0 if name == "mean" else float(name.removeprefix("noise-"))
