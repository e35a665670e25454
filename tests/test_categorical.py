"""Categorical head: its loss by plain loops, its flow against Bayes' rule, the law of its draws, its codes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, CategoricalHeadConfig
from nextvec.errors import ConfigError
from nextvec.model.calm import Calm
from nextvec.model.heads.categorical import CategoricalHead, Codes

VOCAB, K, E = 13, 3, 4


def calm(head: CategoricalHeadConfig, vocab: int = VOCAB) -> Calm:
    """Random parameters everywhere in float64."""
    config = CalmConfig(
        autoencoder=AutoencoderConfig(vocab_size=vocab, patch_size=K, width=16, inner=24, latent=K * E, factored=True),
        backbone=BackboneConfig(layers=1, width=12, inner=20, heads=2),
        head=head,
    )
    model = Calm(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.4, generator=generator)
    return model


def head_of(model: Calm) -> CategoricalHead:
    assert isinstance(model.head, CategoricalHead)
    return model.head


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(head: CategoricalHead, codes: Codes, x_L: Tensor, time: float, state_D: Tensor, place: int) -> Tensor:
    """The docstring's formula, (V,), but for what is the same for all tokens."""
    hidden = head.slots(state_D)
    if time > 0:
        size = math.sqrt((1 - time) ** 2 + time**2)
        hidden = hidden + head.net(x_L / size, torch.tensor(time * 1000), head.net.condition(state_D))
    slot = hidden.view(K, -1)[place]
    slot = slot / (slot.square().mean() + 1e-6).sqrt() * head.norm.weight
    variance = (1 - time) ** 2 + time**2 * float(codes.square)
    away = (x_L.view(K, E)[place] - time * codes.mean).square().sum(-1)
    return head.output.weight @ slot - away / (2 * variance)


def test_the_loss_is_its_definition() -> None:
    model = calm(CategoricalHeadConfig(blocks=1, teacher_draws=3, clean=0.4, until=0.7))
    head, state = head_of(model), normal(2, 5, 12)
    ids = torch.randint(VOCAB, (2, 5, K), generator=torch.Generator().manual_seed(2))
    loss, metrics = head.loss(state, ids, torch.Generator().manual_seed(7))
    g, codes = torch.Generator().manual_seed(7), head.codes()
    time = 0.7 * torch.rand(3, 10, generator=g, dtype=torch.float64)
    clean = torch.rand(3, 10, generator=g, dtype=torch.float64) < 0.4
    start, eps = (torch.randn(3, 10, K, E, generator=g, dtype=torch.float64) for _ in range(2))
    assert 0 < int(clean.sum()) < 30
    total, right = 0.0, 0
    for s, n in product(range(3), range(10)):
        tokens, t = ids.view(10, K)[n], 0.0 if clean[s, n] else float(time[s, n])
        z = codes.mean[tokens] + codes.std[tokens] * eps[s, n]
        x = ((1 - t) * start[s, n] + t * z).flatten()
        for place in range(K):
            found = logits(head, codes, x, t, state.view(10, 12)[n], place).log_softmax(-1)
            total -= float(found[tokens[place]])
            right += int(found.argmax() == tokens[place])
    assert float(loss) == pytest.approx(total / (30 * K), rel=1e-6)  # times reach the network as float32 waves
    assert float(metrics["accuracy"]) == pytest.approx(right / (30 * K))
    assert float(metrics["cross_entropy"]) == float(loss)


