"""Presets: every one builds on the meta device and has the parameters that its evidence states."""

from __future__ import annotations

import pytest
import torch

from nextvec.config import AutoencoderConfig, CalmConfig, ModelConfig
from nextvec.errors import ConfigError
from nextvec.evaluate.cost import cost
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.presets import PRESETS, preset

# As reported by the paper, in millions, the autoencoder not counted; its figures have three digits.
REPORTED = {
    "transformer-s": 281,
    "transformer-m": 465,
    "transformer-l": 849,
    "calm-m": 371,
    "calm-l": 735,
    "calm-xl": 1820,
    "autoencoder-paper": 75.8,
}


def build(config: ModelConfig) -> Autoencoder | Calm | TokenLM:
    with torch.device("meta"):
        if isinstance(config, CalmConfig):
            return Calm(config)
        return Autoencoder(config) if isinstance(config, AutoencoderConfig) else TokenLM(config)


def language_model_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("autoencoder."))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_counts_as_its_evidence_says(name: str) -> None:
    config = preset(name)
    model = build(config)
    count = language_model_parameters(model)
    if name in REPORTED:
        assert count / 1e6 == pytest.approx(REPORTED[name], rel=0.006)
    if not isinstance(config, AutoencoderConfig):
        assert cost(config).params == count
    if isinstance(config, CalmConfig):
        assert cost(config).autoencoder_params == sum(p.numel() for p in model.parameters()) - count


@pytest.mark.parametrize("name", REPORTED)
def test_a_preset_of_the_paper_names_its_evidence(name: str) -> None:
    text = " ".join(str(PRESETS[name].__doc__).split())
    reported = "1.82B" if name == "calm-xl" else f"{REPORTED[name]:.0f}M"
    assert "reported" in text
    assert "not yet reproduced" in text
    assert (reported if name != "autoencoder-paper" else "75M") in text


def test_the_sizes_that_are_not_the_papers() -> None:
    reference, tiny = preset("calm-reference"), preset("calm-tiny")
    assert isinstance(reference, CalmConfig)
    assert isinstance(tiny, CalmConfig)
    assert (reference.vocab_size, reference.patch_size, reference.autoencoder.latent) == (8192, 4, 128)
    assert (reference.autoencoder.width, reference.autoencoder.inner) == (256, 640)
    backbone = reference.backbone
    assert (backbone.layers, backbone.width, backbone.inner, backbone.heads) == (6, 384, 1024, 6)
    assert reference.head.blocks == 2
    assert reference.autoencoder == preset("autoencoder-reference")
    assert tiny.autoencoder == preset("autoencoder-tiny")
    for size in ("reference", "tiny"):
        calm, baseline = preset(f"calm-{size}"), preset(f"transformer-{size}")
        assert calm.backbone == baseline.backbone  # type: ignore[union-attr]
    assert language_model_parameters(build(tiny)) < 1e6


def test_another_vocabulary_and_an_unknown_name() -> None:
    assert preset("calm-tiny", 512).vocab_size == 512
    with pytest.raises(ConfigError, match=r"unknown preset 'calm-n'; did you mean 'calm-m'\?"):
        preset("calm-n")
    with pytest.raises(ConfigError, match="unknown preset '999'; known presets are transformer-s, "):
        preset("999")
