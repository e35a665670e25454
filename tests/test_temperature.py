"""Temperature sampling against enumeration, closed forms and plain loops. Seeds are fixed.

Chi-square tests fail by chance with probability 1e-6 each (for a fresh seed).
"""

from __future__ import annotations

import itertools
import json
import math
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nextvec.errors import UserError
from nextvec.sampling.exact import BudgetError, estimate_normaliser, exact_temperature
from nextvec.sampling.temperature import (
    batch_temperature,
    check_temperature,
    condition,
    count_equal,
    pool_probabilities,
    sample_logits,
    split_exponent,
)

LAW = (0.5, 0.3, 0.2)
TEMPERATURES = [1.0, 0.8, 0.6, 0.5, 0.4, 1 / 3, 0.3, 0.25]
FALSE_ALARM = 1e-6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sharpened(law: tuple[float, ...], temperature: float) -> list[float]:
    powers = [p ** (1 / temperature) for p in law]
    return [p / sum(powers) for p in powers]


def algorithm_2(pool: tuple[int, ...], n: int) -> dict[int, float]:
    """The paper's batch algorithm for T = 1/n on one pool, written as it stands: probability of each value."""
    counts = Counter(pool)
    for m in range(n, 0, -1):
        weight = {x: math.comb(c, m) for x, c in counts.items() if c >= m}
        if weight:
            return {x: w / sum(weight.values()) for x, w in weight.items()}
    raise AssertionError("a pool is never empty")


