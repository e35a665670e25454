"""The N-D-K law: known laws are found again from synthetic rows, plans follow from them, and what gives no law is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvec.cli import main
from nextvec.config import MixtureHeadConfig, OptimSettings
from nextvec.errors import ConfigError, DataError
from nextvec.files import read_json, write_json
from nextvec.law.fit import Law, fit
from nextvec.law.plan import plan
from nextvec.law.points import Grid, backbone_parameters, encoder_flops, read_grid
from nextvec.scoring.brier import Protocol, summarise
from nextvec.sweep.folder import write_sweep
from nextvec.sweep.plan import Vocabulary, flops_per_token, make_jobs, tokens_per_step
from nextvec.sweep.spec import Row, SweepSpec, read_spec

PROTOCOL = Protocol("documents-512", "t" * 64, 512, "patch_starts", 8, 4, "all_pairs", "argmax", 12, "d" * 64, 0)
Truth = Callable[[float, float, int], float]  # Brier-1 of N, D and K
DOCUMENTS, POSITIONS = 12, 50


def power(N: float, D: float, K: int) -> float:
    """Larger K starts lower and gains more of each token, so that it is ahead from somewhere on."""
    return 1 - (0.5 + 0.01 * K + 0.1 * (N / 1e5) ** -0.3 + (0.25 + 0.03 / K) * (D / 1e6) ** -0.2)


def logarithmic(N: float, D: float, K: int) -> float:
    return 1 - 0.95 * (N / 1e5) ** -0.02 * (D / 1e6) ** -0.05 * (1 + 0.01 * K)


def brier(level: float, noise: float, seed: int) -> dict[str, Any]:
    """A result whose Brier-n is `level` / n, but for noise; documents are easier and harder alike for every row."""
    common = 0.02 * torch.randn(DOCUMENTS, generator=torch.Generator().manual_seed(0)).double()
    common = (common - common.mean()).repeat_interleave(POSITIONS)[:, None]
    values = level / torch.arange(1, 5).double() + common
    values += noise * torch.randn(1, generator=torch.Generator().manual_seed(seed)).double()
    document = torch.arange(DOCUMENTS).repeat_interleave(POSITIONS)
    return summarise(values, torch.ones_like(values, dtype=torch.bool), document, PROTOCOL).to_dict()


def write(out: Path, truth: Truth, noise: float = 0.0, keep: Callable[[str], bool] = lambda name: True) -> Path:
    """Results of the shipped sweep as a law would have them."""
    spec = read_spec("law")
    write_sweep(out, spec)
    for index, job in enumerate(make_jobs(spec, lambda run: 1.0, Vocabulary(2048, 1))):
        if keep(job.row.name):
            D = job.run.train.steps * tokens_per_step(job.run)
            level = truth(backbone_parameters(job.run), D, job.run.model.patch_size)
            found = {"stage": job.row.stage, "failed": None, "brier": brier(level, noise, index), "autoencoder": None}
            found |= {"held_out": [], "identity": job.identity, "tokens": D, "seconds": 1.0, "cpu_seconds": 1.0}
            write_json(out / job.folder / "result.json", found | {"machine": {}, "command": "x", "nextvec": "0"})
    return out


def fitted(grid: Grid, **more: Any) -> Law:
    return fit(grid, torch.Generator().manual_seed(0), **{"resamples": 200, **more})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("law") / "law", power, noise=0.002)


def test_points_count_backbone_tokens_and_all_operations(results: Path) -> None:
    grid = read_grid(results)
    assert (len(grid.points), grid.sizes, grid.missing, grid.notes) == (48, [1, 2, 4, 8], 0, ())
    assert len({point.parameters for point in grid.points}) == 3  # the same for every K of a width
    width, inner = 64, 168
    assert grid.of(4)[0].parameters == 2 * (4 * width**2 + width + 3 * width * inner + width) + width
    token, calm = grid.of(1)[0], grid.of(4)[0]
    assert token.flops == pytest.approx(token.tokens * flops_per_token(token.run))
    assert calm.encoder is not None
    assert calm.flops - calm.tokens * flops_per_token(calm.run) == pytest.approx(
        150 * 2048 * flops_per_token(calm.encoder)
    )


@pytest.mark.parametrize("truth", [power, logarithmic])
def test_a_known_law_is_found_again(truth: Truth, tmp_path: Path) -> None:
    law = fitted(read_grid(write(tmp_path / "law", truth)), score="Brier-1", resamples=20)
    assert law.solution.family.power is (truth is power)
    assert min(error for _, error in law.errors) < 0.06  # points of 100
    place = torch.tensor([[5e5, 1.5e6, 4.0], [2e6, 1e7, 2.0]], dtype=torch.float64)
    expected = [100 * truth(*row[:2], int(row[2])) for row in place.tolist()]
    assert law.solution.scores(place)[0].tolist() == pytest.approx(expected, abs=0.5)


def test_the_interval_covers_and_grows_outside_of_the_grid(results: Path) -> None:
    law = fitted(read_grid(results), score="Brier-1")
    place = torch.tensor([[8e5, 1.2e6, 4.0], [8e6, 1e8, 4.0]], dtype=torch.float64)
    inside, outside = law.solution.scores(place)[1:].T
    low, high = inside.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert low < 100 * power(8e5, 1.2e6, 4) < high
    assert outside.std() > inside.std() > 0.1


def test_a_plan_spends_the_budget_and_finds_the_best(results: Path) -> None:
    grid = read_grid(results)
    made = plan(grid, fitted(grid, score="Brier-1"), 3e13)
    assert [each.K for each in sorted(made.choices, key=lambda each: each.K)] == [1, 2, 4, 8]
    assert sum(each.wins for each in made.choices) == pytest.approx(1)
    truth = {}
    for each in made.choices:
        widest = grid.of(each.K)[-1]
        backbone = widest.run.model.backbone.override(  # type: ignore[union-attr]
            width=each.width, inner=8 * round(512 * each.width / 192 / 8), heads=each.width // 64
        )
        run = widest.run.override(model=widest.run.model.override(backbone=backbone))
        assert each.tokens * flops_per_token(run) + encoder_flops(widest.encoder) == pytest.approx(3e13)
        assert each.token is (each.K == 1)
        truth[each.K] = 100 * power(each.backbone_parameters, each.tokens, each.K)
        assert each.low - 1 < truth[each.K] < each.high + 1
    assert max(truth, key=lambda K: truth[K]) == made.choices[0].K


def test_a_plan_says_how_far_it_reaches(results: Path) -> None:
    grid = read_grid(results)
    law = fitted(grid, score="Brier-1", resamples=20)
    assert "extrapolation" not in str(plan(grid, law, 3e12))
    assert "WARNING" not in str(plan(grid, law, 2e13))
    assert "above the largest row of K = " in str(plan(grid, law, 2e14))
    far = str(plan(grid, law, 1e16))
    assert "WARNING: the budget (1e+16 operations) is" in far
    assert "WARNING: the recommended training" in far
    small = plan(grid, law, 1.3e12)
    assert [each.K for each in small.choices] == [1]
    assert "K = 4 is left out: the budget does not pay for its autoencoder and one step of the narrowest model." in str(
        small
    )
    assert small.gap is None
    for budget in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a budget is a number of operations above zero"):
            plan(grid, law, budget)
    with pytest.raises(ConfigError, match="does not pay for a step of any model"):
        plan(grid, law, 1e6)


def test_sizes_within_one_standard_error_are_a_tie(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path / "law", lambda N, D, K: 0.1, noise=0.01))
    made = plan(grid, fitted(grid, score="Brier-1"), 2e13)
    assert made.choices[0].wins < 0.9
    assert made.gap is not None
    assert made.gap_error is not None
    assert 0 < made.gap < 3 * made.gap_error
    assert ("a tie" in made.sentence()) is (made.gap <= made.gap_error)
    second = made.choices[1].K
    tie = f"K = {second} is within one standard error of it ({made.gap_error:.2f} ± {made.gap_error:.2f}): a tie."
    assert replace(made, gap=made.gap_error).sentence().endswith(tie)
    assert "a tie" not in replace(made, gap=1.1 * made.gap_error).sentence()


def test_an_unfinished_grid_gives_a_law_of_what_is_there(tmp_path: Path) -> None:
    absent = "D=0.4M, width=192, K=8"
    out = write(tmp_path / "law", power, keep=lambda name: name[:6] in ("D=0.4M", "D=0.8M") and name != absent)
    damaged = next(out.glob("rows/lm/D=0.8M-width=*K=8/*/result.json"))
    write_json(damaged, read_json(damaged, "row") | {"failed": "training stopped at step 3", "brier": None})
    for path in list(out.glob("rows/lm/*0.8M*K=8/*/result.json"))[1:]:
        path.unlink()
    grid = read_grid(out)
    assert grid.sizes == [1, 2, 4]
    assert grid.missing == 27
    assert any("training stopped at step 3" in note for note in grid.notes)
    assert "K = 8 is left out: 2 of its rows are finished, and 3 are needed" in grid.notes
    assert fitted(grid, resamples=5).points == 18


def test_brier_lm_decides_where_every_row_has_it(results: Path, tmp_path: Path) -> None:
    assert fitted(read_grid(results), resamples=5).score == "BrierLM"
    grid = read_grid(write(tmp_path / "law", lambda N, D, K: power(N, D, K) - 0.14))
    assert any(point.brier.brier_lm is None for point in grid.points)
    assert fitted(grid, resamples=5).score == "Brier-1"
    with pytest.raises(ConfigError, match="rows have no BrierLM"):
        fitted(grid, score="BrierLM")


def test_what_gives_no_law_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no law yet: .* run `nextvec sweep law --out .*` first"):
        read_grid(tmp_path / "none")
    with pytest.raises(ConfigError, match="too few finished rows for a law"):
        read_grid(write(tmp_path / "one", power, keep=lambda name: "0.4M" in name))
    few = read_grid(
        write(tmp_path / "few", power, keep=lambda name: "K=1" in name and "192" not in name and "3.2M" not in name)
    )
    assert len(few.points) == 6
    with pytest.raises(
        ConfigError, match="has 5 finished rows that can be used, and a law of 1 sizes of patch takes 6"
    ):
        fitted(Grid(few.path, few.text, few.points[:5], 0, ()))
    assert fitted(few, resamples=5).points == 6

    def changed(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        out = tmp_path / name
        shutil.copytree(results, out)
        path = next(out.glob("rows/lm/*0.4M*64*K=4/*/result.json"))
        record = read_json(path, "row")
        change(record)
        write_json(path, record)
        return out

    with pytest.raises(ConfigError, match=r"differ in optim\.lr .*: rows of a law differ in backbone width, tokens, K"):
        read_grid(changed("rate", lambda record: record["identity"]["lm"]["optim"].update(lr=1.0)))
    with pytest.raises(ConfigError, match="stand on autoencoders of other settings"):
        read_grid(changed("encoder", lambda record: record["identity"]["autoencoder"]["train"].update(steps=9)))
    with pytest.raises(ConfigError, match="differ in documents"):
        read_grid(changed("text", lambda record: record["brier"]["protocol"].update(documents_hash="e" * 64)))
    with pytest.raises(DataError, match=r"without Brier-1\.\.4 of each document"):
        read_grid(changed("sums", lambda record: record["brier"].update(per_document=None)))
    with pytest.raises(DataError, match="scored at other positions: a file was changed"):
        read_grid(changed("places", lambda record: record["brier"]["per_document"]["positions"][0].__setitem__(0, 7)))


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nextvec", "plan", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_command_recommends(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--flops", "1e15", "--law", str(results)) == 0
    text = capsys.readouterr().out
    assert "law: 48 rows" in text
    assert "Recommended for 1e+15 operations: K = " in text
    assert "WARNING: the budget (1e+15 operations) is" in text
    assert command(monkeypatch, "--seconds", "1000", "--rate", "3e10", "--law", str(results), "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["flops"] == 3e13
    assert len(made["choices"]) == 4
    assert made["law"]["rows"] == 48


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "plan takes either --flops or --seconds with --rate"),
        (["--flops", "1", "--seconds", "1"], "plan takes either --flops or --seconds with --rate"),
        (["--seconds", "1"], "--seconds and --rate go together"),
        (["--flops", "1e15", "--score", "brier-1"], "unknown score 'brier-1'; did you mean 'Brier-1'?"),
        (["--flops", "1e15", "--law", "none"], "run `nextvec sweep law --out none` first"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *words) == 2
    found = capsys.readouterr().err
    assert sentence in found
    assert found.count("\n") == 1


def test_the_shipped_law_is_that_of_its_published_rows() -> None:
    """Whatever the fast settings, on which it stands, have become."""
    spec = read_spec("law")
    folder = Path(__file__).parents[1] / "docs" / "results" / "law"
    published = spec.override(base=read_json(folder / "sweep.json", "sweep")["spec"]["base"])

    def whole(of: SweepSpec, row: Row) -> dict[str, Any]:
        """With the defaults of what the fast settings may change."""
        settings = of.settings(row, row.stage, 0)
        model = {"input": "tokens", **settings["model"]}
        if row.stage == "lm":
            model["head"] = MixtureHeadConfig.parse(model["head"])
        return {**settings, "model": model, "optim": OptimSettings.parse(settings["optim"])}

    for row in spec.points():
        assert whole(spec, row) == whole(published, row)
