"""Small pieces of HTML: tables, figures, legends, lists of facts. Text arguments are escaped here, `html` ones are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from nextvec.report.figures import swatch
from nextvec.report.words import minus, safe

LABELS = {  # keys of the protocol and machine records whose plain form would puzzle a reader
    "tokenizer_hash": "Tokenizer (sha256)",
    "documents_hash": "Documents (sha256)",
    "context_tokens": "Context length (tokens)",
    "stride": "Tokens between scored positions",
    "draws": "Draws per position",
    "decode": "Decode rule",
    "gpus": "GPU",
    "cpu_features": "Processor features",
    "memory_bytes": "Memory (GiB)",
    "memory_rate": "Memory rate (GB/s)",
    "matmul_rate": "Matrix products (GFLOP/s)",
}
SCALES = {"memory_bytes": 2.0**30, "memory_rate": 1e9, "matmul_rate": 1e9}


def document(title: str, lede: str, opening: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page that stands alone: no script, no request. Sections of (anchor, title, html), in order."""
    here = files("nextvec.report")
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        title=safe(title),
        style=(here / "style.css").read_text(encoding="utf-8"),
        lede=safe(lede),
        opening=opening,
        contents="".join(f'<li><a href="#{anchor}">{safe(name)}</a></li>' for anchor, name, _ in sections),
        main="\n".join(section(anchor, name, html) for anchor, name, html in sections),
    )


def tiles(items: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """The figures that matter most, large: (name, value, lines below)."""
    grid = "".join(
        f'<div><dt>{safe(name)}</dt><dd class="big">{safe(value)}</dd>'
        + "".join(f'<dd class="small">{safe(line)}</dd>' for line in lines if line)
        + "</div>"
        for name, value, lines in items
    )
    return f'<dl class="tiles">{grid}</dl>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A data table: the first cell of each row is its header; scrolls sideways inside its own box when too wide."""
    columns = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{safe(first)}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{safe(caption)}"><table><caption>{safe(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def facts(caption: str, data: Mapping[str, Any]) -> str:
    """A two-column table of names and values; nested records are flattened."""
    rows = "".join(f'<tr><th scope="row">{safe(name)}</th><td>{safe(value)}</td></tr>\n' for name, value in _flat(data))
    return f'<div class="scroll"><table class="facts"><caption>{safe(caption)}</caption><tbody>{rows}</tbody></table></div>'


def figure(svg: str, caption: str = "") -> str:
    """A picture with its caption."""
    words = f"<figcaption>{safe(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{words}</figure>"


def pair(*figures: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'


def legend(items: Iterable[tuple[str, str]], line: bool = True, mark: bool = True) -> str:
    """Samples of the looks used in the pictures below; items of (look, text)."""
    entries = "".join(f"<li>{swatch(look, line, mark)}{safe(text)}</li>" for look, text in items)
    return f'<ul class="legend">{entries}</ul>'


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{safe(text)}</p>' if kind else f"<p>{safe(text)}</p>"


def absent(text: str) -> str:
    """In place of a figure: why there is none."""
    return paragraph(text, "absent")


def section(anchor: str, title: str, *html: str) -> str:
    inside = "\n".join(part for part in html if part)
    return f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{safe(title)}</h2>\n{inside}\n</section>'


def fold(summary: str, html: str) -> str:
    """Details a reader may open."""
    return f"<details><summary>{safe(summary)}</summary>{html}</details>"


def _flat(data: Mapping[str, Any], prefix: str = "", scale: float = 1.0) -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        name = LABELS.get(key, key.replace("_", " "))
        name = f"{prefix}, {name}" if prefix else name[:1].upper() + name[1:]
        if isinstance(value, Mapping):
            yield from _flat(value, name, SCALES.get(key, scale))
        else:
            yield name, _plain(value, SCALES.get(key, scale))


def _plain(value: Any, scale: float = 1.0) -> str:
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and scale != 1.0:
        return f"{value / scale:,.1f}"
    if isinstance(value, int):
        return minus(f"{value:,}")
    if isinstance(value, float):
        return minus(f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}")
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
