"""evaluate.ngrams and evaluate.brier: chained draws and whole documents against loops that feed one context at a time."""

import itertools

import numpy as np
import pytest
import torch

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, TokenLMConfig
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate import ngrams
from nextvec.evaluate.brier import evaluate_brier, hash_documents, plan_windows
from nextvec.evaluate.ngrams import Scored, draw_ngrams
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.scoring.brier import brier_scores

VOCAB = 7
BACKBONE = BackboneConfig(layers=2, width=16, inner=24, heads=4, kv_heads=2)


class GreedyTokenLM(TokenLM):
    """Its one draw is the most likely token, so that chains can be compared token by token."""

    def draw_tokens(self, state, draws, generator=None):
        return self.logits(state).argmax(-1, keepdim=True).expand(draws, *state.shape[:-1], 1)


class GreedyCalm(Calm):
    """Its one draw is that of zero noise."""

    def draw_latents(self, state, draws, generator=None):
        noise = torch.zeros(draws, *state.shape[:-1], self.config.head.noise, dtype=state.dtype)
        return self.head(state, noise)


def lively(model):
    """Weights large enough that contexts matter, in float64 so that no tie is broken by rounding; no bias."""
    g = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=g, dtype=torch.float64) / parameter.shape[1] ** 0.5
                )
            elif name.endswith("bias"):
                parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("embedding.weight"):
                parameter.mul_(4.0)
    return model


def token_model(kind=TokenLM):
    return lively(kind(TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE)))


def calm_model(patch_size, kind=Calm):
    autoencoder = AutoencoderConfig(vocab_size=VOCAB, patch_size=patch_size, width=16, inner=24, latent=6)
    return lively(
        kind(CalmConfig(autoencoder=autoencoder, backbone=BACKBONE, head=EnergyHeadConfig(noise=4, blocks=1)))
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length) for length in lengths]


@torch.no_grad()
def state_after(model, tokens):
    """The state that follows these tokens, read alone."""
    return model.states(torch.tensor(tokens).view(1, -1, model.patch_size))[0, -1]


def slow_ngram(model, context, order):
    """Feeds the position's own context, then each drawn patch."""
    gram = []
    while len(gram) < order:
        gram += model.draw_tokens(state_after(model, [*context, *gram]), 1, None)[0].tolist()
    return gram[:order]


MODELS = {
    "token": lambda: token_model(GreedyTokenLM),
    "calm K=2": lambda: calm_model(2, GreedyCalm),
    "calm K=4": lambda: calm_model(4, GreedyCalm),
}


