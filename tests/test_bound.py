"""scoring.likelihood and evaluate.bound: bounds against enumeration, exact bits per byte against a loop, `nextvec bound`."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

from nextvec.cli import main
from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, TokenLMConfig, parse_run
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate import bound as bound_module
from nextvec.evaluate.bound import evaluate_likelihood, patch_bytes
from nextvec.model import cross_entropy
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import save_run
from nextvec.scoring import likelihood
from nextvec.scoring.clusters import cluster_ratio
from nextvec.scoring.likelihood import NOT_ARGMAX, nested_bounds, patch_log_probability
from nextvec.text.tokenizer import byte_tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()
BACKBONE = BackboneConfig(layers=1, width=16, inner=24, heads=2)
AUTOENCODER = AutoencoderConfig(vocab_size=TOKENIZER.vocab_size, patch_size=2, width=16, inner=24, latent=6, mask_id=1)
CALM = CalmConfig(autoencoder=AUTOENCODER, backbone=BACKBONE, head=EnergyHeadConfig(noise=4, blocks=1))
TOKEN_LM = TokenLMConfig(vocab_size=TOKENIZER.vocab_size, backbone=BACKBONE)


class FiniteCalm(Calm):
    """Its noise has four values of equal probability, so that p(y | h) is a sum of four terms."""

    ATOMS = 4

    def atoms(self, state):
        """Every latent that can be drawn, (ATOMS, ..., L)."""
        noise_AR = torch.linspace(-0.5, 0.5, self.ATOMS * 4, dtype=state.dtype).view(self.ATOMS, 4).sin()
        return self.head(state, noise_AR.view(self.ATOMS, *[1] * (state.dim() - 1), 4).expand(-1, *state.shape[:-1], 4))

    def draw_latents(self, state, draws, generator=None):
        atoms = self.atoms(state)
        picked = torch.randint(self.ATOMS, (draws, *state.shape[:-1]), generator=generator)
        return atoms.gather(0, picked[..., None].expand(*picked.shape, atoms.shape[-1]))


def lively(model, scale=1.0):
    """Float64 weights large enough that contexts and noise matter; biases stay small."""
    g = torch.Generator().manual_seed(0)
    model = model.double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fresh = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        if parameter.dim() > 1:
            parameter.copy_(scale * fresh / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(0.1 * fresh + (0.0 if name.endswith("bias") else 1.0))
    return model


def texts(*lengths):
    """Documents of bytes with the end-of-text token last."""
    rng = np.random.default_rng(0)
    return [np.array([*rng.integers(3 + 32, 3 + 127, n - 1), TOKENIZER.eos_id]) for n in lengths]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def evaluate(calm=None, baseline=None, documents=None, **settings):
    settings = {"context_tokens": 16, "generator": generator(), "patch_size": 2, "draws": 8, **settings}
    return evaluate_likelihood(calm, baseline, documents or texts(23, 40, 9, 30, 12, 18), TOKENIZER, **settings)


def test_log_probability_of_a_patch_is_the_sum_of_its_tokens_in_chunks(monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 3 * 11)  # three tokens at a time, so that the last chunk is short
    g = generator()
    hidden = torch.randn(5, 2, 7, generator=g, dtype=torch.float64)
    weight = torch.randn(11, 7, generator=g, dtype=torch.float64)
    target = torch.randint(11, (5, 2), generator=g)
    keep = torch.tensor([[True, True], [True, False], [True, True], [False, False], [True, True]])
    found = patch_log_probability(hidden, weight, target, keep, (1.0, 2.5))
    for i, temperature in enumerate((1.0, 2.5)):
        for n in range(5):
            slow = 0.0
            for k in range(2):
                logits = [
                    sum(h * w for h, w in zip(hidden[n, k].tolist(), row, strict=True)) for row in weight.tolist()
                ]
                total = sum(math.exp(logit / temperature) for logit in logits)
                slow += keep[n, k].item() * (logits[target[n, k]] / temperature - math.log(total))
            assert float(found[i, n]) == pytest.approx(slow, abs=1e-12)
    assert patch_log_probability(hidden.float(), weight.float(), target, keep).dtype == torch.float32
    assert cross_entropy.CHUNK_ELEMENTS > 3 * 11


def expected_bound(values, chances, draws):
    """E of -log of the mean over `draws` independent draws, by enumerating all of them."""
    return sum(
        math.prod(chances[i] for i in picked) * -math.log(sum(values[i] for i in picked) / draws)
        for picked in itertools.product(range(len(values)), repeat=draws)
    )


def test_nested_bounds_are_means_over_disjoint_groups():
    log_p = torch.rand(8, 3, generator=generator(), dtype=torch.float64).log()
    found = nested_bounds(log_p)
    assert found.shape == (4, 3)
    for c, size in enumerate((1, 2, 4, 8)):
        for n in range(3):
            groups = [log_p[i : i + size, n].exp().mean() for i in range(0, 8, size)]
            assert float(found[c, n]) == pytest.approx(-sum(math.log(g) for g in groups) / len(groups), abs=1e-12)
    assert bool((found[1:] <= found[:-1] + 1e-12).all())
    with pytest.raises(ValueError, match="power of two; got 6"):
        nested_bounds(log_p[:6])


def test_each_point_of_the_curve_has_the_expectation_of_that_many_draws():
    """A law of three values: the curve's mean over 40,000 positions against enumeration, within 6 standard errors."""
    values, chances = [0.9, 0.2, 0.01], [0.1, 0.3, 0.6]
    g = generator()
    picked = torch.multinomial(torch.tensor(chances, dtype=torch.float64), 8 * 40_000, replacement=True, generator=g)
    curve = nested_bounds(torch.tensor(values, dtype=torch.float64)[picked].log().view(8, -1))
    exact = -math.log(sum(v * c for v, c in zip(values, chances, strict=True)))
    expected = [expected_bound(values, chances, draws) for draws in (1, 2, 4, 8)]
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] > exact
    error = curve.std(dim=1) / math.sqrt(40_000)
    assert bool(((curve.mean(dim=1) - torch.tensor(expected)).abs() < 6 * error).all())


