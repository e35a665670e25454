"""`nextvec sweep`: what a spec means, what a folder keeps, and that a sweep cut off anywhere ends as an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nextvec.cli import main
from nextvec.config import CalmRun, parse_run
from nextvec.errors import ConfigError, DataError
from nextvec.lock import held
from nextvec.report.sweep import markdown
from nextvec.settings import layered
from nextvec.sweep.estimate import Rates
from nextvec.sweep.folder import LOCK, begin, check_begun, open_folder
from nextvec.sweep.plan import Vocabulary, assumed_vocabulary, digest, flops_per_token, make_jobs, tokens_per_step
from nextvec.sweep.run import Progress, run_sweep
from nextvec.sweep.spec import SweepSpec, named, read_spec, shipped
from nextvec.sweep.tables import read_sweep_results
from nextvec.train.metrics import read_metrics

SMALL = {"context_tokens": 64, "rows": 2}
BACKBONE = {"layers": 1, "width": 16, "inner": 16, "heads": 2}
SPEC: dict[str, Any] = {
    "about": "a test",
    "data": {"source": "texts", "vocab_size": 300, "valid_fraction": 0.3},
    "base": {
        "autoencoder": {
            "model": {"patch_size": 2, "width": 16, "inner": 16, "latent": 8},
            "data": SMALL,
            # auto is measured, and on a busy machine not the same each time
            "train": {"steps": 6, "precision": "fp32"},
            "optim.warmup": 1,
        },
        "lm": {
            "model": {"backbone": BACKBONE, "head": {"blocks": 1, "noise": 4}},
            "data": SMALL,
            "optim.warmup": 1,
            "train": {"eval_every": 5, "save_every": 2, "precision": "fp32"},
        },
        "baseline": {"model.backbone": BACKBONE, "data": SMALL, "optim.warmup": 1, "train.precision": "fp32"},
    },
    "rows": [{"lm.energy.draws": 2}, {"lm.energy.draws": 4}, {"name": "tokens", "stage": "baseline"}],
    "seeds": [0, 1],
    "budget": {"tokens": 12 * 128},
    "evaluate": {"context_tokens": 64, "draws": 2, "documents": 3, "document_tokens": 96, "batches": 1},
}
TIMES = ("seconds", "cpu_seconds", "tokens_per_s", "share", "memory_bytes")
STUB = Vocabulary(300, 1)


def spec_of(**changes: Any) -> SweepSpec:
    return SweepSpec.parse({"name": "test", **deepcopy(SPEC), **changes}, "test.yaml")


def one_second(run: object) -> float:
    return 1.0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, spec.yaml, and out/, the finished sweep."""
    work = tmp_path_factory.mktemp("sweep")
    (work / "texts").mkdir()
    for index in range(20):
        lines = [f"def f{index}_{n}(x, y):\n    return x * {n * index} + y\n\n" for n in range(14)]
        (work / "texts" / f"{index}.py").write_text("".join(lines))
    data = {**SPEC["data"], "source": str(work / "texts")}
    (work / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "data": data}))
    done = run_sweep(
        read_spec(str(work / "spec.yaml")), work / "out", device="cpu", command="x", say=ignore, show=False
    )
    assert done == Progress(finished=6, skipped=0, busy=0)
    return work


def ignore(line: str) -> None:
    pass


