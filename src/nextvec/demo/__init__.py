"""`nextvec demo`: from the Python standard library to a trained, scored, talking CALM and its baseline, in minutes.

    corpus -> tokenizer -> shards -> autoencoder -> CALM -> baseline of equal backbone -> scores, samples, report

settings.py: what is trained and for how long. stages.py: corpus and training. results.py: figures and samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nextvec.demo.settings import Demo

__all__ = ["Demo", "run_demo"]


def run_demo(demo: Demo, say: Callable[[str], None] = print) -> Path:
    """Run every stage that is not finished yet; returns the report's path.

    Leaves data/, autoencoder/, calm/ and baseline/ (run directories), summary.json, details.json and report.html under
    `demo.out`. Raises ConfigError when that folder holds something else, KeyboardInterrupt after an interrupted stage
    has saved itself.
    """
    from nextvec.demo import results, stages
    from nextvec.report.page import build_report

    began = time.monotonic()
    stages.open_folder(demo, say)
    say(f"nextvec demo: {demo.minutes:g} minutes, everything under {demo.out}")
    corpus = stages.corpus(demo, say)
    models = stages.train_all(demo, corpus, began, say)
    say("Scoring both models on held-out files, and letting them write")
    found = results.measure(demo, corpus, models)
    results.write(demo, corpus, models, found, time.monotonic() - began)
    report = build_report(demo.out)
    say(results.closing(demo, found, report, time.monotonic() - began))
    return report
