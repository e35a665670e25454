"""Autoencoder, backbone, head, CALM and baseline: shapes, equivalences, initialisation and dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    EnergyHeadConfig,
    MixtureHeadConfig,
    TokenLMConfig,
)
from nextvec.model.autoencoder import Autoencoder, gaussian_kl
from nextvec.model.calm import Calm
from nextvec.model.compressor import PlaceTables
from nextvec.model.cross_entropy import linear_cross_entropy
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.init import STD, initialise
from nextvec.model.text_states import States, TextStates
from nextvec.model.token_lm import TokenLM

AUTOENCODER = AutoencoderConfig(vocab_size=61, patch_size=4, width=16, inner=24, latent=12)
BACKBONE = BackboneConfig(layers=2, width=24, inner=40, heads=4, kv_heads=2)
CONFIG = CalmConfig(autoencoder=AUTOENCODER, backbone=BACKBONE, head=EnergyHeadConfig(blocks=2, noise=8))


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Random parameters everywhere, so that no zero initialisation hides a difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.double().eval().requires_grad_(False)


def calm(form: str = "tokens") -> Calm:
    model = lively(Calm(CONFIG.override(input=form)))
    assert isinstance(model, Calm)
    return model


def mixture(recall: int = 0, multi_token: bool = False, grams: int = 0) -> Calm:
    """Its head reads tokens of the patch besides the state; the multi-token one does with recall alone."""
    factored = AUTOENCODER.override(factored=True)
    kind = AutoregressiveHeadConfig if multi_token else MixtureHeadConfig
    model = lively(Calm(CalmConfig(autoencoder=factored, backbone=BACKBONE, head=kind(recall=recall, grams=grams))))
    assert isinstance(model, Calm)
    return model


def token_lm(embedding_norm: bool = False, recall: int = 0, grams: int = 0) -> TokenLM:
    config = TokenLMConfig(vocab_size=61, backbone=BACKBONE, embedding_norm=embedding_norm, recall=recall, grams=grams)
    model = lively(TokenLM(config))
    assert isinstance(model, TokenLM)
    return model


def ids(rows: int, patches: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, patches, size), generator=torch.Generator().manual_seed(seed))


MODELS = {
    "calm": calm(),
    "calm of latents": calm("latents"),
    "calm of both": calm("both"),
    "calm of a mixture": mixture(),
    "calm with recall": mixture(recall=2),
    "multi-token with recall": mixture(recall=2, multi_token=True),
    "token_lm": token_lm(),
    "token_lm of equal embeddings": token_lm(embedding_norm=True),
    "token_lm with recall": token_lm(recall=2),
    "calm with n-grams": mixture(recall=1, grams=29),
    "multi-token with n-grams": mixture(recall=1, multi_token=True, grams=29),
    "token_lm with n-grams": token_lm(recall=1, grams=29),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def said(model: Calm | TokenLM, states: States) -> Tensor:
    """What a model makes of its states, (..., F): a law of tokens, or latents; of a text looked up, too."""
    if isinstance(states, TextStates):
        patch = torch.zeros(*states.shape[:-1], model.patch_size, dtype=torch.int64)
        law = model.head.log_probabilities(states, patch)  # type: ignore[union-attr, operator]
        return torch.cat((states.vector, law), dim=-1)
    return states


@every_model
def test_cached_states_equal_uncached_for_every_split(model: Calm | TokenLM) -> None:
    tokens = ids(2, 9, model.patch_size)
    whole = model.states(tokens)
    for first in range(1, 9):
        cache = model.new_cache(2, 9)
        parts = [model.states(tokens[:, :first], cache), model.states(tokens[:, first : first + 1], cache)]
        if first < 8:
            parts.append(model.states(tokens[:, first + 1 :], cache))
        torch.testing.assert_close(
            torch.cat([said(model, part) for part in parts], 1), said(model, whole), rtol=1e-11, atol=1e-11
        )
    with pytest.raises(ValueError, match="the cache holds 9 positions; got 10"):
        model.states(tokens[:, :1], cache)


@every_model
def test_branches_equal_running_each_prefix_alone(model: Calm | TokenLM) -> None:
    tokens, first, second = (ids(2, 6, model.patch_size, seed) for seed in range(3))
    state, trunk = model.trunk(tokens)
    torch.testing.assert_close(said(model, state), said(model, model.states(tokens)), rtol=1e-11, atol=1e-11)
    one, trunk_one = model.branch(first, trunk, torch.arange(6))
    two, _ = model.branch(second, trunk_one, torch.arange(6))
    for p in range(6):
        sequence = torch.cat((tokens[:, : p + 1], first[:, p : p + 1], second[:, p : p + 1]), dim=1)
        alone = said(model, model.states(sequence))
        torch.testing.assert_close(said(model, one)[:, p], alone[:, p + 1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(said(model, two)[:, p], alone[:, p + 2], rtol=1e-10, atol=1e-10)


def test_tables_of_places_are_a_compressor_whose_first_layer_is_looked_up() -> None:
    """One of the same width, its product with each token's embedding in the place of the tables, and no bias."""
    model, tokens = calm("tables"), ids(2, 5, 4)
    tables = model.compressor
    assert isinstance(tables, PlaceTables)
    generator = torch.Generator().manual_seed(3)
    embedding_VD = torch.randn(model.vocab_size, 10, generator=generator, dtype=torch.float64)
    first_KDE = torch.randn(4, 24, 10, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        tables.embedding.weight.copy_((embedding_VD @ first_KDE.mT).flatten(0, 1))
    hidden = F.silu(embedding_VD[tokens].flatten(-2) @ first_KDE.transpose(0, 1).flatten(1).T)
    _, second, norm = tables.project
    expected = F.layer_norm(second(hidden), (24,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(tables(tokens), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.states(tokens), model.backbone(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["tokens", "latents", "both"])
def test_the_compressor_reads_tokens_the_posterior_mean_or_both_side_by_side(form: str) -> None:
    model, tokens = calm(form), ids(2, 5, 4)
    compressor, latent = model.compressor, model.autoencoder.encode(tokens).mean
    first, (_, second, norm) = compressor.project[0], compressor.project[1:]
    columns, read, bias = [], [], []
    if compressor.embedding is not None:
        columns, read, bias = [first.weight], [compressor.embedding(tokens).flatten(-2)], [first.bias]
    if compressor.latent_in is not None:
        columns, read = [*columns, compressor.latent_in.weight], [*read, latent]
        bias = bias or [compressor.latent_in.bias]
    assert [matrix.shape[1] for matrix in columns] == {"tokens": [96], "latents": [12], "both": [96, 12]}[form]
    hidden = F.silu(F.linear(torch.cat(read, -1), torch.cat(columns, -1), *bias))
    expected = F.layer_norm(second(hidden), (24,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(compressor(tokens, latent), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.states(tokens), model.backbone(expected), rtol=1e-11, atol=1e-11)
    given = model.states(tokens, latent_BPL=latent + 1)
    assert torch.equal(given, model.states(tokens)) is (form == "tokens")


def test_the_default_input_has_the_parameters_that_it_always_had() -> None:
    """Also in this order: it is the order in which fresh parameters are drawn."""
    names = [name for name, _ in Calm(CONFIG).compressor.named_parameters()]
    assert names == ["embedding.weight"] + [f"project.{n}.{kind}" for n in (0, 2, 3) for kind in ("weight", "bias")]


def test_normed_embeddings_have_unit_size_and_no_parameters() -> None:
    plain, normed = token_lm(), token_lm(embedding_norm=True)
    assert plain.state_dict().keys() == normed.state_dict().keys()
    read: list[torch.Tensor] = []
    normed.backbone.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    tokens = ids(2, 5, 1)
    normed.states(tokens)
    assert bool((read[0].square().mean(-1) - 1).abs().max() < 1e-3)
    scale = plain.embedding.weight.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    plain.embedding.weight.mul_(scale)
    torch.testing.assert_close(plain.states(tokens), normed.states(tokens), rtol=1e-11, atol=1e-11)
    assert TokenLMConfig(vocab_size=61, backbone=BACKBONE).embedding_norm is False  # as published
    head = AutoregressiveHeadConfig(embedding_norm=True)
    model = lively(Calm(CONFIG.model_copy(update={"head": head})))
    assert isinstance(model, Calm)
    other = lively(Calm(CONFIG.model_copy(update={"head": AutoregressiveHeadConfig()})))
    assert isinstance(other, Calm)
    states, targets = model.states(ids(2, 5, 4)), ids(2, 5, 4, seed=1)
    assert float((model.loss(states, targets, None)[0] - other.loss(states, targets, None)[0]).abs()) > 1e-3
    drawn, given = model.head.draw(states[:, -1], 2000, torch.Generator().manual_seed(0)), {}
    for patch in drawn[:, 0].tolist():
        given[tuple(patch[:2])] = given.get(tuple(patch[:2]), 0) + 1
    (first, second), count = max(given.items(), key=lambda item: item[1])  # sampling and likelihood read alike
    assert isinstance(model.head, AutoregressiveHead)
    patch = torch.tensor([[first, second, 0, 0]])
    p = float(model.head.log_probabilities(states[:1, -1], patch)[0, :2].sum().exp())
    assert abs(count - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5


def test_states_are_causal() -> None:
    model, tokens = calm(), ids(1, 6, 4)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    before, after = model.states(tokens), model.states(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_split_head_equals_the_published_unsplit_layer() -> None:
    """l1([LayerNorm(x); c]) with one 2D -> D matrix, as the authors write it (docs/method.md)."""
    head = calm().head
    generator = torch.Generator().manual_seed(2)
    state = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    noise = torch.rand(3, 5, 8, generator=generator, dtype=torch.float64) - 0.5
    x, c = head.noise_norm(head.noise_in(noise)), head.state_norm(head.state_in(state)).expand(3, 5, 24)
    for block in head.blocks:
        matrix = torch.cat((block.from_draw.weight, block.from_state.weight), dim=1)
        hidden = F.silu(F.linear(torch.cat((block.norm(x), c), -1), matrix, block.from_draw.bias))
        gate, up = block.gate_up(F.silu(block.middle(hidden))).chunk(2, -1)
        x = x + block.down(F.silu(gate) * up)
    expected = head.out(F.silu(head.out_in(head.norm(x))))
    torch.testing.assert_close(head(state, noise), expected, rtol=1e-11, atol=1e-11)


def test_draws_depend_on_state_noise_and_seed_alone() -> None:
    model = calm()
    state = model.states(ids(2, 3, 4))
    one = model.draw_latents(state, 5, torch.Generator().manual_seed(0))
    again = model.draw_latents(state, 5, torch.Generator().manual_seed(0))
    other = model.draw_latents(state, 5, torch.Generator().manual_seed(1))
    assert one.shape == (5, 2, 3, 12)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    tokens = model.draw_tokens(state, 5, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, model.autoencoder.decode(one).argmax(-1))


def test_token_draws_follow_the_softmax() -> None:
    model = token_lm()
    state = model.states(ids(1, 4, 1))[:, -1:]
    count = 40_000
    drawn = model.draw_tokens(state, count, torch.Generator().manual_seed(0)).flatten()
    p = torch.softmax(model.logits(state).flatten(), 0)
    z = (drawn.bincount(minlength=61) / count - p) / (p * (1 - p) / count).sqrt().clamp(min=1e-6)
    assert float(z[p > 1e-3].abs().max()) < 5.0  # 61 seeded comparisons, false alarm below 4e-5


def test_initialisation_is_what_its_page_says() -> None:
    model = Calm(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    big = Autoencoder(AutoencoderConfig(vocab_size=500, width=64, inner=64, latent=64))
    initialise(big, torch.Generator().manual_seed(0))
    assert abs(float(big.embedding.weight.detach().std()) / STD - 1.0) < 0.05
    assert float(big.squeeze.bias.detach().abs().max()) == 0.0
    assert float(model.head.out.weight.detach().abs().max()) == 0.0
    assert float(model.head.out.bias.detach().abs().max()) == 0.0
    assert bool((model.backbone.norm.weight == 1.0).all())
    same = Calm(CONFIG)
    before = same.autoencoder.squeeze.weight.clone()
    initialise(same, torch.Generator().manual_seed(0))
    assert torch.equal(same.autoencoder.squeeze.weight, before)  # frozen: not touched
    assert torch.equal(model.backbone.blocks[1].mlp.down.weight, same.backbone.blocks[1].mlp.down.weight)


def test_the_autoencoder_inside_calm_is_frozen_and_stays_in_evaluation_mode() -> None:
    model = Calm(CONFIG).train()
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    assert model.training
    assert not model.autoencoder.training
    with pytest.raises(ValueError, match="another configuration"):
        Calm(CONFIG, Autoencoder(AUTOENCODER.override(latent=8)))


def test_kl_is_torchs() -> None:
    posterior = calm().autoencoder.encode(ids(3, 5, 4))
    mean, log_std = posterior
    ours = gaussian_kl(posterior)
    normal = torch.distributions.Normal(mean, log_std.exp())
    theirs = torch.distributions.kl_divergence(
        normal, torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    )
    torch.testing.assert_close(ours, theirs)


def test_autoencoder_loss_is_the_sum_of_its_parts_without_noise() -> None:
    config = AUTOENCODER.override(token_dropout=0.0, latent_dropout=0.0)
    model = lively(Autoencoder(config))
    assert isinstance(model, Autoencoder)
    with torch.no_grad():
        model.to_latent.bias[12:] = -30.0  # std e^-30: the draw is the mean
        model.to_latent.weight[12:] = 0.0
    tokens = ids(7, 1, 4)[:, 0]
    loss, metrics = model.loss(tokens, torch.Generator().manual_seed(0))
    posterior = model.encode(tokens)
    logits = model.decode(posterior.mean)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    clipped = gaussian_kl(posterior).clamp(min=0.5).sum(-1).mean()
    torch.testing.assert_close(loss, 4 * cross_entropy + 0.001 * clipped, rtol=1e-9, atol=1e-9)
    assert float(metrics["accuracy"]) == float((logits.argmax(-1) == tokens).double().mean())


def test_token_dropout_writes_the_mask_id_and_targets_stay_clean() -> None:
    config = AUTOENCODER.override(token_dropout=0.999999, mask_id=7, latent_dropout=0.0)
    model = lively(Autoencoder(config))
    assert isinstance(model, Autoencoder)
    with torch.no_grad():
        model.to_latent.bias[12:] = -30.0
        model.to_latent.weight[12:] = 0.0
    tokens = ids(5, 1, 4)[:, 0]
    clean, _ = model.loss(tokens, torch.Generator().manual_seed(0))
    loss, _ = model.train().loss(tokens, torch.Generator().manual_seed(0))
    assert not torch.equal(clean, loss)  # evaluation mode drops nothing
    posterior = model.encode(torch.full_like(tokens, 7))
    cross_entropy = F.cross_entropy(model.decode(posterior.mean).flatten(0, 1), tokens.flatten())
    expected = 4 * cross_entropy + 0.001 * gaussian_kl(posterior).clamp(min=0.5).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", [None, [True, False, True, True, False, True, True]])
def test_fused_cross_entropy_equals_torchs_in_value_and_gradients(
    keep: list[bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextvec.model.cross_entropy.CHUNK_ELEMENTS", 3 * 11)  # several chunks, the last one short
    monkeypatch.setattr("nextvec.model.cross_entropy.LEAST_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (7,), generator=generator)
    mask = None if keep is None else torch.tensor(keep)
    loss, accuracy = linear_cross_entropy(hidden, weight, target, mask)
    ours = torch.autograd.grad(3.0 * loss, (hidden, weight))
    rows = slice(None) if mask is None else mask
    plain = F.cross_entropy((hidden @ weight.T)[rows], target[rows])
    theirs = torch.autograd.grad(3.0 * plain, (hidden, weight))
    torch.testing.assert_close(loss, plain)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    right = ((hidden @ weight.T).argmax(-1) == target)[rows].double().mean()
    torch.testing.assert_close(accuracy, right)


def test_fused_cross_entropy_under_bfloat16_autocast_keeps_a_float32_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator, requires_grad=True)
    weight = torch.randn(300, 32, generator=generator, requires_grad=True)
    target = torch.randint(0, 300, (64,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, target)
    loss.backward()
    exact = F.cross_entropy(hidden @ weight.T, target)
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0.0)


def test_backbone_runs_in_bfloat16_autocast_with_the_right_dtypes() -> None:
    model = Calm(CONFIG)
    initialise(model, torch.Generator().manual_seed(0))
    initialise(model.autoencoder.requires_grad_(True), torch.Generator().manual_seed(1))
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.states(ids(1, 3, 4))
        posterior = model.teacher(ids(1, 3, 4))
    assert posterior.mean.dtype == torch.float32
    assert posterior.log_std.dtype == torch.float32
    torch.testing.assert_close(state.float(), model.states(ids(1, 3, 4)), rtol=0.1, atol=0.1)


def test_configs_say_rule_value_and_nearest() -> None:
    with pytest.raises(ValueError, match="heads must divide width 24; got 5, nearest 4"):
        BackboneConfig(layers=1, width=24, inner=8, heads=5)
    with pytest.raises(ValueError, match="layers must be even"):
        AutoencoderConfig(vocab_size=9, layers=3)
    with pytest.raises(ValueError, match="did you mean 'latent'"):
        AutoencoderConfig.parse({"vocab_size": 9, "latnet": 3})