def pools(outcomes: int, size: int) -> Tensor:
    """All ordered pools (outcomes ** size, size, 2), each value a patch of two tokens."""
    values = torch.tensor(list(itertools.product(range(outcomes), repeat=size)))
    return torch.stack((values // 2, values % 2), dim=-1)


def pool_law(law: tuple[float, ...], size: int, temperature: float) -> list[float]:
    """Exact law of the batch sampler's result for a pool of `size` draws: every pool, by its probability."""
    all_BNK = pools(len(law), size)
    value_BN = all_BNK[..., 0] * 2 + all_BNK[..., 1]
    weight_B1 = torch.tensor(law, dtype=torch.float64)[value_BN].prod(dim=1, keepdim=True)
    chosen_BN = weight_B1 * pool_probabilities(all_BNK, temperature)
    return [float(chosen_BN[value_BN == x].sum()) for x in range(len(law))]


def distance(left: list[float], right: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / 2


@pytest.mark.parametrize(("n", "size"), [(1, 4), (2, 4), (2, 6), (3, 4), (3, 3), (4, 6), (5, 5)])
def test_every_pool_of_a_small_law_has_the_papers_probabilities(n: int, size: int) -> None:
    all_BNK = pools(len(LAW), size)
    got_BN = pool_probabilities(all_BNK, 1 / n)
    for pool, probability in zip(itertools.product(range(len(LAW)), repeat=size), got_BN.tolist(), strict=True):
        expected = algorithm_2(pool, n)
        for value in set(pool):
            total = sum(p for p, x in zip(probability, pool, strict=True) if x == value)
            assert total == pytest.approx(expected.get(value, 0.0), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.8, 0.6, 0.4, 0.35, 0.3])
def test_other_temperatures_weigh_by_generalised_falling_factorials(temperature: float) -> None:
    b, n = 1 / temperature, math.floor(1 / temperature)
    all_BNK = pools(len(LAW), 5)
    for pool, probability in zip(
        itertools.product(range(len(LAW)), repeat=5), pool_probabilities(all_BNK, temperature).tolist(), strict=True
    ):
        counts = Counter(pool)
        weight = {x: math.gamma(c + 1) / math.gamma(c - b + 1) if c >= n else 0.0 for x, c in counts.items()}
        if not any(weight.values()):
            weight = {x: float(c == max(counts.values())) for x, c in counts.items()}
        for value, w in weight.items():
            total = sum(p for p, x in zip(probability, pool, strict=True) if x == value)
            assert total == pytest.approx(w / sum(weight.values()), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.8, 0.6, 0.4, 0.3])
@pytest.mark.parametrize("p", [0.1, 0.4, 0.9])
def test_the_weight_estimates_the_power_series_truncated_at_the_pool_size(temperature: float, p: float) -> None:
    """E w(c) Gamma(b+1) Gamma(N-b+1) / N! = p^n sum_{k <= N-n} (-1)^k C(a, k) (1-p)^k, over p^b by less than the bound."""
    b, size = 1 / temperature, 12
    n, a = math.floor(b), b - math.floor(b)
    mean = 0.0
    for c in range(n, size + 1):
        scaled = math.exp(
            math.lgamma(c + 1) - math.lgamma(c - b + 1) + math.lgamma(size - b + 1) - math.lgamma(size + 1)
        )
        mean += math.comb(size, c) * p**c * (1 - p) ** (size - c) * scaled
    term, series = 1.0, 0.0
    for k in range(size - n + 1):
        series += term
        term *= -(a - k) / (k + 1) * (1 - p)
    assert mean == pytest.approx(p**n * series, rel=1e-10)
    assert 0 <= mean - p**b <= p**n * (size - n) ** -a / math.gamma(1 - a)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_pool_law_approaches_the_sharpened_law(temperature: float) -> None:
    target = sharpened(LAW, temperature)
    small, large = (distance(pool_law(LAW, size, temperature), target) for size in (4, 9))
    if temperature == 1:
        assert small == pytest.approx(0, abs=1e-12)
        assert large == pytest.approx(0, abs=1e-12)
    else:
        assert large < small


@pytest.mark.parametrize("temperature", [0.8, 0.5, 0.4, 0.3])
def test_a_large_pool_gives_the_sharpened_law(temperature: float) -> None:
    draws = torch.multinomial(torch.tensor(LAW), 200_000, replacement=True, generator=seeded())
    probability = pool_probabilities(draws[None, :, None], temperature)[0]
    got = [float(probability[draws == x].sum()) for x in range(len(LAW))]
    assert distance(got, sharpened(LAW, temperature)) < 0.01


def test_the_weights_are_continuous_in_the_temperature() -> None:
    all_BNK = pools(3, 5)
    for n in (2, 3, 4):
        below, at, above = (pool_probabilities(all_BNK, 1 / b) for b in (n - 1e-7, n, n + 1e-7))
        torch.testing.assert_close(below, at, atol=1e-5, rtol=0)
        torch.testing.assert_close(above, at, atol=1e-5, rtol=0)


def test_every_reciprocal_counts_as_whole() -> None:
    """1 / (1 / 49) is 48.999..; such a temperature still is 1/49."""
    for n in range(1, 1000):
        assert split_exponent(1 / n) == (n, 0.0)
    assert split_exponent(0.4) == (2, 0.5)


def test_counts_equal_plain_loops_for_large_ids() -> None:
    candidates = torch.randint(0, 3, (4, 60, 3), generator=seeded()) * 100_000_007
    counts = count_equal(candidates)
    keep = torch.rand(4, 60, generator=seeded(1)) < 0.5
    kept_counts = count_equal(candidates, keep)
    for row, kept, got, got_kept in zip(
        candidates.tolist(), keep.tolist(), counts.tolist(), kept_counts.tolist(), strict=True
    ):
        assert got == [row.count(patch) for patch in row]
        pool = [patch for patch, use in zip(row, kept, strict=True) if use]
        assert got_kept == [pool.count(patch) if use else 0 for patch, use in zip(row, kept, strict=True)]


def test_a_kept_pool_is_the_pool_of_the_kept_draws_alone() -> None:
    candidates = torch.randint(0, 4, (1, 40, 2), generator=seeded())
    keep = torch.rand(1, 40, generator=seeded(1)) < 0.6
    got = pool_probabilities(candidates, 0.4, keep)
    assert torch.equal(got[~keep], torch.zeros(int((~keep).sum()), dtype=torch.float64))
    torch.testing.assert_close(got[keep][None], pool_probabilities(candidates[keep][None], 0.4))


def test_temperature_one_returns_the_first_kept_draw() -> None:
    candidates = torch.arange(12).reshape(2, 3, 2)
    assert batch_temperature(candidates, 1.0, seeded()).tolist() == [[0, 1], [6, 7]]
    keep = torch.tensor([[False, True, True], [False, False, True]])
    assert batch_temperature(candidates, 1.0, seeded(), keep).tolist() == [[2, 3], [10, 11]]


def test_choices_follow_the_exposed_probabilities() -> None:
    pool = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1])[None, :, None]
    expected = [float(pool_probabilities(pool, 0.4)[0][pool[0, :, 0] == x].sum()) for x in range(3)]
    rows = 20_000
    chosen = batch_temperature(pool.expand(rows, -1, -1), 0.4, seeded())[:, 0]
    assert chi_square_p_value(torch.bincount(chosen, minlength=3).tolist(), expected) > FALSE_ALARM


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    pool = torch.randint(0, 5, (6, 50, 2), generator=seeded())
    together = batch_temperature(pool, 0.5, [seeded(row) for row in range(6)])
    for row in range(6):
        assert torch.equal(batch_temperature(pool[row : row + 1], 0.5, [seeded(row)])[0], together[row])


