"""Recall: what it looks up, by plain loops; whole texts, caches, branches and tiles agree; what it makes of a repeated text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    MixtureHeadConfig,
    OptimSettings,
    TokenLMConfig,
)
from nextvec.model.calm import Calm
from nextvec.model.grams import FACTORS, Grams
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.heads.mixture import MixtureHead
from nextvec.model.init import initialise
from nextvec.model.recall import DIM, Recall, Tokens, last_ids, queries
from nextvec.model.text_states import TextStates, join, vector_of
from nextvec.model.token_lm import TokenLM
from nextvec.sampling.engine import Engine
from nextvec.sampling.settings import Sampling
from nextvec.train.optim import make_optimizer

VOCAB, K, D = 7, 3, 12
GRAMS = 5  # rows of a table
HEADS = {"mixture": MixtureHeadConfig, "autoregressive": AutoregressiveHeadConfig}
BACKBONE = BackboneConfig(layers=1, width=D, inner=20, heads=2)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As in generation and evaluation: keys come from tables."""
    with torch.no_grad():
        yield


def said_together(grams: Grams | None, line: list[int]) -> Tensor:
    """Of the last two and the last three tokens of a line, by the docstring."""
    assert grams is not None
    padded = [-1, -1, *line]
    rows = [
        (sum((y + 1) * factor for y, factor in zip(padded[-3:], factors, strict=True)) >> 20) % GRAMS + table * GRAMS
        for table, factors in enumerate(FACTORS)
    ]
    return grams.up.weight @ torch.cat([grams.embedding.weight[row] for row in rows])


def lively(model: torch.nn.Module, size: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, size, generator=generator)
    return model.double().eval().requires_grad_(False)


def calm(heads: int = 2, patch_size: int = K, kind: str = "mixture") -> Calm:
    config = CalmConfig(
        autoencoder=AutoencoderConfig(
            vocab_size=VOCAB, patch_size=patch_size, width=16, inner=24, latent=patch_size * 4, factored=True
        ),
        backbone=BACKBONE,
        head=HEADS[kind](blocks=1, recall=heads, grams=GRAMS if heads else 0),
    )
    model = lively(Calm(config))
    assert isinstance(model, Calm)
    return model


def token_lm(embedding_norm: bool = True) -> TokenLM:
    config = TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE, embedding_norm=embedding_norm, recall=2, grams=GRAMS)
    model = lively(TokenLM(config))
    assert isinstance(model, TokenLM)
    return model


def head_of(model: Calm) -> MixtureHead:
    assert isinstance(model.head, MixtureHead)
    return model.head


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def answer(recall: Recall, e: list[Tensor], seen: int) -> Tensor:
    """By the docstring: asked after the last of the embeddings `e`, of which `seen` can be found."""

    def pair(last: int) -> Tensor:
        zero = torch.zeros_like(e[0])
        return torch.cat([e[at] if at >= 0 else zero for at in (last, last - 1)])

    mixed = []
    for head in range(recall.heads):
        rows = slice(head * DIM, (head + 1) * DIM)
        query = recall.query.weight[rows] @ pair(len(e) - 1)
        scores = torch.stack([query @ (recall.key.weight[rows] @ pair(j - 1)) / DIM**0.5 for j in range(seen)])
        values = torch.stack([recall.value.weight[rows] @ e[j] for j in range(seen)])
        mixed.append(scores.softmax(0) @ values)
    return recall.out.weight @ torch.cat(mixed)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_place_finds_what_followed_its_pair_in_the_patches_read(patch_size: int) -> None:
    model = calm(patch_size=patch_size)
    head, ids = head_of(model), tokens(2, 5, patch_size)
    assert head.recall is not None
    state, target = model.states(ids[:, :-1]), ids[:, 1:]
    assert isinstance(state, TextStates)
    found = head.log_probabilities(state, target)
    embed = [rms(row) * head.embedding_norm.weight for row in head.embedding.weight]
    for row, patch, place in product(range(2), range(4), range(patch_size)):
        seen = (patch + 1) * patch_size
        line = ids[row].flatten().tolist()[: seen + place]
        bare = state.vector[row, patch, :D]
        before = torch.cat([embed[y] for y in line[-head.window :]])
        x = head.slots(bare)[place * D : (place + 1) * D] + head.before.weight @ before
        x = x + answer(head.recall, [embed[y] for y in line], seen) + said_together(head.grams, line)
        for block in head.blocks:
            x = block(x)
        law = (head.output.weight @ (rms(x) * head.norm.weight)).log_softmax(-1)
        assert float(found[row, patch, place]) == pytest.approx(float(law[target[row, patch, place]]), abs=1e-9)
    loss, _ = head.loss(state, target, None)
    assert float(loss) == pytest.approx(-float(found.mean()), rel=1e-9)
    with torch.enable_grad():  # keys then come from embeddings, else from tables
        assert float(head.loss(model.states(ids[:, :-1]), target, None)[0]) == pytest.approx(float(loss), rel=1e-9)


