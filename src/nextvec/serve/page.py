"""The page at `/`: one file with its style and script inside, and a policy that lets it load and call nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template


def page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy: this style and this script by their hash, requests to the server alone."""
    here = files("nextvec.serve")
    html, style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    whole = Template(html).substitute(style=f"\n{style}", script=f"\n{script}")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return whole.encode(), policy


def _hash(text: str) -> str:
    digest = hashlib.sha256(f"\n{text}".encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