@pytest.mark.slow
def test_the_expected_latent_is_bayes_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A euler step from time t to 1 arrives at E[z | x], here of 13^3 patches, one by one."""
    model = calm(CategoricalHeadConfig(blocks=1, steps=2, until=0.6))
    head, state = head_of(model), normal(1, 12)
    mean = normal(VOCAB, E, seed=3)
    codes = Codes(mean, torch.full_like(mean, 0.3), torch.tensor(0.09, dtype=torch.float64))  # one variance: exact
    monkeypatch.setattr(head, "codes", lambda: codes)
    start = normal(2, 1, K * E, seed=4)
    found = head.transport(start, state)
    for x, arrived in zip(start[:, 0], found[:, 0], strict=True):
        x = x + 0.6 * (expected(head, codes, x, 0.0, state[0]) - x)
        torch.testing.assert_close(arrived, expected(head, codes, x, 0.6, state[0]), rtol=1e-6, atol=1e-7)


def expected(head: CategoricalHead, codes: Codes, x: Tensor, time: float, state: Tensor) -> Tensor:
    """Over all patches: their probability, a product over places, times the mean of z given the patch and x."""
    law = [logits(head, codes, x, time, state, place).softmax(-1) for place in range(K)]
    variance = (1 - time) ** 2 + (0.3 * time) ** 2
    total = torch.zeros_like(x)
    for patch in product(range(VOCAB), repeat=K):
        clean = codes.mean[list(patch)].flatten()
        weight = math.prod(float(law[place][token]) for place, token in enumerate(patch))
        total += weight * (clean + time * 0.09 / variance * (x - time * clean))
    return total


@pytest.mark.slow
def test_draws_have_the_probabilities_that_the_network_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of 20,000 draws, 64 steps, against the law of the tokens: the flow of the true velocity ends in it."""
    model = calm(CategoricalHeadConfig(blocks=1, steps=64, until=0.95), vocab=7)
    head, state = head_of(model), normal(1, 12)
    head.net.out.weight.zero_()  # places know nothing of each other
    head.net.out.bias.zero_()
    mean = 2.0 * normal(7, E, seed=5)
    codes = Codes(mean, torch.full_like(mean, 0.1), torch.tensor(0.01, dtype=torch.float64))
    monkeypatch.setattr(head, "codes", lambda: codes)
    found = head.draw(state, 20_000, torch.Generator().manual_seed(0))[:, 0].unflatten(-1, (K, E))
    tokens = torch.cdist(found, mean.expand(len(found), -1, -1)).argmin(-1)
    law = torch.stack(
        [logits(head, codes, torch.zeros(K * E).double(), 0.0, state[0], p).softmax(-1) for p in range(K)]
    )
    for place in range(K):
        counts = torch.bincount(tokens[:, place], minlength=7).double()
        wanted = 20_000 * law[place]
        assert float(wanted.min()) > 20
        statistic = float(((counts - wanted).square() / wanted).sum())
        assert statistic < 40, (place, statistic)  # 6 degrees of freedom: p below 1e-6
    pairs = torch.bincount(7 * tokens[:, 0] + tokens[:, 1], minlength=49).double() / 20_000
    assert float((pairs.view(7, 7) - law[0][:, None] * law[1]).abs().max()) < 0.012


def test_codes_are_those_of_the_autoencoders_present_weights() -> None:
    model = calm(CategoricalHeadConfig(blocks=1))
    head, ids = head_of(model), torch.randint(VOCAB, (5, K), generator=torch.Generator().manual_seed(0))
    before = head.codes()
    assert head.codes() is before
    torch.testing.assert_close(before.mean[ids].flatten(-2), model.teacher(ids).mean)
    torch.testing.assert_close(before.std[ids].flatten(-2), model.teacher(ids).log_std.exp())
    model.autoencoder.load_state_dict({name: 0.5 * value for name, value in model.autoencoder.state_dict().items()})
    torch.testing.assert_close(head.codes().mean[ids].flatten(-2), model.teacher(ids).mean)
    assert not torch.equal(head.codes().mean, before.mean)
    state = normal(2, 12)
    before_step = head.draw(state, 2, torch.Generator().manual_seed(0))
    head.output.weight.add_(0.3 * normal(VOCAB, 12, seed=6))
    after_step = head.draw(state, 2, torch.Generator().manual_seed(0))
    assert not torch.equal(before_step, after_step)  # nothing that draws are made of is kept too long
    assert not any("codes" in name or "autoencoder" in name for name in head.state_dict())
    half = model.to(torch.bfloat16)
    assert head_of(half).codes().mean.dtype == torch.float32
    assert half.draw_tokens(torch.randn(2, 12).bfloat16(), 3, torch.Generator().manual_seed(0)).shape == (3, 2, K)


def test_the_pass_at_time_0_is_one_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm(CategoricalHeadConfig(blocks=1, steps=4))
    head, rows = head_of(model), []
    original = head._expected

    def counted(given: Tensor, *rest: object) -> Tensor:
        rows.append(given.shape[0])
        return original(given, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(head, "_expected", counted)
    draws = head.draw(normal(2, 12), 9, torch.Generator().manual_seed(0))
    assert draws.shape == (9, 2, K * E)
    assert rows == [1, 9, 9, 9]
    one = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    together = head.draw(normal(2, 12), 5, one)
    alone = head.draw(normal(2, 12)[1:], 5, [torch.Generator().manual_seed(4)])
    torch.testing.assert_close(together[:, 1:], alone)


def test_what_cannot_work_is_one_sentence() -> None:
    autoencoder = {"vocab_size": 9, "patch_size": 2, "width": 8, "inner": 8, "latent": 4}
    backbone = {"layers": 1, "width": 8, "inner": 8, "heads": 2}
    model = {"autoencoder": autoencoder, "backbone": backbone, "head": {"kind": "categorical"}}
    with pytest.raises(ConfigError, match="categorical needs an autoencoder whose tokens have dimensions of their own"):
        CalmConfig.parse(model, "model")
    with pytest.raises(ConfigError, match="steps: Input should be greater than or equal to 2; got 1"):
        CategoricalHeadConfig.parse({"steps": 1}, "head")
    with pytest.raises(ConfigError, match="the categorical head knows the solvers euler; got 'heun'"):
        CategoricalHeadConfig.parse({"solver": "heun"}, "head")
