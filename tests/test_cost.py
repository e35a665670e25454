"""evaluate.cost: the paper's table, the parameters of real models, and operations counted by torch."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, TokenLMConfig
from nextvec.evaluate.cost import calm_cost, cost, token_lm_cost
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM

PAPER_TOKENS = 250_000 * 2.0e6
VOCAB = 128256


def transformer(layers, width, inner, heads):
    backbone = BackboneConfig(layers=layers, width=width, inner=inner, heads=heads)
    return TokenLMConfig(vocab_size=VOCAB, backbone=backbone)


def calm(layers, width, inner, heads):
    return CalmConfig(
        autoencoder=AutoencoderConfig(vocab_size=VOCAB),
        backbone=BackboneConfig(layers=layers, width=width, inner=inner, heads=heads),
        head=EnergyHeadConfig(blocks=layers // 4),
    )


# name, configuration, (published, tolerance) of parameters (1e6), training FLOPs (1e20), inference FLOPs per token (1e8)
TABLE = [
    ("Transformer-S", transformer(12, 768, 2048, 16), (281, 0.02), (6.6, 0.02), (4.4, 0.02)),
    ("Transformer-M", transformer(16, 1024, 2752, 16), (465, 0.02), (11.9, 0.02), (7.9, 0.02)),
    ("Transformer-L", transformer(16, 1536, 4096, 16), (849, 0.02), (22.5, 0.02), (15.0, 0.02)),
    ("CALM-M", calm(16, 1024, 2752, 16), (371, 0.02), (3.7, 0.02), (2.9, 0.02)),
    ("CALM-L", calm(16, 1536, 4096, 16), (735, 0.02), (7.7, 0.04), (4.6, 0.02)),
    ("CALM-XL", calm(16, 2560, 6880, 20), (1820, 0.02), (19.5, 0.09), (9.4, 0.035)),
]


@pytest.mark.parametrize(("name", "config", "params", "training", "inference"), TABLE, ids=[row[0] for row in TABLE])
def test_the_paper_table(name, config, params, training, inference):
    found = cost(config, name)
    assert found.params / 1e6 == pytest.approx(params[0], rel=params[1])
    assert found.training.total * PAPER_TOKENS / 1e20 == pytest.approx(training[0], rel=training[1])
    assert found.inference.total / 1e8 == pytest.approx(inference[0], rel=inference[1])
    assert found.training_split.total <= found.training.total
    assert found.inference_split.total == pytest.approx(found.inference.total)


def test_the_paper_autoencoder_and_the_cost_of_200_candidates():
    medium = calm(16, 1024, 2752, 16)
    assert calm_cost(medium).autoencoder_params / 1e6 == pytest.approx(75.8, rel=0.001)
    small = token_lm_cost(transformer(12, 768, 2048, 16))
    assert calm_cost(medium, candidates=200).inference.total / small.inference.total == pytest.approx(66, rel=0.04)


TINY = CalmConfig(
    autoencoder=AutoencoderConfig(vocab_size=50, patch_size=3, width=12, inner=20, layers=4, latent=10),
    backbone=BackboneConfig(layers=3, width=16, inner=28, heads=4, kv_heads=2),
    head=EnergyHeadConfig(noise=6, blocks=2),
)
TINY_TOKENS = TokenLMConfig(vocab_size=50, backbone=TINY.backbone)


@pytest.mark.parametrize("config", [TINY, TABLE[3][1]])
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = Calm(config)
    found = calm_cost(config)
    assert found.autoencoder_params == sum(p.numel() for p in model.autoencoder.parameters())
    assert found.params == sum(p.numel() for p in model.parameters()) - found.autoencoder_params
    assert found.parameters.head == sum(p.numel() for p in model.head.parameters())
    assert found.parameters.compressor + found.parameters.embedding == sum(
        p.numel() for p in model.compressor.parameters()
    )


def test_parameters_are_those_of_the_baseline():
    with torch.device("meta"):
        model = TokenLM(TINY_TOKENS)
    assert token_lm_cost(TINY_TOKENS).params == sum(p.numel() for p in model.parameters())


def counted(function):
    """Operations that torch counts; the plain attention kernel, so that its products are all seen."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.no_grad()
def test_operations_are_those_that_torch_counts():
    model, patches, draws = Calm(TINY).eval(), 7, 5
    ids = torch.zeros(1, patches, 3, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    found = calm_cost(TINY, context=patches, draws=draws)
    backbone = found.inference.attention + found.inference.mlp + found.inference.compressor
    tokens = patches * 3
    assert counted(lambda: model.states(ids)) == pytest.approx(backbone * tokens)
    state = model.states(ids)
    assert counted(lambda: model.draw_latents(state, draws, g)) == pytest.approx(found.training_split.head * tokens / 3)
    assert counted(lambda: model.draw_latents(state, 1, g)) == pytest.approx(found.inference_split.head * tokens)
    assert counted(lambda: model.autoencoder.encode(ids)) == pytest.approx(found.training.autoencoder * tokens)
    z = torch.zeros(patches, 10)
    decoding = found.inference.autoencoder + found.inference.vocabulary
    assert counted(lambda: model.autoencoder.decode(z)) == pytest.approx(decoding * tokens)
    many = calm_cost(TINY, context=patches, candidates=4).inference_split
    assert counted(lambda: model.draw_tokens(state, 4, g)) == pytest.approx(
        (many.head + many.autoencoder + many.vocabulary) * tokens
    )


@torch.no_grad()
def test_operations_of_the_baseline_are_those_that_torch_counts():
    model = TokenLM(TINY_TOKENS).eval()
    ids = torch.zeros(1, 9, 1, dtype=torch.long)
    found = token_lm_cost(TINY_TOKENS, context=9).inference
    assert counted(lambda: model.logits(model.states(ids))) == pytest.approx(found.total * 9)


def test_training_is_three_times_forward_where_trained():
    """Counted backward through the head: twice its forward, except the input gradients that nothing needs."""
    head = Calm(TINY).head
    noise = torch.rand(5, 11, 6)
    state = torch.zeros(11, 16, requires_grad=True)
    found = calm_cost(TINY, draws=5).training_split.head * 11 * 3
    unneeded = 2 * 5 * 11 * 6 * 16  # gradient towards the noise
    assert counted(lambda: head(state, noise).sum().backward()) == pytest.approx(found - unneeded)


def test_the_auxiliary_part_is_training_only():
    plain, fast = calm_cost(TINY), calm_cost(TINY, auxiliary=True)
    assert fast.inference == plain.inference
    assert fast.params == plain.params
    assert fast.training.auxiliary == 3 * 2 * (16 * 3 * 16 + 3 * 16 * 50) / 3
    assert fast.training.total == plain.training.total + fast.training.auxiliary


def test_record_prints_and_becomes_json():
    found = calm_cost(TINY, "tiny")
    data = json.loads(json.dumps(found.to_dict()))
    assert data["params"] == found.params
    assert data["training"]["total"] == found.training.total
    assert sum(value for part, value in data["inference"].items() if part != "total") == data["inference"]["total"]
    text = str(found)
    assert text.startswith(f"tiny: {found.params:,} parameters, and {found.autoencoder_params:,} in the autoencoder")
    assert "auxiliary" not in text
    assert "embedding" not in text
    assert "compressor" not in str(token_lm_cost(TINY_TOKENS))
