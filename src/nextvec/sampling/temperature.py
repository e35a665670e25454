"""Temperature without likelihoods: a law P known only through its draws is sharpened to P^(1/T), 0 < T <= 1.

Paper (arXiv 2510.27688) Algorithms 1 and 2, extended here from T = 1/n to every temperature. Write b = 1/T, n = floor(b),
a = b - n. A pool of N draws holds c copies of a value. Its weight is the generalised falling factorial

    w(c) = C(c, b) = Gamma(c + 1) / (Gamma(b + 1) Gamma(c - b + 1))  for c >= n, and 0 below;

where no value reaches n copies, all values with the most copies weigh the same.

* At b = n this is the paper's Algorithm 2. Its weight at level n is C(c, n); at a lower level m = max c < n every member
  has exactly m copies and weight 1.
* For other b it is the unbiased estimator of a power series. p^b = p^n sum_k (-1)^k C(a, k) (1 - p)^k, the series behind
  Algorithm 1; U-statistics of its terms up to degree N sum, by Chu-Vandermonde, to exactly w(c) Gamma(b+1) Gamma(N-b+1) / N!.
  So E w is proportional to p^b plus at most p^n (N - n)^-a / Gamma(1 - a), and w(c) ~ c^b / Gamma(b + 1): the choice
  converges to P^(1/T) as N grows. For finite N it is biased, as the paper's is, by the choice among values and by the fallback.
* w is continuous in T: as b rises to n from below, w(n - 1) goes to 0 and w(c) to C(c, n).

Legend: B rows, N candidates of a row's pool, K tokens per patch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nextvec.errors import UserError
from nextvec.model.heads.interface import Sharpen

Generators = torch.Generator | Sequence[torch.Generator]  # one for all rows, or one per row

COLDEST = 1e-6  # below it a law of tokens is its likeliest token to rounding, and a division could overflow
_TOKEN_RANGE = 1 << 32  # a rank below N times this, plus a token, fits in int64: larger than any vocabulary


def check_temperature(temperature: float) -> None:
    """Raise UserError (a ValueError) unless 0 < temperature <= 1."""
    if 0 < temperature <= 1:
        return
    if temperature == 0:
        fix = "there is no greedy limit without likelihoods, take a low one such as 0.2"
    elif temperature > 1:
        fix = "take 1 for the model's own law or a lower one to sharpen it"
    else:
        fix = "take 0.5 to sharpen the model's own law, 1 to keep it"
    raise UserError(f"temperature must be in (0, 1]; got {temperature:g}: {fix}")


def check_pool(temperature: float, candidates: int) -> None:
    """Raise UserError unless `candidates` draws can hold floor(1 / temperature) equal ones."""
    check_temperature(temperature)
    whole, _ = split_exponent(temperature)
    if candidates < whole:
        raise UserError(
            f"temperature {temperature:g} needs at least {whole} candidates (1 / temperature, rounded down); "
            f"got {candidates}: take {whole} or more candidates, or a temperature of at least {1 / max(1, candidates):.3g}"
        )


def split_exponent(temperature: float) -> tuple[int, float]:
    """n and a with 1/T = n + a, 0 <= a < 1; a is exactly 0 where T is the float nearest to some 1/n."""
    exponent = min(1.0 / temperature, 2.0**53)
    nearest = round(exponent)
    if math.isclose(exponent, nearest, rel_tol=1e-12):
        return nearest, 0.0
    whole = math.floor(exponent)
    return whole, exponent - whole


def batch_temperature(
    candidates_BNK: Tensor, temperature: float, generator: Generators, keep_BN: Tensor | None = None
) -> Tensor:
    """One patch per row, (B, K), from its pool of independent draws (B, N, K) int64: Algorithm 2, for every T in (0, 1].

    `keep` (B, N) bool, at least one true per row: the pool is the kept draws alone (a conditional law). At T = 1 the result is
    the first kept draw. Costs O(B N K log N) time, O(B N) memory, no host synchronisation. Biased for finite N, see above.
    Raises UserError for a temperature outside (0, 1] or N < floor(1/T).
    """
    check_pool(temperature, candidates_BNK.shape[1])
    if temperature == 1:
        if keep_BN is None:
            return candidates_BNK[:, 0]
        index_B = keep_BN.to(torch.uint8).argmax(dim=1)
    else:
        probability_BN = pool_probabilities(candidates_BNK, temperature, keep_BN)
        index_B = pick(probability_BN, uniforms(generator, probability_BN))
    return candidates_BNK[torch.arange(len(index_B), device=index_B.device), index_B]


def pool_probabilities(candidates_BNK: Tensor, temperature: float, keep_BN: Tensor | None = None) -> Tensor:
    """Probability (B, N) that Algorithm 2 returns each draw of the pool; equal draws share their value's weight equally.

    float64, or float32 on a device without it. Arguments and errors as in `batch_temperature`.
    """
    check_pool(temperature, candidates_BNK.shape[1])
    return weigh_counts(count_equal(candidates_BNK, keep_BN), temperature)


def weigh_counts(count_BN: Tensor, temperature: float) -> Tensor:
    """`pool_probabilities` from the copies (B, N) that each draw has in its pool, itself included; 0 for one not kept."""
    whole, _ = split_exponent(temperature)
    log_weight = _log_weights(count_BN.shape[1], temperature, count_BN.device)[count_BN]
    most_B1 = count_BN.amax(dim=1, keepdim=True)
    fallback_BN = torch.where(count_BN == most_B1, 0.0, -math.inf).to(log_weight.dtype)
    return torch.where(most_B1 >= whole, log_weight, fallback_BN).softmax(dim=1)


def count_equal(candidates_BNK: Tensor, keep_BN: Tensor | None = None) -> Tensor:
    """For each kept draw, how many kept draws of its row are the same patch, 0 for others: (B, N, K) -> (B, N) int64, exact.

    Draws are ranked by their first k tokens, k = 1..K: each round sorts (rank so far, next token) pairs, so nothing of size
    N x N exists and no hash can collide.
    """
    rank_BN = torch.zeros_like(candidates_BNK[..., 0])
    for token_BN in candidates_BNK.unbind(-1):
        key_BN, order_BN = (rank_BN * _TOKEN_RANGE + token_BN).sort(dim=1)
        step_BN = torch.zeros_like(key_BN)
        step_BN[:, 1:] = key_BN[:, 1:] != key_BN[:, :-1]
        rank_BN = torch.empty_like(key_BN).scatter_(1, order_BN, step_BN.cumsum(dim=1))
    one_BN = torch.ones_like(rank_BN) if keep_BN is None else keep_BN.to(rank_BN.dtype)
    total_BN = torch.zeros_like(rank_BN).scatter_add_(1, rank_BN, one_BN)
    return total_BN.gather(1, rank_BN) * one_BN


def condition(candidates_BNK: Tensor, prefix_BK: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Condition pools on the first `length` tokens (0..K) of each row's patch: the pools to use and which draws are kept.

    Kept are the draws that agree with the row's prefix, or, where none agrees on all of it, those that agree longest; these
    then get the prefix's tokens written over their own. With agreeing draws this is rejection sampling, so the kept draws
    are exact draws of the conditional law. Without, only the later tokens come from the model, given a shorter prefix.
    """
    position_K = torch.arange(candidates_BNK.shape[-1], device=candidates_BNK.device)
    given_BK = position_K < length_B[:, None]
    agree_BNK = (candidates_BNK == prefix_BK[:, None]) & given_BK[:, None]
    matched_BN = agree_BNK.to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    keep_BN = matched_BN == matched_BN.amax(dim=1, keepdim=True)
    return torch.where(given_BK[:, None], prefix_BK[:, None], candidates_BNK), keep_BN