def test_rows_come_from_lists_and_grids_with_names_of_their_own() -> None:
    spec = spec_of(
        rows=[{"lm.energy.draws": 2}, {"name": "plain"}],
        grid={
            "stage": ["lm", "baseline"],
            "optimiser": {"AdamW": {"stage.optim.name": "adamw", "stage.optim.lr": 1e-3}},
            "stage.optim.schedule": ["constant", "linear"],
        },
    )
    points = spec.points()
    assert [(row.stage, row.name) for row in points] == [
        ("lm", "draws=2"),
        ("lm", "plain"),
        ("lm", "AdamW, schedule=constant"),
        ("lm", "AdamW, schedule=linear"),
        ("baseline", "AdamW, schedule=constant"),
        ("baseline", "AdamW, schedule=linear"),
    ]
    assert points[4].changes == {
        "baseline.optim.name": "adamw",
        "baseline.optim.lr": 1e-3,
        "baseline.optim.schedule": "constant",
    }
    settings = spec.settings(points[0], "lm", seed=7)
    assert settings["kind"] == "calm"
    assert settings["energy"] == {"draws": 2}
    assert settings["model"]["backbone"] == BACKBONE
    assert settings["train"] == {"seed": 7, "eval_every": 5, "save_every": 2, "precision": "fp32"}


def test_seeds_reach_every_stage_and_autoencoders_are_shared_by_their_settings() -> None:
    rows = [{"lm.energy.draws": 2}, {"lm.energy.draws": 4}, {"autoencoder.model.kl_weight": 0.01}]
    jobs = make_jobs(spec_of(rows=rows), one_second, STUB)
    assert [(job.row.name, job.seed) for job in jobs[:4]] == [
        ("draws=2", 0),
        ("draws=4", 0),
        ("kl_weight=0.01", 0),
        ("draws=2", 1),
    ]
    assert all(job.run.train.seed == job.autoencoder.train.seed == job.seed for job in jobs if job.autoencoder)
    assert len({job.autoencoder_folder for job in jobs}) == 4
    assert jobs[0].autoencoder_folder == jobs[1].autoencoder_folder
    assert jobs[2].run.model.autoencoder.kl_weight == 0.01  # type: ignore[attr-defined]


def test_a_budget_becomes_steps() -> None:
    def steps(rate: Any = one_second, **budget: float) -> int:
        return make_jobs(spec_of(budget=budget), rate, STUB)[0].run.train.steps

    assert steps(tokens=12.4 * 128) == 12
    assert steps(seconds=30, rate=lambda run: 2.0) == 15
    run = make_jobs(spec_of(), one_second, STUB)[0].run
    assert tokens_per_step(run) == 128
    assert steps(flops=20 * 128 * flops_per_token(run)) == 20
    assert make_jobs(spec_of(budget=None), one_second, STUB)[0].run.train.steps == 1000  # of the settings
    with pytest.raises(ConfigError, match=r"row draws=2: a budget of 100 tokens is less than one step of 128 tokens"):
        steps(tokens=100)


