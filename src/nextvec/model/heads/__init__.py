"""Heads: a backbone state and noise to draws of the next patch, as a latent or as tokens."""

from __future__ import annotations

from nextvec.config import CalmConfig, EnergyHeadConfig
from nextvec.model.heads.energy import EnergyHead


def build_head(config: CalmConfig) -> EnergyHead:
    """The head that `config.head` describes, on the backbone's states."""
    head, width, latent = config.head, config.backbone.width, config.autoencoder.latent
    assert isinstance(head, EnergyHeadConfig)
    return EnergyHead(head, width, latent)