def sample_logits(
    logits_BV: Tensor, temperature: float, generator: Generators, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """One token per row, (B,) int64, from softmax(logits) as `sharpener` makes it: where likelihoods exist."""
    return sample_by(logits_BV, sharpener(temperature, top_k, top_p), generator)


def sample_by(logits_BV: Tensor, sharpen: Sharpen | None, generator: Generators) -> Tensor:
    """The same, by anything that changes the logits."""
    logits_BV = logits_BV.to(_wide(logits_BV.device))
    probability_BV = (logits_BV if sharpen is None else sharpen(logits_BV)).softmax(dim=-1)
    return pick(probability_BV, uniforms(generator, probability_BV))


class Sharpener(NamedTuple):
    """Logits (R, V) of laws of tokens to those of the sharpened laws, softmax(logits / T), the same for all rows.

    Then, in this order: only the `top_k` most likely tokens, only the fewest most likely of those left that together have
    probability `top_p` at least (always one). Of equal logits the lower id is the more likely.
    """

    temperature: float
    top_k: int | None
    top_p: float | None

    def __call__(self, logits_RV: Tensor) -> Tensor:
        scale = max(self.temperature, COLDEST)
        scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / scale
        if self.top_k is None and self.top_p is None:
            return scaled_RV
        sorted_RV, token_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            sorted_RV[:, self.top_k :] = -math.inf
        if self.top_p is not None:
            probability_RV = sorted_RV.softmax(dim=-1)
            before_RV = probability_RV.cumsum(-1) - probability_RV
            sorted_RV = sorted_RV.masked_fill(before_RV >= self.top_p, -math.inf)
        return torch.empty_like(scaled_RV).scatter_(-1, token_RV, sorted_RV)

    def of(self, rows: slice) -> Sharpener:
        return self

    def took(self, ids_R: Tensor) -> None:
        pass


def sharpener(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Sharpener | None:
    """None where nothing changes. Raises UserError for a temperature outside (0, 1]."""
    check_temperature(temperature)
    if top_p == 1:
        top_p = None
    if temperature == 1 and top_k is None and top_p is None:
        return None
    return Sharpener(temperature, top_k, top_p)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@lru_cache(maxsize=64)
def _log_weights(candidates: int, temperature: float, device: torch.device) -> Tensor:
    """log(w(c) / c) for c = 0..N, -inf below n, on the device: a value's weight shared among its c copies."""
    whole, rest = split_exponent(temperature)
    count = torch.arange(candidates + 1, dtype=torch.float64)
    safe = count.clamp(min=whole)
    log_weight = torch.lgamma(safe + 1) - torch.lgamma(safe - (whole + rest) + 1) - safe.log()
    log_weight -= math.lgamma(whole + rest + 1)
    return log_weight.masked_fill(count < whole, -math.inf).to(_wide(device)).to(device)


def uniforms(generator: Generators, like_BN: Tensor) -> Tensor:
    """One uniform number per row, (B, 1); with one generator per row, a row's number does not depend on the others."""
    if isinstance(generator, torch.Generator):
        return torch.rand(len(like_BN), 1, generator=generator, dtype=like_BN.dtype, device=like_BN.device)
    assert len(generator) == len(like_BN), "one generator per row"
    rows = [torch.rand(1, 1, generator=each, dtype=like_BN.dtype, device=like_BN.device) for each in generator]
    return torch.cat(rows)


def pick(probability_BN: Tensor, uniform_B1: Tensor) -> Tensor:
    """Index (B,) drawn from each row's probabilities by inverting their cumulative sum."""
    cumulative_BN = probability_BN.cumsum(dim=1)
    below_one = uniform_B1 * (
        1 - torch.finfo(uniform_B1.dtype).eps
    )  # none may round up to the sum, behind all that count
    return torch.searchsorted(cumulative_BN, below_one * cumulative_BN[:, -1:], right=True).squeeze(1)
