"""Numbers as a reader wants them: honest digits, units, and one sentence that sums up the run."""

from __future__ import annotations

import html
import math
import re

from nextvec.report.inputs import Inputs, ModelSummary, number

MISSING = "not measured"
TIMES_100 = "\u00d7 100"


def count(value: float | None) -> str:
    """9,100,000 -> 9.1M. Three significant digits from a thousand on.

    >>> count(9_100_000), count(27_140), count(950), count(None)
    ('9.1M', '27.1k', '950', 'not measured')
    """
    if value is None:
        return MISSING
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if value != int(value) else f"{int(value)}"


def speed(value: float | None) -> str:
    """Tokens a second, whole from 100 on.

    >>> speed(27140.2), speed(31.44)
    ('27,140', '31.4')
    """
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as a reader says them.

    >>> duration(52.4), duration(252), duration(3780), duration(None)
    ('52 s', '4 min 12 s', '1 h 3 min', 'not measured')
    """
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.2g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(fraction: float | None) -> str:
    """A fraction in percent, with digits enough that an imperfect figure never reads as 100 %.

    >>> percent(0.9996), percent(0.999996), percent(1.0), percent(0.42)
    ('99.96 %', '99.9996 %', '100 %', '42.0 %')
    """
    if fraction is None:
        return MISSING
    if fraction in (0.0, 1.0):
        return f"{fraction:.0%}".replace("%", " %")
    wrong = 100 * (1 - fraction)
    digits = 1 if wrong >= 10 else 2 if wrong >= 0.01 else min(6, math.ceil(-math.log10(wrong)))
    return f"{100 * fraction:.{digits}f} %"


def minus(text: str) -> str:
    """A typographic minus sign before digits."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def plus_minus(value: float | None, error: float | None) -> str:
    """Value and one standard error, to two digits of the error but no finer than 0.01 where that shows it.

    >>> plus_minus(8.2134, 0.3127), plus_minus(0.0312, 0.0021), plus_minus(2.41, None)
    ('8.21 ± 0.31', '0.0312 ± 0.0021', '2.41')
    """
    if value is None:
        return MISSING
    if error is None or error <= 0:
        return minus(f"{value:.2f}")
    digits = min(2 if error >= 0.01 else 6, max(0, 1 - math.floor(math.log10(error))))
    return minus(f"{value:.{digits}f} ± {error:.{digits}f}")


def share(fraction: float, error: float | None) -> str:
    """A fraction in percent with one standard error, the unit left to the heading.

    >>> share(0.99962, 0.00004), share(1.0, 0.0)
    ('99.962 ± 0.004', '100')
    """
    if not error:
        return percent(fraction).removesuffix(" %")
    digits = 3 if error >= 5e-6 else 6
    return f"{100 * fraction:.{digits}f} ± {100 * error:.{digits}f}"


def brier(model: ModelSummary, order: int) -> str:
    """Brier-(order+1) x 100 with its standard error."""
    if model.brier is None:
        return MISSING
    return plus_minus(100 * model.brier[order], 100 * model.brier_stderr[order] if model.brier_stderr else None)


def brier_lm(model: ModelSummary) -> str:
    """BrierLM with its standard error when there is one, "not defined" when an order is not positive."""
    if model.brier_lm is None:
        return MISSING if model.brier is None else "not defined"
    return plus_minus(model.brier_lm, model.brier_lm_stderr)


def why_undefined(name: str, model: ModelSummary) -> str | None:
    """Why BrierLM is null, in one sentence; None when it is not, or when nothing was scored."""
    if model.brier_lm is not None or model.brier is None:
        return None
    bad = [f"Brier-{i + 1} = {brier(model, i)}" for i, value in enumerate(model.brier) if value <= 0]
    orders = f": {', '.join(bad)} ({TIMES_100})" if bad else ""
    return (
        f"BrierLM of {name} is not defined, because a geometric mean needs four positive orders and "
        f"{'this one is' if len(bad) == 1 else 'these are' if bad else 'one is'} not{orders}."
    )


def lede(inputs: Inputs) -> str:
    """One sentence: what was trained, on how much, and how good it is."""
    s = inputs.summary
    rows = inputs.metrics["calm"].train
    seconds = number(rows[-1].get("seconds")) if rows else None
    spent = "" if seconds is None else f" in {duration(seconds)}".replace(" min", "\u00a0min").replace(" s", "\u00a0s")
    corpus = f" of {inputs.details.corpus}" if inputs.details.corpus else ""
    amount = "" if s.calm.train_tokens is None else f" on {count(s.calm.train_tokens)} tokens{corpus}"
    start = f"A CALM that writes {s.K} tokens per step was trained{amount}{spent}"
    if s.calm.brier is None:
        return f"{start}; it has not been scored."
    scored = [model for model in (s.calm, s.baseline) if model.brier is not None]
    if all(model.brier_lm is not None for model in scored):
        figures = [brier_lm(model) for model in scored]
        end = f"scores BrierLM {figures[0]}"
    else:
        figures = [brier(model, 0) for model in scored]
        whose = "CALM" if s.calm.brier_lm is None else "the token Transformer"
        end = f"scores Brier-1 {figures[0]} ({TIMES_100}; BrierLM of {whose} is not defined yet)"
    rival = ""
    if len(figures) == 2:
        seen = f" after {count(s.baseline.train_tokens)} tokens" if s.baseline.train_tokens is not None else ""
        rival = f", against {figures[1]} of a token Transformer with an equal backbone{seen}"
    return f"{start} and {end} on held-out files{rival}."


def above_zero(model: ModelSummary) -> str | None:
    """Which orders lie at least two standard errors above zero."""
    if model.brier is None or model.brier_stderr is None:
        return None
    sure = [str(i + 1) for i in range(4) if model.brier[i] > 0 and model.brier[i] >= 2 * model.brier_stderr[i]]
    if not sure:
        return "No Brier order of CALM lies two standard errors above zero yet."
    if len(sure) == 4:
        return "All four Brier orders of CALM lie at least two standard errors above zero."
    names = f"Brier-{sure[0]}" if len(sure) == 1 else f"Brier-{', '.join(sure[:-1])} and {sure[-1]}"
    return (
        f"{names} of CALM {'lies' if len(sure) == 1 else 'lie'} at least two standard errors above zero, the rest not."
    )


def safe(text: object) -> str:
    """Any text as HTML text or attribute: escaped, control characters made visible, broken surrogates replaced."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8")
    shown = "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if c == "\x7f" else c for c in plain
    )
    return html.escape(shown, quote=True)