def test_ratios_per_byte_and_their_clustered_error_equal_a_loop():
    g = generator()
    values, sizes = torch.rand(9, 2, generator=g, dtype=torch.float64), torch.randint(1, 9, (9,), generator=g)
    clusters = [4, 4, 7, 7, 7, 1, 1, 1, 1]
    found = cluster_ratio(values, torch.ones(9, 2, dtype=torch.bool), torch.tensor(clusters), sizes)
    total = sum(sizes.tolist())
    for q in range(2):
        ratio = sum(values[:, q].tolist()) / total
        residuals = [
            sum(values[i, q].item() - ratio * sizes[i].item() for i in range(9) if clusters[i] == c) / total
            for c in (1, 4, 7)
        ]
        assert float(found.mean[q]) == pytest.approx(ratio, rel=1e-12)
        assert float(found.covariance[q, q]) == pytest.approx(1.5 * sum(r * r for r in residuals), rel=1e-12)
    assert found.count.tolist() == [9, 9]


def exact_nats(calm, documents, context_tokens, temperature):
    """-log p of every scored patch of every reported document, by a loop over contexts and atoms; and tokens in all."""
    total, tokens, K, hop = 0.0, 0, calm.patch_size, context_tokens // 2
    for index, document in enumerate(documents):
        if index % 4 == 0:
            continue
        for start in range(K, len(document), K):
            begin = 0 if start < context_tokens else (start // hop - 1) * hop
            context = torch.tensor(document[begin:start]).view(1, -1, K)
            logits = calm.autoencoder.decode(calm.atoms(calm.states(context)[0, -1:]))[:, 0] / temperature
            target = document[start : start + K]
            chances = [
                math.prod(float(logits[a, k].softmax(-1)[t]) for k, t in enumerate(target)) for a in range(calm.ATOMS)
            ]
            total -= math.log(sum(chances) / calm.ATOMS)
            tokens += len(target)
    return total, tokens


def test_the_bound_is_above_the_exact_value_and_reaches_it():
    calm, documents = lively(FiniteCalm(CALM), 2.0), texts(23, 40, 9, 31, 12, 18)
    nats, tokens = exact_nats(calm, documents, 16, 1.5)
    found = evaluate(calm, documents=documents, draws=1024, temperature=1.5)
    curve = found.bound.nats_per_token
    assert found.text.tokens == tokens
    assert found.bound.draws == tuple(2**i for i in range(11))
    assert list(curve) == sorted(curve, reverse=True)
    assert curve[0] > 1.02 * nats / tokens  # the noise matters here
    assert curve[-1] > 0.999 * nats / tokens
    assert curve[-1] == pytest.approx(nats / tokens, rel=0.01)
    assert not found.bound.fitted


def test_draws_that_coincide_give_the_exact_value_at_every_number_of_draws():
    calm = lively(Calm(CALM))
    calm.head.out.weight.zero_()
    found = evaluate(calm, temperature=1.0).bound
    assert found.bits_per_byte == pytest.approx([found.bits_per_byte[0]] * 4, rel=1e-12)
    assert found.bits_per_byte_unscaled == pytest.approx(found.bits_per_byte[0], rel=1e-12)


def test_the_bound_in_float32_is_that_in_float64():
    calm = lively(FiniteCalm(CALM))
    wide = evaluate(calm, temperature=2.0).bound.bits_per_byte
    narrow = evaluate(calm.float(), temperature=2.0).bound.bits_per_byte
    assert narrow == pytest.approx(wide, rel=1e-5)


def test_the_baseline_is_exact():
    """Every token alone, given its own context; bytes of the whole text after the first patch of each document."""
    model, documents = lively(TokenLM(TOKEN_LM), 2.0), texts(23, 40, 9, 31, 12, 18)
    nats = tokens = 0
    for index, document in enumerate(documents):
        if index % 4 == 0:
            continue
        for at in range(2, len(document)):
            patch = at // 2 * 2
            begin = 0 if patch < 16 else (patch // 8 - 1) * 8
            context = torch.tensor(document[begin:at]).view(1, -1, 1)
            nats -= float(model.log_probabilities(model.states(context)[0, -1])[document[at]])
            tokens += 1
    found = evaluate(baseline=model, documents=documents)
    size = sum(
        len(d) - 3 for i, d in enumerate(documents) if i % 4
    )  # without the first patch and the end-of-text token
    assert (found.text.tokens, found.text.bytes, found.bound) == (tokens, size, None)
    assert found.exact.nats_per_token == pytest.approx(nats / tokens, rel=1e-12)
    assert found.exact.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)
    assert found.uniform_bits_per_byte == pytest.approx(math.log2(TOKENIZER.vocab_size) * tokens / size)
    assert NOT_ARGMAX not in str(found)


def test_both_models_are_scored_at_the_same_positions_and_differ_by_the_excess():
    calm, baseline = lively(Calm(CALM)), lively(TokenLM(TOKEN_LM))
    both = evaluate(calm, baseline, temperature=3.0)
    alone = evaluate(baseline=baseline)
    assert both.text == alone.text == evaluate(calm, temperature=3.0).text
    assert both.exact == alone.exact
    assert both.excess == pytest.approx(both.bound.bits_per_byte[-1] - both.exact.bits_per_byte)
    assert both.excess_stderr > 0
    assert len(both.bound.stderr) == 4
    text = str(both)
    assert NOT_ARGMAX in text
    assert "bound less baseline" in text
    data = json.loads(json.dumps(both.to_dict()))
    assert data["note"] == NOT_ARGMAX
    assert data["bound"]["draws"] == [1, 2, 4, 8]


def test_batching_changes_nothing_but_the_noise():
    calm, baseline = lively(Calm(CALM)), lively(TokenLM(TOKEN_LM))
    calm.head.out.weight.zero_()
    one, many = (evaluate(calm, baseline, temperature=1.0, batch_rows=rows) for rows in (1, 5))
    assert one.text == many.text
    assert one.exact.bits_per_byte == pytest.approx(many.exact.bits_per_byte, rel=1e-12)
    assert one.bound.bits_per_byte == pytest.approx(many.bound.bits_per_byte, rel=1e-12)


def test_a_number_of_patches_is_spread_over_the_text_and_keeps_to_it():
    baseline = lively(TokenLM(TOKEN_LM))
    few, every = evaluate(baseline=baseline, patches=10), evaluate(baseline=baseline)
    assert few.text.patches == 10
    assert few.text.scored_documents > 1
    assert evaluate(baseline=baseline, patches=10**6) == every
    assert evaluate(baseline=baseline, patches=10, batch_rows=1).text == few.text


def test_the_temperature_of_an_overconfident_decoder_is_fitted_on_other_documents():
    """Text of the model's own making wants temperature 1, and five times as much for logits that are five times too large."""
    calm = lively(Calm(CALM), 0.5)
    calm.head.out.weight.zero_()  # every latent is the bias: tokens are independent of the context
    chances = calm.autoencoder.decode(calm.head.out.bias).softmax(-1)
    g = generator(1)
    documents = [torch.multinomial(chances, 200, True, generator=g).T.flatten().numpy() for _ in range(6)]
    right = evaluate(calm, documents=documents, context_tokens=400)
    calm.autoencoder.embedding.weight.mul_(5.0)
    wrong = evaluate(calm, documents=documents, context_tokens=400)
    assert (right.bound.fitted, right.bound.fit_draws, right.bound.fit_patches) == (True, 8, 2 * 199)
    assert (right.text.fit_documents, right.text.scored_documents) == (2, 4)
    assert right.bound.temperature == pytest.approx(1, rel=0.2)
    assert wrong.bound.temperature == pytest.approx(5, rel=0.2)
    assert wrong.bound.bits_per_byte[-1] == pytest.approx(right.bound.bits_per_byte[-1], rel=0.01)
    assert wrong.bound.bits_per_byte_unscaled > 1.1 * wrong.bound.bits_per_byte[-1]
    for index in (1, 2, 3, 5):  # the fit does not read the text that is scored
        documents[index] = np.full(400, 3 + 65)
    changed = evaluate(calm, documents=documents, context_tokens=400)
    assert changed.bound.temperature == wrong.bound.temperature
    assert changed.bound.bits_per_byte != wrong.bound.bits_per_byte


def test_bytes_of_patches_add_up_to_the_text():
    text = "naïve façade 東京 🙂🙂 plain\n" * 5
    for tokenizer in (TOKENIZER, train_tokenizer([text], 300)):
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id, tokenizer.pad_id])
        total = sum(patch_bytes(tokenizer, ids, start, 3) for start in range(0, len(ids), 3))
        assert total == len(text.encode())
        assert patch_bytes(tokenizer, ids, len(ids) - 2, 2) == 0  # end-of-text and pad are no text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"draws": 6}, "draws must be a power of two, since the curve doubles them; got 6, nearest 8"),
        ({"draws": 0}, "got 0, nearest 1"),
        ({"temperature": 0.0}, "temperature must be a positive number; got 0.0"),
        ({"patches": 0}, "the number of patches must be at least 1; got 0"),
        ({"context_tokens": 18}, "context-tokens must be a multiple of 4"),
        ({"patch_size": 0}, "the patch size must be at least 1; got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        evaluate(baseline=lively(TokenLM(TOKEN_LM)), **settings)


def test_texts_and_models_that_cannot_work_are_refused():
    baseline = lively(TokenLM(TOKEN_LM))
    with pytest.raises(
        DataError, match="at least 2 documents must be longer than their first patch of 2 tokens; got 1"
    ):
        evaluate(baseline=baseline, documents=texts(20, 2))
    with pytest.raises(DataError, match="no document is longer than the first patch"):
        evaluate(baseline=baseline, documents=texts(2, 2))
    ends = [np.full(9, TOKENIZER.eos_id)] * 3
    with pytest.raises(DataError, match="decode to no text at all"):
        evaluate(baseline=baseline, documents=ends)
    baseline.output.weight.fill_(math.inf)
    with pytest.raises(DataError, match="not finite numbers: its training diverged"):
        evaluate(baseline=baseline)
    calm = lively(Calm(CALM))
    calm.autoencoder.from_latent.weight.fill_(math.nan)
    with pytest.raises(DataError, match="not finite numbers: its training diverged"):
        evaluate(calm)


def test_the_grid_of_temperatures_closes_on_the_best_of_the_coarse_one():
    (_, coarse, _, _), (_, fine, _, _) = bound_module.GRIDS
    ratio = coarse[1] / coarse[0]
    assert min(fine) > 1 / ratio
    assert max(fine) < ratio
    assert 1.0 in fine


@pytest.fixture
def runs(tmp_path):
    """A calm, a token_lm and an autoencoder run, and a text."""
    data = {"path": "shards", "context_tokens": 16}
    models = {"calm": Calm(CALM), "token_lm": TokenLM(TOKEN_LM)}
    models["autoencoder"] = models["calm"].autoencoder
    for kind, model in models.items():
        settings = {"kind": kind, "model": model.config.model_dump(mode="json"), "data": data}
        save_run(tmp_path / kind, parse_run(settings, kind), model, TOKENIZER)
    lines = [json.dumps({"text": "some words of text, " * n}) for n in (1, 2, 3, 2)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path


def command(monkeypatch, capsys, *words):
    """Exit code, standard output and standard error of `nextvec bound WORDS`."""
    monkeypatch.setattr(sys, "argv", ["nextvec", "bound", *map(str, words)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_prints_and_writes_both_models(runs, monkeypatch, capsys):
    words = [runs / "calm", "--baseline", runs / "token_lm", "--data", runs / "text.jsonl", "--draws", 4]
    code, out, _ = command(monkeypatch, capsys, *words, "--json", runs / "bound.json")
    assert code == 0
    assert NOT_ARGMAX in out
    data = json.loads((runs / "bound.json").read_text())
    assert data["likelihood"]["bound"]["draws"] == [1, 2, 4]
    assert data["likelihood"]["text"]["protocol"] == "documents-16"
    code, again, _ = command(monkeypatch, capsys, *words)
    assert again == out
    code, alone, _ = command(monkeypatch, capsys, runs / "token_lm", "--data", runs / "text.jsonl", "--patch-size", 2)
    assert code == 0
    assert next(line for line in out.splitlines() if line.startswith("baseline")) in alone


def test_mistakes_on_the_command_line_are_one_sentence(runs, monkeypatch, capsys):
    data = ["--data", runs / "text.jsonl"]
    for words, sentence in (
        ([runs / "autoencoder", *data], "holds an autoencoder, which predicts nothing"),
        ([runs / "token_lm", "--baseline", runs / "token_lm", *data], "is a baseline itself"),
        ([runs / "calm", "--baseline", runs / "calm", *data], "--baseline must be a token_lm run"),
        ([runs / "calm", "--data", runs / "nowhere"], "nowhere"),
        ([runs / "calm", *data, "--patch-size", 4], "--patch-size is for a baseline alone"),
        ([runs / "calm", *data, "--draws", 3], "draws must be a power of two"),
        ([runs / "nothing", *data], "is not a run directory"),
    ):
        code, out, err = command(monkeypatch, capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith("nextvec: ")
        assert sentence in err
        assert err.count("\n") == 1


def test_another_tokenizer_of_the_baseline_is_refused(runs, monkeypatch, capsys):
    other = train_tokenizer(["some words of text, " * 20], 262)
    config = TokenLMConfig(vocab_size=other.vocab_size, backbone=BACKBONE)
    settings = {
        "kind": "token_lm",
        "model": config.model_dump(mode="json"),
        "data": {"path": "s", "context_tokens": 16},
    }
    save_run(runs / "other", parse_run(settings, "other"), TokenLM(config), other)
    code, _, err = command(
        monkeypatch, capsys, runs / "calm", "--baseline", runs / "other", "--data", runs / "text.jsonl"
    )
    assert code == 2
    assert "have different tokenizers" in err
