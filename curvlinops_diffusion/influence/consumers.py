"""Consumers reduce training gradients as they stream past: to scores, the extreme ones, sums.

Legend: Q queries, N training examples, B a batch of them, K groups, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.linalg.operator import check_whole
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.processes import Share


class GradientConsumer(ABC):
    """Something made of training gradients as they stream past."""

    def prepare(self, clean: CleanBatch) -> None:  # noqa: B027  most need nothing
        """Compute what else is needed of a batch, before its gradients come."""

    @abstractmethod
    def add(self, indices: Sequence[int], rows_BP: Tensor) -> None:
        """Take the gradients of some training examples."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The result of those seen so far, as sums, so that parts can be added up."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`."""


class PairwiseScores(GradientConsumer):
    """All scores, ``[Q, N]``.

    Args:
        preconditioned_PQ: The queries' preconditioned gradients.
        num_data: ``N``.
    """

    def __init__(self, preconditioned_PQ: Tensor, num_data: int):
        self._preconditioned_PQ = preconditioned_PQ
        self.scores_QN = preconditioned_PQ.new_zeros(preconditioned_PQ.shape[1], num_data)

    def add(self, indices: Sequence[int], rows_BP: Tensor) -> None:
        """Fill the examples' columns."""
        N = self.scores_QN.shape[1]
        self.scores_QN[:, list(indices)] = (rows_BP @ self._preconditioned_PQ).T / N

    def tensors(self) -> dict[str, Tensor]:
        """The scores; zero where none were computed."""
        return {"scores": self.scores_QN}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from scores."""
        self.scores_QN = tensors["scores"]


class GradientRows(GradientConsumer):
    """The gradients themselves, ``[N, P]``.

    Args:
        J_train: Whose rows they are.
    """

    def __init__(self, J_train: ExampleGradientLinearOperator):
        self.rows_NP = torch.zeros(J_train.shape, dtype=J_train.dtype, device=J_train.device)

    def add(self, indices: Sequence[int], rows_BP: Tensor) -> None:
        """Fill the examples' rows."""
        self.rows_NP[list(indices)] = rows_BP

    def tensors(self) -> dict[str, Tensor]:
        """The rows; zero where none were computed."""
        return {"rows": self.rows_NP}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from rows."""
        self.rows_NP = tensors["rows"]


@dataclass(frozen=True)
class Ranked:
    """Training examples of each query in the order of some property.

    Attributes:
        indices: The training examples, ``[Q, k]``.
        scores: Their scores, ``[Q, k]``.
    """

    indices: Tensor
    scores: Tensor


@dataclass(frozen=True)
class TopInfluences:
    """The training examples that stand out for each query.

    Attributes:
        positive: The largest scores, falling. For a loss, the most helpful examples.
        negative: The least, rising.
        neutral: Those nearest to zero, in order of their distance from it.
    """

    positive: Ranked
    negative: Ranked
    neutral: Ranked


class TopScores(GradientConsumer):
    """The ``k`` largest, least, and nearest to zero of each query's scores, so far.

    Args:
        preconditioned_PQ: The queries' preconditioned gradients.
        num_data: ``N``.
        k: How many of each.
        share: The process: what several have found is brought together.
    """

    # an order in which the scores sought come first
    ORDERS = ("positive", "negative", "neutral")

    def __init__(self, preconditioned_PQ: Tensor, num_data: int, k: int, share: Share):
        self._preconditioned_PQ = preconditioned_PQ
        self._num_data = num_data
        self._k = min(check_count("k", k), num_data)
        self._part = str(share.rank)
        empty = preconditioned_PQ.new_zeros(preconditioned_PQ.shape[1], 0)
        self._found = {order: (empty, empty.long()) for order in self.ORDERS}

    def add(self, indices: Sequence[int], rows_BP: Tensor) -> None:
        """Compare the examples with the best so far."""
        scores_QB = (rows_BP @ self._preconditioned_PQ).T / self._num_data
        index_QB = torch.tensor(list(indices), device=scores_QB.device).expand_as(scores_QB)
        for order in self.ORDERS:
            self._merge(order, scores_QB, index_QB)

    def _merge(self, order: str, scores_Qk: Tensor, index_Qk: Tensor) -> None:
        scores = torch.cat([self._found[order][0], scores_Qk], 1)
        index = torch.cat([self._found[order][1], index_Qk], 1)
        key = {"positive": -scores, "negative": scores, "neutral": scores.abs()}[order]
        # by example first, so that equal scores rank the same whatever came first
        by_example = index.argsort(1)
        chosen = by_example.gather(1, key.gather(1, by_example).argsort(dim=1, stable=True))
        chosen = chosen[:, : self._k]
        self._found[order] = (scores.gather(1, chosen), index.gather(1, chosen))

    @property
    def result(self) -> TopInfluences:
        """The examples found."""
        return TopInfluences(
            **{order: Ranked(index, scores) for order, (scores, index) in self._found.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Scores and indices, under this process' number: they are no sums."""
        parts = {}
        for order, (scores, index) in self._found.items():
            parts[f"{self._part}/{order}/scores"], parts[f"{self._part}/{order}/index"] = (
                scores,
                index,
            )
        return parts

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring together what processes have found."""
        self._found = {order: (s[:, :0], i[:, :0]) for order, (s, i) in self._found.items()}
        for part in sorted({name.split("/")[0] for name in tensors}):
            for order in self.ORDERS:
                self._merge(
                    order, tensors[f"{part}/{order}/scores"], tensors[f"{part}/{order}/index"]
                )


class GroupSums(GradientConsumer):
    """Sums of gradients over groups of training examples, ``[K, P]``.

    Args:
        groups_NK: How much of each example is in each group, usually zero or one.
        num_params: ``P``.
    """

    def __init__(self, groups_NK: Tensor, num_params: int):
        self._groups_NK = groups_NK
        self.sums_KP = groups_NK.new_zeros(groups_NK.shape[1], num_params)

    def add(self, indices: Sequence[int], rows_BP: Tensor) -> None:
        """Add the gradients to their groups'."""
        self.sums_KP += self._groups_NK[list(indices)].T @ rows_BP

    def tensors(self) -> dict[str, Tensor]:
        """The sums."""
        return {"sums": self.sums_KP}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums."""
        self.sums_KP = tensors["sums"]


class SelfInfluence(GradientConsumer):
    """``τ(n, n) = 1/N ∇ℓ_nᵀ G_inv ∇ℓ'_n``, ``[N]``.

    Args:
        G_inv: Inverse curvature.
        num_data: ``N``.
        J_again: Gradients ``∇ℓ'`` of the same examples from other draws; ``None`` for those that
            stream past.

    Raises:
        ValueError: If the curvature's blocks are shared among processes.
    """

    def __init__(
        self,
        G_inv: PyTorchLinearOperator,
        num_data: int,
        J_again: ExampleGradientLinearOperator | None = None,
    ):
        check_whole(G_inv, "Self-influence")
        self._G_inv = G_inv
        self._J_again = J_again
        self._again_BP: Tensor | None = None
        self.values_N = torch.zeros(num_data, dtype=G_inv.dtype, device=G_inv.device)

    def prepare(self, clean: CleanBatch) -> None:
        """Compute the gradients from other draws."""
        if self._J_again is not None:
            self._again_BP = self._J_again.rows_of(clean)

    def add(self, indices: Sequence[int], rows_BP: Tensor) -> None:
        """Fill the examples' entries."""
        products_PB = self._G_inv @ (rows_BP if self._again_BP is None else self._again_BP).T
        self.values_N[list(indices)] = (rows_BP.T * products_PB).sum(0) / len(self.values_N)

    def tensors(self) -> dict[str, Tensor]:
        """The values; zero where none were computed."""
        return {"values": self.values_N}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from values."""
        self.values_N = tensors["values"]