def test_a_row_may_have_a_budget_of_its_own() -> None:
    grid = {
        "D": {"short": {"budget.tokens": 4 * 128}, "long": {"budget.tokens": "8e3"}},
        "stage": ["lm", "baseline"],
    }
    spec = spec_of(rows=[{"lm.energy.draws": 2}, {"budget.flops": 1e9}], grid=grid, seeds=[0])
    jobs = make_jobs(spec, one_second, STUB)
    assert [job.row.name for job in jobs] == ["draws=2", "flops=1e+09", "short", "short", "long", "long"]
    assert [job.run.train.steps for job in jobs[::2]] == [12, 4, 62]
    assert jobs[1].run.train.steps == round(1e9 / 128 / flops_per_token(jobs[1].run))
    assert all("budget" not in key for job in jobs for key in job.row.changes)
    counted = spec_of(rows=[{"budget.tokens": 20 * 128}], budget={"tokens": 1, "autoencoder": True})
    assert make_jobs(counted, one_second, STUB)[0].run.train.steps == 14  # 20 less its autoencoder's 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": [{"budget.token": 5}]}, "row token=5: budget: unknown key 'token'; did you mean 'tokens'?"),
        (
            {"rows": [{"budget.tokens": 5, "budget.flops": 5}]},
            "row tokens=5, flops=5: budget: give exactly one of tokens, flops, seconds; got tokens, flops",
        ),
        (
            {"rows": [{"budget.autoencoder": True}]},
            "budget.autoencoder is for the whole sweep: put it into `budget`",
        ),
        ({"grd": {}}, "test.yaml: unknown key 'grd'; did you mean 'grid'?"),
        ({"budget": {"token": 5}}, "test.yaml: budget: unknown key 'token'; did you mean 'tokens'?"),
        (
            {"budget": {"tokens": 5, "flops": 5}},
            "budget: give exactly one of tokens, flops, seconds; got tokens, flops",
        ),
        ({"rows": [{"ml.energy.draws": 2}]}, "unknown stage 'ml'; did you mean 'lm'?"),
        ({"base": {"lmm": {}}}, "test.yaml: base: unknown stage 'lmm'; did you mean 'lm'?"),
        ({"base": {"lm": {"optim.ler": 1}}}, "row draws=2, lm: optim: unknown key 'ler'; did you mean 'lr'?"),
        ({"rows": [{"lm.energy.drawz": 2}]}, "row drawz=2, lm: energy: unknown key 'drawz'; did you mean 'draws'?"),
        (
            {"rows": [{"lm.energy.draws": 1}]},
            "row draws=1, lm: energy.draws: Input should be greater than or equal to 2",
        ),
        (
            {"rows": [{"baseline.optim.lr": 1}]},
            "a row that trains lm has no stage baseline: leave baseline.optim.lr out",
        ),
        ({"rows": [{"lm.train.seed": 1}]}, "lm.train.seed is not a row's to set: it comes from `seeds`"),
        ({"rows": [{"lm.train.steps": 9}]}, "row steps=9: the budget says the steps; leave lm.train.steps out"),
        ({"rows": [{"lm.energy.draws": 4}] * 2}, "two rows are called 'draws=4'; give them names of their own"),
        ({"rows": []}, "a sweep needs rows: give rows or a grid"),
        (
            {"grid": {"lm.energy.draws": 4}},
            "grid: lm.energy.draws needs a list of values, or named sets of overrides; got 4",
        ),
        ({"seeds": [1, 1]}, "seeds must be one or more different numbers; got [1, 1]"),
        ({"paper": {"draws=3": 1.0}}, "paper: unknown row 'draws=3'; did you mean 'draws=4'?"),
        ({"data": {"vocab_size": 300}}, "data: give either source or shards"),
        ({"rows": [{"autoencoder.model.patch_size": 3}]}, "data.context_tokens must be a multiple of K 3; got 64"),
        ({"evaluate": {"stride": 3}}, "row draws=2: evaluate.stride must be a multiple of K 2; got 3"),
        ({"evaluate": {"context_tokens": 6}}, "test, evaluate: context-tokens must be a multiple of 4"),
    ],
)
def test_a_mistake_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as found:
        make_jobs(spec_of(**changes), one_second, STUB)
    assert sentence in str(found.value)
    assert "\n" not in str(found.value)


def test_a_spec_takes_what_it_lacks_from_others_whole_keys_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**SPEC, "seeds": [5]}))
    (tmp_path / "child.yaml").write_text("from: base\nrows: [{lm.optim.lr: 1e-4}]\nbudget: {seconds: 10}\n")
    spec = read_spec(str(tmp_path / "child.yaml"))
    assert (spec.name, spec.seeds) == ("child", (5,))
    assert spec.rows == ({"lm.optim.lr": 1e-4},)  # a number, though YAML reads text
    assert spec.budget is not None
    assert spec.budget.tokens is None
    (tmp_path / "loop.yaml").write_text("from: loop\n")
    with pytest.raises(ConfigError, match="takes its settings `from` itself"):
        read_spec(str(tmp_path / "loop.yaml"))


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_spec_holds(name: str) -> None:
    spec = read_spec(name)
    vocabulary, note = assumed_vocabulary(spec)
    assert (note is not None) == name.startswith("paper-")
    jobs = make_jobs(spec, one_second, vocabulary)
    assert spec.about
    assert len({digest(job.identity) for job in jobs}) == len(jobs) == len(spec.points()) * len(spec.seeds)
    for job in jobs:
        budget = spec.budget_of(job.row)
        assert budget is not None
        if budget.seconds is not None:
            own = 0 if job.autoencoder is None or not budget.autoencoder else job.autoencoder.train.steps
            assert job.run.train.steps == budget.seconds - own  # a second a step, as this test says
        else:
            assert job.run.train.steps * tokens_per_step(job.run) == pytest.approx(budget.tokens, rel=0.01)


