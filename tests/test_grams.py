"""Hashed n-grams: rows by plain integers, two ways to the same numbers, tables that know when they are old, what is refused.

What heads and the token Transformer make of them is in test_recall.py and test_models.py.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from nextvec.config import AutoregressiveHeadConfig, MixtureHeadConfig, TokenLMConfig
from nextvec.errors import ConfigError
from nextvec.model import grams
from nextvec.model.grams import DIM, FACTORS, SHIFT, Grams, windows
from nextvec.model.init import initialise
from nextvec.model.recall import last_ids

BACKBONE = {"layers": 1, "width": 8, "inner": 8, "heads": 2}


def filled(buckets: int = 50, width: int = 8) -> Grams:
    module = Grams(width, buckets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.double()


def test_rows_are_a_hash_in_integers_without_overflow_up_to_ids_of_18_bits() -> None:
    module, most = Grams(8, 1000), 2**18 - 1
    lines = [(-1, -1, 0), (-1, 3, 5), (1, 2, 3), (most, most, most), (0, most, 7)]
    rows = module.rows(torch.tensor(lines))
    for line, found in zip(lines, rows.tolist(), strict=True):
        sums = [sum((y + 1) * factor for y, factor in zip(line, factors, strict=True)) for factors in FACTORS]
        assert all(0 <= each < 2**63 for each in sums)
        assert found == [(each >> SHIFT) % 1000 + 1000 * table for table, each in enumerate(sums)]


def test_the_pair_does_not_see_the_third_and_n_grams_spread_over_the_rows() -> None:
    module = Grams(8, 512)
    every = torch.tensor(list(product(range(16), repeat=3)))
    rows = module.rows(every)
    of_pair: dict[tuple[int, int], set[int]] = {}
    for (_, a, b), row in zip(every.tolist(), rows[:, 0].tolist(), strict=True):
        of_pair.setdefault((a, b), set()).add(row)
    assert all(len(each) == 1 for each in of_pair.values())
    pairs = len({row for each in of_pair.values() for row in each})
    assert pairs > 0.7 * 512 * (1 - (1 - 1 / 512) ** 256)  # as many as random rows would be, or nearly
    assert rows[:, 1].unique().numel() > 0.95 * 512
    assert int(rows.min()) >= 0
    assert int(rows.max()) < 1024


def test_with_and_without_gradient_it_says_the_same_and_follows_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module, lines = filled(), torch.randint(-1, 30, (4, 5, 3), generator=torch.Generator().manual_seed(1))
    trained = module(lines)
    with torch.no_grad():
        torch.testing.assert_close(module(lines), trained.detach())
        module.up.weight.mul_(2.0)
        torch.testing.assert_close(module(lines), 2 * trained.detach())
        module.embedding.weight.neg_()
        torch.testing.assert_close(module(lines), -2 * trained.detach())
        monkeypatch.setattr(grams, "MOST_MADE", 0)  # too large for a table
        torch.testing.assert_close(module(lines), -2 * trained.detach())


def test_it_begins_at_nothing_and_learns() -> None:
    module = Grams(8, 20)
    initialise(module, torch.Generator().manual_seed(0), 0.1)
    line = torch.tensor([[1, 2, 3]])
    assert torch.equal(module(line), torch.zeros(1, 8))
    (module(line) - 1).square().sum().backward()
    assert module.up.weight.grad is not None
    assert module.up.weight.grad.abs().min() > 0
    assert list(module.state_dict()) == ["embedding.weight", "up.weight"]
    assert module.embedding.weight.shape == (40, DIM)


def test_it_may_be_made_without_memory_and_filled_later() -> None:
    """As run directories are loaded."""
    line = torch.tensor([[1, 2, 3]])
    with torch.device("meta"):
        empty = Grams(8, 50)
        assert empty(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 8)
    whole = filled()
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty(line), whole(line))


def test_last_ids_of_whole_texts_and_of_places_agree() -> None:
    text = torch.arange(10, 18).view(2, 4)
    assert windows(text)[0].tolist() == [[-1, -1, 10], [-1, 10, 11], [10, 11, 12], [11, 12, 13]]
    seen = torch.arange(1, 5).expand(2, -1)
    assert torch.equal(last_ids(text, seen, 3), windows(text))
    all_of_it = torch.full((2, 1), 4)
    assert torch.equal(last_ids(text, all_of_it, 3, all_seen=True)[:, 0], windows(text)[:, -1])
    assert last_ids(text[:, :2], torch.full((2, 1), 2), 3, all_seen=True)[0].tolist() == [[-1, 10, 11]]


@pytest.mark.parametrize("head", [MixtureHeadConfig, AutoregressiveHeadConfig])
def test_without_recall_they_are_refused(head: type[MixtureHeadConfig | AutoregressiveHeadConfig]) -> None:
    message = "grams = 64 needs recall, which keeps the tokens of the text at hand: give recall = 1, or grams = 0"
    with pytest.raises(ConfigError, match=message):
        head.parse({"grams": 64})
    with pytest.raises(ConfigError, match=message):
        TokenLMConfig.parse({"vocab_size": 10, "backbone": BACKBONE, "grams": 64})
    assert head.parse({"grams": 64, "recall": 1}).grams == 64
