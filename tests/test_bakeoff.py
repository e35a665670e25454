"""`nextvec bakeoff`, tiny and end to end: a budget that counts the autoencoder, figures beside each row, resume, refusals."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextvec.bakeoff import Bakeoff, measure, run, settings
from nextvec.bakeoff.depth import choose_depths
from nextvec.bakeoff.run import Outcome, run_bakeoff
from nextvec.bakeoff.settings import layers_of, spec_of
from nextvec.cli import main
from nextvec.config import AutoencoderRun, CalmRun, RunConfig, TokenLMRun
from nextvec.errors import ConfigError, DataError
from nextvec.recipes import AUTOENCODER_LEAST as LEAST
from nextvec.recipes import AUTOENCODER_MOST, AUTOENCODER_SHARE, KINDS, arena, autoencoder_bounds, autoencoder_steps
from nextvec.report.bakeoff import markdown, write_page
from nextvec.rundir import load_run
from nextvec.sweep.plan import Vocabulary, flops_per_token, make_jobs, tokens_per_step
from nextvec.sweep.spec import SweepSpec

SHARED = {"data": {"context_tokens": 64, "rows": 2}, "optim": {"warmup": 2}}
BACKBONE = {"layers": 1, "width": 16, "inner": 16, "heads": 2}
TINY = {
    "autoencoder": {"model": {"patch_size": 2, "width": 16, "inner": 16, "latent": 8}, **SHARED},
    "calm": {"model": {"backbone": BACKBONE, "head": {"noise": 4, "blocks": 1}}, **SHARED},
    "token": {"model": {"backbone": BACKBONE}, **SHARED},
    "multi-token": {"model": {"backbone": BACKBONE, "head": {"kind": "autoregressive", "blocks": 1}}, **SHARED},
}
STUB = Vocabulary(300, 1)


def rate(config: RunConfig) -> float:
    """A machine on which an autoencoder takes 20 s at least, and a step of any other model one."""
    return 20 / LEAST if isinstance(config, AutoencoderRun) else 1.0


def write_texts(folder: Path, count: int, lines: int = 14) -> None:
    folder.mkdir()
    for index in range(count):
        text = [f"def f{index}_{n}(x, y):\n    return x * {n * index} + y\n\n" for n in range(lines)]
        (folder / f"{index}.py").write_text("".join(text))


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "arena", lambda kind, vocab_size, minutes: TINY[kind])
        patch.setattr(measure, "PLACES", 24)
        patch.setattr(measure, "BOUND_PATCHES", 24)
        patch.setattr(measure, "BOUND_DRAWS", 4)
        patch.setattr(run, "measure_speeds", functools.partial(run.measure_speeds, repeats=1))
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("bakeoff")
    write_texts(work / "texts", 24)
    return work


def asked(work: Path, **changes: Any) -> Bakeoff:
    given = {
        "data": (str(work / "texts"),), "minutes": 1.0, "out": work / "out", "vocab_size": 300, "valid_fraction": 0.3,
        "device": "cpu",
    }  # fmt: skip
    return Bakeoff(**{**given, **changes})


@pytest.fixture(scope="module")
def outcome(work: Path) -> Outcome:
    found = run_bakeoff(asked(work), command="nextvec bakeoff", say=ignore, show=False, rate=rate)
    assert found is not None
    return found


def ignore(line: str) -> None:
    pass


@pytest.mark.slow
def test_each_arm_gets_equal_seconds_and_calm_pays_for_its_autoencoder(outcome: Outcome) -> None:
    calm, token, multi = (outcome.planned[arm] for arm in ("calm", "token", "multi-token"))
    assert (calm.autoencoder_steps, calm.autoencoder_seconds) == (LEAST, pytest.approx(20.0))
    assert (calm.steps, token.steps, multi.steps) == (40, 60, 60)
    assert calm.seconds + calm.autoencoder_seconds == token.seconds == multi.seconds == 60.0
    assert multi.autoencoder_steps == 0
    assert len(list((outcome.asked.out / "autoencoders").iterdir())) == 1


@pytest.mark.slow
def test_every_row_has_its_figures_beside_its_result(outcome: Outcome) -> None:
    rows = sorted((outcome.asked.out / "rows").glob("*/*/seed-0"))
    assert [row.parent.name for row in rows] == ["token", "calm", "multi-token"]
    positions = set()
    for row in rows:
        figures = json.loads((row / "figures.json").read_text())
        exact, bound = figures["likelihood"]["exact"], figures["likelihood"]["bound"]
        assert (exact is None) == (row.parent.name == "calm") == (bound is not None)
        positions.add((figures["likelihood"]["text"]["tokens"], figures["likelihood"]["text"]["bytes"]))
        methods = {point["method"] for point in figures["collision"]}
        assert methods == ({"batch sampler", "centre"} if row.parent.name == "calm" else {"temperature"})
        result = json.loads((row / "result.json").read_text())
        steps = [point["step"] for point in result["held_out"]]
        assert len(steps) == 6
        assert steps[-1] == result["steps"]
        assert all(len(point["per_document"]["sums"]) == 4 for point in result["held_out"])
        assert "per_document" not in (row / "README.md").read_text()
    assert len(positions) == 1  # all arms at the same tokens


@pytest.mark.slow
def test_speeds_are_those_of_all_arms_and_their_samplers(outcome: Outcome) -> None:
    assert {arm: list(ways) for arm, ways in outcome.speeds.items()} == {
        "calm": ["T = 1", "centre of 8", "T = 0.5, 200 candidates"],
        "token": ["T = 1"],
        "multi-token": ["T = 1"],
    }
    calm = outcome.speeds["calm"]
    assert all(found["tokens_per_s"] > 0 for ways in outcome.speeds.values() for found in ways.values())
    for ways in outcome.speeds.values():  # of one draw a patch also 16 texts at once, which share what is read
        assert [way for way in ways if "together" in ways[way]] == ["T = 1"]
        at_once = ways["T = 1"]["together"]
        assert at_once["texts"] == 16
        assert 0 < at_once["low"] <= at_once["tokens_per_s"] <= at_once["high"]
    assert (
        calm["T = 1"]["operations"] < calm["centre of 8"]["operations"] < calm["T = 0.5, 200 candidates"]["operations"]
    )


@pytest.mark.slow
def test_the_verdict_is_told_in_markdown_and_on_a_page(outcome: Outcome, tmp_path: Path) -> None:
    text = markdown(outcome)
    assert f"Of CALM's 60 s its autoencoder has 20 s ({LEAST:,} steps) and the model 40 s (40 steps)" in text
    assert "| calm | 1 | 40 | 5.12k | 40 | 20 |" in text
    assert "| multi-token | 1 | 60 | 7.68k | 60 | none |" in text
    assert text.count("Break-even: ") + text.count("nothing is decided") == 2
    write_page(outcome, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<script" not in page
    verdict = json.loads((outcome.asked.out / "verdict.json").read_text())
    assert [duel["rival"] for duel in verdict["duels"]] == ["token", "multi-token"]


@pytest.mark.slow
def test_what_is_done_is_skipped_and_what_is_missing_is_made(outcome: Outcome, work: Path) -> None:
    out = work / "out"
    figures = next((out / "rows").glob("*/token/seed-0")) / "figures.json"
    kept = json.loads(figures.read_text())
    figures.write_text(json.dumps({"likelihood": kept["likelihood"]}))  # as if stopped between the two
    rows = [path for path in out.glob("rows/*/*/*/*") if path.name != "figures.json" and path.name[0] != "."]
    before = {path: path.stat().st_mtime_ns for path in rows}
    lines: list[str] = []
    again = run_bakeoff(asked(work), command="nextvec bakeoff", say=lines.append, show=False, rate=rate)
    assert again is not None
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads(figures.read_text()) == kept
    assert not [line for line in lines if "training" in line or "speed" in line]
    assert again.duels == outcome.duels


@pytest.mark.slow
def test_another_budget_or_sweep_in_the_same_folder_is_refused(outcome: Outcome, work: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a bake-off of 1 minutes, begun before; give --minutes 1, or another"):
        run_bakeoff(asked(work, minutes=2.0), say=ignore, show=False, rate=rate)
    with pytest.raises(
        ConfigError, match="of 2 tokens per patch, begun before, and 8 are asked for; give --patch-size 2"
    ):
        run_bakeoff(asked(work, patch_size=8), say=ignore, show=False, rate=rate)
    row = tmp_path / "out" / "rows" / "lm" / "a" / "seed-0"
    row.mkdir(parents=True)
    (row / "job.json").write_text("{}")
    (tmp_path / "out" / "sweep.json").write_text(json.dumps({"format": 1, "spec": {"name": "draws", "budget": None}}))
    with pytest.raises(ConfigError, match="holds the sweep draws, not a bake-off; give another folder with --out"):
        run_bakeoff(asked(work, out=tmp_path / "out"), say=ignore, show=False, rate=rate)


@pytest.mark.slow
def test_the_multi_token_model_trains_without_an_autoencoder(outcome: Outcome) -> None:
    (folder,) = (outcome.asked.out / "rows").glob("*/multi-token/seed-0")
    result = json.loads((folder / "result.json").read_text())
    assert result["identity"]["autoencoder"] is None
    assert result["autoencoder"] is None
    assert load_run(folder).model.patch_size == 2


# --- budgets that count the autoencoder, in any sweep


def jobs_at(autoencoder_steps: int, **budget: Any) -> list[Any]:
    rows = [
        {"name": name, "stage": stage, **{f"{stage}.{key}": value for key, value in TINY[name].items()}}
        for name, stage in (("calm", "lm"), ("token", "baseline"), ("multi-token", "lm"))
    ]
    base = {"autoencoder": {**TINY["autoencoder"], "train": {"steps": autoencoder_steps}}}
    data = {"source": "texts", "vocab_size": 300}
    evaluate = {"context_tokens": 64, "curve": 4}
    spec = SweepSpec.parse(
        {"name": "x", "data": data, "base": base, "rows": rows, "budget": budget, "evaluate": evaluate}
    )
    return make_jobs(spec, rate, STUB)


def test_a_budget_may_count_the_autoencoder_in_seconds_tokens_or_operations() -> None:
    assert [job.run.train.steps for job in jobs_at(LEAST, seconds=60)] == [60, 60, 60]
    assert [job.run.train.steps for job in jobs_at(LEAST, seconds=60, autoencoder=True)] == [40, 60, 60]
    assert [job.run.train.eval_every for job in jobs_at(LEAST, seconds=62, autoencoder=True)] == [11, 16, 16]
    assert [job.run.train.steps for job in jobs_at(10, tokens=40 * 128, autoencoder=True)] == [30, 40, 40]
    calm, token, _ = jobs_at(10, flops=1e8, autoencoder=True)
    assert isinstance(calm.run, CalmRun)
    assert calm.autoencoder is not None
    spent = sum(
        each.train.steps * tokens_per_step(each) * flops_per_token(each) for each in (calm.run, calm.autoencoder)
    )
    one = tokens_per_step(calm.run) * flops_per_token(calm.run)
    assert spent == pytest.approx(1e8, abs=one)
    assert token.run.train.steps == round(1e8 / (128 * flops_per_token(token.run)))


def test_a_budget_that_leaves_too_little_for_the_model_is_refused() -> None:
    with pytest.raises(ConfigError) as found:
        jobs_at(2 * LEAST, seconds=60, autoencoder=True)
    assert str(found.value) == (
        f"x, row calm: {2 * LEAST:,} steps of the autoencoder take 67% of a budget of 60 s, and at least 40% are for the model: "
        "give a larger budget or fewer autoencoder.train.steps"
    )


def test_the_autoencoder_has_a_share_within_what_is_known_to_serve() -> None:
    between = (LEAST + AUTOENCODER_MOST) // 2
    for steps, found in ((10 * AUTOENCODER_MOST, AUTOENCODER_MOST), (between, between), (1, LEAST)):
        assert autoencoder_steps(600, AUTOENCODER_SHARE * 600 / steps, 2048) == found
    assert [autoencoder_bounds(size) for size in (300, 4096, 8192)] == [(80, 150), (127, 150), (202, 202)]
    assert [arena("autoencoder", size, 10.0)["data"]["rows"] for size in (2048, 8192)] == [2, 2]
    assert all(arena(kind, 2048, 10.0)["data"]["context_tokens"] % 8 == 0 for kind in KINDS)
    with pytest.raises(ConfigError, match="unknown arm 'clam'; did you mean 'calm'"):
        arena("clam", 2048, 10.0)


def test_each_arm_may_have_its_own_depth(tmp_path: Path) -> None:
    arms = ("calm", "token", "multi-token")
    assert layers_of("", arms) == {}
    assert layers_of("2", arms) == {"calm": 2, "token": 2, "multi-token": 2}
    assert layers_of("2, token=3", arms) == {"calm": 2, "token": 3, "multi-token": 2}
    usual = [settings.arena(arm, 2048, 10.0)["model"]["backbone"] for arm in arms]
    spec = spec_of(asked(tmp_path, arms=arms, layers=layers_of("calm=1,token=7", arms)), 2048, 80)
    made = [row[f"{row['stage']}.model"]["backbone"] for row in spec.rows]
    assert made == [usual[0] | {"layers": 1}, usual[1] | {"layers": 7}, usual[2]]
    for words in ("two", "calm=", "=2", "calm=2.5", "-1", "2,3", "calm=2,calm=5"):
        with pytest.raises(ConfigError, match="--layers takes a number, or ARM=N once for an arm"):
            layers_of(words, arms)
    assert layers_of("token=3,2", arms) == layers_of("2, token=3", arms)


def test_patches_may_be_of_another_size(tmp_path: Path) -> None:
    for size, latent, stride in ((None, 8, 2), (8, 256, 8)):
        jobs = make_jobs(spec_of(asked(tmp_path, patch_size=size), 300, 80), rate, STUB)
        assert [job.run.model.patch_size for job in jobs] == [stride, 1, stride]
        assert {job.identity["evaluate"]["stride"] for job in jobs} == {stride}  # all arms at the same places
        assert jobs[0].autoencoder is not None
        assert jobs[0].autoencoder.model.latent == latent
    assert TINY["autoencoder"]["model"]["patch_size"] == 2


def step(config: RunConfig) -> float:
    """A step of the token Transformer takes as many times a quarter of a second as it has layers; of CALM always half of one."""
    if isinstance(config, AutoencoderRun):
        return 20 / AUTOENCODER_MOST
    return config.model.backbone.layers / 4 if isinstance(config, TokenLMRun) else 0.5


def chosen(out: Path, given: Bakeoff, turns: list[int], rate: Callable[[RunConfig], float] = step) -> dict[str, int]:
    """Layers by arm, of a text without end; `turns` gets how many jobs were timed."""
    out.mkdir(exist_ok=True)
    depths = choose_depths(
        out, given, STUB, 10**12, rate, lambda jobs: turns.append(len(jobs)), lambda step: AUTOENCODER_MOST * step
    )
    return {arm: depth.layers for arm, depth in depths.items()}


def test_an_arm_gets_the_layers_that_its_positions_feed(tmp_path: Path) -> None:
    per_layer = 16 * (4 * 16 + 2 + 3 * 16)  # of TINY's width
    turns: list[int] = []
    found = {}
    for seconds in (100, 320, 1000, 5000):
        given = asked(tmp_path, minutes=seconds / 60, arms=("calm", "token"))
        layers = chosen(tmp_path / str(seconds), given, turns)
        found[seconds] = layers
        patch_size = TINY["autoencoder"]["model"]["patch_size"]
        read = {"calm": 128 * (seconds - 20) / 0.5 / patch_size, "token": 128 * seconds * 4 / layers["token"]}
        for arm in layers:
            assert layers[arm] == 1 or read[arm] / 20 > 0.99 * layers[arm] * per_layer
    assert [each["calm"] for each in found.values()] == [1, 1, 3, 4]
    assert [each["token"] for each in found.values()] == [1, 2, 3, 4]
    assert turns == [4] * 4
    long = asked(tmp_path, minutes=5000 / 60, arms=("calm",))
    few = choose_depths(tmp_path, long, STUB, 40_000, step, lambda jobs: None, lambda step: 20.0)
    assert few["calm"].layers == 2, "four passes over a text of 40,000 tokens are 160,000, half as many patches"
    assert few["calm"].fed == 80_000 / 20


def test_depths_are_kept_for_the_budget_they_were_chosen_for(tmp_path: Path) -> None:
    given, out = asked(tmp_path, minutes=1000 / 60, arms=("calm", "token")), tmp_path / "out"
    turns: list[int] = []
    assert chosen(out, given, turns) == {"calm": 3, "token": 3}

    def slower(config: RunConfig) -> float:
        return 10 * step(config)

    assert chosen(out, given, turns, slower) == {"calm": 3, "token": 3}
    assert turns == [4], "nothing was timed again"
    three = replace(given, arms=("calm", "token", "multi-token"))
    assert chosen(out, three, turns, slower) == {"calm": 3, "token": 3, "multi-token": 1}
    assert turns == [4, 2], "only the arm that is new"
    assert chosen(out, replace(given, layers={"token": 1}), turns, slower) == {"calm": 3}
    assert chosen(out, replace(given, minutes=100 / 60), turns) == {"calm": 1, "token": 1}
    count = len(turns)
    chosen(out, replace(given, minutes=100 / 60, patch_size=4), turns)
    assert len(turns) == count + 1, "other patches, other depths"
    for damaged in ("{", "[]", '{"of": {}}', '{"of": {}, "depths": {"calm": {"layers": 2}}}'):
        (out / "depth.json").write_text(damaged)
        with pytest.raises(DataError, match=r"depth\.json"):
            chosen(out, given, turns)
    (out / "depth.json").unlink()
    with pytest.raises(ConfigError, match="too few"):
        choose_depths(out, given, STUB, 1, step, lambda jobs: None, functools.partial(_refuse, "too few"))
    assert not (out / "depth.json").exists()


def _refuse(why: str, step: float) -> float:
    raise ConfigError(why)


@pytest.mark.slow
def test_a_bakeoff_goes_on_with_the_depth_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the arms differ, and whatever the budget would feed by now."""
    write_texts(tmp_path / "texts", 24)
    given = asked(tmp_path, arms=("multi-token",), layers={"multi-token": 2})
    said: list[str] = []
    first = run_bakeoff(given, say=said.append, show=False, rate=rate)
    assert first is not None
    more = replace(given, arms=("multi-token", "token"), layers={})
    found = run_bakeoff(more, say=said.append, show=False, rate=rate)
    assert found is not None
    assert found.asked.layers == {"multi-token": 2, "token": 1}
    assert [line for line in said if "layer" in line] == [
        "token: 1 layer of 0.0018 million parameters; 1 minutes and this text feed 0.00038 million",
        "--layers asks for other depths, of all arms or of some: calm=2,token=3",
    ]
    for arm, layers in found.asked.layers.items():
        model = load_run(next((tmp_path / "out" / "rows").glob(f"*/{arm}/seed-0"))).model
        assert model.config.backbone.layers == layers  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="was edited after rows were run"):
        run_bakeoff(replace(more, layers={"multi-token": 1}), say=said.append, show=False, rate=rate)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"minutes": 0.0}, "minutes must be above 0 and at most 1440; got 0"),
        ({"arms": ("calm", "tokne")}, "unknown arm 'tokne'; did you mean 'token'?"),
        ({"arms": ()}, "give at least one arm of calm, token, multi-token"),
        ({"arms": ("calm", "calm")}, "an arm is given twice: calm, calm"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"shards": "x"}, "a bake-off needs text: give either --data SRC or --shards DIR"),
        ({"data": ()}, "a bake-off needs text: give either --data SRC or --shards DIR"),
        ({"data": (), "shards": "x", "tokenizer": "bytes"}, "shards have their tokenizer: leave --tokenizer out"),
        ({"valid_fraction": 1.0}, "valid-fraction must be above 0 and below 1; got 1"),
        (
            {"arms": ("calm",), "layers": {"token": 2}},
            "--layers names token, which is not among the arms: add it to --arms, or leave it out",
        ),
        (
            {"arms": ("token",), "patch_size": 8},
            "patch-size is for calm and multi-token, and neither is among the arms: leave it out",
        ),
        ({"patch_size": 3}, "patch-size must be 2, 4, 8 or 16 tokens; got 3"),
        ({"layers": {"calmm": 2}}, "unknown arm in --layers 'calmm'; did you mean 'calm'?"),
        ({"layers": {"calm": 0}}, "a backbone has at least 1 layer; got --layers calm=0"),
    ],
)
def test_a_mistake_is_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        asked(tmp_path, **changes)
    assert str(found.value) == sentence