@pytest.mark.parametrize("embedding_norm", [True, False])
def test_a_token_model_finds_what_followed_its_pair_up_to_its_last_token(embedding_norm: bool) -> None:
    model, ids = token_lm(embedding_norm), tokens(2, 6)
    assert model.recall is not None
    x = model._embedded(ids).clone()
    for row, at in product(range(2), range(6)):
        e = [rms(model.embedding.weight[y]) for y in ids[row, : at + 1].tolist()]
        x[row, at] += answer(model.recall, e, at + 1) + said_together(model.grams, ids[row, : at + 1].tolist())
    torch.testing.assert_close(model.states(ids[..., None]), model.backbone(x), atol=1e-9, rtol=0)


def test_draws_have_its_law_in_every_arrangement_of_the_states() -> None:
    """One state, many of one text, some of several texts, texts side by side; and one by one, as a tile does."""
    model = calm()
    head, ids = head_of(model), tokens(3, 4, K)
    state = model.states(ids)
    every = torch.tensor(list(product(range(VOCAB), repeat=K)))
    one = state[1, 2]
    law = head.log_probabilities(one.expand(len(every), -1), every).sum(-1).exp()
    assert float(law.sum()) == pytest.approx(1.0)
    assert model.draw_tokens(one, 5, torch.Generator().manual_seed(0)).shape == (5, K)
    common = 20_000 * law > 8
    picked = _picked(model, one, 20_000)  # draws are decoded, here by random weights: these are the tokens themselves
    counts = torch.bincount((picked * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1), minlength=VOCAB**K).double()
    statistic = float(((counts - 20_000 * law).square() / (20_000 * law))[common].sum())
    freedom = int(common.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)

    def draws(states: TextStates, seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return head.draw(states, 4, generators)

    some = state[:, torch.tensor([1, 3])]
    assert some.by_text()[0].shape == (3, 12)
    together = head.draw(some, 2, torch.Generator().manual_seed(0))
    loose = TextStates(some.vector, some.text.clone(), some.seen)
    assert loose.by_text()[0].shape == (6, 12)
    torch.testing.assert_close(head.draw(loose, 2, torch.Generator().manual_seed(0)), together)
    rows = state[:, -1]
    alone = torch.cat([draws(rows[row : row + 1], [row]) for row in range(3)], dim=1)
    torch.testing.assert_close(draws(rows, [0, 1, 2]), alone)
    apart = TextStates(rows.vector, rows.text, rows.seen, apart=True)
    torch.testing.assert_close(draws(apart, [0, 1, 2]), alone)
    mixed = join([rows[:1], state[1:2, 0], rows[2:]])
    torch.testing.assert_close(draws(mixed, [0, 1, 2])[:, [0, 2]], alone[:, [0, 2]])


def _picked(model: Calm, state: TextStates, draws: int) -> Tensor:
    """The tokens picked behind draws of one state."""
    head = head_of(model)
    many = state.expand(draws, -1)
    share = torch.rand(1, draws, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = []
    for states, asking in head.askings(many):
        parts.append(head._chosen(many.vector[states], asking, share[:, states], None, ()))
    return torch.cat(parts, dim=1)[0]


def test_the_multi_token_head_finds_it_too_and_draws_by_that_law() -> None:
    model = calm(kind="autoregressive")
    head, ids = model.head, tokens(3, 4, K)
    assert isinstance(head, AutoregressiveHead)
    assert head.recall is not None
    state = model.states(ids)
    read, embed = [], [rms(row) for row in head.embedding.weight]
    line = ids[1, :3].flatten().tolist() + ids[1, 3].tolist()
    for place in range(K):
        own = head.embedding.weight[line[9 + place - 1]] if place else head.state_in(state.vector[1, 2])
        found = answer(head.recall, [embed[y] for y in line[: 9 + place]], 9)
        read.append(own + found + said_together(head.grams, line[: 9 + place]))
    expected = (head.decoder(torch.stack(read)[None])[0] @ head.embedding.weight.T).log_softmax(-1)
    found = head.log_probabilities(state[1, 2:3], ids[1, 3:])[0]
    torch.testing.assert_close(found, expected.gather(-1, ids[1, 3][:, None])[:, 0])

    every = torch.tensor(list(product(range(VOCAB), repeat=K)))
    one = state[1, 2]
    law = head.log_probabilities(one.expand(len(every), -1), every).sum(-1).exp()
    assert float(law.sum()) == pytest.approx(1.0)
    drawn = model.draw_tokens(one, 20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount((drawn * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1), minlength=VOCAB**K).double()
    common = 20_000 * law > 8
    statistic = float(((counts - 20_000 * law).square() / (20_000 * law))[common].sum())
    assert statistic < int(common.sum()) + 5 * math.sqrt(2 * int(common.sum()))


def test_many_texts_are_asked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm()
    head, ids = head_of(model), tokens(5, 3, K)
    state, target = model.states(ids[:, :-1]), ids[:, 1:]
    generators = [torch.Generator().manual_seed(row) for row in range(5)]
    multi, states = calm(kind="autoregressive").head, state[:, -1]
    several = TextStates(states.vector[:, :D], states.text, states.seen)
    together = multi.draw(several, 3, generators)
    whole = head.log_probabilities(state, target), head.draw(state, 3, torch.Generator().manual_seed(0))
    assert head.recall is not None
    monkeypatch.setattr(Recall, "texts_at_once", lambda self, size: 2)
    assert [asking.seen.shape for _, asking in head.askings(state) if asking] == [(2, 2), (2, 2), (1, 2)]
    apart = TextStates(state.vector, state.text, state.seen, apart=True)  # whose bits depend on no other
    assert [asking.seen.shape for _, asking in head.askings(apart) if asking] == [(5, 2)]
    torch.testing.assert_close(head.log_probabilities(state, target), whole[0])
    torch.testing.assert_close(head.draw(state, 3, torch.Generator().manual_seed(0)), whole[1])
    assert torch.equal(multi.draw(several, 3, [torch.Generator().manual_seed(row) for row in range(5)]), together)


@pytest.mark.parametrize(
    "model",
    [calm(), calm(patch_size=1), calm(kind="autoregressive"), token_lm()],
    ids=["calm", "patches of one", "multi-token", "token_lm"],
)
def test_texts_read_piece_by_piece_side_by_side_are_the_texts_read_whole(model: Calm | TokenLM) -> None:
    """Rows of different lengths in one cache, one row moved, and single rows of it."""
    ids = tokens(3, 6, model.patch_size)
    cache = model.new_cache(4, 6)
    model.states(ids[:1, :2], cache.rows(0, 1))
    model.states(ids[1:2, :4], cache.rows(1, 2))
    model.states(ids[2:, :1], cache.rows(3, 4))
    cache.copy(3, 2)
    cache.clear(3)
    last = torch.stack([ids[0, 2], ids[1, 4], ids[2, 1]])[:, None]
    state = model.states(last, cache.rows(0, 3))[:, 0]
    for row, length in enumerate((3, 5, 2)):
        alone = model.states(ids[row : row + 1, :length])[0, -1]
        torch.testing.assert_close(vector_of(state)[row], vector_of(alone), rtol=1e-11, atol=1e-11)
        if isinstance(alone, TextStates):
            assert int(state.seen[row]) == int(alone.seen) == length * model.patch_size
            assert torch.equal(state.text[row, : int(alone.seen)], alone.text)


@pytest.mark.parametrize("model", [calm(), calm(patch_size=1), token_lm()], ids=["calm", "patches of one", "token_lm"])
def test_a_cache_keeps_what_lookups_made_of_a_text_and_looks_up_new_tokens_alone(
    model: Calm | TokenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = model.patch_size
    ids, cache = tokens(3, 6, size), model.new_cache(3, 6)
    for row, length in enumerate((4, 2, 5)):  # rows of different lengths
        model.states(ids[row : row + 1, :length], cache.rows(row, row + 1))
    last = torch.stack([ids[0, 4], ids[1, 2], ids[2, 5]])[:, None]
    looked_up: list[int] = []
    original = Recall.parts

    def parts(self: Recall, *asked: Any) -> Any:
        found = original(self, *asked)
        return found._replace(tells=lambda ids: looked_up.append(ids.numel()) or found.tells(ids))

    recall = head_of(model).recall if isinstance(model, Calm) else model.recall
    assert recall is not None
    with monkeypatch.context() as patch:
        patch.setattr(Recall, "parts", parts)
        state = model.states(last, cache)[:, -1]
        kept = head_of(model).draw(state, 2, torch.Generator().manual_seed(0)) if isinstance(model, Calm) else state
    assert looked_up == [3 * (size + 2)]  # of three texts the new tokens, and two before them, once
    for row, length in enumerate((5, 3, 6)):
        embeddings = head_of(model).tokens() if isinstance(model, Calm) else model._tokens()
        whole = recall.memory(ids[row : row + 1, :length].flatten(1), original(recall, embeddings, length * size))
        for held, made in zip(cache.memory[:, row], whole, strict=True):
            torch.testing.assert_close(held[:, : length * size], made[0], rtol=1e-12, atol=1e-12)
    if isinstance(model, Calm):  # the texts looked up anew give the same
        anew = head_of(model).draw(replace(state, memory=None), 2, torch.Generator().manual_seed(0))
        torch.testing.assert_close(kept, anew, rtol=1e-11, atol=1e-11)


def test_fresh_keys_are_the_queries_and_equal_pairs_find_each_other() -> None:
    recall = Recall(64, 1)
    initialise(recall, torch.Generator().manual_seed(0), 0.1)
    assert torch.equal(recall.key.weight, recall.query.weight)
    table = torch.nn.functional.rms_norm(torch.randn(50, 64, generator=torch.Generator().manual_seed(1)), (64,))
    text = torch.arange(50).roll(7)[None]
    tokens_of = Tokens(lambda: table, lambda ids: table[ids], (table,))
    parts = recall.parts(tokens_of, 50)
    memory = recall.memory(text, parts)
    query = recall._split(queries(last_ids(text, torch.tensor([[10]])), parts))
    weights = (query @ memory.keys.transpose(-1, -2) / DIM**0.5).softmax(-1)[0, 0, 0]
    assert int(weights.argmax()) == 10
    assert float(weights[10]) > 0.5


def test_its_tables_follow_an_optimiser_whose_steps_are_fused() -> None:
    model, ids = token_lm().requires_grad_(True), tokens(4, 12)
    optimizer = make_optimizer(model, OptimSettings.parse({"name": "adamw", "lr": 0.05}))

    def loss() -> Tensor:
        logits = model.logits(model.states(ids[:, :-1, None]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    cache = model.new_cache(4, 20)
    model.states(ids[:, :3, None], cache)
    first = model.states(ids[:, 3:4, None], cache)  # from tables
    for _ in range(5):
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    cache = model.new_cache(4, 20)
    model.states(ids[:, :3, None], cache)
    after = model.states(ids[:, 3:4, None], cache)
    with torch.enable_grad():
        whole = model.states(ids[:, :4, None])[:, 3:]
    torch.testing.assert_close(after, whole.detach(), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(after, first, atol=1e-3)


def test_its_tables_follow_the_weights() -> None:
    model = calm()
    head, ids = head_of(model), tokens(1, 3, K)
    head.loss(model.states(ids[:, :-1]), ids[:, 1:], None)
    assert head.recall is not None
    with torch.no_grad():
        head.recall.value.weight.mul_(2.0)
        head.embedding.weight.neg_()
    tables = head.loss(model.states(ids[:, :-1]), ids[:, 1:], None)[0]
    with torch.enable_grad():
        assert float(head.loss(model.states(ids[:, :-1]), ids[:, 1:], None)[0]) == pytest.approx(
            float(tables), rel=1e-9
        )


@torch.enable_grad()
def test_a_text_that_repeats_itself_is_learnt_at_once() -> None:
    """Random tokens, said twice: only what is looked up tells the second half."""
    torch.manual_seed(0)
    losses = {}
    for heads in (0, 1):
        config = CalmConfig(
            autoencoder=AutoencoderConfig(vocab_size=32, patch_size=4, width=16, inner=24, latent=16, factored=True),
            backbone=BackboneConfig(layers=1, width=32, inner=48, heads=2),
            head=MixtureHeadConfig(recall=heads),
        )
        model = Calm(config)
        initialise(model, torch.Generator().manual_seed(0), 0.14)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            once = torch.randint(32, (16, 26), generator=generator)
            ids = torch.cat((once, once), dim=1).unflatten(1, (-1, 4))  # 26: the second half lies askew in its patches
            loss, _ = model.loss(model.states(ids[:, :-1]), ids[:, 1:], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            second = model.states(ids[:, :-1])[:, 8:], ids[:, 9:]
            losses[heads] = float(model.loss(*second, None)[0])
    assert losses[1] < 0.5 < 3.0 < losses[0]


@pytest.mark.parametrize("kind", ["mixture", "autoregressive", "token_lm"])
def test_texts_in_company_are_texts_alone_to_the_bit_in_the_deterministic_mode(kind: str) -> None:
    model = (token_lm() if kind == "token_lm" else calm(kind=kind)).float()
    prompts = [tokens(length, seed=length).tolist() for length in (4, 9, 14, 3)]

    def texts(rows: list[int]) -> dict[int, list[int]]:
        engine = Engine(model, eos_id=5, pad_id=6, slots=4, capacity=48, deterministic=True)
        numbers = {}
        for row in rows:
            numbers[engine.add(prompts[row], Sampling(0.8, max_tokens=18, seed=row))[0]] = row
        found: dict[int, list[int]] = {row: [] for row in rows}
        while len(engine):
            for event in engine.step():
                found[numbers[event.row]] += event.tokens
        return found

    together = texts([0, 1, 2, 3])
    for row in range(4):
        assert texts([row])[row] == together[row]
