"""Agreement of orders: of the scores of two halves of the draws, and rank correlations.

Legend: Q queries or rows, N training examples, M entries of a row, k the largest scores compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb, isfinite, sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor

#: The number of largest scores of two halves that are compared.
TOP = 10

#: Draws at most where they are taken until the halves agree.
MAX_DRAWS = 256

# the halves agree no better than chance if they would as well with a probability of more than this;
# and the number of standard deviations that a correlation then has at most
_CHANCE, _DEVIATIONS = 0.025, 1.96
# of fewer examples even one and the same order is no evidence
_LEAST_ORDERED = 5
# the share of the largest scores that the halves have in common where more draws change little
_SETTLED = 0.8
#: Scores within so many standard errors are not told from zero.
NOT_TOLD = 2
#: What is said of a query of whose scores the halves agree no better than chance.
NOISE = "these scores are noise: take more draws"


@dataclass(frozen=True)
class SplitHalfScores:
    r"""Scores, and those of either half of the draws of queries and training examples.

    With gradients ``g = (g₁ + g₂)/2`` of the two halves of the draws, on both sides::

        τ = 1/N q̄ᵀ G_inv ḡ        τ₁ = 1/N q₁ᵀ G_inv g₁        τ₂ = 1/N q₂ᵀ G_inv g₂

    The halves share no noise. Their agreement is that of two runs with half the draws and other
    seeds; the scores of all draws are surer than either.

    Attributes:
        scores: ``τ``, shape ``[Q, N]``.
        first: ``τ₁``, likewise.
        second: ``τ₂``, likewise.
    """

    scores: Tensor
    first: Tensor
    second: Tensor

    def rank_correlation(self) -> Tensor:
        """Spearman's correlation of the halves' scores over training examples, ``[Q]``."""
        return rank_correlations(self.first, self.second)

    def top_shared(self, k: int = 10) -> Tensor:
        """The share of each half's ``k`` largest scores that the other half has too, ``[Q]``."""
        k = min(k, self.first.shape[1])
        one, other = (
            torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(k).indices, True)
            for z in (self.first, self.second)
        )
        return (one & other).sum(1) / k

    def standard_error(self) -> Tensor:
        """The standard error of a query's scores, root mean square over its examples, ``[Q]``.

        Half the difference of the halves: the error of their mean, which is not below that of
        ``τ``.
        """
        return (self.first - self.second).square().mean(1).sqrt() / 2


