"""Ranks in which ties share their mean, and Spearman's correlation of them.

Legend: Q rows, M entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_ranks(values_QM: Tensor) -> Tensor:
    """Rank the entries of each row from zero, ties sharing the mean of their ranks, ``[Q, M]``."""
    values_QM = values_QM.contiguous()
    sorted_QM = values_QM.sort(1).values
    below_QM = torch.searchsorted(sorted_QM, values_QM, right=False)
    not_above_QM = torch.searchsorted(sorted_QM, values_QM, right=True)
    return (below_QM + not_above_QM - 1).double() / 2


def ranks_beyond_rounding(values_QM: Tensor, rounding_Q: Tensor) -> Tensor:
    """Number the distinct values of each row in order, float64 ``[Q, M]``.

    Args:
        values_QM: The values.
        rounding_Q: Neighbours that differ by no more are one value.
    """
    sorted_QM, order_QM = values_QM.sort(1)
    steps_QM = torch.zeros_like(sorted_QM, dtype=torch.float64)
    steps_QM[:, 1:] = (sorted_QM.diff(dim=1) > rounding_Q.unsqueeze(1)).double()
    return steps_QM.cumsum(1).gather(1, order_QM.argsort(1))


def rank_correlations(x_QM: Tensor, y_QM: Tensor) -> Tensor:
    """Spearman's correlation of corresponding rows, ``[Q]``; NaN where a row is constant."""
    a_QM, b_QM = (r_QM - r_QM.mean(1, keepdim=True) for r_QM in map(mean_ranks, (x_QM, y_QM)))
    covariance_Q, own_Q, other_Q = (
        z_QM.sum(1) for z_QM in (a_QM * b_QM, a_QM.square(), b_QM.square())
    )
    return covariance_Q / (own_Q * other_Q).sqrt()


def rank_correlations_without_each(x_M: Tensor, y_M: Tensor) -> Tensor:
    """Spearman's correlation of two rows without each of the entries, ``[M]``; NaN likewise.

    Without entry ``m`` those above it lose a rank, and those tied with it half of one, so that
    sums over the others follow from those over all. Multiples of 1/4: exact.
    """
    others = len(x_M) - 1
    ranks, losses = [], []
    for z_M in (x_M, y_M):
        ranks.append(mean_ranks(z_M.unsqueeze(0))[0])
        lost_MM = (z_M > z_M.unsqueeze(1)).double() + (z_M == z_M.unsqueeze(1)).double() / 2
        losses.append(lost_MM.fill_diagonal_(0))
    mean = (others - 1) / 2  # of the ranks that are left

    def product(one: int, two: int) -> Tensor:
        """Sums over the others of products of their ranks, less the means."""
        a_M, b_M, a_MM, b_MM = ranks[one], ranks[two], losses[one], losses[two]
        sum_M = a_M @ b_M - a_M * b_M - a_MM @ b_M - b_MM @ a_M + (a_MM * b_MM).sum(1)
        return sum_M - others * mean**2

    return product(0, 1) / (product(0, 0) * product(1, 1)).sqrt()
