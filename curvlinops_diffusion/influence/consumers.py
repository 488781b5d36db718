"""Consumers reduce rows of training examples as they stream past: gradients, or their scores.

Legend: Q queries, N training examples, B a batch of them, K groups, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.influence.score_files import HALVED, INDEX
from curvlinops_diffusion.linalg.operator import check_whole
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.runtime.sums import prefixed, within


class GradientConsumer(ABC):
    """Something made of rows of training examples, gradients usually, as they stream past.

    Attributes:
        sums: The result of those seen so far, tensors by name, so that parts can be added up.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def begin(self) -> None:  # noqa: B027  most need nothing
        """Make what is needed; on all processes together, unless the pass was finished before."""

    @abstractmethod
    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Take rows of some training examples: gradients ``[B, P]`` of each stream.

        Consumers of scores take those, ``[B, Q]`` of each name.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The sums, as they are written down and added up over processes."""
        return dict(self.sums)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`."""
        self.sums = dict(tensors)


class Scored(GradientConsumer):
    """Hands the scores of gradients to a consumer.

    ::

        τ(q, n) = 1/N (G_inv ∇m_q)ᵀ ∇ℓ_n

    Of two streams, of halves of the draws, the scores of their mean come first, then those of each.

    Args:
        consumer: Takes the scores.
        columns: Make the queries' preconditioned gradients, ``[P, Q]``, one for each stream.
        num_data: ``N``.
        layers: Where the parameters of each layer are, to score them one by one.
    """

    def __init__(
        self,
        consumer: GradientConsumer,
        columns: Sequence[Callable[[], Tensor]],
        num_data: int,
        layers: Sequence[Sequence[slice]] = (),
    ):
        super().__init__()
        self._consumer, self._make_columns, self._num_data = consumer, columns, num_data
        self._layers = layers or [[slice(None)]]
        self._columns: Sequence[Tensor] = ()

    def begin(self) -> None:
        """Make the columns."""
        self._columns = _with_mean([make() for make in self._make_columns])

    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Score the examples."""
        N = self._num_data
        scores = [
            torch.stack([rows_BP[:, at] @ columns_PQ[at] / N for at in layer or (slice(0),)]).sum(0)
            for rows_BP, columns_PQ in zip(_with_mean(rows), self._columns, strict=True)
            for layer in self._layers
        ]
        self._consumer.add(indices, *scores)

    def tensors(self) -> dict[str, Tensor]:
        """The consumer's state."""
        return self._consumer.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the consumer go on."""
        self._consumer.restore(tensors)


def _with_mean(several: Sequence[Tensor]) -> Sequence[Tensor]:
    return several if len(several) == 1 else ((several[0] + several[1]) / 2, *several)


class AllRows(GradientConsumer):
    """The rows themselves: scores, ``[N, Q]`` of each name, or gradients, ``[N, P]``; else zero."""

    def __init__(self, num_data: int, names: Sequence[str] = HALVED[:1]):
        super().__init__()
        self._num_data, self._names = num_data, names

    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Fill the examples' rows."""
        for name, own in zip(self._names, rows, strict=True):
            if name not in self.sums:
                self.sums[name] = own.new_zeros(self._num_data, own.shape[1])
            self.sums[name][list(indices)] = own


class OwnScores(GradientConsumer):
    """The scores of those examples that this process has seen, ``[Q, n]`` each, in main memory.

    They are no sums: a pass whose sums are not added up leaves each process with its own.
    """

    def __init__(self, names: Sequence[str], processes: Processes):
        super().__init__()
        self._names, self._part = names, str(processes.rank)
        self._pieces: list[dict[str, Tensor]] = []

    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Keep the examples' scores."""
        scores = {name: z_BQ.T.cpu() for name, z_BQ in zip(self._names, rows, strict=True)}
        self._pieces.append({**scores, INDEX: torch.tensor(list(indices))})

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
        """Join those of several blocks of queries."""

        def joined(order: str) -> Ranked:
            own: list[Ranked] = [getattr(block, order) for block in blocks]
            return Ranked(torch.cat([r.indices for r in own]), torch.cat([r.scores for r in own]))

        return cls(*map(joined, TopScores.ORDERS))


class TopScores(GradientConsumer):
    """The ``k`` largest, least, and nearest to zero of each query's scores, so far."""

    # an order in which the scores sought come first
    ORDERS = ("positive", "negative", "neutral")

    def __init__(self, num_data: int, k: int, processes: Processes):
        super().__init__()
        self._k = min(check_count("k", k), num_data)
        self._part = str(processes.rank)
        self._found: dict[str, Ranked] = {}

    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Compare the examples with the best so far."""
        (scores_BQ,) = rows
        index_QB = torch.tensor(list(indices), device=scores_BQ.device).expand_as(scores_BQ.T)
        for order in self.ORDERS:
            self._merge(order, Ranked(index_QB, scores_BQ.T))

    def _merge(self, order: str, new: Ranked) -> None:
        both = [self._found[order], new] if order in self._found else [new]
        scores = torch.cat([one.scores for one in both], 1)
        index = torch.cat([one.indices for one in both], 1)
        key = {"positive": -scores, "negative": scores, "neutral": scores.abs()}[order]
        # by example first, so that equal scores rank the same in whatever order they come
        by_example = index.argsort(1)
        chosen = by_example.gather(1, key.gather(1, by_example).argsort(dim=1, stable=True))
        chosen = chosen[:, : self._k]
        self._found[order] = Ranked(index.gather(1, chosen), scores.gather(1, chosen))

    @property
    def result(self) -> TopInfluences:
        """The examples found."""
        return TopInfluences(**self._found)

    def tensors(self) -> dict[str, Tensor]:
        """Scores and indices, under this process' number: they are no sums."""
        return {
            f"{self._part}/{order}/{kind}": z
            for order, found in self._found.items()
            for kind, z in vars(found).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge what processes have found."""
        self._found = {}
        for part in sorted({name.split("/")[0] for name in tensors}):
            for order in self.ORDERS:
                self._merge(order, Ranked(**within(f"{part}/{order}", tensors)))


class GroupSums(GradientConsumer):
    """Sums of gradients over groups, ``[K, P]``, by how much of each example is in each group."""

    def __init__(self, groups_NK: Tensor, num_params: int):
        super().__init__()
        self._groups_NK = groups_NK
        self.sums["sums"] = groups_NK.new_zeros(groups_NK.shape[1], num_params)

    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Add the gradients to their groups'."""
        self.sums["sums"] += self._groups_NK[list(indices)].T @ rows[0]


class SelfInfluence(GradientConsumer):
    """``τ(n, n) = 1/N ∇ℓ_nᵀ G_inv ∇ℓ'_n``, ``[N]``; zero where none were computed.

    ``∇ℓ'`` are those of the second stream, from other draws say, or if there is one alone its own.
    """

    def __init__(self, G_inv: PyTorchLinearOperator, num_data: int):
        check_whole(G_inv, "Self-influence")
        super().__init__()
        self._G_inv = G_inv
        self.sums["values"] = torch.zeros(num_data, dtype=G_inv.dtype, device=G_inv.device)

    def add(self, indices: Sequence[int], *rows: Tensor) -> None:
        """Fill the examples' entries."""
        products_PB = self._G_inv @ rows[-1].T
        values_N = self.sums["values"]
        values_N[list(indices)] = (rows[0].T * products_PB).sum(0) / len(values_N)
