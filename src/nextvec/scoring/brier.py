"""BrierLM: a strictly proper score of a language model from its draws alone (paper section 4, docs/method.md). Torch only.

Legend: S model draws, N scored positions, n tokens of the longest n-gram (the order, 1..4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from nextvec.scoring.clusters import cluster_ratio

DrawEstimator = Literal["all_pairs", "two_draws"]  # from draws alone: any model
Estimator = Literal["all_pairs", "two_draws", "exact_tail"]  # exact_tail: a model with token probabilities
MAX_ORDER = 4  # BrierLM is the geometric mean of Brier-1..4


@dataclass(frozen=True)
class Protocol:
    """What makes two numbers comparable: they are, only where all of this is equal."""

    name: str  # how documents become windows: documents-N, wikitext103-N
    tokenizer_hash: str
    context_tokens: int  # tokens in a window
    positions: str  # which offsets start an n-gram: patch_starts, every_offset
    stride: int  # K of the comparison: tokens between two starts of one pass
    draws: int  # S, model draws per position
    estimator: Estimator
    decode: str  # how a latent becomes tokens
    documents: int  # documents given
    documents_hash: str  # sha256 of their token ids
    seed: int

    def __str__(self) -> str:
        every = (
            f"every {self.stride} tokens" if self.positions == "patch_starts" else f"in {self.stride} shifted passes"
        )
        return (
            f"{self.name}, {self.positions} {every}, "
            f"{self.draws} {'draw' if self.draws == 1 else 'draws'} ({self.estimator}), "
            f"decoding {self.decode}, {self.documents:,} {'document' if self.documents == 1 else 'documents'}, "
            f"seed {self.seed}, "
            f"tokenizer {self.tokenizer_hash[:12]}, text {self.documents_hash[:12]}"
        )


def decimals(value: float, sign: str = "") -> str:
    """Five decimals, or two digits and a power of ten where these would show less than two; `sign` "+": always signed."""
    return f"{value:{sign}.5f}" if value == 0 or abs(value) >= 1e-4 else f"{value:{sign}.1e}"


@dataclass(frozen=True)
class DocumentSums:
    """What each document contributes, by columns: enough for a paired comparison without the positions themselves."""

    document: tuple[int, ...]  # C indices into the documents given, those with a scored n-gram
    positions: tuple[tuple[int, ...], ...]  # n rows of C: n-grams scored, per order
    sums: tuple[tuple[float, ...], ...]  # n rows of C: sums of their values, rounded to 9 decimals

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            document=tuple(data["document"]),
            positions=tuple(tuple(row) for row in data["positions"]),
            sums=tuple(tuple(row) for row in data["sums"]),
        )


@dataclass(frozen=True)
class BrierResult:
    """Brier-1..n on their scale [-1, 1] and BrierLM on its scale 0..100, with standard errors clustered by document."""

    brier: tuple[float, ...]  # Brier-1..n
    brier_stderr: tuple[float, ...] | None  # None with a single document
    brier_lm: float | None  # None when an order is not positive, or the order is below 4
    brier_lm_stderr: float | None
    positions: tuple[int, ...]  # n-grams scored, per order
    documents: int  # documents with a scored n-gram
    protocol: Protocol
    per_document: DocumentSums | None = None  # None in results of before it was kept

    def __str__(self) -> str:
        lines = []
        where = f"{self.documents:,} {'document' if self.documents == 1 else 'documents'}"
        for order, (value, count) in enumerate(zip(self.brier, self.positions, strict=True), 1):
            error = "" if self.brier_stderr is None else f" ± {decimals(self.brier_stderr[order - 1])}"
            lines.append(f"Brier-{order}  {decimals(value, '+')}{error}  ({count:,} n-grams in {where})")
        if self.brier_lm is None:
            lines.append(f"BrierLM  none: {self.why_none()}")
        else:
            error = "" if self.brier_lm_stderr is None else f" ± {self.brier_lm_stderr:.3f}"
            lines.append(f"BrierLM  {self.brier_lm:.3f}{error}")
        if self.brier_stderr is None:
            lines.append("standard errors: none, they are clustered by document and there is one document")
        lines.append(f"protocol: {self.protocol}")
        return "\n".join(lines)

    def why_none(self) -> str:
        """One sentence on why there is no BrierLM; empty when there is one."""
        bad = [f"Brier-{k} is {decimals(value, '+')}" for k, value in enumerate(self.brier, 1) if value <= 0]
        if bad:
            return f"{', '.join(bad)}, and a geometric mean needs every order above zero"
        if len(self.brier) < MAX_ORDER:
            return f"it is the geometric mean of Brier-1..{MAX_ORDER}, and only {len(self.brier)} were measured"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        errors, per_document = data["brier_stderr"], data.get("per_document")
        return cls(
            brier=tuple(data["brier"]),
            brier_stderr=None if errors is None else tuple(errors),
            brier_lm=data["brier_lm"],
            brier_lm_stderr=data["brier_lm_stderr"],
            positions=tuple(data["positions"]),
            documents=data["documents"],
            protocol=Protocol(**data["protocol"]),
            per_document=None if per_document is None else DocumentSums.from_dict(per_document),
        )


def brier_scores(
    draws_SNn: Tensor, target_Nn: Tensor, valid_Nn: Tensor, estimator: DrawEstimator = "all_pairs"
) -> Tensor:
    """Unbiased estimates of Brier-1..n at every position; higher is better.

    Brier-k = 2 P(y) - sum_x P(x)^2 = P(x = y) + P(x' = y) - P(x = x'), in [-1, 1], for the first k tokens y of the
    target and independent draws x, x'. From S draws (docs/method.md):

    all_pairs: (2/S) sum_s 1{x_s = y} - (2/(S(S-1))) sum_{s<t} 1{x_s = x_t}; all draws, least variance.
    two_draws: the paper's 1{x = y} + 1{x' = y} - 1{x = x'} on the first two draws; the same expectation.

    Equal pairs are counted by sorting the S draws of a position, so the cost is O(n N S log S).

    Args: draws (S, N, n) non-negative ids with S >= 2; target (N, n) ids; valid (N, n) bool, where order k may be
    scored. Returns (N, n) float32, 0 where not valid.
    Raises ValueError on an unknown estimator, disagreeing shapes, fewer than two draws, or an order above 4.
    """
    if estimator not in get_args(DrawEstimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(DrawEstimator))}; got {estimator!r}")
    if draws_SNn.dim() != 3 or target_Nn.shape != draws_SNn.shape[1:] or valid_Nn.shape != target_Nn.shape:
        raise ValueError(
            "draws must be (S, N, n), target and valid (N, n); got "
            f"{tuple(draws_SNn.shape)}, {tuple(target_Nn.shape)} and {tuple(valid_Nn.shape)}"
        )
    if draws_SNn.shape[0] < 2:
        raise ValueError(f"a Brier score needs at least 2 draws per position; got {draws_SNn.shape[0]}")
    if not 1 <= draws_SNn.shape[2] <= MAX_ORDER:
        raise ValueError(f"order must be between 1 and {MAX_ORDER}; got {draws_SNn.shape[2]}")
    if estimator == "two_draws":
        draws_SNn = draws_SNn[:2]
    S, N, order = draws_SNn.shape
    values_Nn = torch.zeros(N, order, dtype=torch.float32, device=draws_SNn.device)
    if N == 0:
        return values_Nn
    base = int(draws_SNn.max()) + 1
    index_S1 = torch.arange(S, device=draws_SNn.device)[:, None]
    right_SN = torch.ones(S, N, dtype=torch.bool, device=draws_SNn.device)
    group_SN = torch.zeros(S, N, dtype=torch.int64, device=draws_SNn.device)  # draws that agree so far share a number
    for k in range(order):
        tokens_SN = draws_SNn[:, :, k]
        right_SN = right_SN & (tokens_SN == target_Nn[:, k])
        sorted_SN, place_SN = (group_SN * base + tokens_SN).sort(dim=0)
        opens_SN = torch.ones_like(right_SN)
        opens_SN[1:] = sorted_SN[1:] != sorted_SN[:-1]
        start_SN = torch.where(opens_SN, index_S1, 0).cummax(dim=0).values
        pairs_N = (index_S1 - start_SN).sum(dim=0)  # the i-th of a run of equals adds i pairs
        group_SN = torch.zeros_like(group_SN).scatter_(0, place_SN, start_SN)
        values_Nn[:, k] = 2 * right_SN.sum(dim=0) / S - 2 * pairs_N / (S * (S - 1))
    return values_Nn.masked_fill(~valid_Nn, 0.0)


def exact_tail_scores(target_log_Nn: Tensor, drawn_log_SNn: Tensor, collision_SNn: Tensor, valid_Nn: Tensor) -> Tensor:
    """Unbiased estimates of Brier-1..n from token probabilities along the target and along S drawn chains.

    2 P(y) is exact. With x drawn from the model, the other term is a mean over *prefixes* only, its last token exact:

        sum_x P(x)^2 = E over x_<k of [ P(x_<k) sum_v P(v | x_<k)^2 ]

    since sum_x P(x)^2 = sum over prefixes P(x_<k)^2 sum_v P(v | x_<k)^2. The authors' baseline has the indicator that
    two drawn prefixes agree in the place of P(x_<k): the same expectation, more variance. Brier-1 has none here.

    Args: target_log (N, n): log P(y_k | y_<k), in nats; drawn_log (S, N, n): log P(x_k | x_<k); collision (S, N, n):
    sum_v P(v | x_<k)^2; valid (N, n) bool. Returns (N, n) float32, 0 where not valid.
    Raises ValueError on disagreeing shapes.
    """
    if drawn_log_SNn.shape != collision_SNn.shape or not (
        drawn_log_SNn.shape[1:] == target_log_Nn.shape == valid_Nn.shape
    ):
        raise ValueError(
            "target_log and valid must be (N, n), drawn_log and collision (S, N, n); got "
            f"{', '.join(str(tuple(x.shape)) for x in (target_log_Nn, valid_Nn, drawn_log_SNn, collision_SNn))}"
        )
    right_Nn = target_log_Nn.double().cumsum(-1).exp()
    prefix_SNn = drawn_log_SNn.double().cumsum(-1).roll(1, -1)
    prefix_SNn[..., 0] = 0.0
    same_Nn = (prefix_SNn.exp() * collision_SNn.double()).mean(dim=0)
    return (2 * right_Nn - same_Nn).float().masked_fill(~valid_Nn, 0.0)


def brier_lm_of(mean_n: Tensor) -> Tensor:
    """100 times the geometric mean over the last axis of Brier-1..4; nan where an order is not positive."""
    return 100 * mean_n.where(mean_n > 0, torch.nan).log().mean(-1).exp()


def summarise(values_Nn: Tensor, valid_Nn: Tensor, document_N: Tensor, protocol: Protocol) -> BrierResult:
    """Averages over positions, BrierLM, and their standard errors clustered by document.

    BrierLM = 100 (Brier-1 Brier-2 Brier-3 Brier-4)^(1/4) of the position averages (docs/method.md). The averages are unbiased;
    the geometric mean of them is consistent. Its standard error is the delta method's, g^T C g with
    g_k = BrierLM / (4 Brier-k) and C the clustered covariance of the four averages.

    Args: values and valid (N, n) as in `brier_scores`; document (N,) the document of each position.
    Raises ValueError when an order has no valid n-gram.
    """
    ratio = cluster_ratio(values_Nn, valid_Nn, document_N)
    covariance = ratio.covariance
    mean_n = ratio.mean
    brier_lm = brier_lm_stderr = None
    if len(mean_n) == MAX_ORDER and bool((mean_n > 0).all()):
        brier_lm = float(brier_lm_of(mean_n))
        if covariance is not None:
            slope_n = brier_lm / (MAX_ORDER * mean_n)
            brier_lm_stderr = float((slope_n @ covariance @ slope_n).clamp_min(0).sqrt())
    return BrierResult(
        brier=tuple(mean_n.tolist()),
        brier_stderr=None if covariance is None else tuple(covariance.diagonal().clamp_min(0).sqrt().tolist()),
        brier_lm=brier_lm,
        brier_lm_stderr=brier_lm_stderr,
        positions=tuple(ratio.count.tolist()),
        documents=ratio.clusters,
        protocol=protocol,
        per_document=DocumentSums(
            document=tuple(ratio.label.tolist()),
            positions=tuple(tuple(row) for row in ratio.counts.long().T.tolist()),
            sums=tuple(tuple(round(value, 9) for value in row) for row in ratio.sums.T.tolist()),
        ),
    )
