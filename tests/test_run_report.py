"""`nextvec report RUN`: the page of one training run, before its first row, while it trains and afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextvec.config import BackboneConfig, CalmConfig, CalmRun, DataSettings, RunConfig, TokenLMRun, dump_yaml
from nextvec.presets import preset
from nextvec.report.run import render
from nextvec.watch.status import Reader
from test_report import INJECTION, Page
from test_train_loop import config, run
from test_watch import command

TERMS: dict[str, list[str]] = {
    "autoencoder": ["loss", "cross_entropy", "accuracy", "kl", "sigma", "collapsed"],
    "calm": ["loss", "energy", "fidelity", "diversity", "auxiliary"],
    "token_lm": ["loss", "cross_entropy", "accuracy"],
}


def settings(kind: str) -> RunConfig:
    data = DataSettings(path=INJECTION.replace("\x00", "").replace("\ud800", "").replace("\x1b", ""))
    if kind == "autoencoder":
        return config(steps=100).override(data=data)
    backbone = BackboneConfig(layers=1, width=16, inner=16, heads=2)
    if kind == "calm":
        return CalmRun(model=CalmConfig(autoencoder=preset("autoencoder-tiny"), backbone=backbone), data=data)  # type: ignore[arg-type]
    return TokenLMRun(model=preset("transformer-tiny"), data=data)  # type: ignore[arg-type]


def started(out: Path, kind: str, count: int = 0) -> Path:
    """A run with `count` rows and an evaluation after each fifth."""
    out.mkdir()
    (out / "config.yaml").write_text(dump_yaml(settings(kind)))
    rows: list[dict[str, Any]] = []
    for n in range(1, count + 1):
        common = {"step": 10 * n, "tokens": 4096 * n, "seconds": 2.0 * n, **dict.fromkeys(TERMS[kind], 3.0 / n)}
        more = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 2048.0, "share": None, "memory_bytes": 2**28}
        rows.append({"kind": "train", "progress": n / 20, **common, **more})
        if n > 10:
            rows[-1].pop("auxiliary", None)  # as where recipe.auxiliary_until ends it
        if n % 5 == 0:
            scores = {"brier": [0.1, 0.05, 0.02, 0.01], "brier_lm": 3.0, "conditioning_gap": 0.5}
            rows.append({"kind": "eval", **common, **(scores if kind == "calm" else {})})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def page_of(out: Path) -> tuple[str, Page, str]:
    text = render(Reader(out).look())
    page = Page(text)
    return text, page, " ".join("".join(page.text).split())


@pytest.mark.parametrize("kind", TERMS)
def test_a_run_in_the_middle_of_training(kind: str, tmp_path: Path) -> None:
    text, page, words = page_of(started(tmp_path / "run", kind, 15))
    assert "75.0 %" in words
    assert "about 10 s of training to go" in words
    assert "is not being trained; go on with --resume" in words
    assert "no anomalies" in words
    labels = [attrs["aria-label"] or "" for attrs in page.all("svg") if attrs.get("role") == "img"]
    drawn = {
        "autoencoder": ["cross-entropy", "KL", "sigma", "collapsed"],
        "calm": ["energy", "terms of the energy loss"],
    }
    drawn["calm"] += ["conditioning gap", "auxiliary", "BrierLM", "Brier-1"]
    drawn["token_lm"] = ["cross entropy", "accuracy"]
    for what in (*drawn[kind], "gradient norm", "tokens/s", "learning rate", "memory (GiB)"):
        assert any(label.startswith(what) for label in labels), (what, labels)
    assert "Held-out windows" in words
    assert text.count("<tr>") > 5
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_anomalies_stand_first(tmp_path: Path) -> None:
    out = started(tmp_path / "run", "calm", 15)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows[14] |= {"grad_norm": 50.0, "skipped": 3}
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page, words = page_of(out)
    assert "3 steps were skipped" in words
    assert "the gradient's norm was 50" in words
    assert next(attrs for attrs in page.all("section"))["aria-labelledby"] == "anomalies"


def test_before_the_first_row(tmp_path: Path) -> None:
    _, _, words = page_of(started(tmp_path / "run", "calm"))
    assert "No curve yet: the run has not logged a step." in words
    assert "Settings" in words


def test_the_command_writes_the_page_and_prints_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(out, config(steps=6, log_every=2))
    capsys.readouterr()
    assert command(monkeypatch, "report", str(out)) == 0
    told = capsys.readouterr()
    assert "is finished" in " ".join(told.out.split())
    assert told.err == f"page: {out / 'report.html'}\n"
    Page((out / "report.html").read_text(encoding="utf-8"))
    assert command(monkeypatch, "report", str(out), "--out", str(tmp_path / "other.html")) == 0
    assert (tmp_path / "other.html").is_file()
    assert command(monkeypatch, "report", str(out), str(tmp_path)) == 2
    assert "is a training run: a report is of one run, or of sweeps" in capsys.readouterr().err
    assert command(monkeypatch, "report", str(tmp_path / "nothing")) == 2
    assert (
        "nothing does not exist: give a run directory, or a folder that `nextvec sweep` wrote"
        in capsys.readouterr().err
    )
    (tmp_path / "empty").mkdir()
    assert command(monkeypatch, "report", str(tmp_path / "empty")) == 2
    assert "empty is neither a run directory (it has no config.yaml) nor a folder of" in capsys.readouterr().err
