"""The autoencoder's ablations: no variational layer, no clip, no dropout, other latent sizes, attention inside patches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextvec.bench.plain_model import Autoencoder as PlainAutoencoder
from nextvec.config import (
    AutoencoderConfig,
    AutoencoderRun,
    BackboneConfig,
    CalmConfig,
    DataSettings,
    DiffusionHeadConfig,
    EnergyHeadConfig,
    EnergySettings,
    FlowHeadConfig,
    HeadKind,
    RecipeSettings,
)
from nextvec.errors import ConfigError
from nextvec.model.autoencoder import Autoencoder, gaussian_kl
from nextvec.model.calm import Calm
from nextvec.model.init import initialise
from nextvec.model.layers import PatchAttention
from nextvec.reference.convert import convert_back
from nextvec.rundir import build_model, load_run, save_run
from nextvec.sampling.pools import count_latents
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train.objectives import CalmTraining

PLAIN = AutoencoderConfig(vocab_size=61, patch_size=4, width=16, inner=24, latent=12)
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "no variational layer": {"variational": False},
    "no clip": {"kl_clip": 0.0},
    "no KL": {"kl_weight": 0.0},
    "no dropout": {"latent_dropout": 0.0, "token_dropout": 0.0},
    "attention": {"attention": True},
    "attention, no variational layer": {"attention": True, "variational": False},
    "factored": {"factored": True},
    "factored, no variational layer": {"factored": True, "variational": False},
    "small latent": {"latent": 3},
    "large latent": {"latent": 40},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def model(variant: str, lively: bool = True) -> Autoencoder:
    found = Autoencoder(PLAIN.override(**VARIANTS[variant]))
    generator = torch.Generator().manual_seed(1)
    initialise(found, generator, std=0.25)
    if lively:
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        found.double().eval().requires_grad_(False)
    return found


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (count, 4), generator=torch.Generator().manual_seed(seed))


@every_variant
def test_it_learns_its_patches(variant: str) -> None:
    """Sixteen patches by heart, through a latent of any size; with every option the loss falls to a small part."""
    found = model(variant, lively=False).train()
    optimizer = torch.optim.AdamW(found.parameters(), lr=5e-3)
    generator, patches = torch.Generator().manual_seed(0), ids(16)
    first = None
    for _ in range(150):
        loss, metrics = found.loss(patches, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or float(metrics["cross_entropy"])
    found.eval()
    with torch.no_grad():
        _, metrics = found.loss(patches, generator)
    assert float(metrics["cross_entropy"]) < 0.25 * first
    if "no" in variant:  # without dropout or noise nothing keeps it from learning them all
        assert float(metrics["accuracy"]) > 0.9


@every_variant
def test_posterior_and_reconstruction_have_their_shapes(variant: str) -> None:
    found = model(variant)
    posterior = found.encode(ids(5))
    size = found.config.latent
    assert posterior.mean.shape == posterior.log_std.shape == (5, size)
    assert found.decode(posterior.mean).shape == (5, 4, 61)
    assert torch.equal(found.decode_tokens(posterior.mean), found.decode(posterior.mean).argmax(-1))
    stem = found.decode_stem(posterior.mean)
    for place in range(4):
        assert torch.equal(found.decode_place(stem, place), found.decode_tokens(posterior.mean)[:, place])
    latents = posterior.mean[torch.tensor([[0, 1, 0, 2], [3, 3, 3, 4]])]
    counts, _ = count_latents(found, latents, 4)
    tokens = found.decode_tokens(latents)
    assert torch.equal(counts, (tokens[:, :, None] == tokens[:, None]).all(-1).sum(-1))
    if variant not in (
        "small latent",
        "factored, no variational layer",
    ):  # where random weights decode all patches alike
        assert counts.tolist() == [[2, 1, 2, 1], [3, 3, 3, 1]]


def test_without_the_variational_layer_the_latent_is_a_point() -> None:
    found = model("no variational layer")
    assert found.to_latent.weight.shape[0] == 12
    posterior = found.encode(ids(5))
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert float((drawn - posterior.mean).abs().max()) < 1e-7
    loss, metrics = found.loss(ids(5), torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(4 * float(metrics["cross_entropy"]), rel=1e-12)  # no KL term
    again, _ = found.loss(ids(5), torch.Generator().manual_seed(1))
    assert float(loss) == pytest.approx(float(again), rel=1e-6)  # and no noise


def test_without_the_clip_every_dimension_pays_for_its_kl() -> None:
    clipped, free = model("as published"), model("no clip")
    free.load_state_dict(clipped.state_dict())
    kl = gaussian_kl(clipped.encode(ids(5)))
    (with_clip, _), (without, _) = (m.loss(ids(5), torch.Generator().manual_seed(0)) for m in (clipped, free))
    difference = float(kl.clamp(min=0.5).sum(-1).mean() - kl.sum(-1).mean())
    assert difference > 0
    assert float(with_clip - without) == pytest.approx(0.001 * difference, rel=1e-6)


def test_attention_is_softmax_among_the_tokens_of_a_patch() -> None:
    """Head by head and pair by pair in float64, rotated by position."""
    layer = PatchAttention(8, 2, 1e-6).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = layer(x)

    def rotated(vector: Tensor, position: int) -> Tensor:
        out = vector.clone()
        for i in range(2):
            angle = position * 10000.0 ** (-i / 2)
            out[i] = vector[i] * math.cos(angle) - vector[i + 2] * math.sin(angle)
            out[i + 2] = vector[i + 2] * math.cos(angle) + vector[i] * math.sin(angle)
        return out

    normed = x[1, 2] / (x[1, 2].square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    rows = [layer.attention.qkv.weight @ token for token in normed]
    for t in range(4):
        mixed = []
        for head in range(2):
            at = [slice(4 * (2 * part + head), 4 * (2 * part + head) + 4) for part in range(3)]
            query = rotated(rows[t][at[0]], t)
            scores = torch.stack([query @ rotated(rows[s][at[1]], s) / 2.0 for s in range(4)])
            mixed.append(sum(p * rows[s][at[2]] for s, p in enumerate(scores.softmax(0))))
        expected = x[1, 2, t] + layer.attention.out.weight @ torch.cat(mixed)
        torch.testing.assert_close(ours[1, 2, t], expected, rtol=1e-6, atol=1e-6)  # rotations are float32 tables


def test_attention_looks_both_ways_inside_a_patch_and_never_beyond() -> None:
    found = model("attention")
    hidden = found.decode_hidden(torch.randn(2, 12, dtype=torch.float64))
    assert hidden.shape == (2, 4, 16)
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = x.clone()
    changed[1, 2] += 1.0
    before, after = (found.encoder_attention[0](each) for each in (x, changed))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert float((before[1] - after[1]).abs().amax(-1).min()) > 1e-6


@pytest.mark.parametrize("variant", ["attention", "no variational layer", "factored"])
def test_under_bf16_autocast_the_posterior_is_float32(variant: str) -> None:
    found = model(variant).float()
    with torch.autocast("cpu", torch.bfloat16):
        posterior = found.encode(ids(5))
        tokens = found.decode_hidden(posterior.mean)
    assert posterior.mean.dtype == posterior.log_std.dtype == torch.float32
    assert bool(torch.isfinite(tokens).all())
    half = found.to(torch.bfloat16)
    assert half.decode_tokens(half.encode(ids(5)).mean).shape == (5, 4)


HEADS: list[HeadKind] = [EnergyHeadConfig(blocks=1, noise=8), FlowHeadConfig(blocks=1), DiffusionHeadConfig(blocks=1)]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
@pytest.mark.parametrize("variant", ["no variational layer", "attention", "factored"])
def test_heads_learn_from_every_variant(variant: str, head: HeadKind) -> None:
    """Also from a point, where the exact teacher's expectation has no spread."""
    config = CalmConfig(
        autoencoder=PLAIN.override(**VARIANTS[variant]),
        backbone=BackboneConfig(layers=1, width=16, inner=16, heads=2),
        head=head,
    )
    module = CalmTraining(Calm(config, model(variant).float()), EnergySettings(), RecipeSettings(name="paper"))
    initialise(module, torch.Generator().manual_seed(0), std=0.2)
    loss, _ = module(ids(6).view(2, 12), torch.Generator().manual_seed(0), 0.0)
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_saved_and_loaded(tmp_path: Path, variant: str) -> None:
    config = AutoencoderRun(data=DataSettings(path="shards"), model=PLAIN.override(vocab_size=259, **VARIANTS[variant]))
    built = build_model(config, torch.Generator().manual_seed(0))
    save_run(tmp_path / "run", config, built, byte_tokenizer())
    loaded = load_run(tmp_path / "run").model
    assert isinstance(loaded, Autoencoder)
    assert loaded.config == config.model
    assert torch.equal(loaded.encode(ids(3)).mean, built.eval().encode(ids(3)).mean)  # type: ignore[operator,union-attr]
    if not {"attention", "variational", "factored"} & VARIANTS[variant].keys():
        convert_back(tmp_path / "run", tmp_path / "published")
        return
    with pytest.raises(ConfigError, match=r"has an autoencoder with .*, which the published format does not know"):
        convert_back(tmp_path / "run", tmp_path / "published")
    with pytest.raises(ConfigError, match=r"the plain arm has the published autoencoder alone.*--no-plain"):
        PlainAutoencoder(config.model)


