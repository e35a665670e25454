"""The verdict of a bake-off against cases worked out by hand: quality, matched generation, break-even, and the words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nextvec.bakeoff.curve import RESAMPLES, BreakEven, Curve, break_even, curve_of, points
from nextvec.bakeoff.measure import Planned
from nextvec.bakeoff.verdict import Duel, Matched, Quality, accuracy_gap, matched, quality, sentences
from nextvec.evaluate.collision import Tally
from nextvec.sweep.tables import Figure, TableRow
from test_sweep_tables import result

WIN = "Use CALM here, not the token Transformer: it is better at this budget"
LOSS = "Do not use CALM here: the token Transformer is better at this budget."
FLAT = BreakEven("none", "BrierLM", None, None, None, 1.0, -1.0, (0.1, 0.2))


def rows(calm: list[float | None], rival: list[float | None]) -> tuple[TableRow, TableRow]:
    return tuple(  # type: ignore[return-value]
        TableRow(name, "lm", {seed: result(value) for seed, value in enumerate(values)})
        for name, values in (("calm", calm), ("token", rival))
    )


@pytest.mark.parametrize(
    ("calm", "rival", "gap", "standing"),
    [
        ([5.0, 6.0], [4.0, 4.6], 1.2, "ahead"),  # 1.0, 1.4: 1.2 ± 0.2
        ([5.0, 6.0], [5.5, 5.6], -0.05, "tie"),  # -0.5, 0.4: -0.05 ± 0.45
        ([4.0, 4.6], [5.0, 6.0], -1.2, "behind"),
    ],
)
def test_quality_is_the_paired_difference_and_a_tie_within_its_error(
    calm: list[float | None], rival: list[float | None], gap: float, standing: str
) -> None:
    found = quality(*rows(calm, rival))
    assert (found.figure, found.standing) == ("BrierLM", standing)
    assert found.gap.value == pytest.approx(gap)


def test_where_brier_lm_is_not_defined_brier_1_decides() -> None:
    found = quality(*rows([None, None], [5.0, 6.0]))  # Brier-1 is 0.1 against 0.5 and 0.6
    assert (found.figure, found.standing) == ("Brier-1", "behind")
    assert found.gap.value == pytest.approx(-0.45)


def test_a_failed_arm_or_a_difference_without_an_error_leaves_the_question_open() -> None:
    calm, rival = rows([5.0], [4.0])
    broken = TableRow("token", "baseline", {0: {**result(None), "failed": "training stopped at step 3", "brier": None}})
    found = quality(calm, broken)
    assert (found.standing, found.why) == ("open", "the token Transformer failed: training stopped at step 3")
    alone = result(5.0)
    alone["brier"] = {**alone["brier"], "per_document": None}
    found = quality(TableRow("calm", "lm", {0: alone}), rival)
    assert (found.standing, found.gap.error) == ("open", None)
    assert "no standard error" in found.why


# --- generation


def tally(figures: dict[tuple[str, float], list[list[float]]]) -> list[dict[str, Any]]:
    """Points from the figures of four contexts in documents 0, 0, 1, 2."""
    found = Tally()
    for (method, strength), each in figures.items():
        for document, values in zip((0, 0, 1, 2), each, strict=True):
            found.add(method, strength, document, values)
    return found.points()


def same(token: float, together: float, pair: float, equal: float) -> list[list[float]]:
    """Four contexts alike."""
    return [[token, together, pair, equal]] * 4


RIVAL = {
    ("temperature", 1.0): same(0.2, 0.1, 0.1, 0.0),
    ("temperature", 0.5): same(0.4, 0.3, 0.2, 0.2),
    ("temperature", 0.25): same(0.5, 0.7, 0.3, 0.6),
}


def test_accuracy_is_compared_at_equal_collision_on_straight_lines() -> None:
    rival = tally(RIVAL)
    (point,) = tally({("centre", 8): same(0.36, 0.25, 0.1, 0.9)})
    gap, outside = accuracy_gap(point, rival, "token")  # at 0.25 the rival has 0.2 + 0.75 * 0.2 = 0.35
    assert (gap.value, outside) == (pytest.approx(0.01), False)
    assert gap.error == pytest.approx(0.0, abs=1e-9)  # all documents alike
    gap, outside = accuracy_gap(point, rival, "pair")  # the rival does not come to 0.9: its last point counts
    assert (gap.value, outside) == (pytest.approx(-0.2), True)


def test_the_error_of_a_gap_in_accuracy_is_paired_by_document() -> None:
    levels = [0.1, 0.3, 0.6, 0.8]  # of the contexts, the same for both
    mine = [[level + extra, 0.2, 0.0, 0.0] for level, extra in zip(levels, (0.0, 0.02, 0.03, 0.07), strict=True)]
    theirs = [[level, 0.2, 0.0, 0.0] for level in levels]
    (point,), others = tally({("centre", 8): mine}), tally({("temperature", 1.0): theirs})
    gap, _ = accuracy_gap(point, others, "token")
    extras = {0: 0.02, 1: 0.03, 2: 0.07}  # sums by document, of 2, 1 and 1 contexts
    middle = sum(extras.values()) / 4
    spread = sum((extra - middle * count) ** 2 for extra, count in zip(extras.values(), (2, 1, 1), strict=True))
    assert gap.value == pytest.approx(middle)
    assert gap.error == pytest.approx(math.sqrt(spread * 3 / 2) / 4)
    assert point["token_accuracy_stderr"] > 5 * gap.error


SPEEDS = {
    "T = 1": {"tokens_per_s": 900.0, "operations": 2e6},
    "centre of 8": {"tokens_per_s": 600.0, "operations": 3e6},
    "T = 0.5, 200 candidates": {"tokens_per_s": 100.0, "operations": 4e7},
}
OTHER = {"T = 1": {"tokens_per_s": 300.0, "operations": 6e6}}


def test_the_fastest_way_that_is_as_accurate_is_the_matched_one() -> None:
    calm = {
        ("batch sampler", 1.0): same(0.1, 0.1, 0.05, 0.0),  # behind 0.2 and 0.1
        ("centre", 8): same(0.41, 0.3, 0.21, 0.2),  # ahead of 0.4 and 0.2
        ("batch sampler", 0.5): same(0.5, 0.3, 0.3, 0.2),
    }
    found = matched([tally(calm)], [tally(RIVAL)], SPEEDS, OTHER)
    assert found is not None
    assert (found.way, found.reached, found.ratio, found.operations) == ("centre of 8", True, 2.0, (3e6, 6e6))
    worse = {key: same(0.0, 0.3, 0.1, 0.2) for key in calm} | {("centre", 8): same(0.3, 0.3, 0.15, 0.2)}
    found = matched([tally(worse)], [tally(RIVAL)], SPEEDS, OTHER)
    assert found is not None
    assert (found.way, found.reached) == ("centre of 8", False)
    assert found.gaps["token"].value == pytest.approx(-0.1)
    both = matched([tally(calm), tally(worse)], [tally(RIVAL)] * 2, SPEEDS, OTHER)
    assert both is not None
    assert both.gaps["token"].over in ("seeds", "none")
    assert matched([], [], SPEEDS, OTHER) is None


def test_several_texts_at_once_are_told_and_may_decide_a_tie() -> None:
    def at_once(rate: float) -> dict[str, float]:
        return {"texts": 16, "tokens_per_s": rate}

    calm = {("batch sampler", 1.0): same(0.41, 0.3, 0.21, 0.2)}
    slow = {"T = 1": {"tokens_per_s": 270.0, "operations": 2e6, "together": at_once(4000.0)}}
    other = {"T = 1": {**OTHER["T = 1"], "together": at_once(2000.0)}}
    found = matched([tally(calm)], [tally(RIVAL)], slow, other)
    assert found is not None
    assert (found.ratio, found.together) == (0.9, (16, 4000.0, 2000.0))
    tie = Quality(Figure(0.01, 0.1, "seeds"), "BrierLM", "tie")
    meeting = BreakEven("open", "BrierLM")
    duel = Duel("token", tie, found, meeting)
    assert duel.use
    words = sentences(duel, 10)
    assert words[0].endswith("it generates faster where several texts are written at once.")
    assert "270 tokens/s against 300, 0.90 times (16 texts at once: 4,000 against 2,000, 2.00 times)" in words[2]
    alone = matched([tally(calm)], [tally(RIVAL)], slow, OTHER)  # a rival measured before there was such a figure
    assert alone is not None
    assert alone.together is None
    assert not Duel("token", tie, alone, meeting).use


def test_a_way_without_a_point_of_its_own_is_not_looked_at() -> None:
    """Speeds of a folder may be newer than its points."""
    speeds = SPEEDS | {"T = 0.5, token by token": {"tokens_per_s": 800.0, "operations": 2e6}}
    calm = {("batch sampler", 1.0): same(0.1, 0.1, 0.05, 0.0), ("centre", 8): same(0.35, 0.3, 0.15, 0.2)}
    found = matched([tally(calm)], [tally(RIVAL)], speeds, OTHER)
    assert found is not None
    assert (found.way, found.reached) == ("centre of 8", False)
    more = calm | {("temperature", 0.5): same(0.41, 0.3, 0.21, 0.2)}
    found = matched([tally(more)], [tally(RIVAL)], speeds, OTHER)
    assert found is not None
    assert (found.way, found.reached) == ("T = 0.5, token by token", True)


# --- break-even


def curve(
    intercept: float, slope: float, seconds: list[float], noise: float = 0.0, seed: int = 0, before: float = 0.0
) -> Curve:
    """Brier-1..4 equal to (intercept + slope log t) / 100 in each of 20 documents of 10 positions, and noise of the documents."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor(seconds, dtype=torch.float64)
    level_P = (intercept + slope * x.log()) / 100
    shift_C = noise * torch.randn(20, generator=generator, dtype=torch.float64)
    sums = 10 * (level_P[:, None] + shift_C)[None, :, :, None].expand(1, -1, -1, 4)
    return Curve(before, x, sums, torch.full_like(sums, 10.0))