def test_choosing_a_patch_never_waits_for_the_host() -> None:
    """Run on tensors without values, where reading one raises."""
    real = torch.zeros(2, 200, 4, dtype=torch.int64)
    batch_temperature(real, 0.4, seeded())  # the table of weights is made once per size and temperature
    with FakeTensorMode(allow_non_fake_inputs=True):
        pool = torch.empty(2, 200, 4, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            pool.sum().item()
        prefix, length = torch.empty(2, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
        candidates, keep = condition(pool, prefix, length)
        assert batch_temperature(candidates, 0.4, seeded(), keep).shape == (2, 4)


def test_conditioning_keeps_the_draws_that_agree() -> None:
    pool = torch.tensor([[[1, 2, 3], [1, 5, 6], [4, 2, 9]]]).repeat(3, 1, 1)
    prefix = torch.tensor([[1, 2, 0], [1, 7, 0], [0, 0, 0]])
    candidates, keep = condition(pool, prefix, torch.tensor([2, 2, 0]))
    assert keep.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert candidates[0, 0].tolist() == [1, 2, 3]
    assert candidates[1, :2].tolist() == [[1, 7, 3], [1, 7, 6]]  # the longest agreement, then the prefix by force
    assert candidates[2].tolist() == pool[2].tolist()


def test_conditional_pools_give_the_exact_conditional_law() -> None:
    """At T = 1, over all pools that hold an agreeing draw, the result has the law P(second token | first token)."""
    law = (0.4, 0.3, 0.2, 0.1)  # of patches 00, 01, 10, 11
    all_BNK = pools(4, 4)
    weight_B = torch.tensor(law, dtype=torch.float64)[all_BNK[..., 0] * 2 + all_BNK[..., 1]].prod(dim=1)
    some_B = (all_BNK[..., 0] == 1).any(dim=1)
    all_BNK, weight_B = all_BNK[some_B], weight_B[some_B]
    rows = len(all_BNK)
    prefix = torch.tensor([[1, 0]]).expand(rows, -1)
    candidates, keep = condition(all_BNK, prefix, torch.ones(rows, dtype=torch.int64))
    result = batch_temperature(candidates, 1.0, seeded(), keep)
    assert (result[:, 0] == 1).all()
    share = float(weight_B[result[:, 1] == 1].sum() / weight_B.sum())
    assert share == pytest.approx(0.1 / 0.3, abs=1e-12)


def test_logits_are_sampled_at_their_temperature() -> None:
    logits = torch.tensor(LAW).log().expand(20_000, -1)
    tokens = sample_logits(logits, 0.4, seeded())
    assert chi_square_p_value(torch.bincount(tokens, minlength=3).tolist(), sharpened(LAW, 0.4)) > FALSE_ALARM


def sampler(law: tuple[float, ...], generator: torch.Generator) -> tuple[Callable[[int], Tensor], list[int]]:
    calls: list[int] = []

    def draw(count: int) -> Tensor:
        calls.append(count)
        value = torch.multinomial(torch.tensor(law), count, replacement=True, generator=generator)
        return torch.stack((value, value + 10), dim=-1)

    return draw, calls


@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.4, 0.3])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_exact_sampler_has_the_sharpened_law_and_the_stated_cost(temperature: float, batch: int) -> None:
    generator, runs = seeded(3), 1500
    draw, calls = sampler(LAW, generator)
    results = torch.stack([exact_temperature(draw, temperature, generator, 100_000, batch) for _ in range(runs)])
    assert torch.equal(results[:, 1], results[:, 0] + 10)
    counts = torch.bincount(results[:, 0], minlength=3).tolist()
    assert chi_square_p_value(counts, sharpened(LAW, temperature)) > FALSE_ALARM
    b = 1 / temperature
    n = math.floor(b)
    if batch == 1:  # nothing is fetched that is not used
        extra = sum(p ** (b - 1) for p in LAW) if b > n else 0.0
        expected = (n + extra) / sum(p**b for p in LAW)
        assert sum(calls) / runs == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("temperature", "remedy"),
    [(0.7, "take temperature 1, one of at most 0.5"), (0.2, "no 5 of them are equal, .*: raise the budget")],
)
def test_an_exhausted_budget_says_what_was_used(temperature: float, remedy: str) -> None:
    counter = itertools.count()

    def never_equal(count: int) -> Tensor:
        return torch.tensor([[next(counter)] for _ in range(count)])

    with pytest.raises(BudgetError, match=remedy) as caught:
        exact_temperature(never_equal, temperature, seeded(), budget=1000)
    assert 1000 - 5 < caught.value.draws <= 1000
    assert caught.value.restarts >= 10
    assert f"{caught.value.draws} draws used, {caught.value.restarts} restarts" in str(caught.value)
    assert next(counter) <= 1000


