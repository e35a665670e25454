"""Configurations by name. Each is a function whose docstring says what evidence there is for it.

Sizes of the paper are those of its main table (docs/cost.md), with the vocabulary of Llama 3; "reported" figures are
the paper's own, counted without the autoencoder, and BrierLM is on WikiText-103.
"""

from __future__ import annotations

from collections.abc import Callable

from nextvec.config import (
    AutoencoderConfig,
    BackboneConfig,
    CalmConfig,
    EnergyHeadConfig,
    ModelConfig,
    TokenLMConfig,
    unknown_name,
)
from nextvec.errors import ConfigError

LLAMA3_VOCAB = 128256  # tokens
REFERENCE_VOCAB = 8192
BYTE_VOCAB = 259  # 256 bytes and the three special tokens of the byte tokenizer
BYTE_MASK = 1  # mask_id of the byte tokenizer
LAYERS_PER_HEAD_BLOCK = 4  # the paper's head has a quarter of the backbone's layers


def autoencoder_paper(vocab_size: int = LLAMA3_VOCAB) -> AutoencoderConfig:
    """The paper's autoencoder (K = 4, L = 128): reported about 75M parameters, over 99.9 % of tokens reconstructed; not
    yet reproduced."""
    return AutoencoderConfig(vocab_size=vocab_size)


def calm_m(vocab_size: int = LLAMA3_VOCAB) -> CalmConfig:
    """The paper's CALM-M: reported 371M parameters, BrierLM 5.72; not yet reproduced."""
    return _calm(autoencoder_paper(vocab_size), _m())


def calm_l(vocab_size: int = LLAMA3_VOCAB) -> CalmConfig:
    """The paper's CALM-L: reported 735M parameters, BrierLM 6.58; not yet reproduced."""
    return _calm(autoencoder_paper(vocab_size), _l())


def calm_xl(vocab_size: int = LLAMA3_VOCAB) -> CalmConfig:
    """The paper's CALM-XL: reported 1.82B parameters, BrierLM 8.53; not yet reproduced. Its 20 heads are assumed."""
    return _calm(autoencoder_paper(vocab_size), BackboneConfig(layers=16, width=2560, inner=6880, heads=20))


def transformer_s(vocab_size: int = LLAMA3_VOCAB) -> TokenLMConfig:
    """The paper's Transformer-S: reported 281M parameters, BrierLM 6.05; not yet reproduced."""
    return TokenLMConfig(vocab_size=vocab_size, backbone=BackboneConfig(layers=12, width=768, inner=2048, heads=16))


def transformer_m(vocab_size: int = LLAMA3_VOCAB) -> TokenLMConfig:
    """The paper's Transformer-M: reported 465M parameters, BrierLM 7.07; not yet reproduced."""
    return TokenLMConfig(vocab_size=vocab_size, backbone=_m())


def transformer_l(vocab_size: int = LLAMA3_VOCAB) -> TokenLMConfig:
    """The paper's Transformer-L: reported 849M parameters, BrierLM 8.98; not yet reproduced."""
    return TokenLMConfig(vocab_size=vocab_size, backbone=_l())


def autoencoder_reference(vocab_size: int = REFERENCE_VOCAB) -> AutoencoderConfig:
    """Autoencoder of the speed benchmarks (K = 4, L = 128): chosen here for a laptop, no figure is published."""
    return AutoencoderConfig(vocab_size=vocab_size, width=256, inner=640)


def calm_reference(vocab_size: int = REFERENCE_VOCAB) -> CalmConfig:
    """CALM of the speed benchmarks: chosen here for a laptop, no figure is published."""
    return CalmConfig(
        autoencoder=autoencoder_reference(vocab_size), backbone=_reference(), head=EnergyHeadConfig(blocks=2)
    )


def transformer_reference(vocab_size: int = REFERENCE_VOCAB) -> TokenLMConfig:
    """Baseline of the speed benchmarks, with the backbone of `calm_reference`: no figure is published."""
    return TokenLMConfig(vocab_size=vocab_size, backbone=_reference())


def autoencoder_tiny(vocab_size: int = BYTE_VOCAB) -> AutoencoderConfig:
    """Trains on bytes in seconds, for tests and first steps: no claim on quality."""
    return AutoencoderConfig(vocab_size=vocab_size, width=64, inner=160, latent=64, mask_id=BYTE_MASK)


def calm_tiny(vocab_size: int = BYTE_VOCAB) -> CalmConfig:
    """Trains on bytes in seconds, for tests and first steps: no claim on quality."""
    return CalmConfig(
        autoencoder=autoencoder_tiny(vocab_size), backbone=_tiny(), head=EnergyHeadConfig(noise=16, blocks=1)
    )


def transformer_tiny(vocab_size: int = BYTE_VOCAB) -> TokenLMConfig:
    """Trains on bytes in seconds, for tests and first steps: no claim on quality."""
    return TokenLMConfig(vocab_size=vocab_size, backbone=_tiny())


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "transformer-s": transformer_s,
    "transformer-m": transformer_m,
    "transformer-l": transformer_l,
    "calm-m": calm_m,
    "calm-l": calm_l,
    "calm-xl": calm_xl,
    "autoencoder-paper": autoencoder_paper,
    "autoencoder-reference": autoencoder_reference,
    "calm-reference": calm_reference,
    "transformer-reference": transformer_reference,
    "autoencoder-tiny": autoencoder_tiny,
    "calm-tiny": calm_tiny,
    "transformer-tiny": transformer_tiny,
}


def preset(name: str, vocab_size: int | None = None) -> ModelConfig:
    """The configuration called `name`, for its own vocabulary or another. Raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, list(PRESETS)))
    return PRESETS[name]() if vocab_size is None else PRESETS[name](vocab_size)


def _calm(autoencoder: AutoencoderConfig, backbone: BackboneConfig) -> CalmConfig:
    head = EnergyHeadConfig(blocks=backbone.layers // LAYERS_PER_HEAD_BLOCK)
    return CalmConfig(autoencoder=autoencoder, backbone=backbone, head=head)


def _m() -> BackboneConfig:
    return BackboneConfig(layers=16, width=1024, inner=2752, heads=16)


def _l() -> BackboneConfig:
    return BackboneConfig(layers=16, width=1536, inner=4096, heads=16)


def _reference() -> BackboneConfig:
    return BackboneConfig(layers=6, width=384, inner=1024, heads=6)


def _tiny() -> BackboneConfig:
    return BackboneConfig(layers=2, width=64, inner=160, heads=4)