TIMES = [100.0, 200.0, 300.0, 400.0, 500.0, 600.0]


def meeting(calm: Curve | None, rival: Curve | None) -> BreakEven:
    return break_even(calm, rival, 600.0, torch.Generator().manual_seed(0))


def test_two_lines_meet_where_they_do() -> None:
    # 2 log t - 8 against log t - 1: at log t = 7
    found = meeting(curve(-8.0, 2.0, TIMES), curve(-1.0, 1.0, TIMES))
    assert (found.state, found.figure) == ("meets", "BrierLM")
    for seconds in (found.seconds, found.low, found.high):
        assert seconds == pytest.approx(math.exp(7.0), rel=1e-3)
    assert found.beyond == 0.0
    assert found.slopes is not None
    assert list(found.slopes) == pytest.approx([2 * math.log(2), math.log(2)])
    assert found.gap == pytest.approx(math.log(600) - 7.0)


def test_the_seconds_of_an_autoencoder_shift_the_curve_and_do_not_bend_it() -> None:
    # 2 log (t - 100) - 8 against log t - 1: (t - 100)^2 = t e^7
    found = meeting(curve(-8.0, 2.0, [each - 100 for each in TIMES[1:]], before=100.0), curve(-1.0, 1.0, TIMES))
    e7 = math.exp(7.0)
    assert found.seconds == pytest.approx(100 + e7 / 2 + math.sqrt(e7 * e7 / 4 + 100 * e7), rel=1e-3)


