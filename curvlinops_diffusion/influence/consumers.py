"""Consumers reduce training gradients as they stream past: to scores, the extreme ones, sums.

Legend: Q queries, N training examples, B a batch of them, K groups, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scorers import Scorer
from curvlinops_diffusion.linalg.operator import check_whole
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.runtime.sums import prefixed, within


class GradientConsumer(ABC):
    """Something made of training gradients as they stream past."""

    def begin(self) -> None:  # noqa: B027  most need nothing
        """Make what is needed; on all processes together, unless the pass was finished before."""

    @abstractmethod
    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Take the gradients of some training examples, ``[B, P]`` of each stream."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The result of those seen so far, as sums, so that parts can be added up."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`."""


class ScoringConsumer(GradientConsumer):
    """Something made of the scores of training examples.

    Args:
        make_scorer: Makes what scores a batch.
    """

    def __init__(self, make_scorer: Callable[[], Scorer]):
        self._make_scorer = make_scorer
        self._scorer: Scorer | None = None

    def begin(self) -> None:
        """Make the scorer."""
        self._scorer = self._make_scorer()

    def scores_of(self, *rows_BP: Tensor) -> dict[str, Tensor]:
        """Scores of a batch, ``[Q, B]``, by name."""
        assert self._scorer is not None, "begin comes first"
        return self._scorer(*rows_BP)


class PairwiseScores(ScoringConsumer):
    """All scores by name, ``[Q, N]`` each.

    Args:
        make_scorer: Makes what scores a batch.
        num_data: ``N``.

    Attributes:
        scores: Those seen so far; zero where there are none.
    """

    def __init__(self, make_scorer: Callable[[], Scorer], num_data: int):
        super().__init__(make_scorer)
        self._num_data = num_data
        self.scores: dict[str, Tensor] = {}

    @property
    def scores_QN(self) -> Tensor:
        """The main ones."""
        return self.scores["scores"]

    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Fill the examples' columns."""
        for name, scores_QB in self.scores_of(*rows_BP).items():
            if name not in self.scores:
                self.scores[name] = scores_QB.new_zeros(len(scores_QB), self._num_data)
            self.scores[name][:, list(indices)] = scores_QB

    def tensors(self) -> dict[str, Tensor]:
        """The scores."""
        return dict(self.scores)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from scores."""
        self.scores = dict(tensors)


class OwnScores(ScoringConsumer):
    """The scores of those examples that this process has seen, ``[Q, n]`` each, in main memory.

    They are no sums: a pass whose sums are not added up leaves each process with its own.

    Args:
        make_scorer: Makes what scores a batch.
        processes: The process.
    """

    #: The name of the examples' numbers, ``[n]``.
    INDEX = "index"

    def __init__(self, make_scorer: Callable[[], Scorer], processes: Processes):
        super().__init__(make_scorer)
        self._part = str(processes.rank)
        self._pieces: list[dict[str, Tensor]] = []

    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Keep the examples' scores."""
        scores = {name: z_QB.cpu() for name, z_QB in self.scores_of(*rows_BP).items()}
        self._pieces.append({**scores, self.INDEX: torch.tensor(list(indices))})

    @property
    def found(self) -> dict[str, Tensor]:
        """The scores by name, and the numbers of the examples in the order of their columns."""
        if not self._pieces:
            return {}
        joined = {
            name: torch.cat([piece[name] for piece in self._pieces], -1) for name in self._pieces[0]
        }
        self._pieces = [joined]
        return joined

    def tensors(self) -> dict[str, Tensor]:
        """Scores and numbers, under this process' number."""
        return prefixed(self._part, self.found)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what one or several processes had seen."""
        parts = sorted({name.split("/")[0] for name in tensors})
        self._pieces = [
            {name: z.cpu() for name, z in within(part, tensors).items()} for part in parts
        ]


class GradientRows(GradientConsumer):
    """The gradients themselves, ``[N, P]``.

    Args:
        J_train: Whose rows they are.
    """

    def __init__(self, J_train: ExampleGradientLinearOperator):
        self.rows_NP = torch.zeros(J_train.shape, dtype=J_train.dtype, device=J_train.device)

    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Fill the examples' rows."""
        (self.rows_NP[list(indices)],) = rows_BP

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

    @classmethod
    def of_blocks(cls, blocks: Sequence[TopInfluences]) -> TopInfluences:
        """Those of some queries after those of others."""

        def together(order: str) -> Ranked:
            own: list[Ranked] = [getattr(block, order) for block in blocks]
            return Ranked(torch.cat([r.indices for r in own]), torch.cat([r.scores for r in own]))

        return cls(*(together(order) for order in TopScores.ORDERS))


class TopScores(ScoringConsumer):
    """The ``k`` largest, least, and nearest to zero of each query's scores, so far.

    Args:
        make_scorer: Makes what scores a batch.
        num_data: ``N``.
        k: How many of each.
        processes: The process: what several have found is brought together.
    """

    # an order in which the scores sought come first
    ORDERS = ("positive", "negative", "neutral")

    def __init__(
        self, make_scorer: Callable[[], Scorer], num_data: int, k: int, processes: Processes
    ):
        super().__init__(make_scorer)
        self._k = min(check_count("k", k), num_data)
        self._part = str(processes.rank)
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Compare the examples with the best so far."""
        scores_QB = self.scores_of(*rows_BP)["scores"]
        index_QB = torch.tensor(list(indices), device=scores_QB.device).expand_as(scores_QB)
        for order in self.ORDERS:
            self._merge(order, scores_QB, index_QB)

    def _merge(self, order: str, scores_Qk: Tensor, index_Qk: Tensor) -> None:
        before = [self._found[order]] if order in self._found else []
        scores = torch.cat([*(own for own, _ in before), scores_Qk], 1)
        index = torch.cat([*(own for _, own in before), index_Qk], 1)
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
        self._found = {}
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

    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Add the gradients to their groups'."""
        self.sums_KP += self._groups_NK[list(indices)].T @ rows_BP[0]

    def tensors(self) -> dict[str, Tensor]:
        """The sums."""
        return {"sums": self.sums_KP}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums."""
        self.sums_KP = tensors["sums"]


class SelfInfluence(GradientConsumer):
    """``τ(n, n) = 1/N ∇ℓ_nᵀ G_inv ∇ℓ'_n``, ``[N]``.

    ``∇ℓ'`` are those of the second stream, from other draws say, or if there is one alone its own.

    Args:
        G_inv: Inverse curvature.
        num_data: ``N``.

    Raises:
        ValueError: If the curvature's blocks are shared among processes.
    """

    def __init__(self, G_inv: PyTorchLinearOperator, num_data: int):
        check_whole(G_inv, "Self-influence")
        self._G_inv = G_inv
        self.values_N = torch.zeros(num_data, dtype=G_inv.dtype, device=G_inv.device)

    def add(self, indices: Sequence[int], *rows_BP: Tensor) -> None:
        """Fill the examples' entries."""
        products_PB = self._G_inv @ rows_BP[-1].T
        self.values_N[list(indices)] = (rows_BP[0].T * products_PB).sum(0) / len(self.values_N)

    def tensors(self) -> dict[str, Tensor]:
        """The values; zero where none were computed."""
        return {"values": self.values_N}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from values."""
        self.values_N = tensors["values"]
