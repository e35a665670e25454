"""evaluate.toy: the source whose likelihood is known, against walks over n-grams, and the evaluator against its exact sums."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from nextvec.evaluate.brier import evaluate_sampler
from nextvec.evaluate.toy import Markov, exact_brier, exact_cross_entropy, plug_in_cross_entropy

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "toy_language.py"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def source(vocab=3, memory=2):
    return Markov.random(vocab, memory, 1.5, generator(vocab))


def walk(law, context, gram):
    """P(gram | context), token by token; the context as a list of its last `memory` tokens."""
    p, read = 1.0, list(context)
    for token in gram:
        row = 0
        for past in read[-law.memory :]:
            row = row * law.vocab_size + past
        p *= law.table[row, token].item()
        read.append(token)
    return p


@pytest.mark.parametrize(("vocab", "memory"), [(3, 2), (2, 3), (4, 1)])
def test_ngrams_and_the_stationary_law_equal_plain_walks(vocab, memory):
    law = source(vocab, memory)
    assert law.memory == memory
    contexts = list(itertools.product(range(vocab), repeat=memory))
    for n in (1, 2, 3):
        wanted = [[walk(law, c, gram) for gram in itertools.product(range(vocab), repeat=n)] for c in contexts]
        torch.testing.assert_close(law.ngrams(n), torch.tensor(wanted, dtype=torch.float64))
    weight = law.stationary()
    after = torch.zeros_like(weight)
    for i, context in enumerate(contexts):
        for token in range(vocab):
            after[contexts.index((*context[1:], token))] += weight[i] * law.table[i, token]
    torch.testing.assert_close(after, weight)
    assert weight.sum().item() == pytest.approx(1)


def test_text_and_draws_follow_the_law():
    """Frequencies of 3-grams in 40,000 tokens and of 8,000 drawn 4-grams: chi-squared, 6 standard deviations."""
    law = source()
    text = law.text(400, generator(1), rows=100)
    index = law.context_of(text[:, 100:102])
    counts = torch.bincount(index, minlength=9).double()
    assert ((counts - 100 * law.stationary()).square() / (100 * law.stationary())).sum() < 8 + 6 * 16**0.5
    context = text[0, :5]
    drawn = law.sample([context, text[1, :9]], 8000, generator(2))
    assert drawn.shape == (8000, 2, 4)
    place = 3 ** torch.arange(3, -1, -1)
    counts = torch.bincount((drawn[:, 0] * place).sum(1), minlength=81).double()
    expected = 8000 * law.ngrams(4)[law.context_of(context)]
    assert ((counts - expected).square() / expected).sum() < 80 + 6 * 160**0.5


def test_exact_figures_equal_plain_sums_and_the_source_is_best():
    truth = source()
    model = truth.noisy(1.0, generator(3))
    contexts = list(itertools.product(range(3), repeat=2))
    weight = truth.stationary().tolist()
    for n in (1, 2, 4):
        total = 0.0
        for w, c in zip(weight, contexts, strict=True):
            for gram in itertools.product(range(3), repeat=n):
                p, q = walk(truth, c, gram), walk(model, c, gram)
                total += w * (2 * p * q - q * q)
        assert exact_brier(truth, model)[n - 1].item() == pytest.approx(total)
    entropy = exact_cross_entropy(truth, truth)
    assert exact_cross_entropy(truth, truth.uniform()) == pytest.approx(math.log(3))
    for other in (model, truth.at_temperature(2.0), truth.at_temperature(0.5), truth.mixed(truth.uniform(), 0.2)):
        assert exact_cross_entropy(truth, other) > entropy
        assert bool((exact_brier(truth, other) < exact_brier(truth, truth)).all())
    torch.testing.assert_close(truth.at_temperature(1.0).table, truth.table)
    sure = Markov(torch.eye(3, dtype=torch.float64)[torch.arange(9) % 3])
    assert exact_cross_entropy(truth, sure) == math.inf


def test_the_evaluator_finds_the_exact_brier_of_a_black_box():
    """Mean of Brier-1..4 over held-out text against enumeration: five standard errors."""
    truth = source(4, 1)
    for model in (truth, truth.at_temperature(1.6), truth.mixed(truth.uniform(), 0.4)):
        found = evaluate_sampler(
            model.sample,
            [row.numpy() for row in truth.text(66, generator(4), rows=120)],
            context_tokens=128,
            stride=2,
            draws=16,
            generator=generator(5),
            tokenizer_hash="toy",
            batch_rows=40,
        )
        for value, error, exact in zip(
            found.brier, found.brier_stderr, exact_brier(truth, model).tolist(), strict=True
        ):
            assert abs(value - exact) < 5 * error


def test_the_plug_in_finds_the_cross_entropy_of_a_law_within_its_bias():
    truth = source(4, 1)
    model = truth.at_temperature(1.5)
    contexts = truth.text(8, generator(6), rows=200)

    def draw(contexts, draws, g):
        return model.sample(list(contexts), draws, g)[..., :2]

    found = plug_in_cross_entropy(truth, draw, contexts, 2, 4000, generator(7))
    law = truth.ngrams(2)[truth.context_of(contexts)]
    exact = -(law * model.ngrams(2)[truth.context_of(contexts)].log()).sum(1) / 2
    assert found.cross_entropy == pytest.approx(exact.mean().item(), abs=0.005)
    assert abs(exact_cross_entropy(truth, model) - found.cross_entropy) < 5 * found.stderr + 0.005
    assert 0 < found.bias < 0.005
    assert found.floor == pytest.approx(-math.log(0.5 / (4000 + 8)) / 2)

    def deaf(contexts, draws, g):
        return torch.zeros(draws, len(contexts), 2, dtype=torch.long)

    missed = plug_in_cross_entropy(truth, deaf, contexts, 2, 4000, generator(7))
    assert found.cross_entropy < missed.cross_entropy < missed.floor


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(5, 2).double() / 2, r"V\^m rows"),
        (torch.ones(4, 2).double(), "must be a law"),
        (torch.tensor([[1.5, -0.5]] * 2).double(), "must be a law"),
        (torch.ones(3, 1).double(), r"V >= 2"),
    ],
)
def test_a_table_that_is_no_law_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Markov(table)


@pytest.mark.slow
def test_the_figure_is_made_by_its_command(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("toy_language", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main(["--shrunk", "--svg", str(tmp_path / "toy.svg"), "--json", str(tmp_path / "toy.json")])
    found = json.loads((tmp_path / "toy.json").read_text())
    assert found["correlations"]["laws"]["pearson"] < -0.8
    assert {point["kind"] for point in found["points"]} == {"laws", "ar", "energy"}
    assert (tmp_path / "toy.svg").read_text().count("<svg") == 1
    assert "correlations" in capsys.readouterr().out
    monkeypatch.setattr(module, "measure", None)  # the figure again, from the points alone
    module.main(["--points", str(tmp_path / "toy.json"), "--svg", str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "toy.svg").read_bytes()