@dataclass(frozen=True)
class Agreement:
    """Agreement of two halves of the draws, for each query, as of :class:`SplitHalfScores`.

    Attributes:
        top: The number ``k`` of largest scores that are compared.
        shared: How many of these both halves have, ``[Q]``.
        num_train: The number ``N`` of training examples.
        rank_correlation: Spearman's, over training examples; ``None`` where it is undefined.
        standard_error: That of a query's scores, root mean square over its examples.
        same_first: Whether the largest is the same, ``[Q]``: of a copy of one training image the
            other places may well be noise.
    """

    top: int
    shared: tuple[float, ...]
    num_train: int
    rank_correlation: tuple[float | None, ...]
    standard_error: tuple[float | None, ...]
    same_first: tuple[bool, ...]

    @classmethod
    def of_halves(cls, first: Iterable[Tensor], second: Iterable[Tensor]) -> Agreement:
        """Compare the halves' scores ``[Q, N]``, which are read one query at a time."""
        found = []
        for first_N, second_N in zip(first, second, strict=True):
            N = len(first_N)
            k = max(1, min(TOP, N // 2))  # all of them would always be shared
            halves = SplitHalfScores(*(z.unsqueeze(0) for z in (first_N, first_N, second_N)))
            numbers = halves.top_shared(k), halves.rank_correlation(), halves.standard_error()
            same = bool(first_N.argmax() == second_N.argmax())
            found.append((*plain_numbers(torch.cat(numbers)), same))
        shared, correlations, errors, firsts = zip(*found, strict=True)
        return cls(k, tuple(k * (one or 0.0) for one in shared), N, correlations, errors, firsts)

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Agreement | None:
        """Read it from the header of a file of scores; ``None`` where there were no halves."""
        if "top_shared" not in header:
            return None
        k, names = header["top"], ("rank_correlation", "standard_error", "same_first")
        shared = tuple(k * share for share in header["top_shared"])
        return cls(k, shared, len(header["train"]), *(tuple(header[name]) for name in names))

    def as_header(self) -> dict[str, Any]:
        """The entries of a header, as plain values."""
        return {
            "rank_correlation": list(self.rank_correlation),
            "top": self.top,
            "top_shared": [share / self.top for share in self.shared],
            "standard_error": list(self.standard_error),
            "same_first": list(self.same_first),
        }

    @property
    def by_chance(self) -> float:
        """Mean number that two random choices of ``k`` share: ``k² / N``, hypergeometric."""
        return self.top**2 / self.num_train

    def is_top_told(self, q: int) -> bool:
        """Tell if the halves share more of a query's largest scores, or the first, than chance."""
        k, N = self.top, self.num_train
        if self.same_first[q] and 1 / N <= _CHANCE:
            return True
        shared = range(round(self.shared[q]), k + 1)
        ways = sum(comb(k, s) * comb(N - k, k - s) for s in shared)
        return ways / comb(N, k) <= _CHANCE

    def is_noise(self, q: int) -> bool:
        """Tell if they agree no better than chance about a query's largest scores and its order.

        Of fewer than five examples no order differs from chance, and ``False`` is the answer.
        """
        if self.num_train < _LEAST_ORDERED or self.is_top_told(q):
            return False
        correlation = self.rank_correlation[q] or 0.0
        return correlation * sqrt(self.num_train - 1) < _DEVIATIONS

    @property
    def is_settled(self) -> bool:
        """Tell if the halves share eight of ten of the largest scores of half of the queries."""
        return median(self.shared) >= _SETTLED * self.top

    def verdict(self, q: int) -> str:
        """State what is uncertain about a query's scores; empty where nothing is."""
        if self.is_noise(q):
            return NOISE
        if self.num_train < _LEAST_ORDERED or self.is_top_told(q):
            return ""
        return (
            "the order as a whole differs from chance, which images come first is uncertain: take "
            "more draws"
        )

    def of_query(self, q: int) -> str:
        """Agreement about a query, as text."""
        return self._text(self.shared[q], self.rank_correlation[q])

    def summary(self) -> str:
        """The medians over queries, as text."""
        known = [r for r in self.rank_correlation if r is not None]
        return self._text(median(self.shared), median(known) if known else None)

    def _text(self, shared: float, correlation: float | None) -> str:
        ranks = "" if correlation is None else f", rank correlation {correlation:.2f}"
        return (
            f"{shared:.3g} of the top {self.top} in both halves of the draws "
            f"({self.by_chance:.2g} by chance){ranks}"
        )

    def __str__(self) -> str:
        """The medians over queries, as a sentence, and of how many queries the scores are noise."""
        noise, Q = sum(map(self.is_noise, range(len(self.shared)))), len(self.shared)
        told = f" The scores of {noise} of {Q} queries are noise: take more draws."
        told = f" {NOISE.capitalize()}." if noise == Q else told if noise else ""
        return f"{self.summary()}; medians over queries. All draws together are surer.{told}"


def plain_numbers(values: Tensor) -> list[float | None]:
    """Numbers for a header of JSON, ``None`` where they are undefined or infinite."""
    return [value if isfinite(value) else None for value in values.double().tolist()]


def rank_correlations(x_QM: Tensor, y_QM: Tensor) -> Tensor:
    """Spearman's correlation of corresponding rows, ``[Q]``; NaN where a row is constant."""
    a_QM, b_QM = (r_QM - r_QM.mean(1, keepdim=True) for r_QM in map(_mean_ranks, (x_QM, y_QM)))
    return (a_QM * b_QM).sum(1) / (a_QM.square().sum(1) * b_QM.square().sum(1)).sqrt()


def rank_correlations_without_each(x_M: Tensor, y_M: Tensor) -> Tensor:
    """Spearman's correlation of two rows without each of the entries, ``[M]``; NaN likewise.

    Without entry ``m`` those above it lose a rank, and those tied with it half of one, so that
    sums over the others follow from those over all. Multiples of 1/4: exact.
    """
    others = len(x_M) - 1
    ranks, losses = [], []
    for z_M in (x_M, y_M):
        ranks.append(_mean_ranks(z_M.unsqueeze(0))[0])
        lost_MM = (z_M > z_M.unsqueeze(1)).double() + (z_M == z_M.unsqueeze(1)).double() / 2
        losses.append(lost_MM.fill_diagonal_(0))
    mean = (others - 1) / 2  # of the ranks that are left

    def product(one: int, two: int) -> Tensor:
        """Sums over the others of products of their ranks, less the means."""
        a_M, b_M, a_MM, b_MM = ranks[one], ranks[two], losses[one], losses[two]
        sum_M = a_M @ b_M - a_M * b_M - a_MM @ b_M - b_MM @ a_M + (a_MM * b_MM).sum(1)
        return sum_M - others * mean**2

    return product(0, 1) / (product(0, 0) * product(1, 1)).sqrt()


def ranks_beyond_rounding(values_QM: Tensor, rounding_Q: Tensor) -> Tensor:
    """Number the values of each row, ``[Q, M]``; one number where rounding is all that differs."""
    sorted_QM, order_QM = values_QM.sort(1)
    steps_QM = torch.zeros_like(sorted_QM, dtype=torch.float64)
    steps_QM[:, 1:] = (sorted_QM.diff(dim=1) > rounding_Q.unsqueeze(1)).double()
    return steps_QM.cumsum(1).gather(1, order_QM.argsort(1))


def _mean_ranks(values_QM: Tensor) -> Tensor:
    """Rank the entries of each row from zero, ties sharing the mean of their ranks."""
    from scipy.stats import rankdata  # takes most of a second, which few programs need

    ranks_QM = rankdata(values_QM.detach().double().cpu().numpy(), axis=1) - 1
    return torch.from_numpy(ranks_QM).to(values_QM.device)