def test_the_shipped_sets_cover_the_paper() -> None:
    assert {"patch", "latent", "kl-weight", "kl-clip", "dropout", "autoencoder-size", "autoencoder-kind"} <= set(
        named(["small"])
    )
    assert {"draws", "teacher", "alpha", "head", "head-depth", "input", "optimisers"} <= set(named(["small"]))
    assert {
        f"paper-{name}" for name in named(["small"]) if name not in ("depth", "law", "optimisers", "recipe", "tuning")
    } == set(named(["paper"]))
    with pytest.raises(ConfigError, match="unknown spec 'drawz'; did you mean 'draws'"):
        read_spec("drawz")


def test_results_hold_what_tables_need(work: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted((work / "out").glob("rows/*/*/*/result.json"))]
    assert len(results) == 6
    for result in results:
        assert (result["steps"], result["tokens"], result["failed"]) == (12, 12 * 128, None)
        assert result["seconds"] > 0
        assert result["cpu_seconds"] > 0
        assert result["brier"]["protocol"]["stride"] == 2  # K of the CALMs, for the baseline as well
        assert (result["autoencoder"] is None) == (result["stage"] == "baseline")
        assert result["held_out"][-1]["step"] == 12
        assert result["machine"]["torch"]
    assert len({result["brier"]["protocol"]["documents_hash"] for result in results}) == 1
    assert [row["step"] for row in results[0]["held_out"]] == (
        [12] if results[0]["stage"] == "baseline" else [5, 10, 12]
    )
    assert len(list((work / "out" / "autoencoders").iterdir())) == 2  # one a seed
    assert not list((work / "out").glob("**/checkpoints"))


def test_finished_rows_are_skipped_and_a_sweep_may_grow(work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "out").glob("rows/*/*/*/*")}
    spec = read_spec(str(work / "spec.yaml"))
    assert run_sweep(spec, work / "out", device="cpu", say=ignore, show=False) == Progress(0, 6, 0)
    assert {path: path.stat().st_mtime_ns for path in (work / "out").glob("rows/*/*/*/*")} == before
    grown = spec.override(seeds=(0, 1, 2), rows=(*spec.rows, {"lm.energy.draws": 3}))
    check_begun(work / "out", grown, make_jobs(grown, one_second, vocabulary_of(work)))


def test_a_setting_newer_than_what_was_begun_counts_as_its_default(work: Path, tmp_path: Path) -> None:
    spec = read_spec(str(work / "spec.yaml"))
    shutil.copytree(work / "out", tmp_path / "out")
    for path in (tmp_path / "out").glob("rows/baseline/*/*/job.json"):  # as a version without recall would have left it
        job = json.loads(path.read_text())
        del job["identity"]["baseline"]["model"]["recall"]
        path.write_text(json.dumps(job))
    jobs = make_jobs(spec, one_second, vocabulary_of(work))
    check_begun(tmp_path / "out", spec, jobs)
    now = spec.override(base={**spec.base, "baseline": layered(spec.base.get("baseline", {}), {"model.recall": 1})})
    with pytest.raises(ConfigError, match=r"began with baseline\.model\.recall 0 and it now says 1"):
        check_begun(tmp_path / "out", now, make_jobs(now, one_second, vocabulary_of(work)))


