"""Protocols, positions and estimators of the evaluator, and the black-box sampler, against loops over single positions."""

import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, TokenLMConfig
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate import ngrams
from nextvec.evaluate.brier import evaluate_brier, evaluate_sampler
from nextvec.evaluate.documents import read_documents
from nextvec.evaluate.windows import parse_protocol, plan
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.text.tokenizer import TextTokenizer, byte_tokenizer

VOCAB = 5
BACKBONE = BackboneConfig(layers=1, width=16, inner=16, heads=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(model):
    """Weights large enough that contexts matter; float64, so that rounding breaks no tie."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator(), dtype=torch.float64) / 2)
    return model


def token_model(vocab=VOCAB):
    return lively(TokenLM(TokenLMConfig(vocab_size=vocab, backbone=BACKBONE)))


def calm_model(patch_size=2):
    autoencoder = AutoencoderConfig(vocab_size=VOCAB, patch_size=patch_size, width=16, inner=16, latent=6)
    config = CalmConfig(autoencoder=autoencoder, backbone=BACKBONE, head=EnergyHeadConfig(noise=4, blocks=1))
    return lively(Calm(config))


def random_documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length) for length in lengths]


@torch.no_grad()
def law_after(model, tokens):
    state = model.states(torch.tensor(tokens).view(1, -1, 1))[0, -1]
    return model.log_probabilities(state).exp().tolist()


def exact_orders(model, context, target):
    """2 P(y) - sum_x P(x)^2 for orders 1..len(target), by walking every n-gram."""
    found = []
    for n in range(1, len(target) + 1):
        total = 0.0
        right = 0.0
        for gram in itertools.product(range(VOCAB), repeat=n):
            p, read = 1.0, list(context)
            for token in gram:
                p *= law_after(model, read)[token]
                read.append(token)
            total += p * p
            right += p if list(gram) == list(target[:n]) else 0.0
        found.append(2 * right - total)
    return found


SETTINGS = {"context_tokens": 16, "stride": 4, "draws": 2, "tokenizer_hash": "t"}


def test_exact_tail_converges_to_the_enumerated_score():
    """Order 3 at three positions: with 4000 drawn chains each order is right to 5 standard errors of the collision."""
    model = token_model()
    (document,) = random_documents(15)
    settings = SETTINGS | {"draws": 4000, "order": 3, "estimator": "exact_tail"}
    found = evaluate_brier(model, [document], generator=generator(), **settings)
    text = document.tolist()
    per_start = [exact_orders(model, text[:s], text[s : s + 3]) for s in (4, 8, 12)]
    wanted = np.array(per_start).mean(0)
    assert found.brier[0] == pytest.approx(wanted[0], abs=1e-6)  # nothing is drawn for order 1
    assert found.brier == pytest.approx(wanted, abs=5 * 0.3 / 4000**0.5)
    assert found.protocol.estimator == "exact_tail"


def test_exact_tail_has_the_expectation_of_all_pairs_and_less_variance():
    model = token_model()
    documents = random_documents(*[33] * 80)
    settings = SETTINGS | {"batch_rows": 64}
    pairs = evaluate_brier(model, documents, generator=generator(1), **settings | {"draws": 16})
    exact = evaluate_brier(model, documents, generator=generator(2), estimator="exact_tail", **settings)
    one = evaluate_brier(model, documents, generator=generator(3), estimator="exact_tail", **settings | {"draws": 1})
    for a, b, c, error in zip(pairs.brier, exact.brier, one.brier, pairs.brier_stderr, strict=True):
        assert abs(a - b) < 5 * 2**0.5 * error
        assert abs(a - c) < 5 * 2**0.5 * error
    assert exact.brier_stderr[0] < pairs.brier_stderr[0]
    assert one.brier[0] == pytest.approx(exact.brier[0], abs=1e-6)


def test_exact_tail_is_refused_for_calm_and_too_few_draws():
    documents = random_documents(40)
    with pytest.raises(ConfigError, match=r"exact_tail needs the probability of each token, and Calm \(patch size 2\)"):
        evaluate_brier(calm_model(), documents, generator=generator(), estimator="exact_tail", **SETTINGS)
    with pytest.raises(ConfigError, match="draws must be at least 1 per position; got 0"):
        evaluate_brier(
            token_model(), documents, generator=generator(), estimator="exact_tail", **SETTINGS | {"draws": 0}
        )


@pytest.mark.parametrize("estimator", ["all_pairs", "exact_tail"])
def test_memory_bounds_do_not_change_which_chains_are_grown(monkeypatch, estimator):
    """Chains of a row in several passes: the first order is the same, the others agree within their errors."""
    documents = random_documents(*[40] * 30)  # one window each, all in one batch: first tokens are drawn before chains
    model = token_model()
    settings = SETTINGS | {"estimator": estimator, "draws": 8, "context_tokens": 80, "batch_rows": 32}
    whole = evaluate_brier(model, documents, generator=generator(), **settings)
    monkeypatch.setattr(ngrams, "BRANCHES", 8 * 2)  # two starts of a row
    parts = evaluate_brier(model, documents, generator=generator(), **settings)
    assert parts.brier[0] == pytest.approx(whole.brier[0], abs=1e-6)
    assert parts.brier[3] != whole.brier[3]
    for a, b, error in zip(whole.brier, parts.brier, whole.brier_stderr, strict=True):
        assert abs(a - b) < 5 * 2**0.5 * error


def starts_of(documents, layout, context, stride, positions):
    """(text, offset of the start in it, tokens of context) of all that is scored."""
    planned = plan(documents, layout, context, stride, positions)
    return [
        (w.document, w.start + s, s, planned.owner(w, s))
        for w in planned.windows
        for s in range(w.first, w.last + 1, stride)
    ]


@pytest.mark.parametrize(("context", "stride"), [(16, 4), (12, 2), (12, 3), (8, 1)])
def test_every_offset_scores_every_offset_once_with_whole_patches_of_context(context, stride):
    documents = [np.zeros(length, dtype=np.int64) for length in (0, 1, 3, 4, 5, 9, 16, 17, 40)]
    found = starts_of(documents, "documents", context, stride, "every_offset")
    assert sorted((text, at) for text, at, _, _ in found) == [
        (text, at) for text, document in enumerate(documents) for at in range(stride, len(document))
    ]
    for _, at, tokens, _ in found:
        assert tokens % stride == 0
        assert min(at - at % stride, context // 2) <= tokens + stride
        assert tokens >= min(at - (stride - 1), context // 2)
    first = [f for f in found if f[1] % stride == 0]
    assert set(first) >= set(starts_of(documents, "documents", context, stride, "patch_starts"))


@pytest.mark.parametrize("build", [token_model, calm_model])
def test_every_offset_is_the_mean_over_shifted_texts(build):
    model = build()
    documents = random_documents(30, 41, 9)
    found = evaluate_brier(
        model, documents, generator=generator(), positions="every_offset", **SETTINGS | {"draws": 400}
    )
    totals, counts = np.zeros(4), np.zeros(4)
    for shift in range(4):
        alone = evaluate_brier(
            model, [d[shift:] for d in documents], generator=generator(shift), **SETTINGS | {"draws": 400}
        )
        totals += np.array(alone.brier) * alone.positions
        counts += alone.positions
    assert found.positions == tuple(counts.astype(int))
    assert found.brier == pytest.approx(totals / counts, abs=0.03)
    assert found.protocol.positions == "every_offset"
    assert "every_offset in 4 shifted passes" in str(found)


def test_blocks_run_across_documents_and_errors_belong_to_the_scored_token():
    lengths = (700, 3, 0, 900, 800)  # 2403 tokens: two blocks of 1024, and 355 dropped
    documents = random_documents(*lengths)
    found = starts_of(documents, "wikitext103", 1024, 4, "patch_starts")
    assert [(block, at) for block, at, _, _ in found] == [(b, s) for b in (0, 1) for s in range(4, 1024, 4)]
    assert all(at == tokens for _, at, tokens, _ in found)
    owners = np.repeat(np.arange(5), lengths)
    assert [owner for *_, owner in found] == [owners[1024 * block + at] for block, at, _, _ in found]
    every = starts_of(documents, "wikitext103", 1024, 4, "every_offset")
    assert sorted((block, at) for block, at, _, _ in every) == [(b, s) for b in (0, 1) for s in range(4, 1024)]


def test_a_block_is_scored_like_a_document_of_its_own():
    model = token_model()
    documents = random_documents(701, 3, 900, 800)
    stream = np.concatenate(documents)
    settings = {"context_tokens": 1024, "stride": 4, "draws": 2, "tokenizer_hash": "t", "order": 1}
    settings |= {"estimator": "exact_tail"}
    found = evaluate_brier(model, documents, generator=generator(), layout="wikitext103", **settings)
    total, count = 0.0, 0
    for block in (stream[:1024], stream[1024:2048]):  # windows of twice a block: nothing is cut
        alone = evaluate_brier(model, [block], generator=generator(), **settings | {"context_tokens": 2048})
        total += alone.brier[0] * alone.positions[0]
        count += alone.positions[0]
    assert found.positions == (count,) == (2 * 255,)
    assert found.brier[0] == pytest.approx(total / count, abs=1e-6)
    assert found.protocol.name == "wikitext103-1024"
    assert found.documents == 3  # the three tokens of document 1 lie between two starts: 701..703
    assert found.per_document.document == (0, 2, 3)
    assert sum(found.per_document.positions[0]) == count


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": "wikitext103", "context_tokens": 512}, ConfigError, "blocks of 1024, 2048, 8192 tokens; got 512"),
        (
            {"layout": "wikitext103", "context_tokens": 1024},
            DataError,
            "shorter than one: got 40 tokens in 1 documents",
        ),
        ({"layout": "wikitext", "context_tokens": 1024}, ConfigError, "layout must be one of documents, wikitext103"),
        ({"positions": "all"}, ConfigError, "positions must be one of patch_starts, every_offset; got 'all'"),
        ({"estimator": "exact"}, ConfigError, "estimator must be one of all_pairs, two_draws, exact_tail"),
        ({"layout": "wikitext103", "context_tokens": 1024, "stride": 3}, ConfigError, "stride that divides its blocks"),
    ],
)
def test_bad_protocols_are_one_sentence(change, error, message):
    with pytest.raises(error, match=message):
        evaluate_brier(token_model(), random_documents(40), generator=generator(), **SETTINGS | change)


def test_names_of_protocols():
    assert parse_protocol("documents-512") == ("documents", 512)
    assert parse_protocol("wikitext103-8192") == ("wikitext103", 8192)
    for name in ("documents", "documents-", "documents-x", "documents-0", "wikitext103", "wikitext-1024", "-1024", ""):
        with pytest.raises(ConfigError, match=r"protocol must be documents-N .* wikitext103-1024, .*; got"):
            parse_protocol(name)
    with pytest.raises(ConfigError, match="wikitext103 has blocks of 1024, 2048, 8192 tokens; got 4096"):
        parse_protocol("wikitext103-4096")


def test_wikitext_takes_the_tokenizers_own_special_tokens(tmp_path):
    """A tokenizer that opens each text with a token of its own, as Llama 3's does; no end-of-text token is added."""
    core = Tokenizer(models.WordLevel({"<bos>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<bos>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    path = tmp_path / "test.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "b b a")))

    def read(tokenizer, layout):
        return [ids.tolist() for ids in read_documents(str(path), tokenizer, layout=layout)]

    assert read(TextTokenizer(core), "wikitext103") == [[0, 2, 3], [0, 3, 3, 2]]
    assert read(TextTokenizer(core), "documents") == [[2, 3, 1], [3, 3, 2, 1]]
    plain = byte_tokenizer()
    assert read(plain, "wikitext103") == [ids[:-1] for ids in read(plain, "documents")]
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenises the text itself and .* is a shard directory"):
        read_documents(str(tmp_path), plain, layout="wikitext103")


def sampler_of(model):
    """A model as a black box that is asked context by context."""

    def sample(contexts, draws, g):
        grams = []
        for context in contexts:
            chains = context.expand(draws, -1)
            for _ in range(4):
                state = model.states(chains.unsqueeze(-1))[:, -1]
                chains = torch.cat([chains, model.draw_tokens(state, 1, g)[0]], dim=1)
            grams.append(chains[:, -4:])
        return torch.stack(grams, dim=1)

    return torch.no_grad()(sample)


@pytest.mark.parametrize("positions", ["patch_starts", "every_offset"])
def test_a_sampler_is_scored_like_the_model_that_it_wraps(positions):
    model = token_model()
    documents = random_documents(*[21] * 25, 3, 4)
    settings = SETTINGS | {"draws": 8, "positions": positions, "batch_rows": 16}
    box = evaluate_sampler(sampler_of(model), documents, generator=generator(1), **settings)
    own = evaluate_brier(model, documents, generator=generator(1), **settings)
    assert (box.protocol, box.positions) == (own.protocol, own.positions)
    for a, b, e, f in zip(box.brier, own.brier, box.brier_stderr, own.brier_stderr, strict=True):
        assert abs(a - b) < 5 * (e**2 + f**2) ** 0.5


def test_a_sampler_sees_exactly_the_scored_contexts():
    documents = random_documents(13, 9)
    asked = []

    def sample(contexts, draws, g):
        asked.extend(context.tolist() for context in contexts)
        return torch.randint(0, VOCAB, (draws, len(contexts), 5), generator=g)

    evaluate_sampler(sample, documents, generator=generator(), **SETTINGS)
    wanted = [d[:s].tolist() for d in documents for s in range(4, len(d), 4)]
    assert sorted(asked) == sorted(wanted)


def test_a_sampler_that_ignores_its_generator_is_refused():
    documents = random_documents(30, 20)

    def greedy(contexts, draws, g):
        return torch.stack([context[-4:] for context in contexts]).expand(draws, -1, -1)

    with pytest.raises(DataError, match=r"ignores its generator: all 2 draws are the same at each of 11 positions"):
        evaluate_sampler(greedy, documents, generator=generator(), **SETTINGS)
    found = evaluate_sampler(greedy, documents, generator=generator(), deterministic=True, **SETTINGS)
    hits = [
        d[s - 4 : s - 4 + k].tolist() == d[s : s + k].tolist()
        for k in (1,)
        for d in documents
        for s in range(4, len(d), 4)
    ]
    assert found.brier[0] == pytest.approx(2 * np.mean(hits) - 1)

    def peaked(contexts, draws, g):  # one answer per seed, the same for all draws: odd, but not deaf
        return torch.randint(0, 1000, (1, len(contexts), 4), generator=g).expand(draws, -1, -1)

    evaluate_sampler(peaked, documents, generator=generator(), **SETTINGS)

    def rarely(contexts, draws, g):  # differs at a single position of all
        same = greedy(contexts, draws, g).clone()
        if any(len(context) == 12 for context in contexts):
            same[0, 0, 0] += 1
        return same

    evaluate_sampler(rarely, documents, generator=generator(), **SETTINGS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, n: torch.zeros(s, n, 3, dtype=torch.long), r"here \(2, 6, 4\) or more tokens; got \(2, 6, 3\)"),
        (lambda s, n: torch.zeros(n, s, 4, dtype=torch.long), r"got \(6, 2, 4\)"),
        (lambda s, n: torch.zeros(s, n, 4), "integers from 0 on; got torch.float32"),
        (lambda s, n: torch.full((s, n, 4), -1), "integers from 0 on; got torch.int64 from -1"),
    ],
)
def test_a_sampler_with_another_form_of_answer_is_refused(answer, message):
    with pytest.raises(DataError, match=message):
        evaluate_sampler(
            lambda contexts, draws, g: answer(draws, len(contexts)),
            random_documents(30, 20),
            generator=generator(),
            **SETTINGS,
        )


def test_a_sampler_has_no_exact_tail():
    with pytest.raises(ConfigError, match="estimator of a sampler must be one of all_pairs, two_draws"):
        evaluate_sampler(
            sampler_of(token_model()),
            random_documents(30),
            generator=generator(),
            estimator="exact_tail",
            **SETTINGS,
        )
