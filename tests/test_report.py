"""The report page from realistic inputs: it parses, stands alone, escapes, and stays readable when figures are missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from nextvec.config import BackboneConfig, TokenLMConfig
from nextvec.errors import UserError
from nextvec.evaluate.cost import token_lm_cost
from nextvec.evaluate.reconstruction import Accuracy, ReconstructionResult
from nextvec.report.figures import Series, orders, plot, thin
from nextvec.report.inputs import Details, read_metrics
from nextvec.report.page import build_report

VOID = {"meta", "link", "input", "br", "path", "use", "rect", "circle", "hr", "img"}
INJECTION = "<script>alert('x')</script>&\"\x00\x1b[0m\ud800</pre>"


class Page(HTMLParser):
    """Collects what a test asks of a page, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def model(brier: list[float], lm: float | None) -> dict[str, Any]:
    return {
        "brier": brier,
        "brier_stderr": [0.0041, 0.0023, 0.0016, 0.0009],
        "brier_lm": lm,
        "train_tokens_per_s": 39320.5,
        "train_tokens": 9_011_200,
        "generate_tokens_per_s": {"t1": 812.3, "t05": 96.1},
    }


def parts(total: float) -> dict[str, float]:
    return {"attention": 0.75 * total, "head": 0.25 * total, "auxiliary": 0.0, "total": total}


def cost(name: str, patch_size: int, split: float) -> dict[str, Any]:
    return {
        "name": name,
        "patch_size": patch_size,
        "context": 128,
        "draws": 8,
        "params": 2_925_536,
        "autoencoder_params": 1_667_008 if patch_size > 1 else 0,
        "parameters": parts(2_925_536.0),
        "inference": parts(5e6),
        "inference_split": parts(5e6 * split),
        "training": parts(2e7),
        "training_split": parts(2e7 * split),
    }


def reconstruction() -> dict[str, Any]:
    shares = {
        "mean": 0.99962,
        "draw": 0.9996,
        "doubled": 0.9968,
        "noise-0.1": 0.9996,
        "noise-0.5": 0.95,
        "noise-1.0": 0.5,
    }
    kl = [0.004 if i == 5 else 1.0 + 0.1 * i for i in range(12)]
    return {
        "accuracy": {
            name: {"token": share, "token_stderr": 0.0001, "patch": share**2, "patch_stderr": 0.0002}
            for name, share in shares.items()
        },
        "sigma": 0.158,
        "kl": sum(kl),
        "collapsed_dimensions": 1,
        "sigma_per_dimension": [math.exp(-k) for k in kl],
        "kl_per_dimension": kl,
        "patches": 41210,
        "patch_size": 2,
        "documents": 96,
        "documents_hash": "ab",
        "tokenizer_hash": "cd",
        "seed": 0,
    }


