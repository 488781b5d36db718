"""Kernels of training examples and queries in the metric of an inverse curvature.

Legend: Q queries, N training examples, S streams of gradients, P parameters, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.consumers import (
    AllRows,
    GradientConsumer,
    GroupSums,
    Scored,
    SelfInfluence,
)
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.score_files import HALVED
from curvlinops_diffusion.influence.streaming import (
    batch_columns,
    curvature_settings,
    gradient_columns,
    of_gradients,
    query_blocks,
    stream_gradients,
)
from curvlinops_diffusion.linalg.upstream import LinearOperator, PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import digest_of, name_of
from curvlinops_diffusion.runtime.passes import PLAIN, DrawsBar, PassOptions, computed_once
from curvlinops_diffusion.runtime.processes import ALONE, Processes

One = ExampleGradientLinearOperator


@dataclass(frozen=True)
class KernelOptions:
    """The way in which a kernel regression is solved.

    Attributes:
        largest_gram: Training examples up to which their kernel matrix is formed.
        gradient_bytes: Bytes of training gradients that are held at once.
        max_iter: Iterations of conjugate gradients at most, where it is not formed.
        tolerance: Their relative residual.

    Raises:
        ValueError: If a number is not a whole one of at least 1.
    """

    largest_gram: int = 20_000
    gradient_bytes: int = 2**31
    max_iter: int = 100
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("largest_gram", "gradient_bytes"):
            check_count(name, getattr(self, name))


SOLVED = KernelOptions()


class Kernels:
    """``k(q, n) = ∇m_qᵀ G_inv ∇f_n`` of training examples, by passes over their gradients.

    Those may be of halves of the draws, whose passes are one. At most ``gradient_bytes`` of them
    are held at once; passes and their checkpoints are called by ``name``.
    """

    def __init__(
        self,
        J_train: One | Sequence[One],
        G_inv: PyTorchLinearOperator,
        name: str,
        gradient_bytes: int,
        passes: PassOptions = PLAIN,
    ):
        self._trains = [J_train] if isinstance(J_train, One) else list(J_train)
        self._names = HALVED[:1] if len(self._trains) == 1 else HALVED[1:]
        self.J_train = self._trains[0]
        self.G_inv = G_inv
        self.passes = passes
        self._name = name
        self._processes = Processes.of(passes.distributed)
        row_bytes = len(self._trains) * self.J_train.shape[1] * self.J_train.dtype.itemsize
        self._block = max(1, gradient_bytes // row_bytes)

    @property
    def num_data(self) -> int:
        """``N``."""
        return self.J_train.shape[0]

    def both(self, J_query: Sequence[One]) -> tuple[Tensor, Tensor]:
        """Kernels ``[S, S, Q, N]`` of queries, and ``[S, S, N, N]`` of examples on the CPU."""
        if self._block < self.num_data:
            return self.cross(J_query), self._rows_of(self._trains, "examples")
        found = self._stream(AllRows(self.num_data, self._names), "gradients", {})
        rows = [found[name] for name in self._names]
        preconditioned = [self.G_inv @ rows_NP.T for rows_NP in rows]
        blocks = query_blocks(J_query[0], self._block)

        def products(of: Iterable[Tensor], device: torch.device) -> Tensor:
            found = [torch.stack([(z @ each).to(device) for each in preconditioned]) for z in of]
            return torch.stack(found)

        def queried(block: range) -> Tensor:
            columns = (gradient_columns(J, block, self._processes) for J in J_query)
            return products((columns_PQ.T for columns_PQ in columns), rows[0].device)

        return torch.cat(list(map(queried, blocks)), 2), products(rows, torch.device("cpu"))

    def cross(self, J_query: Sequence[One]) -> Tensor:
        """Kernels of queries alone, ``[S, S, Q, N]``."""
        return self._rows_of(J_query, "queries")

    def _rows_of(self, J: Sequence[One], what: str) -> Tensor:
        of_all = self.settings(
            {"for": name_of(self.J_train.measurement), **of_gradients(J[0])}, J[0]
        )

        def compute() -> dict[str, Tensor]:
            columns = [gradient_columns(one, block, self._processes) for one in J]
            preconditioned_PK = torch.cat([self.G_inv @ columns_PB for columns_PB in columns], 1)
            name = f"products with {what} from {block.start}"
            found = self._products(preconditioned_PK, name, settings)  # S of [S B, N]
            return {"kernel": torch.stack([z.unflatten(0, (len(J), -1)) for z in found], 1)}

        # rows of all training examples may be too many for the device
        kept_on = torch.device("cpu") if J is self._trains else self.J_train.device
        parts = []
        for block in query_blocks(J[0], self._block):
            settings = {**of_all, "block": [block.start, block.stop]}
            found = self._once(f"{what} from {block.start}", compute, settings)
            parts.append(found["kernel"].to(kept_on))
        return torch.cat(parts, 2)

    def products(self, vectors_PK: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """``[∇f_nᵀ v_k]``, ``[K, N]``, of the first stream."""
        return self._products(vectors_PK, name, settings)[0]

    def _products(self, vectors_PK: Tensor, name: str, settings: dict[str, Any]) -> list[Tensor]:
        N, S = self.num_data, len(self._trains)
        names = HALVED[:1] if S == 1 else HALVED  # of two streams those of their mean come first
        scored = Scored(AllRows(N, names), [lambda: vectors_PK] * S, N)
        found = self._stream(scored, name, settings)
        return [found[name].T.contiguous() * N for name in self._names]

    def sums(self, weights_NK: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """``Σ_n w_nk ∇f_n``, ``[P, K]``, of the first stream."""
        consumer = GroupSums(weights_NK, self.J_train.shape[1])
        return self._stream(consumer, name, settings)["sums"].T

    def mean_diagonal(self) -> float:
        """``κ``; where blocks are sharded among processes, these multiply every batch together."""
        data, settings = self.J_train.regression, self.settings({})
        if getattr(self.G_inv, "processes", ALONE).count == 1:
            consumer = SelfInfluence(self.G_inv, self.num_data)
            found = self._stream(consumer, "diagonal of the kernel", settings)
            return float(found["values"].sum())  # which are divided by N

        def compute() -> dict[str, Tensor]:
            total, shown = 0.0, self.passes.progressbar and self._processes.rank == 0
            with DrawsBar(data.num_samples, self._name, shown) as bar:
                for clean in data.clean_batches():
                    columns_PB = batch_columns(self.J_train, clean, self._processes)
                    total += float((columns_PB * (self.G_inv @ columns_PB)).sum())
                    bar.batch_done(len(clean.indices) * data.num_draws)
            return {"trace": torch.tensor(total, dtype=torch.float64)}

        found = self._once("sharded diagonal of the kernel", compute, settings)
        return float(found["trace"]) / self.num_data

    def _once(
        self, name: str, compute: Callable[[], dict[str, Tensor]], settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        name = f"{self._name}, {name}".capitalize()
        return computed_once(name, self.J_train.regression, compute, self.passes, settings)

    def _stream(
        self, consumer: GradientConsumer, name: str, settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        stream_gradients(
            self._trains,
            {"kernel": consumer},
            name=f"{self._name}, {name}".capitalize(),
            settings=settings,
            passes=self.passes,
        )
        return consumer.tensors()

    def settings(self, more: dict[str, Any], J: One | None = None) -> dict[str, Any]:
        """Describe what passes depend on besides the training gradients, for checkpoints."""
        if self.passes.checkpoint is None:
            return {}
        of = more if J is None else {"of": J.regression.identity(more)}
        return {**of, "curvature": curvature_settings(self.G_inv)}


class KernelMatrix(LinearOperator):
    """The sum of kernel matrices of the training examples, ``[N, N]``, which is never formed."""

    def __init__(self, kernels: Sequence[Kernels]):
        self._kernels = kernels
        self._number = count()
        shapes = [(kernels[0].num_data,)]
        super().__init__(shapes, shapes, like=kernels[0].J_train)

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """``K X``, by two passes for each kernel."""
        name, (X_NK,) = f"product {next(self._number)}", X
        total_NK = torch.zeros_like(X_NK)
        for kernel in self._kernels:
            settings = kernel.settings({"of": digest_of(X_NK)})
            sums_PK = kernel.sums(X_NK, f"{name}, sums", settings)
            total_NK += kernel.products(kernel.G_inv @ sums_PK, f"{name}, rows", settings).T
        return [total_NK]