def vocabulary_of(work: Path) -> Vocabulary:
    manifest = json.loads((work / "out" / "data" / "shards" / "train" / "manifest.json").read_text())
    return Vocabulary(manifest["vocab_size"], manifest["mask_id"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"budget": {"tokens": 6400}},
            r"row tokens in \S+ began with baseline.train.steps 12 and it now says 50; set it back",
        ),
        ({"evaluate": {"draws": 3}}, "began with evaluate.context_tokens 64 and it now says 512"),
        ({"rows": [{"lm.energy.draws": 2}]}, "holds the row tokens at seed 0, which it no longer has; put it back"),
        ({"seeds": [0]}, "holds the row tokens at seed 1, which it no longer has"),
        (
            {"data": {"source": "other"}},
            r"its rows in \S+ began with data.source \[.*texts'\] and it now says \['other'\]",
        ),
    ],
)
def test_an_edited_spec_is_refused(work: Path, changes: dict[str, Any], sentence: str) -> None:
    (work / "edited.yaml").write_text(yaml.safe_dump({**yaml.safe_load((work / "spec.yaml").read_text()), **changes}))
    with pytest.raises(ConfigError, match=f"edited was edited after rows were run: .*{sentence}"):
        run_sweep(read_spec(str(work / "edited.yaml")), work / "out", device="cpu", say=ignore, show=False)
    assert json.loads((work / "out" / "sweep.json").read_text())["spec"]["name"] == "spec"


