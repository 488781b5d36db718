"""What a batch of training gradients scores for the queries: inner products.

Legend: Q queries, N training examples, B a batch of them, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from curvlinops_diffusion.diffusion.data import CleanBatch

#: The queries' preconditioned gradients ``[P, Q]``, or what makes them.
Columns = Tensor | Callable[[], Tensor]


class Scorer(ABC):
    """Scores of a batch of training examples, by name."""

    @abstractmethod
    def begin(self) -> None:
        """Make what the scores need; on all processes together, before the first batch."""

    def prepare(self, clean: CleanBatch) -> None:  # noqa: B027  most need nothing
        """Compute what else is needed of a batch, before its gradients come."""

    @abstractmethod
    def scores(self, rows_BP: Tensor) -> dict[str, Tensor]:
        """The scores of a batch, ``[Q, B]`` each; the main ones are called ``scores``."""


class InnerProducts(Scorer):
    """``τ(q, n) = 1/N (G_inv ∇m_q)ᵀ ∇ℓ_n``.

    Args:
        columns: The queries' preconditioned gradients, or what makes them when they are needed.
        num_data: ``N``.
    """

    def __init__(self, columns: Columns, num_data: int):
        self._make = columns
        self._num_data = num_data
        self._columns_PQ = columns if isinstance(columns, Tensor) else None

    def begin(self) -> None:
        """Make the columns."""
        if not isinstance(self._make, Tensor):
            self._columns_PQ = self._make()

    def scores(self, rows_BP: Tensor) -> dict[str, Tensor]:
        """The products."""
        assert self._columns_PQ is not None, "begin comes first"
        return {"scores": (rows_BP @ self._columns_PQ).T / self._num_data}
