"""Small models whose draws differ from each other and depend on the text so far, for the tests of generation."""

from __future__ import annotations

import torch

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, HeadConfig, TokenLMConfig
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCAB, EOS, PAD = TOKENIZER.vocab_size, TOKENIZER.eos_id, TOKENIZER.pad_id
BACKBONE = BackboneConfig(layers=2, width=16, inner=24, heads=2)
ENERGY = EnergyHeadConfig(noise=8, blocks=1)


def calm_config(patch_size: int, head: HeadConfig = ENERGY) -> CalmConfig:
    factored = head.kind == "mixture"  # its tokens need dimensions of their own
    return CalmConfig(
        autoencoder=AutoencoderConfig(
            vocab_size=VOCAB,
            patch_size=patch_size,
            width=16,
            inner=24,
            layers=2,
            latent=4 * patch_size if factored else 8,
            factored=factored,
        ),
        backbone=BACKBONE,
        head=head,
    )


def spread(model: torch.nn.Module) -> None:
    """Weights so large that draws differ; no biases and tokens of equal norm, so that no few of them win always."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.0 if name.endswith("bias") else 0.5, generator=generator)
        if name.endswith("embedding.weight"):
            parameter.data.copy_(torch.nn.functional.normalize(parameter.data, dim=-1))


def calm(patch_size: int, dtype: torch.dtype = torch.float64, head: HeadConfig = ENERGY) -> Calm:
    model = Calm(calm_config(patch_size, head))
    spread(model)
    model.tokenizer = TOKENIZER
    return model.to(dtype).eval()


def token_lm(dtype: torch.dtype = torch.float64) -> TokenLM:
    model = TokenLM(TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE))
    spread(model)
    model.tokenizer = TOKENIZER
    return model.to(dtype).eval()
