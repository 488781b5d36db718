"""The linear data-modelling score (Park et al., 2023), its error, and its ceiling.

Legend: H halves, S seeds, Q queries, N training examples, M measurements, K resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Resampled:
    """A bootstrap over halves and queries together, the same for all methods.

    Attributes:
        times_KH: How often each half was drawn, one row for each of ``K`` resamples.
        times_KQ: How often each query was.
    """

    times_KH: Tensor
    times_KQ: Tensor

    @classmethod
    def of(cls, H: int, Q: int, resamples: int, seed: int = 0) -> Resampled:
        """Draw with replacement."""
        generator = torch.Generator().manual_seed(seed)

        def times(number: int) -> Tensor:
            drawn = torch.randint(number, (resamples, number), generator=generator)
            counts = torch.zeros(resamples, number, dtype=torch.double)
            return counts.scatter_add_(1, drawn, torch.ones_like(counts))

        return cls(times(H), times(Q))

    def means(self, predicted_QH: Tensor, measured_QH: Tensor) -> Tensor:
        """The mean over queries of each resample, ``[K]``."""
        x_KQH, y_KQH = self._ranks(predicted_QH), self._ranks(measured_QH)
        times_K1H = self.times_KH.unsqueeze(1)
        covariance, own, other = (
            (times_K1H * a * b).sum(-1) for a, b in ((x_KQH, y_KQH), (x_KQH, x_KQH), (y_KQH, y_KQH))
        )
        correlation_KQ = covariance / (own * other).sqrt()
        return (self.times_KQ * correlation_KQ).sum(1) / self.times_KQ.sum(1)

    def _ranks(self, z_QH: Tensor) -> Tensor:
        """Ranks in each resample, of mean zero; copies of a half share their mean rank."""
        order_QH = z_QH.argsort(-1)
        sorted_KQH = self.times_KH[:, order_QH]
        mean_ranks = sorted_KQH.cumsum(-1) - sorted_KQH / 2
        found = torch.empty_like(mean_ranks)
        found.scatter_(-1, order_QH.expand_as(mean_ranks), mean_ranks)
        return found - z_QH.shape[1] / 2

    def summary(self, predicted_QH: Tensor, measured_QH: Tensor) -> dict[str, float]:
        """The mean over queries, its standard error over them, and the bootstrap's interval.

        Returns:
            ``lds``, ``error_over_queries``, and ``low`` and ``high``, the 2.5 and 97.5 % quantiles.
        """
        values_Q = lds(predicted_QH, measured_QH)
        return {
            "lds": round(float(values_Q.mean()), 4),
            "error_over_queries": round(float(values_Q.std() / len(values_Q) ** 0.5), 4),
            **_interval(self.means(predicted_QH, measured_QH)),
        }

    def difference(
        self, predicted_QH: Tensor, other_QH: Tensor, measured_QH: Tensor
    ) -> dict[str, float]:
        """How much better than another method's predictions, on the same resamples."""
        both = (lds(z, measured_QH).mean() for z in (predicted_QH, other_QH))
        means = (self.means(z, measured_QH) for z in (predicted_QH, other_QH))
        (own, other), (own_K, other_K) = both, means
        return {"difference": round(float(own - other), 4), **_interval(own_K - other_K)}


def _interval(values_K: Tensor) -> dict[str, float]:
    low, high = values_K.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {"low": round(low, 4), "high": round(high, 4)}


def agreement(measured_SQH: Tensor) -> float:
    """The correlation over halves between two training seeds, mean over queries."""
    return float(lds(measured_SQH[0], measured_SQH[1]).mean())


def ceiling(measured_SQH: Tensor) -> float:
    """What a predictor of the expectation over seeds would reach against the seeds' mean.

    With the correlation ``r`` between two seeds, the mean of two has reliability ``2r / (1 + r)``
    (Spearman & Brown), and its correlation with the expectation is the root of that.
    """
    r, S = agreement(measured_SQH), len(measured_SQH)
    return (S * r / (1 + (S - 1) * r)) ** 0.5