def rows(kind: str, steps: int) -> list[dict[str, Any]]:
    """A falling training log of `kind` with an evaluation every 50 steps; the first has an order below zero."""
    out = []
    for step in range(1, steps + 1):
        done = step / steps
        base = {"step": step, "tokens": 2048 * step, "seconds": 0.05 * step}
        terms: dict[str, Any] = {"cross_entropy": 3 + 4 * math.exp(-5 * done), "accuracy": done}
        if kind == "calm":
            energy = 12 + 2 * math.exp(-5 * done)
            terms = {"energy": energy, "fidelity": energy + 7, "diversity": 7.0, "auxiliary": 5 - done}
        if kind == "autoencoder":
            terms |= {"kl": 110 * done, "sigma": 1 - 0.8 * done}
        out.append({"kind": "train", **base, "loss": 1.0, "lr": 1e-3, "share": None, **terms})
        if step % 50 == 0:
            held = {**terms, "conditioning_gap": done} if kind == "calm" else terms
            if kind != "autoencoder":
                brier = [0.1 * done, 0.04 * done, 0.02 * done, 0.01 * done if step > 50 else -0.001]
                lm = 100 * math.prod(brier) ** 0.25 if min(brier) > 0 else None
                held = {**held, "brier": brier, "brier_stderr": [0.004, 0.002, 0.001, 0.001], "brier_lm": lm}
            out.append({"kind": "eval", **base, **held})
    return out


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of a finished demo, for tests that only look at it."""
    return build(write_demo(tmp_path_factory.mktemp("demo")))


def write_demo(root: Path) -> Path:
    """A finished demo's files, without the demo."""
    for kind in ("autoencoder", "calm", "baseline"):
        write_rows(root, kind, rows(kind, 200))
    summary = {
        "autoencoder": {"token_accuracy": 0.99962, "sigma": 0.158, "collapsed_dims": 1},
        "calm": model([0.106, 0.040, 0.021, 0.009], 2.99),
        "baseline": model([0.198, 0.085, 0.038, 0.018], 5.82),
        "seconds": 472.0,
        "K": 2,
        "L": 12,
        "V": 2048,
        "recipe": "fast",
        "decode_rule": "argmax",
        "seed": 0,
        "N": 200,
    }
    details = {
        "reconstruction": reconstruction(),
        "cost": {"calm": cost("CALM", 2, 0.9), "baseline": cost("token Transformer", 1, 1.0)},
        "corpus": "the Python standard library",
        "samples": [
            {"model": "CALM", "prompt": "def ", "temperature": 0.5, "patches": ["f(x", "):\n", "    return", " x\n"]},
            {"model": "token Transformer", "prompt": "", "temperature": 1.0, "patches": ["import", " os"]},
        ],
        "protocol": {"name": "documents-256", "context_tokens": 256, "draws": 16, "decode": "argmax"},
        "machine": {"processor": "a processor", "cores": 2, "gpus": [], "matmul_rate": {"bf16": 1.8e12}},
    }
    write(root / "summary.json", summary)
    write(root / "details.json", details)
    return root


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(root: Path, kind: str, values: list[dict[str, Any]]) -> None:
    path = root / kind / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def build(root: Path) -> tuple[str, Page]:
    path = build_report(root)
    assert path == root / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_holds_every_part(finished: tuple[str, Page]) -> None:
    text, page = finished
    words = " ".join("".join(page.text).split())
    assert (
        "A CALM that writes 2 tokens per step was trained on 9.01M tokens of the Python standard library in 10 s and "
        "scores BrierLM 2.99 on held-out files, against 5.82 of a token Transformer with an equal backbone after 9.01M tokens."
    ) in words
    for part in ("10.60 ± 0.41", "All four Brier orders", "99.96 %", "collapsed dimensions: 1 of 12", "7 min 52 s"):
        assert part in words
    for part in ("noise doubled", "1 of 12 dimensions collapsed", "FLOPs", "documents-256", "GFLOP/s", "a processor"):
        assert part in words
    labels = [attrs["aria-label"] or "" for attrs in page.all("svg") if attrs.get("role") == "img"]
    for key in ("training tokens", "training time"):
        for what in ("BrierLM", *(f"Brier-{n}" for n in (1, 2, 3, 4)), "energy loss", "cross-entropy"):
            assert any(label.startswith(what) and key in label for label in labels), (what, key)
    for what in ("KL of each", "sigma of each", "restored", "conditioning gap", "tokens restored"):
        assert any(label.startswith(what) for label in labels), what
    assert len(text) < 1_500_000


@pytest.mark.parametrize(("head", "called"), [("flow", "Flow-matching loss"), ("diffusion", "Diffusion loss")])
def test_the_loss_is_that_of_the_head(demo: Path, head: str, called: str) -> None:
    log = demo / "calm" / "metrics.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()]
    for row in found:
        row[head] = row.pop("energy")
        del row["fidelity"], row["diversity"]
    log.write_text("".join(json.dumps(row) + "\n" for row in found))
    text, _ = build(demo)
    assert f"<h3>{called} of CALM</h3>" in text
    assert "Energy loss" not in text
    assert "an energy score" not in text


def test_file_stands_alone(finished: tuple[str, Page]) -> None:
    text, page = finished
    assert "http" not in text.replace("http-equiv", "")
    assert not page.all("script")
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in text
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style


def test_ids_are_unique_and_referred_to(finished: tuple[str, Page]) -> None:
    text, page = finished
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"] for tag in ("a", "use") for attrs in page.all(tag)}
    assert targets <= {f"#{name}" for name in ids}
    assert all(f"url(#{name})" in text or f"#{name}" in targets or f'"{name}"' in text for name in ids)