def test_no_break_even_is_told_where_the_lines_do_not_meet_within_reach() -> None:
    assert meeting(curve(-4.0, 1.0, TIMES), curve(-1.0, 1.0, TIMES)).state == "none"  # parallel
    assert meeting(curve(-2.0, 0.5, TIMES), curve(-1.0, 1.0, TIMES)).state == "none"  # apart
    far = meeting(curve(-8.0, 1.9, TIMES), curve(-1.0, 1.4, TIMES))  # 0.5 log t = 7: exp(14) s
    assert (far.state, far.seconds, far.low, far.beyond) == ("none", None, None, 1.0)
    assert meeting(curve(1.0, 1.0, TIMES), curve(0.0, 1.0, TIMES)).state == "ahead"


def test_noise_of_documents_and_a_bend_widen_the_interval_around_the_crossing() -> None:
    rival = curve(-1.0, 1.0, TIMES, 0.005, seed=2)
    found, paired = (meeting(curve(-8.0, 2.0, TIMES, 0.005, seed=seed), rival) for seed in (1, 2))
    assert found.state == paired.state == "meets"
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.high
    assert paired.low is not None
    assert paired.high is not None
    assert paired.high - paired.low < 0.2 * (found.high - found.low)  # the same documents for both arms
    bent = curve(-8.0, 2.0, TIMES)
    sums = bent.sums.clone()
    sums[:, -1] *= 0.97  # the last point falls short of the line
    told = meeting(Curve(0.0, bent.seconds, sums, bent.counts), curve(-1.0, 1.0, TIMES))
    assert told.low is not None
    assert told.high is None or told.high > 1.02 * told.low


