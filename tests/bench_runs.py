"""Tiny runs of every kind for the tests of `nextvec bench`, and the parts that each step has."""

from __future__ import annotations

import torch

from nextvec.config import (
    AutoencoderConfig,
    AutoencoderRun,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    EnergyHeadConfig,
    OptimSettings,
    RunConfig,
    TokenLMConfig,
    TokenLMRun,
    TrainSettings,
)
from nextvec.text.tokenizer import byte_tokenizer

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
VOCAB = TOKENIZER.vocab_size
AUTOENCODER = AutoencoderConfig(vocab_size=VOCAB, patch_size=2, width=8, inner=8, latent=6)
BACKBONE = BackboneConfig(layers=2, width=16, inner=16, heads=2)
DATA = DataSettings(path="synthetic", rows=2, context_tokens=16)
OPTIM = OptimSettings(name="adamw", lr=1e-2, warmup=2, schedule="constant")
TRAIN = TrainSettings(steps=3, accumulate=2, precision="fp32", seed=4)
CALM = CalmConfig(autoencoder=AUTOENCODER, backbone=BACKBONE, head=EnergyHeadConfig(noise=4, blocks=1))
RUNS: dict[str, RunConfig] = {
    "train": CalmRun(data=DATA, model=CALM, optim=OPTIM, train=TRAIN),
    "autoencoder": AutoencoderRun(data=DATA, model=AUTOENCODER, optim=OPTIM, train=TRAIN),
    "baseline": TokenLMRun(
        data=DATA, model=TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE), optim=OPTIM, train=TRAIN
    ),
}
PARTS = {
    "train": {"backbone", "head", "energy loss", "autoencoder", "vocabulary", "optimiser", "data", "other"},
    "autoencoder": {"autoencoder", "vocabulary", "optimiser", "data", "other"},
    "baseline": {"backbone", "vocabulary", "optimiser", "data", "other"},
}
