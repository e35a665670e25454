"""All initialisation in one place.

Every matrix and embedding: normal, standard deviation 0.02 by default (the authors' `initializer_range`); biases 0; norms 1.
Layers that a model names in `zero_initialised()` start at exactly 0 (the energy head's last layer), those that it names in
`equal_at_start()` as copies of others.
"""

from __future__ import annotations

import torch
from torch import nn

STD = 0.02


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, std: float = STD) -> None:
    """Fill the parameters of `module` in registration order from `generator`; frozen ones keep their values."""
    zero = {id(parameter) for part in module.modules() for parameter in getattr(part, "zero_initialised", list)()}
    for part in module.modules():
        matrix = isinstance(part, nn.Linear | nn.Embedding)
        if not matrix and not isinstance(part, nn.RMSNorm | nn.LayerNorm):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias" or id(parameter) in zero:
                parameter.zero_()
            elif matrix:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0)
    for part in module.modules():
        for copy, original in getattr(part, "equal_at_start", list)():
            copy.copy_(original)
