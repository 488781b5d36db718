"""Agreement of the scores of two halves of the draws: how sure scores are.

Legend: Q queries, N training examples, k the largest scores that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.split_half import (
    rank_correlation,
    standard_error,
    top_shared,
)
from curvlinops_diffusion.influence.stored_scores import StoredScores

#: The number of largest scores of two halves that are compared.
TOP = 10

Undefined = float | None


@dataclass(frozen=True)
class Agreement:
    """Agreement of two halves of the draws, for each query.

    The halves share no noise, so that it is the agreement of two runs with half the draws and
    other seeds; the scores of all draws are surer than either.

    Attributes:
        top: The number ``k`` of largest scores that are compared.
        shared: How many of these both halves have, ``[Q]``.
        by_chance: How many two random choices of ``k`` share on average, ``k² / N``.
        rank_correlation: Spearman's, over training examples; ``None`` where it is undefined.
        standard_error: That of a query's scores, root mean square over its examples.
    """

    top: int
    shared: tuple[float, ...]
    by_chance: float
    rank_correlation: tuple[Undefined, ...]
    standard_error: tuple[Undefined, ...]

    @classmethod
    def of_halves(cls, first: Tensor | StoredScores, second: Tensor | StoredScores) -> Agreement:
        """Compare the halves' scores ``[Q, N]``, which are read one query at a time."""
        N = first.shape[1]
        k = max(1, min(TOP, N // 2))  # all of them would always be shared

        def each(compare: Callable[[Tensor, Tensor], Tensor]) -> tuple[Undefined, ...]:
            pairs = zip(first, second, strict=True)
            found = torch.cat([compare(a.unsqueeze(0), b.unsqueeze(0)) for a, b in pairs])
            return tuple(plain_numbers(found))

        shared = tuple(k * (share or 0.0) for share in each(partial(top_shared, k=k)))
        return cls(k, shared, k * k / N, each(rank_correlation), each(standard_error))

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Agreement | None:
        """Read it from the header of a file of scores; ``None`` where there were no halves."""
        if "top_shared" not in header:
            return None
        k = header["top"]
        return cls(
            k,
            tuple(k * share for share in header["top_shared"]),
            k * k / len(header["train"]),
            tuple(header["rank_correlation"]),
            tuple(header["standard_error"]),
        )

    def as_header(self) -> dict[str, Any]:
        """The entries of a header, as plain values."""
        return {
            "rank_correlation": list(self.rank_correlation),
            "top": self.top,
            "top_shared": [share / self.top for share in self.shared],
            "standard_error": list(self.standard_error),
        }

    def of_query(self, q: int) -> str:
        """Agreement about a query, as text."""
        return self._text(self.shared[q], self.rank_correlation[q])

    def summary(self) -> str:
        """The medians over queries, as text."""
        known = [r for r in self.rank_correlation if r is not None]
        return self._text(median(self.shared), median(known) if known else None)

    def _text(self, shared: float, correlation: Undefined) -> str:
        ranks = "" if correlation is None else f", rank correlation {correlation:.2f}"
        return (
            f"{shared:.3g} of the top {self.top} in both halves of the draws "
            f"({self.by_chance:.2g} by chance){ranks}"
        )

    def __str__(self) -> str:
        """The medians over queries, as a sentence."""
        return f"{self.summary()}; medians over queries. All draws together are surer."


def plain_numbers(values: Tensor) -> list[Undefined]:
    """Numbers for a header of JSON, in which none are undefined."""
    return [value if isfinite(value) else None for value in values.double().tolist()]