def test_both_themes_and_accessibility(finished: tuple[str, Page]) -> None:
    text, page = finished
    assert "color-scheme: light dark" in text
    assert "@media (prefers-color-scheme: dark)" in text
    light, dark = (colours(text, start) for start in (":root {", "@media (prefers-color-scheme: dark)"))
    for theme in (light, dark):
        for ink in ("ink", "muted"):
            for ground in ("page", "card"):
                assert contrast(theme[ink], theme[ground]) >= 4.5
        assert min(contrast(theme["ink"], theme[ground]) for ground in ("odd", "even")) >= 4.5
        assert min(contrast(theme["muted"], theme[ground]) for ground in ("odd", "even")) >= 4.5
        assert contrast(theme["calm"], theme["page"]) >= 4.5  # links
        for line in ("baseline", "latent", "accent"):
            assert contrast(theme[line], theme["page"]) >= 3
    plots = text[text.index("</style>") :]
    assert "#0" not in plots.replace('href="#', "")  # every colour of a plot is a variable of the theme
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in page.all("svg"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert [attrs["lang"] for attrs in page.all("html")] == ["en"]


def test_samples_show_patches_and_escape(demo: Path) -> None:
    sample = {"model": INJECTION, "prompt": INJECTION, "temperature": 0.5, "patches": [INJECTION, "\n", "ok"]}
    edit(demo / "details.json", samples=[sample], corpus=INJECTION, machine={INJECTION: INJECTION})
    text, page = build(demo)
    assert "<script" not in text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 5
    assert [attrs.get("class") for attrs in page.all("span")].count("patch") == 3
    box = page.all("input")
    assert [attrs["id"] for attrs in box] == ["boundaries"]
    assert [attrs["for"] for attrs in page.all("label")] == ["boundaries"]
    assert '<span class="patch"><span class="break"></span>\n</span>' in text


def test_undefined_brier_lm_says_why(demo: Path) -> None:
    edit(demo / "summary.json", calm=model([0.106, 0.040, -0.0012, 0.0], None))
    words = " ".join("".join(build(demo)[1].text).split())
    assert "scores Brier-1 10.60 ± 0.41 (\u00d7 100; BrierLM of CALM is not defined yet)" in words
    assert (
        "BrierLM of CALM is not defined, because a geometric mean needs four positive orders and these are not: "
        "Brier-3 = \u22120.12 ± 0.16, Brier-4 = 0.00 ± 0.09"
    ) in words
    assert "Brier-1 and 2 of CALM lie at least two standard errors above zero, the rest not." in words
    assert "Not defined, so not drawn, at 1 of 4 for CALM and 1 of 4 for token Transformer" in words


def test_reads_what_evaluate_writes() -> None:
    """The records of evaluate, through JSON, are what the report expects."""
    values = reconstruction()
    places = {name: Accuracy(**at) for name, at in values["accuracy"].items()}
    record = ReconstructionResult(**{**values, "accuracy": places})
    count = token_lm_cost(TokenLMConfig(vocab_size=64, backbone=BackboneConfig(layers=1, width=8, inner=16, heads=2)))
    written = json.loads(json.dumps({"reconstruction": record.to_dict(), "cost": {"baseline": count.to_dict()}}))
    read = Details.model_validate(written)
    assert read.reconstruction is not None
    assert read.reconstruction.accuracy["draw"].token == 0.9996
    assert read.cost["baseline"].params == count.params


def test_first_sentence_compares_like_with_like(demo: Path) -> None:
    edit(demo / "summary.json", baseline=model([0.05, 0.01, 0.001, -0.001], None))
    words = " ".join("".join(build(demo)[1].text).split())
    assert "scores Brier-1 10.60 ± 0.41 (\u00d7 100; BrierLM of the token Transformer is not defined yet)" in words
    assert "against 5.00 ± 0.41 of a token Transformer" in words


def test_runs_that_stopped_early_stay_readable(demo: Path) -> None:
    nothing = {"t1": None, "t05": None}
    blank = {**dict.fromkeys(model([0.0] * 4, None)), "generate_tokens_per_s": nothing}
    edit(demo / "summary.json", calm=blank, baseline=blank)
    edit(demo / "summary.json", autoencoder={"token_accuracy": None, "sigma": None, "collapsed_dims": None})
    write(demo / "details.json", {})
    for kind in ("autoencoder", "calm", "baseline"):
        write_rows(demo, kind, [row for row in rows(kind, 1) if kind == "baseline"])
    words = " ".join("".join(build(demo)[1].text).split())
    for part in (
        "it has not been scored.",
        "Neither model has been scored on held-out files.",
        "neither run was scored during training",
        "No curve for CALM: this run was not logged",
        "Reconstruction was not measured",
        "No curve for the autoencoder",
        "No cost table",
        "No samples",
        "No protocol was recorded.",
        "No machine was recorded.",
    ):
        assert part in words


def test_one_run_without_evaluations(demo: Path) -> None:
    write_rows(demo, "calm", rows("calm", 40))
    words = " ".join("".join(build(demo)[1].text).split())
    assert "No curve for CALM: this run was not scored during training" in words
    assert "neither run" not in words


@pytest.mark.parametrize("name", ["summary.json", "details.json", "calm/metrics.jsonl", "autoencoder/metrics.jsonl"])
def test_missing_file_is_one_sentence(demo: Path, name: str) -> None:
    (demo / name).unlink()
    with pytest.raises(UserError, match="does not exist") as error:
        build_report(demo)
    assert str(demo / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (demo / "report.html").exists()


def test_damaged_inputs_are_one_sentence(demo: Path) -> None:
    edit(demo / "summary.json", K="two")
    with pytest.raises(UserError, match=r"summary.json: K: .*got 'two'"):
        build_report(demo)
    edit(demo / "summary.json", K=2, calm={})
    with pytest.raises(UserError, match=r"summary.json: calm.brier: is missing"):
        build_report(demo)
    path = demo / "calm" / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnot json\n{}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_metrics(path)
    path.write_text('{"kind": "other", "step": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: a row needs a step"):
        read_metrics(path)


def test_metrics_of_a_resumed_and_of_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": 10, "loss": 3.0}, {"kind": "train", "step": 20, "loss": 9.0}]
    lines += [{"kind": "train", "step": 20, "loss": 2.0}, {"kind": "eval", "step": 20, "loss": float("nan")}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr', encoding="utf-8")
    metrics = read_metrics(path)
    assert metrics.curve("train", "step", "loss") == ([10.0, 20.0], [3.0, 2.0])
    assert metrics.curve("eval", "step", "loss") == ([], [])  # not a number is no point


def test_same_inputs_give_the_same_file(demo: Path, finished: tuple[str, Page]) -> None:
    with matplotlib.rc_context({"axes.grid": False, "font.size": 20, "axes.facecolor": "black"}):  # a user's own style
        assert build(demo)[0] == finished[0]


def test_thin_keeps_short_curves_and_averages_long_ones() -> None:
    assert thin([1, 2, 3], [4, 5, 6], points=3) == ([1, 2, 3], [4, 5, 6])
    assert thin([1, 2, 3, 4], [1, 3, 5, 9], points=2) == ([1.5, 3.5], [2.0, 7.0])
    x, y = thin(list(range(1000)), [1.0] * 1000, points=150)
    assert len(x) == len(y) == 150
    assert set(y) == {1.0}


def test_small_tick_labels_survive() -> None:
    svg = plot("small", [Series("a", [0.0, 1.0], [0.0005, 0.00015], "calm")], "x", "y")
    assert "0.0004" in svg
    assert "a: from 0.0005 to 0.00015" in svg


@pytest.mark.parametrize("error", [0.1, 0.9])
def test_error_bars_below_zero_are_not_cut(error: float) -> None:
    """A mean above zero whose bar of two standard errors reaches below it: the frame goes down to the bar's end."""
    svg = orders("bar", [("calm", [1.0], [error])], "alt")
    top, height = re.findall(r'<rect x="[^"]*" y="([^"]*)" width="[^"]*" height="([^"]*)"', svg)[0]
    (bar,) = re.findall(r'd="([^"]*)"[^>]*var\(--calm\); stroke-width: 1.4', svg)
    ends = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar)]
    assert max(ends) < float(top) + float(height)


def colours(text: str, start: str) -> dict[str, str]:
    block = text[text.index(start) :]
    block = block[: block.index("}")]
    pairs = (item.split(":") for item in block.replace("{", ";").split(";") if item.strip().startswith("--"))
    return {name.strip().removeprefix("--"): value.strip() for name, value in pairs}


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
