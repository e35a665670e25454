"""Upper bounds on the code length of a model that draws a latent and then decodes it softly. Torch only.

Given a latent z the decoder's tokens are independent, so p(y | h) = E_z prod_k p_k(y_k | z). The average over S draws of z
is unbiased for p; -log of it is, in expectation, an upper bound on -log p (Jensen) that falls as S grows (Burda, Grosse
and Salakhutdinov, Importance Weighted Autoencoders, theorem 1).

Legend: S draws, N patches, K tokens per patch, D width, V vocabulary, G decoder temperatures, C points of the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nextvec.model.cross_entropy import CHUNK_ELEMENTS

NOT_ARGMAX = (
    "The bound holds for the soft-decoded model, whose tokens are drawn from the decoder's softmax at this temperature. "
    "It is no bound for argmax decoding, which generation and BrierLM use."
)


@dataclass(frozen=True)
class Text:
    """What was scored: figures compare where all of this is equal."""

    protocol: str
    tokenizer_hash: str
    documents: int  # given
    documents_hash: str  # sha256 of their token ids
    patch_size: int  # K
    scored_documents: int  # documents that the figures are of
    fit_documents: int  # documents kept for the temperature
    patches: int
    tokens: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.protocol}, {self.patches:,} patches of {self.patch_size} ({self.tokens:,} tokens, {self.bytes:,} bytes); "
            f"documents: {self.scored_documents:,} scored, {self.fit_documents:,} for the temperature; "
            f"tokenizer {self.tokenizer_hash[:12]}, text {self.documents_hash[:12]}"
        )


@dataclass(frozen=True)
class Exact:
    """Code length of a model that knows its probabilities."""

    bits_per_byte: float
    stderr: float | None  # clustered by document; None with a single document
    nats_per_token: float


@dataclass(frozen=True)
class Bound:
    """Upper bounds on the code length of the soft-decoded CALM, by the number of draws."""

    draws: tuple[int, ...]  # S = 1, 2, 4 ..
    bits_per_byte: tuple[float, ...]
    stderr: tuple[float, ...] | None  # clustered by document; None with a single document
    nats_per_token: tuple[float, ...]
    temperature: float  # divides the decoder's logits
    fitted: bool  # on the documents kept for it; else given
    fit_draws: int  # S of the fit; 0: not fitted
    fit_patches: int
    bits_per_byte_unscaled: float  # at temperature 1 and the largest S


@dataclass(frozen=True)
class Likelihood:
    """Bits per byte of a CALM (bound), a baseline (exact), or both at the same positions."""

    text: Text
    bound: Bound | None
    exact: Exact | None
    excess: float | None  # bits per byte by which the bound at the largest S exceeds the baseline
    excess_stderr: float | None
    uniform_bits_per_byte: float  # of equal probabilities for all tokens of the vocabulary
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), **({} if self.bound is None else {"note": NOT_ARGMAX})}

    def __str__(self) -> str:
        lines = []
        if (bound := self.bound) is not None:
            how = (
                f"fitted on {bound.fit_patches:,} patches of other documents ({self.text.fit_documents:,}) "
                f"at S = {bound.fit_draws}"
                if bound.fitted
                else "given"
            )
            lines = [
                f"CALM, soft-decoded, upper bound; decoder temperature {bound.temperature:.3f}, {how}",
                f"{'S':>7}{'bits per byte':>24}{'nats per token':>17}",
            ]
            for i, draws in enumerate(bound.draws):
                value = _plus_minus(bound.bits_per_byte[i], None if bound.stderr is None else bound.stderr[i])
                lines.append(f"{draws:>7}{value:>24}{bound.nats_per_token[i]:>17.4f}")
            lines += [
                f"at temperature 1 and S = {bound.draws[-1]}: {bound.bits_per_byte_unscaled:.4f} bits per byte",
                NOT_ARGMAX,
            ]
        if self.exact is not None:
            value = _plus_minus(self.exact.bits_per_byte, self.exact.stderr)
            lines.append(f"baseline, exact: {value} bits per byte, {self.exact.nats_per_token:.4f} nats per token")
        if self.excess is not None:
            lines.append(f"bound less baseline: {_plus_minus(self.excess, self.excess_stderr)} bits per byte")
        lines.append(f"uniform over the vocabulary: {self.uniform_bits_per_byte:.4f} bits per byte")
        lines.append(f"text: {self.text}, seed {self.seed}")
        return "\n".join(lines)


@torch.no_grad()
def patch_log_probability(
    hidden_NKD: Tensor, weight_VD: Tensor, target_NK: Tensor, keep_NK: Tensor, temperatures: Sequence[float] = (1.0,)
) -> Tensor:
    """log prod_k softmax(hidden_k @ weight^T / temperature)[target_k] in nats, for every temperature.

    Only the target's logit and the log-sum-exp of each token are kept: the logits of one chunk of tokens exist at a time.

    Args: hidden (N, K, D), weight (V, D), target (N, K) ids, keep (N, K) bool: tokens that count; the others are summed
    out, a factor of 1. Returns (G, N) float32, float64 for float64 input.
    """
    wide = torch.float64 if hidden_NKD.dtype == torch.float64 else torch.float32
    hidden, target = hidden_NKD.flatten(0, 1), target_NK.reshape(-1, 1)
    out = torch.empty(len(temperatures), len(hidden), dtype=wide, device=hidden.device)
    rows = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = (hidden[part] @ weight_VD.T).to(wide)
        picked = logits.gather(1, target[part])[:, 0]
        for g, temperature in enumerate(temperatures):
            scaled = logits if temperature == 1.0 else logits / temperature
            out[g, part] = picked / temperature - scaled.logsumexp(dim=1)
    return out.unflatten(1, target_NK.shape).masked_fill(~keep_NK, 0.0).sum(dim=-1)


def nested_bounds(log_p_SN: Tensor) -> Tensor:
    """-log of the average probability over 1, 2, 4 .. S draws: each point of the curve from all S draws.

    Point c is the mean over S / 2^c disjoint groups of 2^c draws of -log mean_{s in group} p_s, so that its expectation
    is exactly the bound of 2^c independent draws, and the curve of every single position falls (Jensen on the two
    halves of each group). The groups are nested: the log-means of two are averaged into that of their union.

    Args: log_p (S, N) log-probabilities under independent draws, S a power of two. Returns (C, N), C = log2(S) + 1.
    Raises ValueError when S is no power of two.
    """
    S = len(log_p_SN)
    if S < 1 or S & (S - 1):
        raise ValueError(f"the number of draws must be a power of two; got {S}")
    points = [-log_p_SN.mean(dim=0)]
    while len(log_p_SN) > 1:
        log_p_SN = torch.logaddexp(log_p_SN[0::2], log_p_SN[1::2]) - math.log(2)
        points.append(-log_p_SN.mean(dim=0))
    return torch.stack(points)


def _plus_minus(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
