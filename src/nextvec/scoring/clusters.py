"""Ratios of sums, means among them, with standard errors clustered by document. Torch only.

Legend: N scored positions, Q quantities measured at each position, C clusters (documents).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClusterRatio:
    """Means over the valid positions, or per unit of size, and the covariance of those means (float64, on the CPU)."""

    mean: Tensor  # (Q,)
    covariance: Tensor | None  # (Q, Q); None with a single cluster: nothing to estimate a spread from
    count: Tensor  # (Q,) valid positions, int64
    clusters: int  # clusters with at least one valid position
    label: Tensor  # (C,) the labels of those clusters, ascending
    sums: Tensor  # (C, Q), float64: sums of the valid values of each cluster
    counts: Tensor  # (C, Q), float64: their number


def cluster_ratio(values_NQ: Tensor, valid_NQ: Tensor, cluster_N: Tensor, size_N: Tensor | None = None) -> ClusterRatio:
    """Mean of each column over its valid positions, with a covariance that respects clusters.

    Positions of one document are not independent, so the document is the unit of sampling and both the sum and the
    count of a column are random: the mean is R = sum_c y_c / sum_c n_c, and its linearised (Taylor) estimator of the
    covariance is C / (C - 1) * sum_c r_c r_c^T with r_c = (y_c - R n_c) / sum_c n_c (Cochran, Sampling Techniques,
    section 6.3 and chapter 9A). It holds for many documents; with a handful it is too small.

    Args: values (N, Q); valid (N, Q) bool; cluster (N,) any integer labels; size (N,) what a position adds to n_c, for
    instance its bytes (1 by default: the mean per position).
    Raises ValueError when shapes disagree or a column has no valid position, or sizes that add up to nothing.
    """
    if values_NQ.shape != valid_NQ.shape or cluster_N.shape != values_NQ.shape[:1]:
        raise ValueError(
            "values and valid must both be (N, Q) and cluster (N,); got "
            f"{tuple(values_NQ.shape)}, {tuple(valid_NQ.shape)} and {tuple(cluster_N.shape)}"
        )
    valid_NQ = valid_NQ.cpu().bool()
    used_N = valid_NQ.any(dim=-1)
    valid = valid_NQ[used_N].double()
    values = values_NQ.cpu()[used_N].double() * valid
    sizes = valid if size_N is None else valid * size_N.cpu()[used_N, None].double()
    labels, cluster = cluster_N.cpu()[used_N].unique(return_inverse=True)
    clusters, columns = len(labels), values.shape[1]
    sum_CQ = torch.zeros(clusters, columns, dtype=torch.float64).index_add_(0, cluster, values)
    count_CQ = torch.zeros(clusters, columns, dtype=torch.float64).index_add_(0, cluster, valid)
    size_CQ = torch.zeros(clusters, columns, dtype=torch.float64).index_add_(0, cluster, sizes)
    count_Q, size_Q = count_CQ.sum(dim=0), size_CQ.sum(dim=0)
    if clusters == 0 or bool((size_Q == 0).any()):
        raise ValueError(f"every column needs a valid position; valid positions per column: {count_Q.long().tolist()}")
    mean_Q = sum_CQ.sum(dim=0) / size_Q
    covariance: Tensor | None = None
    if clusters > 1:
        residual_CQ = (sum_CQ - mean_Q * size_CQ) / size_Q
        covariance = residual_CQ.T @ residual_CQ * (clusters / (clusters - 1))
    return ClusterRatio(mean_Q, covariance, count_Q.long(), clusters, labels, sum_CQ, count_CQ)