@pytest.mark.parametrize("order", [1, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_chained_draws_equal_the_loop_over_positions(name, order):
    model = MODELS[name]()
    ids = torch.randint(0, VOCAB, (2, 16), generator=generator(1))
    drawn = draw_ngrams(model, ids, 2, order, generator(), stride=4)
    assert drawn.shape == (2, 2, 4, order)
    for row in range(2):
        for start in range(4, 17, 4):
            expected = slow_ngram(model, ids[row, :start].tolist(), order)
            assert drawn[:, row, start // 4 - 1].tolist() == [expected, expected]
    later = draw_ngrams(model, ids, 2, order, generator(), stride=4, first=12)
    assert later.equal(drawn[:, :, 2:])
    assert len(drawn.unique()) > 1 or order == 1


def recorded(model, monkeypatch):
    """Every call of the model's draw, as (states, tokens)."""
    asked = []
    draw = model.draw_tokens

    def record(state, draws, g):
        found = draw(state, draws, g)
        asked.append((state, found))
        return found

    monkeypatch.setattr(model, "draw_tokens", record)
    return asked


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("build", [token_model, lambda: calm_model(2)])
def test_every_draw_is_conditioned_on_its_own_chain(build, together, monkeypatch):
    """With real, differing draws: each state that a draw was made from is that of its own context and chain."""
    model = build()
    K = model.patch_size
    monkeypatch.setattr(ngrams, "BRANCHES", together * 3 + 1)  # so many starts of one row, with their three draws
    asked = recorded(model, monkeypatch)
    ids = torch.randint(0, VOCAB, (2, 12), generator=generator(2))
    drawn = draw_ngrams(model, ids, 3, 4, generator(3), stride=4)
    links = 4 // K - 1
    groups = [(row, group) for row in range(2) for group in torch.arange(3).split(together)]
    assert len(asked) == 1 + len(groups) * links
    assert len({tuple(chain.flatten().tolist()) for chain in drawn}) == 3
    calls = iter(asked[1:])
    for row, group in groups:
        for link in range(links):
            states, _ = next(calls)
            for n, (q, s) in enumerate(itertools.product(group, range(3))):
                chain = drawn[s, row, q, : (link + 1) * K].tolist()
                alone = state_after(model, ids[row, : 4 * (q + 1)].tolist() + chain)
                torch.testing.assert_close(states[0, n], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("branches", [6, 512])
@pytest.mark.parametrize("build", [token_model, lambda: calm_model(2)])
def test_a_chain_that_cannot_matter_is_not_grown(build, branches, monkeypatch):
    """Whatever stood in the place of the tokens that were not drawn, the scores would be the same."""
    model = build()
    K, S = model.patch_size, 8
    monkeypatch.setattr(ngrams, "BRANCHES", branches)
    asked = recorded(model, monkeypatch)
    ids = torch.randint(0, VOCAB, (3, 44), generator=generator(2))
    target = ids[:, 4:].view(3, 10, 4)
    valid = torch.ones_like(target, dtype=torch.bool)
    valid[0, 8, 2:] = valid[1, 9] = False
    drawn = draw_ngrams(model, ids[:, :-4], S, 4, generator(3), stride=4, scored=Scored(target, valid))
    full = draw_ngrams(model, ids[:, :-4], S, 4, generator(3), stride=4)

    dropped = torch.zeros_like(drawn, dtype=torch.bool)
    for row, q, length in itertools.product(range(3), range(10), range(K, 4, K)):
        prefixes = [tuple(drawn[s, row, q, :length].tolist()) for s in range(S)]
        for s, prefix in enumerate(prefixes):
            met = prefixes.count(prefix) > 1 or prefix == tuple(target[row, q, :length].tolist())
            gone = bool(dropped[s, row, q, length - 1])
            dropped[s, row, q, length : length + K] = gone or not met or not bool(valid[row, q, length])
    assert 0.3 < dropped.float().mean() < 0.7
    assert not drawn[dropped].any()
    assert sum(tokens.numel() for _, tokens in asked) - full.numel() - S * 3 * 10 * K == (~dropped[..., K:]).sum()

    flat = [x.flatten(-3, -2) for x in (drawn, target, valid)]
    other = torch.where(dropped, torch.randint(0, VOCAB, drawn.shape, generator=generator(9)), drawn)
    assert brier_scores(*flat).equal(brier_scores(other.flatten(1, 2), *flat[1:]))
    assert brier_scores(*flat)[:, K:].unique().numel() > 2
    grown = (~dropped[..., 3].permute(1, 2, 0)).nonzero().tolist()
    for row, q, s in grown:  # to the end: each from its own chain
        chain = drawn[s, row, q, : 4 - K].tolist()
        alone = state_after(model, ids[row, : 4 * (q + 1)].tolist() + chain)
        states = torch.cat([state[0] for state, _ in asked[1:] if state.shape[0] == 1])
        assert (states - alone).abs().amax(-1).min() < 1e-10


def test_token_draws_follow_the_exact_law_of_a_pair():
    """6000 chained pairs against P(a) P(b | a); chi-squared with 48 degrees of freedom, 5 standard deviations."""
    model = token_model()
    context = [1, 2, 3, 4]
    first = model.logits(state_after(model, context)).softmax(-1)
    joint = torch.stack([p * model.logits(state_after(model, [*context, a])).softmax(-1) for a, p in enumerate(first)])
    drawn = draw_ngrams(model, torch.tensor([context] * 600), 10, 2, generator(4), stride=4).view(-1, 2)
    counts = torch.zeros(VOCAB * VOCAB).index_add_(0, drawn[:, 0] * VOCAB + drawn[:, 1], torch.ones(6000))
    expected = 6000 * joint.flatten().float()
    assert ((counts - expected).square() / expected).sum().item() < 48 + 5 * (2 * 48) ** 0.5


def slow_evaluation(model, documents, context, stride, order):
    """Every position by its own: the window rule spelled out, greedy draws, plain sums."""
    total, count, scored = [0.0] * order, [0] * order, set()
    for index, document in enumerate(documents):
        for position in range(stride, len(document), stride):
            begin = 0 if position < context else (position - context // 2) // (context // 2) * (context // 2)
            assert position - begin >= min(position, context // 2)
            assert position - begin < context
            gram = slow_ngram(model, document[begin:position].tolist(), order)
            for k in range(1, order + 1):
                if position + k <= len(document):
                    right = gram[:k] == document[position : position + k].tolist()
                    total[k - 1] += 2 * right - 1
                    count[k - 1] += 1
                    scored.add(index)
    return [t / c for t, c in zip(total, count, strict=True)], count, len(scored)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_evaluation_equals_the_slow_twin(name, rows):
    model = MODELS[name]()
    documents = random_documents(4, 5, 8, 9, 16, 17, 26, 47, 1, 0, 40)
    seen = []
    result = evaluate_brier(
        model,
        documents,
        context_tokens=16,
        stride=4,
        draws=3,
        generator=generator(),
        tokenizer_hash="t",
        batch_rows=rows,
        progress=lambda done, total: seen.append((done, total)),
    )
    brier, count, scored = slow_evaluation(model, documents, 16, 4, 4)
    assert result.brier == pytest.approx(brier)
    assert result.positions == tuple(count)
    assert result.documents == scored
    assert result.protocol.documents == 11
    assert seen[-1] == (len(plan_windows([len(d) for d in documents], 16, 4)),) * 2


def test_same_positions_for_every_model_and_deterministic_by_generator():
    documents = random_documents(30, 23)
    models = [token_model(), calm_model(2), calm_model(4)]
    settings = {"context_tokens": 16, "stride": 4, "draws": 4, "tokenizer_hash": "t"}
    results = [evaluate_brier(model, documents, generator=generator(5), **settings) for model in models]
    assert len({result.positions for result in results}) == 1
    assert len({result.protocol for result in results}) == 1
    assert len({result.brier for result in results}) == 3
    again = evaluate_brier(models[0], documents, generator=generator(5), **settings)
    assert again == results[0]
    other = evaluate_brier(models[0], documents, generator=generator(6), **settings)
    assert other.brier != results[0].brier
    assert other.protocol.seed == 6


def test_estimators_agree_in_expectation_on_a_model():
    documents = random_documents(*[40] * 60)
    model = token_model()
    settings = {"context_tokens": 16, "stride": 4, "draws": 8, "tokenizer_hash": "t", "order": 2, "batch_rows": 64}
    every = evaluate_brier(model, documents, generator=generator(7), **settings)
    two = evaluate_brier(model, documents, generator=generator(8), estimator="two_draws", **settings)
    for a, b, error in zip(every.brier, two.brier, two.brier_stderr, strict=True):
        assert abs(a - b) < 5 * 2**0.5 * error
    assert every.brier_stderr[0] < two.brier_stderr[0]
    assert every.protocol != two.protocol
    assert every.brier_lm is None


def test_windows_score_every_position_once():
    for length in range(70):
        for context, stride in ((8, 4), (16, 4), (16, 2), (24, 4), (6, 1)):
            starts = []
            for window in plan_windows([length], context, stride):
                assert 0 < window.first <= window.last < context
                starts += range(window.start + window.first, window.start + window.last + 1, stride)
            assert starts == list(range(stride, length, stride))


def test_the_training_mode_and_the_random_state_are_left_alone():
    model = token_model().train()
    before = torch.random.get_rng_state()
    evaluate_brier(
        model, random_documents(20), context_tokens=8, stride=4, draws=2, generator=generator(), tokenizer_hash="t"
    )
    assert model.training
    assert torch.random.get_rng_state().equal(before)


def test_the_hash_of_the_documents_knows_ids_and_boundaries():
    a, b = np.array([1, 2, 3]), np.array([4])
    assert hash_documents([a, b]) == hash_documents([a.astype(np.uint16), b])
    assert len({hash_documents(d) for d in ([a, b], [b, a], [np.array([1, 2, 3, 4])], [a], [])}) == 5


@pytest.mark.parametrize(
    ("lengths", "change", "error", "message"),
    [
        ((4, 3), {}, DataError, "no document is longer than the first patch of 4 tokens.*2 documents of at most 4"),
        ((), {}, DataError, "0 documents of at most 0 tokens"),
        ((7, 6), {}, DataError, "order 4: no document has 4 tokens after its first patch of 4"),
        ((40,), {"context_tokens": 18}, ConfigError, "multiple of 8.* got 18, nearest 16"),
        ((40,), {"context_tokens": 4}, ConfigError, "multiple of 8.* got 4, nearest 8"),
        ((40,), {"stride": 3}, ConfigError, "multiple of the model's patch size 2; got 3: use 4"),
        ((40,), {"stride": 0}, ConfigError, "patch size 2; got 0: use 2"),
        ((40,), {"draws": 1}, ConfigError, "at least 2 per position; got 1"),
        ((40,), {"order": 5}, ConfigError, "between 1 and 4; got 5"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(lengths, change, error, message):
    settings = {"context_tokens": 16, "stride": 4, "draws": 2, "tokenizer_hash": "t", **change}
    with pytest.raises(error, match=message):
        evaluate_brier(calm_model(2), random_documents(*lengths), generator=generator(), **settings)


def test_ngrams_refuse_a_context_that_is_not_whole_patches():
    with pytest.raises(ConfigError, match="the context must be a positive multiple of the stride 4; got 10 tokens"):
        draw_ngrams(token_model(), torch.zeros(1, 10, dtype=torch.long), 2, 4, generator(), stride=4)
    with pytest.raises(ConfigError, match="the first start must be a positive multiple of the stride 4; got 0 tokens"):
        draw_ngrams(token_model(), torch.zeros(1, 8, dtype=torch.long), 2, 4, generator(), stride=4, first=0)
