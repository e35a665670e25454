"""scoring.brier and scoring.clusters: exact expectations, slow twins, errors, printed forms."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextvec.scoring.brier import BrierResult, Protocol, brier_scores, exact_tail_scores, summarise
from nextvec.scoring.clusters import cluster_ratio

PROTOCOL = Protocol(
    name="documents-64",
    tokenizer_hash="a" * 64,
    context_tokens=64,
    positions="patch_starts",
    stride=4,
    draws=8,
    estimator="all_pairs",
    decode="argmax",
    documents=3,
    documents_hash="b" * 64,
    seed=0,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_scores(draws, target, valid, estimator):
    """The definition, with plain loops."""
    draws, target, valid = draws.tolist(), target.tolist(), valid.tolist()
    if estimator == "two_draws":
        draws = draws[:2]
    values = []
    for row, (goal, scorable) in enumerate(zip(target, valid, strict=True)):
        values.append([])
        for k in range(1, len(goal) + 1):
            grams = [tuple(draw[row][:k]) for draw in draws]
            right = sum(gram == tuple(goal[:k]) for gram in grams) / len(grams)
            pairs = list(itertools.combinations(grams, 2))
            same = sum(a == b for a, b in pairs) / len(pairs)
            values[-1].append(2 * right - same if scorable[k - 1] else 0.0)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["all_pairs", "two_draws"])
@pytest.mark.parametrize(("draws", "order"), [(2, 1), (3, 2), (8, 4), (17, 3)])
def test_scores_equal_the_slow_twin(estimator, draws, order):
    g = generator(draws)
    tokens = torch.randint(0, 3, (draws, 200, order), generator=g)
    target = torch.randint(0, 3, (200, order), generator=g)
    valid = torch.rand(200, order, generator=g) < 0.8
    fast = brier_scores(tokens, target, valid, estimator)
    torch.testing.assert_close(fast.double(), slow_scores(tokens, target, valid, estimator), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("estimator", "draws"), [("two_draws", 2), ("two_draws", 3), ("all_pairs", 2), ("all_pairs", 3)]
)
def test_unbiased_by_exact_enumeration(estimator, draws):
    """Over every S-tuple of a four-outcome law, for every target: each expectation is 2P(y) - sum P^2."""
    law = {(0, 0): 0.5, (0, 1): 0.2, (1, 0): 0.25, (1, 1): 0.05}
    tuples = list(itertools.product(law, repeat=draws))
    weight = torch.tensor([math.prod(law[gram] for gram in pool) for pool in tuples], dtype=torch.float64)
    tokens = torch.tensor(tuples).transpose(0, 1)  # (S, every tuple, 2)
    for target in law:
        goal = torch.tensor(target).expand(len(tuples), 2)
        values = brier_scores(tokens, goal, torch.ones_like(goal, dtype=torch.bool), estimator)
        found = (values.double() * weight[:, None]).sum(dim=0)
        first = {0: 0.7, 1: 0.3}
        expected = [
            2 * first[target[0]] - sum(p * p for p in first.values()),
            2 * law[target] - sum(p * p for p in law.values()),
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def chain(weights):
    """A law over triples of 3 tokens as conditional probabilities: P(a), P(b | a), P(c | a, b)."""
    joint = torch.tensor(weights, dtype=torch.float64).view(3, 3, 3)
    joint = joint / joint.sum()
    return joint, joint.sum((1, 2)), joint.sum(2) / joint.sum((1, 2))[:, None], joint / joint.sum(2, keepdim=True)


def expected_by_draws(law, target, estimator, draws=2):
    """E of Brier-1..3 over every tuple of draws from `law` (3, 3, 3)."""
    grams = list(itertools.product(range(3), repeat=3))
    tuples = list(itertools.product(grams, repeat=draws))
    weight = torch.tensor([math.prod(float(law[gram]) for gram in pool) for pool in tuples], dtype=torch.float64)
    goal = torch.tensor(target).expand(len(tuples), 3)
    values = brier_scores(
        torch.tensor(tuples).transpose(0, 1), goal, torch.ones_like(goal, dtype=torch.bool), estimator
    )
    return (values.double() * weight[:, None]).sum(0)


def expected_by_tails(law, first, second, third, target, draws=1):
    """E of Brier-1..3 of exact_tail over every tuple of drawn prefixes; the last token is never drawn."""
    prefixes = list(itertools.product(range(3), repeat=2))
    tuples = list(itertools.product(prefixes, repeat=draws))
    weight = torch.tensor([math.prod(float(law[a, b].sum()) for a, b in pool) for pool in tuples], dtype=torch.float64)
    log = torch.tensor([[[first[a], second[a, b], 0.5] for a, b in pool] for pool in tuples]).log()
    same = [[[first, second[a], third[a, b]] for a, b in pool] for pool in tuples]
    collision = torch.tensor([[[float(p.square().sum()) for p in one] for one in pool] for pool in same])
    a, b, c = target
    goal = torch.stack([first[a], second[a, b], third[a, b, c]]).log().expand(len(tuples), 3)
    valid = torch.ones(len(tuples), 3, dtype=torch.bool)
    values = exact_tail_scores(goal, log.transpose(0, 1), collision.transpose(0, 1), valid)
    return (values.double() * weight[:, None]).sum(0)


WEIGHTS = st.lists(st.floats(0.05, 1.0), min_size=27, max_size=27)


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.tuples(*[st.integers(0, 2)] * 3))
def test_every_estimator_has_the_same_expectation(weights, target):
    """Laws of three tokens in a row: 2P(y) - sum P^2 for each order, whichever way it is estimated."""
    law, first, second, third = chain(weights)
    a, b, c = target
    wanted = torch.stack(
        [
            2 * law[a].sum() - law.sum((1, 2)).square().sum(),
            2 * law[a, b].sum() - law.sum(2).square().sum(),
            2 * law[a, b, c] - law.square().sum(),
        ]
    )
    found = {
        "all_pairs": expected_by_draws(law, target, "all_pairs"),
        "two_draws": expected_by_draws(law, target, "two_draws"),
        "exact_tail": expected_by_tails(law, first, second, third, target),
        "exact_tail, 2 draws": expected_by_tails(law, first, second, third, target, draws=2),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=5, deadline=None)
@given(WEIGHTS, WEIGHTS)
def test_strictly_proper_by_exact_enumeration(truth, other):
    """Under the truth, any other law loses exactly the squared distance of its n-gram laws."""
    law, wrong = chain(truth), chain(other)
    for estimate in ("all_pairs", "exact_tail"):
        gap = torch.zeros(3, dtype=torch.float64)
        for target in itertools.product(range(3), repeat=3):
            if estimate == "exact_tail":
                gain = expected_by_tails(*law, target) - expected_by_tails(*wrong, target)
            else:
                gain = brier_gap(law[0], wrong[0], target)
            gap += law[0][target] * gain
        loss = [(law[0].sum(d) - wrong[0].sum(d)).square().sum() for d in ((1, 2), (2,))]
        loss.append((law[0] - wrong[0]).square().sum())
        torch.testing.assert_close(gap, torch.stack(loss), atol=1e-6, rtol=0)


def brier_gap(law, wrong, target):
    return expected_by_draws(law, target, "all_pairs") - expected_by_draws(wrong, target, "all_pairs")


def test_exact_tail_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"got \(5, 4\), \(5, 4\), \(2, 5, 3\), \(2, 5, 4\)"):
        exact_tail_scores(torch.zeros(5, 4), torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), torch.ones(5, 4))


def test_all_pairs_has_less_variance_and_the_truth_scores_best():
    g = generator(1)
    truth = torch.tensor([0.6, 0.3, 0.1])
    target = torch.multinomial(truth, 20000, replacement=True, generator=g)[:, None]
    valid = torch.ones_like(target, dtype=torch.bool)

    def scores(law, estimator="all_pairs"):
        tokens = torch.multinomial(law, 8 * 20000, replacement=True, generator=g).view(8, 20000, 1)
        return brier_scores(tokens, target, valid, estimator)

    honest, two = scores(truth), scores(truth, "two_draws")
    assert honest.var() < 0.6 * two.var()
    for other in ([1.0, 0.0, 0.0], [0.5, 0.4, 0.1], [0.34, 0.33, 0.33]):
        assert scores(torch.tensor(other)).mean() < honest.mean()


def test_invariant_under_permutation_of_the_draws_and_extremes():
    g = generator(2)
    tokens = torch.randint(0, 2, (6, 50, 4), generator=g)
    target = torch.randint(0, 2, (50, 4), generator=g)
    valid = torch.ones(50, 4, dtype=torch.bool)
    order = torch.randperm(6, generator=g)
    torch.testing.assert_close(brier_scores(tokens, target, valid), brier_scores(tokens[order], target, valid))
    right = target.expand(6, 50, 4)
    assert brier_scores(right, target, valid).eq(1).all()
    assert brier_scores(right + 1, target, valid).eq(-1).all()
    huge = torch.full((2, 1, 1), 2**31 - 1)
    assert brier_scores(huge, huge[0], valid[:1, :1]).item() == 1
    assert brier_scores(tokens[:, :0], target[:0], valid[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "target", "estimator", "message"),
    [
        ((1, 5, 4), (5, 4), "all_pairs", "at least 2 draws per position; got 1"),
        ((2, 5, 4), (5, 3), "all_pairs", r"got \(2, 5, 4\), \(5, 3\)"),
        ((2, 5, 5), (5, 5), "all_pairs", "order must be between 1 and 4; got 5"),
        ((2, 5, 4), (5, 4), "three_draws", "estimator must be one of all_pairs, two_draws; got 'three_draws'"),
    ],
)
def test_bad_arguments_are_named(shape, target, estimator, message):
    goal = torch.zeros(target, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        brier_scores(torch.zeros(shape, dtype=torch.long), goal, goal == 0, estimator)


def test_cluster_errors_one_position_per_document_is_the_textbook_error():
    values = torch.randn(50, 2, generator=generator())
    valid = torch.ones(50, 2, dtype=torch.bool)
    ratio = cluster_ratio(values, valid, torch.arange(50))
    torch.testing.assert_close(ratio.mean, values.double().mean(dim=0))
    torch.testing.assert_close(ratio.covariance, values.double().T.cov() / 50)
    repeated = cluster_ratio(values.repeat(7, 1), valid.repeat(7, 1), torch.arange(50).repeat(7) * 3 - 9)
    torch.testing.assert_close(repeated.covariance, ratio.covariance)  # copies inside a document add nothing
    assert repeated.count.tolist() == [350, 350]
    assert repeated.clusters == 50


def test_cluster_errors_equal_the_slow_twin_and_cover():
    g = generator(3)
    sizes = torch.randint(1, 30, (40,), generator=g)
    document = torch.repeat_interleave(torch.arange(40), sizes)
    shift = torch.randn(40, 3, generator=g)
    values = shift[document] + 0.3 * torch.randn(len(document), 3, generator=g)
    valid = torch.rand(values.shape, generator=g) < 0.7
    ratio = cluster_ratio(values, valid, document)
    rows = [
        [
            (sum(values[i, q].item() for i in range(len(document)) if document[i] == c and valid[i, q]),
             sum(1 for i in range(len(document)) if document[i] == c and valid[i, q]))
            for q in range(3)
        ]
        for c in range(40)
        if valid[document == c].any()
    ]  # fmt: skip
    count = [sum(row[q][1] for row in rows) for q in range(3)]
    mean = [sum(row[q][0] for row in rows) / count[q] for q in range(3)]
    for a, b in itertools.product(range(3), repeat=2):
        expected = (
            sum((r[a][0] - mean[a] * r[a][1]) * (r[b][0] - mean[b] * r[b][1]) for r in rows) / count[a] / count[b]
        )
        expected *= len(rows) / (len(rows) - 1)
        assert ratio.covariance[a, b].item() == pytest.approx(expected, rel=1e-6)
    assert ratio.mean.tolist() == pytest.approx(mean, rel=1e-6)


def test_cluster_errors_have_the_right_size():
    """400 repeats of 60 unequal documents around a true mean of 0: z has variance 1 within 5 standard errors."""
    g = generator(4)
    scores = []
    for _ in range(400):
        sizes = torch.randint(1, 20, (60,), generator=g)
        document = torch.repeat_interleave(torch.arange(60), sizes)
        values = torch.randn(60, 1, generator=g)[document] + torch.randn(len(document), 1, generator=g)
        ratio = cluster_ratio(values, torch.ones_like(values, dtype=torch.bool), document)
        scores.append(ratio.mean.item() / ratio.covariance.item() ** 0.5)
    variance = torch.tensor(scores).square().mean().item()
    assert abs(variance - 1) < 5 * math.sqrt(2 / 400) + 0.04  # 0.04: the estimator's own bias at 60 clusters


def test_cluster_ratio_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"must both be \(N, Q\)"):
        cluster_ratio(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.zeros(2))
    with pytest.raises(ValueError, match=r"valid positions per column: \[3, 0\]"):
        cluster_ratio(torch.zeros(3, 2), torch.tensor([[True, False]] * 3), torch.arange(3))


def test_brier_lm_is_the_geometric_mean_with_the_delta_method():
    g = generator(5)
    document = torch.arange(300) % 30
    values = torch.tensor([0.4, 0.2, 0.1, 0.05]) + 0.1 * torch.randn(30, 4, generator=g)[document]
    valid = torch.rand(300, 4, generator=g) < 0.9
    result = summarise(values, valid, document, PROTOCOL)
    mean = torch.tensor(result.brier, dtype=torch.float64)
    assert result.brier_lm == pytest.approx(100 * mean.prod().item() ** 0.25)
    slope = [
        (100 * (mean + step).prod().item() ** 0.25 - 100 * (mean - step).prod().item() ** 0.25) / 2e-6
        for step in torch.eye(4, dtype=torch.float64) * 1e-6
    ]
    covariance = cluster_ratio(values, valid, document).covariance
    expected = sum(slope[a] * slope[b] * covariance[a, b].item() for a in range(4) for b in range(4)) ** 0.5
    assert result.brier_lm_stderr == pytest.approx(expected, rel=1e-5)
    assert result.brier_stderr == pytest.approx(covariance.diagonal().sqrt().tolist())
    assert result.positions == tuple(valid.sum(dim=0).tolist())
    assert f"BrierLM  {result.brier_lm:.3f} ± " in str(result)
    assert "documents-64, patch_starts every 4 tokens, 8 draws (all_pairs), decoding argmax" in str(result)
    assert result.why_none() == ""


def test_a_non_positive_order_has_no_brier_lm_and_says_so():
    values = torch.tensor([0.4, 0.2, 0.0, -0.05]).repeat(10, 1)
    result = summarise(values, torch.ones_like(values, dtype=torch.bool), torch.arange(10), PROTOCOL)
    assert result.brier_lm is None
    assert result.brier_lm_stderr is None
    assert "BrierLM  none: Brier-3 is +0.00000, Brier-4 is -0.05000, and a geometric mean needs" in str(result)


def test_small_figures_keep_two_digits():
    values = torch.tensor([[0.4, 2e-5, 2e-5, -3.5e-7], [0.2, 0.0, 2e-5, -3.5e-7]]).repeat(50, 1)
    shown = str(summarise(values, torch.ones_like(values, dtype=torch.bool), torch.arange(100), PROTOCOL)).splitlines()
    assert shown[0].startswith("Brier-1  +0.30000 ± 0.01005  (100")
    assert shown[1].startswith("Brier-2  +1.0e-05 ± 1.0e-06  (100")
    assert shown[2].startswith("Brier-3  +2.0e-05 ± ")
    assert "Brier-4 is -3.5e-07, and a geometric mean needs" in shown[4]


def test_one_document_has_no_standard_error_and_fewer_orders_no_brier_lm():
    values = torch.tensor([0.4, 0.2]).repeat(10, 1)
    result = summarise(values, torch.ones_like(values, dtype=torch.bool), torch.zeros(10), PROTOCOL)
    assert result.brier_stderr is None
    assert "there is one document" in str(result)
    assert "only 2 were measured" in str(result)
    four = summarise(values.repeat(1, 2), torch.ones(10, 4, dtype=torch.bool), torch.zeros(10), PROTOCOL)
    assert four.brier_lm is not None
    assert four.brier_lm_stderr is None


@pytest.mark.parametrize("documents", [1, 5])
def test_results_survive_json(documents):
    values = torch.rand(20, 4, generator=generator(6))
    result = summarise(values, values > 0.1, torch.arange(20) % documents, PROTOCOL)
    assert [sum(row) for row in result.per_document.positions] == list(result.positions)
    means = [sum(row) / count for row, count in zip(result.per_document.sums, result.positions, strict=True)]
    assert means == pytest.approx(result.brier)
    old = {name: value for name, value in result.to_dict().items() if name != "per_document"}
    assert BrierResult.from_dict(old).per_document is None
    assert BrierResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
