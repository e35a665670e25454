"""The report page: the opening, the sections in order, and the one file they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nextvec.files import atomic_open
from nextvec.report import autoencoder, curves, words
from nextvec.report.cost import cost_section
from nextvec.report.figures import orders
from nextvec.report.inputs import Inputs, ModelSummary, Sample, read_inputs
from nextvec.report.markup import absent, document, facts, figure, legend, pair, paragraph, table, tiles
from nextvec.report.words import safe

TITLE = "nextvec demo report"


def build_report(root: Path) -> Path:
    """Write ROOT/report.html from the files named in `nextvec.report.inputs` and return its path. The file stands alone:
    no script, no request. Raises DataError in one sentence when an input is missing or damaged."""
    root = Path(root)
    path = root / "report.html"
    page = render(read_inputs(root))
    with atomic_open(path) as handle:
        handle.write(page)
    return path


def render(inputs: Inputs) -> str:
    """The page as text."""
    summary, details = inputs.summary, inputs.details
    sections = [
        ("quality", "Quality over training", curves.brier_curves(inputs.metrics)),
        ("loss", "Loss", curves.loss_curves(inputs)),
        ("autoencoder", "Autoencoder", autoencoder.autoencoder_section(inputs)),
        ("cost", "Cost", cost_section(inputs)),
        ("samples", "Samples", samples(details.samples, summary.K)),
        ("protocol", "Protocol and machine", stamp(inputs)),
    ]
    return document(TITLE, words.lede(inputs), opening(inputs), sections)


def opening(inputs: Inputs) -> str:
    """The first screen below the sentence: four figures, then the held-out scores of both models."""
    s = inputs.summary
    calm, baseline, latent = s.calm, s.baseline, s.autoencoder
    sigma = words.MISSING if latent.sigma is None else f"{latent.sigma:.2f}"
    collapsed = words.MISSING if latent.collapsed_dims is None else f"{latent.collapsed_dims} of {s.L}"
    fast, slow = calm.generate_tokens_per_s, baseline.generate_tokens_per_s
    half = f"T = 0.5: {words.speed(fast.t05)} against {words.speed(slow.t05)}"
    trained, training = _against(calm.train_tokens_per_s, baseline.train_tokens_per_s)
    written, writing = _against(fast.t1, slow.t1)
    first = tiles(
        [
            ("BrierLM, held out", words.brier_lm(calm), [f"token Transformer {words.brier_lm(baseline)}"]),
            (
                "Tokens the autoencoder restores",
                words.percent(latent.token_accuracy),
                [f"sigma {sigma}", f"collapsed dimensions: {collapsed}"],
            ),
            ("Training, tokens/s", trained, [training]),
            ("Generation at T = 1, tokens/s", written, [writing, half]),
        ]
    )
    return f"{first}\n{scores(calm, baseline, s.scored_tokens_per_file)}"


def scores(calm: ModelSummary, baseline: ModelSummary, per_file: int | None) -> str:
    """Brier-1 to Brier-4 and BrierLM of both models, as a picture and as a table."""
    models = [("calm", "CALM", calm), ("baseline", "token Transformer", baseline)]
    rows = [[f"Brier-{order + 1}", *(words.brier(model, order) for _, _, model in models)] for order in range(4)]
    rows.append(["BrierLM", *(words.brier_lm(model) for _, _, model in models)])
    where = "" if per_file is None else f" on the first {per_file:,} tokens of each file"
    caption = (
        f"Held-out scores{where} (Brier orders {words.TIMES_100}), ± one standard error clustered by document; "
        "higher is better"
    )
    numbers = table(caption, ["", "CALM", "token Transformer"], rows)
    notes = [words.above_zero(calm)] + [words.why_undefined(label, model) for _, label, model in models]
    beside = numbers + "".join(paragraph(note, "note") for note in notes if note)
    drawn = [
        (
            look,
            label,
            [100 * v for v in model.brier],
            [100 * e for e in model.brier_stderr] if model.brier_stderr else None,
        )
        for look, label, model in models
        if model.brier is not None
    ]
    if not drawn:
        return absent("Neither model has been scored on held-out files.")
    alt = "Held-out scores times 100. " + " ".join(
        f"{label}: {', '.join(f'Brier-{i + 1} {v:.2f}' for i, v in enumerate(values))}."
        for _, label, values, _ in drawn
    )
    picture = figure(
        orders("orders", [(look, v, e) for look, _, v, e in drawn], alt), "Bars: two standard errors either way."
    )
    key = legend([(look, label) for look, label, _, _ in drawn], line=False)
    return f'<div class="pair"><div>{key}{picture}</div><div>{beside}</div></div>'


def samples(items: Sequence[Sample], patch_size: int) -> str:
    """Generated text in monospace; one box switches the patch boundaries on and off, without a script."""
    if not items:
        return absent("No samples: the demo stopped before it generated text.")
    shown = "".join(_sample(item) for item in items)
    note = (
        f"A patch of CALM is {patch_size} tokens written in one step; a patch of the token Transformer is one token. "
        "The prompt is grey."
    )
    switch = (
        '<input class="switch" type="checkbox" id="boundaries" checked>'
        '<label for="boundaries">Show patch boundaries</label>'
    )
    return f"{paragraph(note)}{switch}\n{shown}"


def stamp(inputs: Inputs) -> str:
    """What makes the figures comparable: settings, protocol, machine."""
    s, details = inputs.summary, inputs.details
    settings = {
        "Tokens per patch (K)": s.K,
        "Latent dimensions (L)": s.L,
        "Vocabulary (V)": s.V,
        "Recipe": s.recipe,
        "Decode rule": s.decode_rule,
        "Candidates below T = 1 (N)": "none: each token is drawn at the temperature" if s.N is None else s.N,
        "Seed": s.seed,
        "Tokens scored of each held-out file": s.scored_tokens_per_file,
        "CALM training tokens": s.calm.train_tokens,
        "Token Transformer training tokens": s.baseline.train_tokens,
        "Whole demo": words.duration(s.seconds),
    }
    protocol = (
        facts("Evaluation protocol", details.protocol) if details.protocol else absent("No protocol was recorded.")
    )
    machine = facts("Machine", details.machine) if details.machine else absent("No machine was recorded.")
    intro = paragraph("Two scores can be compared only where everything in the evaluation protocol is equal.")
    return intro + pair(f"<div>{facts('Settings', settings)}{machine}</div>", protocol)


def _against(calm: float | None, baseline: float | None) -> tuple[str, str]:
    ratio = f", CALM {calm / baseline:.2g} times that" if calm is not None and baseline else ""
    return words.speed(calm), f"token Transformer {words.speed(baseline)}{ratio}"


def _sample(item: Sample) -> str:
    title = f"{item.model}, T = {item.temperature:g}"
    if item.frequency_penalty:
        title += f", frequency penalty {item.frequency_penalty:g}"
    patches = "".join(f'<span class="patch">{_text(text)}</span>' for text in item.patches)
    prompt = f'<span class="prompt">{_text(item.prompt)}</span>' if item.prompt else ""
    return f"<article>\n<h3>{safe(title)}</h3>\n<pre>{prompt}{patches}</pre>\n</article>\n"


def _text(text: str) -> str:
    """Escaped text whose line breaks carry a mark that shows with the boundaries: a patch may be nothing but one."""
    return safe(text.replace("\r\n", "\n")).replace("\n", '<span class="break"></span>\n')