def test_rows_that_are_kept_as_results_alone_are_not_edited_either(work: Path, tmp_path: Path) -> None:
    """As in docs/results."""
    shutil.copytree(work / "out", tmp_path / "out")
    for path in (tmp_path / "out").glob("rows/*/*/*/job.json"):
        path.unlink()
    spec = read_spec(str(work / "spec.yaml"))
    check_begun(tmp_path / "out", spec, make_jobs(spec, one_second, vocabulary_of(work)))
    other = spec.override(evaluate=spec.evaluate.override(draws=spec.evaluate.draws + 1))
    with pytest.raises(
        ConfigError, match=r"was edited after rows were run: .* began with evaluate\.draws 2 and it now says 3"
    ):
        check_begun(tmp_path / "out", other, make_jobs(other, one_second, vocabulary_of(work)))


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is not a sweep; give another folder with --out"):
        run_sweep(spec_of(), tmp_path, device="cpu", say=ignore, show=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_row_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    with held(tmp_path / "a" / LOCK, wait=False) as first, held(tmp_path / "a" / LOCK, wait=False) as second:
        assert (first, second) == (True, False)
    with held(tmp_path / "a" / LOCK, wait=False) as third:
        assert third


def test_a_row_that_diverges_is_a_result_and_the_others_go_on(work: Path, tmp_path: Path) -> None:
    data = {**SPEC["data"], "source": str(work / "texts")}
    rows = [
        {"name": "wild", "baseline.optim.name": "adamw", "baseline.optim.lr": 1e30},
        {"name": "no latent", "stage": "lm", "autoencoder.optim.name": "adamw", "autoencoder.optim.lr": 1e30},
        {"name": "tame", "budget.tokens": 5 * 128},
    ]
    spec = spec_of(data=data, rows=rows, stage="baseline", seeds=[0])
    assert run_sweep(spec, tmp_path / "out", device="cpu", say=ignore, show=False) == Progress(3, 0, 0)
    results = {
        path.parts[-3]: json.loads(path.read_text()) for path in (tmp_path / "out").glob("rows/*/*/*/result.json")
    }
    for name in ("wild", "no-latent"):
        assert results[name]["failed"].startswith("training ")
        assert results[name]["brier"] is None
    assert results["tame"]["failed"] is None
    assert (results["tame"]["steps"], results["tame"]["budget"]) == (5, {"tokens": 640.0, "autoencoder": False})
    text = markdown(read_sweep_results(tmp_path / "out"))
    assert "wild failed: training stopped at step" in text
    assert "| no latent | failed |" in text


@pytest.mark.slow
def test_killed_in_the_middle_of_a_row_it_ends_as_if_it_had_not_been(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    row = out / "rows" / "lm" / "draws=4" / "seed-1"
    words = ["sweep", str(work / "spec.yaml"), "--out", str(out), "--device", "cpu", "--only", "draws=4", "--seed", "1"]
    script = "import sys; from nextvec.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    process = subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(row.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (row / "result.json").is_file()
    assert not (row / "model.safetensors").is_file()
    lines: list[str] = []
    spec = read_spec(str(work / "spec.yaml"))
    done = run_sweep(
        spec, out, only=lambda job: (job.row.name, job.seed) == ("draws=4", 1), say=lines.append, show=False
    )
    assert done == Progress(1, 0, 0)
    assert not [line for line in lines if "autoencoder" in line]  # it was finished
    whole = work / "out" / "rows" / "lm" / "draws=4" / "seed-1"
    assert stripped(row) == stripped(whole)
    first, second = (json.loads((folder / "result.json").read_text())["brier"] for folder in (row, whole))
    assert first == second


def stripped(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]


def test_a_measured_rate_is_kept_and_asked_once(tmp_path: Path) -> None:
    import torch

    run = make_jobs(spec_of(), one_second, STUB)[0].run
    rates = Rates(tmp_path / "rates.json", torch.device("cpu"))
    assert rates.entry(run)["how"].startswith("measured")
    kept = json.loads((tmp_path / "rates.json").read_text())
    kept[rates.key(run)]["seconds"] = 123.0
    (tmp_path / "rates.json").write_text(json.dumps(kept))
    other_seed = run.override(train=run.train.override(seed=9, steps=77))
    assert Rates(tmp_path / "rates.json", torch.device("cpu"))(other_seed) == 123.0
    planned = Rates(tmp_path / "rates.json", torch.device("cpu"), flops=1e6)
    assert planned(run) == pytest.approx(128 * flops_per_token(run) / 1e6)


def test_models_that_are_compared_are_measured_in_turn_until_the_least_of_each_has_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from nextvec.sweep import estimate

    job = make_jobs(spec_of(), one_second, STUB)[0]
    first = job.run
    wide = first.override(optim=first.optim.override(name="adamw" if first.optim.name == "muon" else "muon"))
    known = first.override(data=first.data.override(rows=first.data.rows + 1))
    rates = Rates(tmp_path / "rates.json", torch.device("cpu"))
    rates.found[rates.key(known)] = {"seconds": 7.0, "how": "measured"}
    script = {rates.key(first): [5.0] * 4 + [3.0] + [4.0] * 99, rates.key(wide): [2.0] * 99}
    calls: list[str] = []

    class Scripted:
        def __init__(self, run: Any, folder: Path, device: Any) -> None:
            self.key, self.taken = rates.key(run), []  # type: ignore[var-annotated]

        def __call__(self) -> bool:
            calls.append(self.key)
            before = min(self.taken, default=float("inf"))
            self.taken.append(script[self.key][len(self.taken)])
            return self.taken[-1] < before

        def entry(self) -> dict[str, Any]:
            return {"seconds": min(self.taken), "how": "measured"}

    monkeypatch.setattr(estimate, "TimedStep", Scripted)
    jobs = [replace(job, run=run, autoencoder=None) for run in (first, known, wide, first)]
    rates.in_turn(jobs)
    assert [rates(run) for run in (first, wide, known)] == [3.0, 2.0, 7.0], "the quickest, though it came late"
    assert calls == [rates.key(first), rates.key(wide)] * (5 + estimate.SETTLED), (
        "one after the other, then quiet rounds"
    )
    assert set(json.loads((tmp_path / "rates.json").read_text())) == set(rates.found)
    calls.clear()
    rates.in_turn(jobs)
    assert not calls


def test_steps_in_turn_are_real_ones(tmp_path: Path) -> None:
    import torch

    job = make_jobs(spec_of(), one_second, STUB)[0]
    more = job.run.override(data=job.run.data.override(rows=4 * job.run.data.rows))
    rates = Rates(tmp_path / "rates.json", torch.device("cpu"))
    rates.in_turn([job, replace(job, run=more)])
    runs = [run for run in (job.run, more, job.autoencoder) if run is not None]
    assert set(rates.found) == {rates.key(run) for run in runs}
    assert all(rates(run) > 0 for run in runs)
    assert all(entry["how"].startswith("measured") for entry in rates.found.values())


def test_an_interrupted_begin_leaves_a_folder_that_goes_on(tmp_path: Path) -> None:
    spec = spec_of()
    jobs = make_jobs(spec, one_second, STUB)
    open_folder(tmp_path / "out", spec)
    begin(tmp_path / "out" / jobs[0].folder, jobs[0])
    check_begun(tmp_path / "out", spec, jobs)
    with pytest.raises(ConfigError, match="was edited after rows were run"):
        check_begun(tmp_path / "out", spec, jobs[1:])


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nextvec", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "sweep", str(work / "spec.yaml"), "--out", str(tmp_path / "o"), "--dry-run") == 0
    text = capsys.readouterr().out
    assert "draws=2" in text
    assert "12 steps" in text
    assert "6 rows (2 seeds), 2 autoencoders" in text
    assert "6 rows to run" in text
    assert not (tmp_path / "o").exists()
    assert command(monkeypatch, "sweep", str(work / "spec.yaml"), "--out", str(work / "out"), "--dry-run") == 0
    assert "0 rows to run" in capsys.readouterr().out
    assert command(monkeypatch, "sweep", "--list") == 0
    assert "optimisers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sweep"], "sweep needs a SPEC"),
        (["sweep", "missing.yaml"], "missing.yaml does not exist; `nextvec sweep --list` names the shipped specs"),
        (["sweep", "draws", "--only", "draws=9"], "--only: unknown row 'draws=9'; did you mean 'draws=8'?"),
        (["sweep", "draws", "--seed", "7"], "--seed 7 is none of the spec's seeds: 0, 1"),
        (["sweep", "draws", "--rate", "5"], "--rate plans, and only --dry-run does that"),
        (
            ["report", "."],
            ". is neither a run directory (it has no config.yaml) nor a folder of `nextvec sweep` (no sweep.json)",
        ),
        (["report", "nowhere"], "nowhere does not exist: give a run directory, or a folder that `nextvec sweep` wrote"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *words) == 2
    found = capsys.readouterr().err
    assert sentence in found
    assert found.count("\n") == 1