def test_a_race_that_the_budget_cuts_short_is_no_restart() -> None:
    """1/T = 2.5: two equal draws, and none left for the race that decides on the half."""
    with pytest.raises(BudgetError, match="2 draws used, 0 restarts"):
        exact_temperature(lambda count: torch.zeros(count, 1, dtype=torch.int64), 0.4, seeded(), budget=2)


def test_an_exhausted_budget_estimates_the_cost_from_equal_draws() -> None:
    draw, _ = sampler((0.02,) * 50, seeded())
    for temperature, words in (
        (0.25, r"Z = sum P\^\(1/T\) is about 8\.\de-06, and a patch takes about 4\d\d,\d\d\d draws"),
        (0.22, r"Z = sum P\^\(1/T\) is between \S+ and \S+, and a patch takes at least \d"),
    ):
        with pytest.raises(BudgetError, match=words) as caught:
            exact_temperature(draw, temperature, seeded(), budget=3000)
        assert caught.value.normaliser is not None
        low, high = caught.value.normaliser
        assert low * 0.7 < 50 * 0.02 ** (1 / temperature) < high * 1.3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_estimate_of_the_normaliser_is_unbiased(order: int) -> None:
    """Its mean over all pools of six draws is sum P^m, exactly."""
    all_BNK = pools(len(LAW), 6)
    weight_B = torch.tensor(LAW, dtype=torch.float64)[all_BNK[..., 0] * 2 + all_BNK[..., 1]].prod(dim=1).tolist()
    found = [estimate_normaliser(pool, 1 / order) for pool in all_BNK]
    mean = sum(w * each[0] for w, each in zip(weight_B, found, strict=True) if each is not None)
    assert mean == pytest.approx(sum(p**order for p in LAW), rel=1e-12)


def test_where_no_normaliser_can_be_estimated() -> None:
    draws = torch.zeros(3, 2, dtype=torch.int64)
    assert estimate_normaliser(draws, 0.7) is None
    assert estimate_normaliser(draws, 0.25) is None
    assert estimate_normaliser(draws, 1 / 3) == (1.0, 1.0)
    assert estimate_normaliser(draws, 0.3) == (0.0, 1.0)


@pytest.mark.parametrize("temperature", [0.8, 0.5, 0.4])
def test_a_law_of_many_patches_is_sharpened(temperature: float) -> None:
    """A law of 40 patches: exact sampler by chi-square at a false-alarm rate of 1e-6, the batch sampler in total variation."""
    law = tuple(p / sum(1 / (i + 1) for i in range(40)) for p in (1 / (i + 1) for i in range(40)))
    generator = seeded(7)
    draw, _ = sampler(law, generator)
    target = torch.tensor(sharpened(law, temperature), dtype=torch.float64)
    results = [int(exact_temperature(draw, temperature, generator, 1_000_000, 64)[0]) for _ in range(3000)]
    counts = torch.bincount(torch.tensor(results), minlength=40).to(torch.float64)
    large = target * 3000 >= 5  # the rest is one cell
    cells = [*zip(counts[large].tolist(), target[large].tolist(), strict=True)]
    if not bool(large.all()):
        cells.append((float(counts[~large].sum()), float(target[~large].sum())))
    statistic = sum((c - 3000 * p) ** 2 / (3000 * p) for c, p in cells)
    freedom = len(cells) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))  # Wilson-Hilferty
    assert z < 4.75
    distances = []
    for size in (8, 64, 512):
        pool_BNK = torch.multinomial(torch.tensor(law), 2000 * size, replacement=True, generator=generator)
        pool_BNK = pool_BNK.view(2000, size, 1)
        mean = torch.zeros(40, dtype=torch.float64)
        mean.scatter_add_(0, pool_BNK.flatten(), pool_probabilities(pool_BNK, temperature).flatten() / 2000)
        distances.append(float((mean - target).abs().sum() / 2))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.03


