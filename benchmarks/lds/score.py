"""The linear data-modelling score (Park et al., 2023), its error, and its ceiling.

Legend: H halves, S seeds, Q queries, N training examples, M measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, of mean zero and norm one; there are no ties among reals."""
    r = x.argsort(-1).argsort(-1).double()
    r = r - r.mean(-1, keepdim=True)
    return r / r.norm(dim=-1, keepdim=True)


def predicted(scores_QN: Tensor, halves_HN: Tensor) -> Tensor:
    """What the scores say of networks trained on halves: the sum over what was left out, [Q, H]."""
    return scores_QN.double() @ (~halves_HN).double().T


def lds(predicted_QH: Tensor, measured_QH: Tensor) -> Tensor:
    """Spearman's correlation over the halves, query by query, ``[Q]``."""
    return (ranks(predicted_QH) * ranks(measured_QH)).sum(-1)


def summary(predicted_QH: Tensor, measured_QH: Tensor, resamples: int = 1000) -> dict[str, float]:
    """The mean over queries, its standard error over them, and a bootstrap over halves.

    Returns:
        ``lds``, ``error_over_queries``, and ``low`` and ``high``, the 2.5 and 97.5 % quantiles of
        the mean when halves and queries are both drawn with replacement.
    """
    values_Q = lds(predicted_QH, measured_QH)
    Q, H = predicted_QH.shape
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(resamples):
        h = torch.randint(H, (H,), generator=generator)
        q = torch.randint(Q, (Q,), generator=generator)
        means.append(_spearman_with_ties(predicted_QH[q][:, h], measured_QH[q][:, h]).mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {
        "lds": float(values_Q.mean()),
        "error_over_queries": float(values_Q.std() / Q**0.5),
        "low": low,
        "high": high,
    }


def ceiling(measured_SQH: Tensor) -> float:
    """What a predictor of the expectation over seeds would reach against the seeds' mean.

    With the correlation ``r`` between two seeds, the mean of two has reliability ``2r / (1 + r)``
    (Spearman & Brown), and its correlation with the expectation is the root of that.
    """
    r = float(lds(measured_SQH[0], measured_SQH[1]).mean())
    S = len(measured_SQH)
    return (S * r / (1 + (S - 1) * r)) ** 0.5


def _spearman_with_ties(x_QH: Tensor, y_QH: Tensor) -> Tensor:
    """With mean ranks for ties, which drawing with replacement makes."""

    def mean_ranks(z: Tensor) -> Tensor:
        less = (z.unsqueeze(-1) > z.unsqueeze(-2)).double().sum(-1)
        equal = (z.unsqueeze(-1) == z.unsqueeze(-2)).double().sum(-1)
        r = less + (equal - 1) / 2
        r = r - r.mean(-1, keepdim=True)
        return r / r.norm(dim=-1, keepdim=True)

    return (mean_ranks(x_QH) * mean_ranks(y_QH)).sum(-1)
