"""The tables of `nextvec report` against figures worked out by hand, and the page and Markdown that show them."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvec.cli import main
from nextvec.errors import DataError
from nextvec.evaluate.compare import compare
from nextvec.report.sweep import markdown, write_page
from nextvec.report.words import TIMES_100
from nextvec.scoring.brier import BrierResult, Protocol, summarise
from nextvec.sweep.tables import (
    RESAMPLES,
    Figure,
    Sweep,
    TableRow,
    difference,
    first_at,
    held_out,
    losses_compare,
    mean,
    measured,
    orderings,
    races,
    read_sweep_results,
    score,
    target,
)

PROTOCOL = Protocol("documents-64", "t" * 64, 64, "patch_starts", 2, 2, "all_pairs", "argmax", 6, "d" * 64, 0)


def brier(level: float, seed: int = 0) -> dict[str, Any]:
    """A real result over six documents whose Brier-n is about `level` / n."""
    generator = torch.Generator().manual_seed(seed)
    values = level / torch.arange(1, 5) + 0.02 * torch.randn(60, 4, generator=generator)
    return summarise(values, torch.ones(60, 4, dtype=torch.bool), torch.arange(60) // 10, PROTOCOL).to_dict()


def result(
    brier_lm: float | None, curve: list[tuple[int, float]] | None = None, latent: int = 8, **more: Any
) -> dict[str, Any]:
    """The parts of a result.json that tables read; Brier-1 is a tenth of BrierLM, on its scale."""
    figures = brier(0.2)
    figures |= {"brier_lm": brier_lm, "brier": [(brier_lm or 1.0) / 1000, 0.01, 0.01, 0.01 if brier_lm else -0.01]}
    rows = [
        {"kind": "eval", "step": step, "seconds": 2.0 * step, "cpu_seconds": 4.0 * step, "energy": loss}
        for step, loss in curve or [(10, 5.0)]
    ]
    identity = {
        "autoencoder": {"model": {"latent": latent}, "train": {"seed": 0}},
        "lm": {"model": {"head": {"kind": "energy"}}, "energy": {"alpha": 1.0}},
    }
    base = {
        "nextvec": "0", "command": "nextvec sweep x", "stage": "lm", "failed": None, "brier": figures, "held_out": rows,
        "tokens": 1000, "seconds": 1.0, "cpu_seconds": 3.0, "identity": identity, "autoencoder": None,
        "machine": {"processor": "P", "cores": 2, "threads": 1, "torch": "2"},
    }  # fmt: skip
    return {**base, **more}


def sweep_of(*rows: TableRow, **spec: Any) -> Sweep:
    known = {
        "name": "x",
        "about": "why",
        "seeds": [0, 1],
        "paper": {},
        "ranking": [],
        "reach": [],
        "data": {"source": ["t"]},
    }
    return Sweep(Path("."), {**known, **spec}, rows)


def test_means_errors_and_paired_differences_by_hand() -> None:
    first = TableRow("a", "lm", {0: result(4.0), 1: result(5.0), 2: result(9.0)})
    second = TableRow("b", "lm", {0: result(5.0), 1: result(5.5), 2: result(10.5), 3: result(99.0)})
    # mean 6, deviations -2, -1, 3: variance 14 / 2, error sqrt(7 / 3)
    assert score(first, "BrierLM") == Figure(6.0, pytest.approx(math.sqrt(7 / 3)), "seeds")
    assert score(first, "Brier-1") == Figure(pytest.approx(0.6), pytest.approx(0.1 * math.sqrt(7 / 3)), "seeds")
    # differences 1, 0.5, 1.5 over the shared seeds: mean 1, variance 0.25, error 0.5 / sqrt(3)
    assert difference(first, second, "BrierLM") == Figure(1.0, pytest.approx(0.5 / math.sqrt(3)), "seeds")
    assert measured(first, lambda found: found["cpu_seconds"]) == Figure(3.0, 0.0, "seeds")
    assert mean([]) == Figure(None)


def test_an_order_that_is_not_positive_or_a_failed_seed_leaves_no_mean() -> None:
    row = TableRow("a", "lm", {0: result(4.0), 1: result(None)})
    failed = TableRow("b", "lm", {0: result(4.0), 1: result(4.0) | {"brier": None, "failed": "training stopped"}})
    assert score(row, "BrierLM") == score(failed, "Brier-1") == Figure(None)
    assert score(row, "Brier-1").value == pytest.approx(0.25)
    assert difference(row, failed, "BrierLM") == Figure(None)
    assert failed.failed == ["training stopped"]
    assert measured(failed, held_out) == Figure(None)


def test_one_seed_has_the_error_of_its_documents_and_the_paired_bootstrap() -> None:
    first = TableRow("a", "lm", {0: result(1.0) | {"brier": brier(0.3, 1)}})
    second = TableRow("b", "lm", {0: result(1.0) | {"brier": brier(0.4, 2)}})
    a, b = (BrierResult.from_dict(row.results[0]["brier"]) for row in (first, second))
    assert score(first, "BrierLM") == Figure(a.brier_lm, a.brier_lm_stderr, "documents")
    found = compare(a, b, generator=torch.Generator().manual_seed(0), resamples=RESAMPLES)
    by_name = {item.name: item for item in found.differences}
    assert difference(first, second, "BrierLM") == Figure(
        pytest.approx(by_name["BrierLM"].value), by_name["BrierLM"].stderr, "documents"
    )
    stderr = by_name["Brier-2"].stderr
    assert stderr is not None
    assert difference(first, second, "Brier-2").error == pytest.approx(100 * stderr)


def test_the_papers_orderings_are_judged_by_paired_differences() -> None:
    rows = [
        TableRow("a", "lm", {0: result(4.0), 1: result(5.0)}),
        TableRow("b", "lm", {0: result(3.0), 1: result(4.1)}),  # below a by 1.0, 0.9
        TableRow("c", "lm", {0: result(3.5), 1: result(3.6)}),  # above b by 0.5, -0.5
    ]
    found = orderings(sweep_of(*rows, paper={"a": 4.7, "b": 4.5, "c": 4.6}))
    assert [(item.better, item.worse, item.verdict) for item in found] == [
        ("a", "b", "holds"),
        ("a", "c", "holds"),  # 0.5, 1.4: 0.95 +- 0.45
        ("c", "b", "tie"),  # 0.0 +- 0.5
    ]
    ranked = orderings(sweep_of(*rows[:2], ranking=["b", "a"]))
    assert [(item.better, item.worse, item.verdict) for item in ranked] == [("b", "a", "reversed")]


def test_a_race_is_run_to_the_best_final_loss_of_the_rows_named() -> None:
    slow = TableRow("slow", "lm", {0: result(1.0, [(10, 9.0), (20, 8.0)])})
    aim = TableRow("aim", "lm", {0: result(1.0, [(10, 9.0), (20, 7.0), (30, 6.0)])})
    fast = TableRow("fast", "lm", {0: result(1.0, [(10, 7.0), (20, 5.0), (30, 4.0)])})
    sweep = sweep_of(slow, aim, fast, TableRow("later", "lm", {}), reach=["slow", "aim"])
    found = target(sweep, "lm")
    assert found is not None
    assert (found[0].name, found[1]) == ("aim", {0: 6.0})
    by_name = {race.row: race for race in races(sweep, "lm")}
    assert list(by_name) == ["slow", "aim", "fast"]
    assert by_name["slow"].reached == 0
    assert by_name["slow"].steps == Figure(None)
    assert by_name["aim"].steps == Figure(30.0)
    assert by_name["fast"].steps == Figure(15.0)  # half way from 7 to 5
    assert by_name["fast"].cpu_seconds == Figure(60.0)
    assert first_at(fast.results[0], 7.0) == {"step": 10.0, "seconds": 20.0, "cpu_seconds": 40.0}
    text = markdown(sweep)
    assert "| fast | 4.0000 | 15 | 0.50 | 60 | 0.50 |" in text
    assert "| slow | 8.0000 | not reached |  |  |  |" in text


def test_losses_stand_side_by_side_only_where_they_compare() -> None:
    first, other = TableRow("a", "lm", {0: result(4.0)}), TableRow("b", "lm", {0: result(4.0)})
    assert losses_compare([first, other])
    assert "held-out loss of the head" in markdown(sweep_of(first, other))
    wide = TableRow("c", "lm", {0: result(4.0, latent=16)})
    assert not losses_compare([first, wide])
    steep = TableRow("d", "lm", {0: result(4.0)})
    steep.results[0]["identity"]["lm"]["energy"] = {"alpha": 1.5}
    assert not losses_compare([first, steep])
    assert "held-out loss" not in markdown(sweep_of(first, steep))
    encoders = [
        TableRow(name, "autoencoder", {0: result(4.0, stage="autoencoder", latent=size)})
        for name, size in (("x", 8), ("y", 9))
    ]
    assert losses_compare(encoders)


def test_the_markdown_and_the_page_show_the_table(tmp_path: Path) -> None:
    rows = [
        TableRow("a|b", "lm", {0: result(4.0), 1: result(5.0)}),
        TableRow("<c>", "lm", {0: result(4.5), 1: result(5.7)}),
        TableRow("later", "lm", {}),
    ]
    sweep = sweep_of(*rows, paper={"a|b": 4.7})
    text = markdown(sweep)
    assert f"| row | BrierLM | minus first | paper | Brier-1 {TIMES_100} | minus first |" in text
    assert "| a\\|b | 4.50 ± 0.50 |  | 4.70 | 0.45 ± 0.05 |  |" in text
    assert "| <c> | 5.10 ± 0.60 | +0.60 ± 0.10 |  |" in text
    assert "2 rows times seeds are not finished yet" in text
    assert "Command: `nextvec sweep x`." in text
    write_page([sweep], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;c&gt;" in page
    assert "<c>" not in page
    assert "+0.60 ± 0.10" in page
    assert "<svg" in page
    assert "<script" not in page
    assert "src=" not in page


RESULTS = sorted(path.parent for path in (Path(__file__).parents[1] / "docs" / "results").glob("*/sweep.json"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_tables_in_the_documents_are_those_of_the_results_beside_them(folder: Path) -> None:
    """To mend a document: `nextvec report docs/results/NAME` prints its tables."""
    text = "".join(path.read_text(encoding="utf-8") for path in folder.parents[1].glob("*.md"))
    lines = [line for line in markdown(read_sweep_results(folder)).splitlines() if line.startswith("|")]
    assert lines
    assert not [line for line in lines if line not in text]


def test_several_sweeps_share_a_page(tmp_path: Path) -> None:
    """Each with its tables and pictures, under names that no other has: SVG refers to its parts by id."""
    sweeps = [read_sweep_results(folder) for folder in RESULTS]
    write_page(sweeps, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    sections = page.split("<section")[1:]
    assert len(sections) == len(sweeps) > 1
    for sweep, html in zip(sweeps, sections, strict=True):
        assert f">{sweep.spec['name']}</h2>" in html
        assert html.count("<table") >= len(sweep.stages())
        rows = [row for row in sweep.rows if row.results]
        found = Counter(row.stage for row in rows)
        found.update(row.stage for row in rows if len(next(iter(row.results.values()))["held_out"]) > 1)
        assert html.count("<svg") >= sum(count > 1 for count in found.values()), "several rows, or points on the way"
        assert all(f">{row.name}</th>" in html for row in sweep.rows if row.results)


def test_report_reads_a_folder_and_names_what_it_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "format": 1,
        "spec": {**sweep_of().spec, "seeds": [0, 1]},
        "rows": [{"name": "a", "stage": "lm", "folder": "a"}],
    }
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    folder = tmp_path / "rows" / "lm" / "a" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result(4.0)))
    sweep = read_sweep_results(tmp_path)
    assert (sweep.missing, list(sweep.rows[0].results)) == (1, [0])
    monkeypatch.setattr(sys, "argv", ["nextvec", "report", str(tmp_path)])
    for page in ("report.html", "rows.html"):
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        assert "| a | 4.00" in capsys.readouterr().out
        assert (tmp_path / page).is_file()
        (tmp_path / "report.html").write_text("of a bake-off")
        (tmp_path / "verdict.json").write_text("{}")
    assert (tmp_path / "report.html").read_text() == "of a bake-off"
    (folder / "result.json").write_text('{"stage": "lm"}')
    with pytest.raises(
        DataError, match=r"result.json is damaged: it has no failed; move it away, and `nextvec sweep` makes"
    ):
        read_sweep_results(tmp_path)