@pytest.mark.parametrize(
    ("texts", "lines", "sentence"),
    [
        (4, 14, "is too little text to score: 2 of its held-out documents are longer than 20 tokens, and 4 at least"),
        (30, 1, "is too little text to score: 0 of its held-out documents"),
    ],
)
def test_too_little_text_is_refused_before_any_training(tmp_path: Path, texts: int, lines: int, sentence: str) -> None:
    write_texts(tmp_path / "texts", texts, lines)
    with pytest.raises(DataError, match=sentence):
        run_bakeoff(asked(tmp_path), say=ignore, show=False, rate=rate)
    assert not (tmp_path / "out" / "rows").exists()


def test_a_budget_too_short_for_the_autoencoder_names_the_one_that_is_enough(work: Path, tmp_path: Path) -> None:
    sentence = (
        rf"0.5 minutes are too few on this machine: {LEAST} steps of CALM's autoencoder take 20 s, and at least 40% are for the "
        r"model; give --minutes 0.6 or more"
    )
    with pytest.raises(ConfigError, match=sentence):
        run_bakeoff(asked(work, minutes=0.5, out=tmp_path / "out"), say=ignore, show=False, rate=rate)
    assert not (tmp_path / "out" / "rows").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "nothing.txt", "--minutes", "1"], "source nothing.txt does not exist; give a file, a folder"),
        (["--data", "x", "--minutes", "0"], "minutes must be above 0"),
        (["--data", "x", "--minutes", "1", "--arms", "calm,rival"], "unknown arm 'rival'"),
        (["--minutes", "1"], "a bake-off needs text"),
        (["--shards", "nowhere", "--minutes", "1"], "nowhere holds no shards"),
    ],
)
def test_the_command_line_refuses_in_one_sentence_and_writes_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nextvec", "bakeoff", *words, "--out", "out"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    found = capsys.readouterr().err
    assert sentence in found
    assert found.count("\n") == 1
    assert not list(tmp_path.iterdir())
