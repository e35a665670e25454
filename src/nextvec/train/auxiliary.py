"""Training-only parts of the `fast` recipe; they are in checkpoints, never in a run's model.safetensors.

Legend: N positions, K tokens per patch, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextvec.model.cross_entropy import linear_cross_entropy
from nextvec.model.layers import RMSNorm


class NextPatchTokens(nn.Module):
    """Cross-entropy of the K tokens of the next patch from the backbone state, one slot a token.

    state -> linear D -> K*D -> RMSNorm per slot -> logits with a vocabulary matrix of its own. On the energy loss's plateau
    the backbone hardly learns; this teaches it directly, at the cost of one vocabulary product per token in training only.
    """

    def __init__(self, vocab_size: int, patch_size: int, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.slots = nn.Linear(width, patch_size * width)
        self.norm = RMSNorm(width, eps=eps)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.patch_size = patch_size

    def forward(self, state_ND: Tensor, ids_NK: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token; state (N, D), ids (N, K) int64."""
        slots = self.slots(state_ND).unflatten(-1, (self.patch_size, -1))
        loss, _ = linear_cross_entropy(self.norm(slots).flatten(0, -2), self.output.weight, ids_NK.reshape(-1))
        return loss


def auxiliary_scale(progress: float, until: float) -> float:
    """Weight factor at a fraction `progress` of training: 1, falling linearly to 0 over the last tenth before `until`."""
    if until >= 1.0:
        return 1.0
    ramp = 0.1
    return float(torch.tensor((until - progress) / ramp).clamp(0.0, 1.0)) if until > 0 else 0.0
