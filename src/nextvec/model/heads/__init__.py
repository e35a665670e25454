"""Heads: a backbone state and noise to draws of the next patch, as a latent or as tokens."""

from __future__ import annotations

from typing import TypeAlias

from nextvec.config import (
    AutoregressiveHeadConfig,
    CalmConfig,
    CategoricalHeadConfig,
    DiffusionHeadConfig,
    EnergyHeadConfig,
    FlowHeadConfig,
    MixtureHeadConfig,
)
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.heads.categorical import CategoricalHead
from nextvec.model.heads.diffusion import DiffusionHead
from nextvec.model.heads.energy import EnergyHead
from nextvec.model.heads.flow import FlowHead
from nextvec.model.heads.mixture import MixtureHead

AnyHead: TypeAlias = EnergyHead | FlowHead | DiffusionHead | CategoricalHead | MixtureHead | AutoregressiveHead

_CLASSES: dict[type, type[AnyHead]] = {
    EnergyHeadConfig: EnergyHead,
    FlowHeadConfig: FlowHead,
    DiffusionHeadConfig: DiffusionHead,
    CategoricalHeadConfig: CategoricalHead,
    MixtureHeadConfig: MixtureHead,
    AutoregressiveHeadConfig: AutoregressiveHead,
}


def head_class(config: CalmConfig) -> type[AnyHead]:
    """What `build_head` builds."""
    return _CLASSES[type(config.head)]


def build_head(config: CalmConfig) -> AnyHead:
    """The head that `config.head` describes, on the backbone's states."""
    head, width, latent = config.head, config.backbone.width, config.autoencoder.latent
    if isinstance(head, FlowHeadConfig):
        return FlowHead(head, width, latent)
    if isinstance(head, DiffusionHeadConfig):
        return DiffusionHead(head, width, latent)
    if isinstance(head, CategoricalHeadConfig):
        return CategoricalHead(config)
    if isinstance(head, MixtureHeadConfig):
        return MixtureHead(config)
    if isinstance(head, EnergyHeadConfig):
        return EnergyHead(head, width, latent)
    return AutoregressiveHead(config)
