"""All initialisation in one place.

Every matrix and embedding: normal, standard deviation 0.02 (the authors' `initializer_range`); biases 0; norms 1.
Layers that a model names in `zero_initialised()` start at exactly 0 (the energy head's last layer).
"""

from __future__ import annotations

import torch
from torch import nn

STD = 0.02


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters of `module` in registration order from `generator`."""
    zero = {id(parameter) for part in module.modules() for parameter in getattr(part, "zero_initialised", list)()}
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            if id(part.weight) in zero:
                part.weight.zero_()
            else:
                part.weight.normal_(0.0, STD, generator=generator)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, nn.RMSNorm | nn.LayerNorm) and part.weight is not None:
            part.weight.fill_(1.0)
            if isinstance(part, nn.LayerNorm) and part.bias is not None:
                part.bias.zero_()