def test_where_an_order_is_not_positive_brier_1_is_fitted_and_too_few_points_tell_nothing() -> None:
    calm = curve(-8.0, 2.0, TIMES)
    sums = calm.sums.clone()
    sums[..., 3] = -1.0
    found = meeting(Curve(0.0, calm.seconds, sums, calm.counts), curve(-1.0, 1.0, TIMES))
    assert (found.state, found.figure) == ("meets", "Brier-1")
    assert meeting(None, calm).state == "open"
    assert meeting(curve(-8.0, 2.0, [500.0, 600.0]), calm).state == "open"
    assert meeting(curve(-12.0, 2.0, TIMES[:4]), calm).state == "open"  # the last score is not above 0
    assert meeting(curve(-12.0, 2.0, TIMES), calm).state == "open"  # and here only two are
    assert RESAMPLES >= 1000


def test_a_curve_has_the_seconds_of_its_model_after_those_of_its_autoencoder() -> None:
    sums = {"document": [0, 1], "positions": [[3, 4]] * 4, "sums": [[0.3, 0.4]] * 4}
    held_out = [{"step": 10, "per_document": sums}, {"step": 20, "per_document": sums}]
    plan = Planned(steps=20, seconds=40.0, autoencoder_steps=5, autoencoder_seconds=20.0, tokens_per_step=128)
    found = curve_of([{"held_out": held_out}], [plan])
    assert found is not None
    assert (found.before, found.seconds.tolist()) == (20.0, [20.0, 40.0])
    assert points(found, "Brier-1") == ([40.0, 60.0], [pytest.approx(10.0)] * 2)
    assert found.sums.shape == (1, 2, 2, 4)
    assert curve_of([{"held_out": [{"step": 20}]}], [plan]) is None


# --- words


def duel(standing: str, matched_at: Matched | None, meets: BreakEven = FLAT) -> Duel:
    gap = {"ahead": 1.0, "tie": 0.1, "behind": -1.0}.get(standing)
    why = "" if standing != "open" else "there is no seed that both have a score for"
    error = None if gap is None else 0.3
    return Duel("token", Quality(Figure(gap, error, "seeds"), "BrierLM", standing, why), matched_at, meets)  # type: ignore[arg-type]


def way(reached: bool, calm: float) -> Matched:
    gaps = {"token": Figure(0.01, 0.02, "documents"), "pair": Figure(-0.01, 0.02, "documents")}
    return Matched("centre of 8", reached, gaps, False, calm, 300.0, (2e6, 3e6))


@pytest.mark.parametrize(
    ("found", "use", "sentence"),
    [
        (duel("ahead", way(True, 600)), True, f"{WIN} and generates faster."),
        (duel("ahead", way(False, 600)), True, f"{WIN}."),
        (duel("tie", way(True, 600)), True, "Use CALM here, for its speed: its quality ties with the token Transformer"),
        (duel("tie", way(True, 200)), False, "Do not use CALM here: it is no better than the token Transformer"),
        (duel("tie", way(False, 600)), False, "Do not use CALM here: it is no better"),
        (duel("tie", None), False, "Do not use CALM here"),
        (duel("behind", way(True, 600)), False, f"{LOSS} CALM generates faster"),
        (duel("behind", way(False, 600)), False, LOSS),
        (duel("open", way(True, 600)), None, "No verdict between CALM and the token Transformer."),
    ],
)  # fmt: skip
def test_the_advice_in_every_case(found: Duel, use: bool | None, sentence: str) -> None:
    assert found.use is use
    assert sentences(found, 10.0)[0].startswith(sentence)


def test_what_is_said_of_quality_speed_cost_and_break_even() -> None:
    text = " ".join(sentences(duel("behind", way(True, 600)), 10.0))
    assert "after 10 minutes of training each CALM is behind the token Transformer: \u22121.00 ± 0.30 BrierLM" in text
    assert "CALM, centre of 8, 600 tokens/s against 300, 2.00 times" in text
    assert "27 min 47 s of this machine and 2e+12 operations with CALM" in text
    assert "Break-even: none in sight within 100 times this budget" in text
    meets = BreakEven("meets", "BrierLM", 3600.0, 1800.0, None, 0.3, -1.0, (0.4, 0.2))
    text = " ".join(sentences(duel("behind", None, meets), 10.0))
    assert "meet at about 1 h 0 min of training" in text
    assert "30 min 0 s to beyond 100 times this budget; in 30% they do not meet" in text
    assert "Break-even: CALM is past it" in " ".join(sentences(duel("ahead", None), 10.0))
    assert "too few points" in " ".join(sentences(duel("tie", None, BreakEven("open")), 10.0))