def test_shards_without_held_out_documents_are_refused(work: Path) -> None:
    train = work / "out" / "data" / "shards" / "train"
    with pytest.raises(DataError, match=r"has no held-out shards \(valid/\), on which rows are scored"):
        make_jobs(spec_of(data={"shards": str(train)}), one_second)


def test_rates_that_were_kept_before_a_setting_existed_still_count(tmp_path: Path) -> None:
    """The key of CALM in the bake-offs of docs/results, measured before the mixture head had an inner width and n-grams."""
    folder = Path(__file__).parents[1] / "docs" / "results" / "bakeoff-english-10min-recall"
    record = json.loads((folder / "rows" / "lm" / "calm" / "seed-0" / "result.json").read_text())
    run = parse_run(record["identity"]["lm"], "the row")
    rates = Rates(tmp_path / "rates.json", torch.device("cpu"))
    assert rates.key(run) == "e3142338febc"
    assert isinstance(run, CalmRun)
    for more in ({"inner": 7}, {"grams": 64}):
        other = run.override(model=run.model.override(head=run.model.head.override(**more)))
        assert rates.key(other) != "e3142338febc"
    assert rates.key(run.override(optim=run.optim.override(lr=0.5))) == "e3142338febc"
    assert rates.key(run.override(optim=run.optim.override(rows_lr=0.5))) != "e3142338febc"