def test_factored_tokens_have_dimensions_of_their_own() -> None:
    """A token changes its L / K numbers alone, is the same at every place, and is read from its own numbers alone."""
    found = model("factored")
    rows = ids(2)
    other = rows.clone()
    other[:, 2] = (other[:, 2] + 1) % 61
    before, after = (found.encode(each).mean.unflatten(-1, (4, 3)) for each in (rows, other))
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
    assert float((before[:, 2] - after[:, 2]).abs().amax(-1).min()) > 1e-6
    same = found.encode(rows[:, :1].expand(2, 4)).mean.unflatten(-1, (4, 3))
    assert torch.equal(same[:, 0], same[:, 3])
    moved = before.clone()
    moved[:, 2] += 1.0
    hidden, changed = (found.decode_hidden(each.flatten(-2)) for each in (before, moved))
    assert torch.equal(hidden[:, [0, 1, 3]], changed[:, [0, 1, 3]])
    assert float((hidden[:, 2] - changed[:, 2]).abs().amax(-1).min()) > 1e-6
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in model("as published").parameters())


def test_factored_settings_that_cannot_work() -> None:
    with pytest.raises(
        ConfigError, match="latent must be a multiple of patch_size 4 where factored is true; got 13, try 16"
    ):
        PLAIN.override(latent=13, factored=True)
    with pytest.raises(ConfigError, match="attention mixes the tokens of a patch, factored keeps them apart"):
        PLAIN.override(factored=True, attention=True)


def test_attention_needs_an_even_width() -> None:
    with pytest.raises(ConfigError, match="width must be even for the rotary positions of attention; got 15"):
        PLAIN.override(width=15, attention=True)
    heads = [AutoencoderConfig(vocab_size=9, width=width).attention_heads for width in (16, 128, 512, 200)]
    assert heads == [1, 2, 8, 2]
