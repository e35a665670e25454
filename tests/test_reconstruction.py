"""evaluate.reconstruction: every figure against a slow twin, and the limits that are known in closed form."""

import json

import numpy as np
import pytest
import torch

from nextvec.config import AutoencoderConfig
from nextvec.errors import DataError
from nextvec.evaluate.reconstruction import evaluate_reconstruction
from nextvec.model.autoencoder import Autoencoder, Posterior
from nextvec.scoring.clusters import cluster_ratio


class OneHot(Autoencoder):
    """Reads every token back: the latent is one-hot per token, except for dimensions made to collapse."""

    def __init__(self, collapsed=2, std=0.25):
        self.tokens, self.collapsed, self.std = 5, collapsed, std
        super().__init__(AutoencoderConfig(vocab_size=5, patch_size=3, width=8, inner=8, latent=15 + collapsed))

    def encode(self, ids):
        mean = torch.nn.functional.one_hot(ids, 5).flatten(-2).float()
        mean = torch.cat([mean, torch.zeros(*mean.shape[:-1], self.collapsed)], dim=-1)
        std = torch.full_like(mean, self.std)
        std[..., 15:] = 1.0
        return Posterior(mean, std.log())

    def decode_tokens(self, z):
        return z[..., :15].unflatten(-1, (3, 5)).argmax(-1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def documents(*lengths, vocabulary=5):
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocabulary, length, dtype=np.uint16) for length in lengths]


def test_every_figure_equals_the_slow_twin():
    autoencoder = Autoencoder(AutoencoderConfig(vocab_size=5, patch_size=3, width=8, inner=12, latent=6)).eval()
    with torch.no_grad():
        g = generator(9)
        for parameter in autoencoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)
    texts = documents(7, 2, 12, 30, 3)
    result = evaluate_reconstruction(autoencoder, texts, generator=generator(1), tokenizer_hash="t", batch_rows=1000)
    patches = [(d, text[i : i + 3].tolist()) for d, text in enumerate(texts) for i in range(0, len(text) - 2, 3)]
    ids = torch.tensor([tokens for _, tokens in patches])
    owner = torch.tensor([d for d, _ in patches])
    mean, log_std = autoencoder.encode(ids)
    std = log_std.exp()
    eps = torch.randn(mean.shape, generator=generator(1))
    where = {"mean": mean, "draw": mean + std * eps, "doubled": mean + 2 * std * eps}
    where |= {f"noise-{c}": mean + c * eps for c in (0.1, 0.3, 0.5, 1.0)}
    assert list(result.accuracy) == list(where)
    for name, z in where.items():
        rows = []
        for patch, logits in zip(ids.tolist(), autoencoder.decode(z), strict=True):
            hits = [logits[k].argmax().item() == patch[k] for k in range(3)]
            rows.append([sum(hits) / 3, float(all(hits))])
        expected = cluster_ratio(torch.tensor(rows), torch.ones(len(rows), 2, dtype=torch.bool), owner)
        found = result.accuracy[name]
        assert [found.token, found.patch] == pytest.approx(expected.mean.tolist())
        assert [found.token_stderr, found.patch_stderr] == pytest.approx(expected.covariance.diagonal().sqrt().tolist())
    kl = (mean**2 + std**2 - 1 - 2 * log_std).detach() / 2
    assert result.kl_per_dimension == pytest.approx(kl.mean(dim=0).tolist(), rel=1e-5)
    assert result.kl == pytest.approx(kl.sum(dim=-1).mean().item(), rel=1e-5)
    assert result.sigma_per_dimension == pytest.approx(std.mean(dim=0).tolist(), rel=1e-5)
    assert result.sigma == pytest.approx(std.mean().item(), rel=1e-5)
    assert (result.patches, result.documents, result.seed) == (2 + 4 + 10 + 1, 4, 1)


def test_a_perfect_autoencoder_and_its_collapsed_dimensions():
    seen = []
    result = evaluate_reconstruction(
        OneHot(),
        documents(300, 301, 302),
        generator=generator(),
        tokenizer_hash="t",
        batch_rows=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.accuracy["mean"].token == result.accuracy["mean"].patch == 1.0
    assert result.collapsed_dimensions == 2
    assert result.sigma_per_dimension[0] == pytest.approx(0.25)
    order = [result.accuracy[name].token for name in ("mean", "noise-0.1", "draw", "noise-0.3", "doubled", "noise-1.0")]
    assert order == sorted(order, reverse=True)
    assert result.accuracy["doubled"] == result.accuracy["noise-0.5"]  # twice 0.25, on the same eps
    assert seen[-1] == (300, 300)
    assert "2 of 17 dimensions collapsed (KL < 0.01 nats)" in str(result)
    assert "over 300 whole patches of 3 tokens in 3 documents" in str(result)


def test_patch_accuracy_under_noise_is_the_cube_of_token_accuracy():
    """Independent noise on the three tokens of a patch: P(patch) = P(token)^3, within 5 standard errors."""
    result = evaluate_reconstruction(
        OneHot(collapsed=0), documents(*[90] * 300), generator=generator(2), tokenizer_hash="t"
    ).accuracy["noise-1.0"]
    error = (result.patch_stderr**2 + (3 * result.token**2 * result.token_stderr) ** 2) ** 0.5
    assert abs(result.patch - result.token**3) < 5 * error
    assert 0.2 < result.token < 0.9


def test_deterministic_json_and_a_single_document():
    text = documents(100)
    first = evaluate_reconstruction(OneHot(), text, generator=generator(3), tokenizer_hash="t")
    assert first == evaluate_reconstruction(OneHot(), text, generator=generator(3), tokenizer_hash="t")
    assert first.accuracy["draw"].token_stderr is None
    data = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert data["accuracy"]["mean"] == {"token": 1.0, "token_stderr": None, "patch": 1.0, "patch_stderr": None}
    assert "±" not in str(first)


def test_no_whole_patch_is_one_sentence():
    with pytest.raises(DataError, match="no document holds a patch of 3 tokens; got 2 documents of at most 2 tokens"):
        evaluate_reconstruction(OneHot(), documents(2, 1), generator=generator(), tokenizer_hash="t")