def test_a_budget_below_n_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1 / temperature = 5 draws; got 3"):
        exact_temperature(lambda count: torch.zeros(count, 1), 0.2, seeded(), budget=3)


@pytest.mark.parametrize("temperature", [0, 0.0, 1.5, -0.1, math.nan, math.inf])
def test_a_temperature_outside_its_range_is_refused(temperature: float) -> None:
    pool = torch.zeros(1, 4, 2, dtype=torch.int64)
    calls: list[Callable[[], object]] = [
        lambda: check_temperature(temperature),
        lambda: batch_temperature(pool, temperature, seeded()),
        lambda: pool_probabilities(pool, temperature),
        lambda: exact_temperature(lambda count: pool[0], temperature, seeded(), 10),
        lambda: sample_logits(torch.zeros(1, 3), temperature, seeded()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"temperature must be in \(0, 1\]; got {temperature:g}: "):
            call()


def test_a_pool_too_small_for_the_temperature_is_refused() -> None:
    with pytest.raises(UserError, match=r"temperature 0\.1 needs at least 10 candidates") as caught:
        batch_temperature(torch.zeros(1, 4, 2, dtype=torch.int64), 0.1, seeded())
    assert "got 4: take 10 or more candidates, or a temperature of at least 0.25" in str(caught.value)


def chi_square_p_value(counts: list[int], law: list[float]) -> float:
    """Upper tail of Pearson's statistic; two degrees of freedom (three outcomes), where it is exp(-x / 2)."""
    assert len(counts) == len(law) == 3
    total = sum(counts)
    statistic = sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, law, strict=True))
    return math.exp(-statistic / 2)


@pytest.mark.slow
def test_the_figure_of_convergence_is_made_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "temperature_convergence.py"))
    svg, out = tmp_path / "t.svg", tmp_path / "t.json"
    module["main"](["--shrunk", "--svg", str(svg), "--json", str(out)])
    rows = json.loads(out.read_text())["points"]
    assert svg.read_text().count("<svg") == 1
    for law in {row["law"] for row in rows}:
        for temperature in {row["temperature"] for row in rows}:
            mine = [row["distance"] for row in rows if (row["law"], row["temperature"]) == (law, temperature)]
            assert mine[-1] < mine[0] or temperature == 1
    assert "total variation" in capsys.readouterr().out


def cut_law(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The slow twin: tokens one by one from the most likely, until k of them or probability p are together."""
    law = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    order = sorted(range(len(law)), key=lambda token: (-law[token], token))[: top_k or len(law)]
    kept, total, together = [], sum(law[token] for token in order), 0.0
    for token in order:
        if top_p is not None and together >= top_p * total:
            break
        kept.append(token)
        together += law[token]
    return [law[token] / together if token in kept else 0.0 for token in range(len(law))]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, None), (3, None), (99, None), (None, 0.5), (None, 1e-9), (None, 1.0), (4, 0.7), (2, 0.99)]
)
def test_logits_are_cut_to_the_most_likely_tokens(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = [0.3, 2.0, -1.0, 2.0, 1.1, 0.0]  # with a tie
    draws = 20_000
    rows = torch.tensor(logits).expand(draws, -1)
    law = cut_law(logits, temperature, top_k, top_p)
    found = sample_logits(rows, temperature, seeded(3), top_k, top_p).bincount(minlength=6)
    for token, probability in enumerate(law):
        if probability == 0:
            assert found[token] == 0
        else:
            spread = math.sqrt(draws * probability * (1 - probability))
            assert abs(float(found[token]) - draws * probability) <= 5 * spread + 1e-9


def test_a_row_of_cut_logits_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(5, 30, generator=seeded(1))
    together = sample_logits(logits, 0.8, [seeded(row) for row in range(5)], 10, 0.9)
    for row in range(5):
        assert sample_logits(logits[row : row + 1], 0.8, [seeded(row)], 10, 0.9)[0] == together[row]
