"""Kernel regression: what each training example counts for in a prediction of a query's value.

Legend: Q queries, N training examples, M measured functions, P parameters, K columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.consumers import (
    GradientRows,
    GroupSums,
    PairwiseScores,
    SelfInfluence,
)
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scorers import inner_products
from curvlinops_diffusion.influence.scores import (
    batch_columns,
    curvature_settings,
    gradient_columns,
    query_blocks,
    stream_gradients,
)
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.solvers.conjugate_gradients import CGRefinedInverseLinearOperator
from curvlinops_diffusion.linalg.upstream import LinearOperator, PyTorchLinearOperator
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checks import check_count, check_positive
from curvlinops_diffusion.runtime.digests import digest_of, name_of
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, computed_once, draws_bar
from curvlinops_diffusion.runtime.processes import ALONE, Processes

#: Bytes of gradients that are held at once, unless somebody says otherwise.
GRADIENT_BYTES = 2**31
#: Training examples up to which the kernel matrix is formed.
LARGEST_GRAM = 20_000
#: Iterations of conjugate gradients at most, and their relative residual.
MAX_ITER, TOLERANCE = 100, 1e-3
# units in the last place by which equal scores may differ
_ROUNDING = 8

One = ExampleGradientLinearOperator
Gradients = One | Sequence[One | Sequence[One]]


def kernel_regression_scores(
    J_query: Gradients,
    G_inv: PyTorchLinearOperator,
    J_train: Gradients,
    *,
    ridge: float = 1.0,
    squared: bool | Sequence[bool] = False,
    weights: Sequence[float] | None = None,
    largest_gram: int = LARGEST_GRAM,
    gradient_bytes: int = GRADIENT_BYTES,
    max_iter: int = MAX_ITER,
    tolerance: float = TOLERANCE,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Weights of the training examples in a kernel regression of a query's value.

    Gradients are compared in the metric of an inverse curvature, ``k(q, n) = ∇m_qᵀ G_inv ∇f_n``,
    and the queries' row of the kernel is divided by that of the training examples, so that what
    several of them share is not counted for each::

        s(q, ·) = k(q, ·) (K + ρ κ I)⁻¹,     K_nm = ∇f_nᵀ G_inv ∇f_m,   κ = 1/N Σ_n K_nn

    With a large ridge ``ρ`` these are influence scores, up to a factor. With several functions
    (lists of ``J_query`` and ``J_train``) each gives scores of its own; their
    :func:`averaged_scores` are returned. A function may be a list itself, whose kernels are added
    up. Positive is helpful, as in :func:`~curvlinops_diffusion.influence_scores`; the size has no
    unit.

    A query's loss ``‖ŷ − y‖²`` changes by ``2⟨ŷ − y, δ⟩ + ‖δ‖²`` if its prediction changes by
    ``δ``. The gradient of the loss knows the first term. Of the second, the regression of the
    prediction itself (:class:`~curvlinops_diffusion.measurements.SignedPrediction`) knows the
    expectation: if every example tells something of its own, leaving out a set changes the query's
    prediction by
    ``δ = −Σ_n s(q, n) ε_n`` over the set, with independent ``ε_n``, so that ``E δ²`` is the sum of
    ``s(q, n)²``, which ``squared`` returns. (As a Gaussian process: without example ``n`` the
    variance at the query rises by ``s(q, n)² / [(K + ρ κ I)⁻¹]_nn``, a divisor that the ridge makes
    nearly constant.) Both together predict retraining best
    (:func:`~curvlinops_diffusion.regression_scores`).

    Up to ``largest_gram`` training examples, ``K`` is computed in blocks and kept in the main
    memory, in float64, whatever the device: one pass over the training gradients if those of all
    fit into ``gradient_bytes``, else one more for each block that does. Beyond, the system is
    solved by conjugate gradients, each iteration two passes; with a relative residual ``r`` the
    scores' error is at most ``r ‖k(q, ·)‖ / (ρ κ)``.

    Source: Park et al., 2023 (TRAK, whose kernel has the identity for ``G_inv``); Zheng et al.,
    2024 (another function than the loss). Saunders et al., 1998, for the regression.

    Args:
        J_query: Gradients of what is measured at the queries, ``[Q, P]``; a list of them, and
            lists of what is added up, for several functions.
        G_inv: Inverse curvature, ``[P, P]``; any self-adjoint positive definite operator.
        J_train: Gradients at the training examples of the functions that are regressed,
            ``[N, P]``; in the same lists.
        ridge: ``ρ > 0``, in units of the mean diagonal entry of ``K``.
        squared: Whether ``s`` is squared; for several functions, one by one or of all.
        weights: Of several functions in the average; ``None`` for equal ones.
        largest_gram: Training examples up to which ``K`` is formed.
        gradient_bytes: Bytes of training gradients that are held at once.
        max_iter: Iterations of conjugate gradients at most.
        tolerance: Their relative residual.
        passes: Checkpoints, processes and progress.

    Returns:
        The scores, ``[Q, N]``, on the operators' device.

    Raises:
        ValueError: If the operators act on different parameters or devices, their numbers differ
            (or those of ``squared`` or ``weights``), the ridge is not positive, or so small that
            rounding makes ``K + ρ κ I`` indefinite.

    Examples:
        >>> K_inv = DiffusionKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> scores = kernel_regression_scores(J_query, K_inv, J_train)
        >>> scores.shape  # [Q, N]
        torch.Size([2, 10])
        >>> plain = influence_scores(J_query, K_inv, J_train).flatten()
        >>> ridged = kernel_regression_scores(J_query, K_inv, J_train, ridge=1e6).flatten()
        >>> bool(torch.cosine_similarity(plain, ridged, dim=0) > 0.999)
        True
    """
    found = kernels_and_scores(
        J_query,
        G_inv,
        J_train,
        ridge=ridge,
        squared=squared,
        weights=weights,
        largest_gram=largest_gram,
        gradient_bytes=gradient_bytes,
        max_iter=max_iter,
        tolerance=tolerance,
        passes=passes,
    )
    return found[1]


def kernels_and_scores(
    J_query: Gradients,
    G_inv: PyTorchLinearOperator,
    J_train: Gradients,
    *,
    ridge: float,
    squared: bool | Sequence[bool] = False,
    weights: Sequence[float] | None = None,
    largest_gram: int = LARGEST_GRAM,
    gradient_bytes: int = GRADIENT_BYTES,
    max_iter: int = MAX_ITER,
    tolerance: float = TOLERANCE,
    passes: PassOptions = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The kernel ``k(q, n)`` of the first function, and the scores.

    Arguments and errors are those of :func:`kernel_regression_scores`.

    Returns:
        Kernel and scores, ``[Q, N]`` each.
    """
    functions = _functions(J_query, J_train)
    M = len(functions)
    are_squared = [squared] * M if isinstance(squared, bool) else list(squared)
    for name, entries in (("squared", are_squared), ("weights", weights)):
        if entries is not None and len(entries) != M:
            raise ValueError(
                f"{name} arrived for {len(entries)} functions, the gradients for {M}. Pass one for "
                "each function, or leave it out."
            )
    for query, train in chain(*functions):
        check_same_parameters({"J_query": query, "J_train": train}, {"G_inv": G_inv})
    check_positive("ridge", ridge)
    check_count("largest_gram", largest_gram)
    check_count("gradient_bytes", gradient_bytes)
    found, crosses = [], []
    number = count()
    for pairs, is_squared in zip(functions, are_squared, strict=True):
        kernels = [
            _Kernel(train, G_inv, f"function {next(number)}", gradient_bytes, passes)
            for _, train in pairs
        ]
        queries = [query for query, _ in pairs]
        if kernels[0].num_data <= largest_gram:
            cross_QN, gram_NN = _sums(map(_Kernel.both, kernels, queries))
            scores_QN = ridge_solution(cross_QN, gram_NN, ridge)
        else:
            (cross_QN,) = _sums((k.cross(q),) for k, q in zip(kernels, queries, strict=True))
            damping = ridge * sum(kernel.mean_diagonal() for kernel in kernels)
            scores_QN = iterated_solution(
                cross_QN, _KernelMatrix(kernels), damping, max_iter, tolerance, passes.progressbar
            )
        found.append((scores_QN.square() if is_squared else scores_QN).to(cross_QN))
        crosses.append(cross_QN)
    return crosses[0], found[0] if M == 1 else averaged_scores(found, weights)


def averaged_scores(scores: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean of several methods' scores, each in units of its spread over training examples.

    Args:
        scores: Scores of the same queries and training examples, ``[Q, N]`` each.
        weights: Of the methods; ``None`` for equal ones.

    Returns:
        Their mean, ``[Q, N]``, query by query. Scores of a query that are all equal, or differ by
        no more than rounding, count as zero: their order says nothing.

    Raises:
        ValueError: If they have several shapes, there are none, or not as many weights above zero.
    """
    shapes = sorted({tuple(one.shape) for one in scores})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"Scores of shapes {shapes} arrived. Pass some of one shape, [Q, N].")
    factors = [1.0] * len(scores) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(scores) or min(factors) <= 0:
        raise ValueError(
            f"weights={factors} arrived for the scores of {len(scores)} methods. Pass a number "
            "above 0 for each."
        )
    total_QN = torch.zeros_like(scores[0])
    for one_QN, factor in zip(scores, factors, strict=True):
        # a single example has no spread, and no degree of freedom to lose
        spread_Q1 = one_QN.std(1, keepdim=True, correction=min(1, one_QN.shape[1] - 1))
        # of the range: the standard deviation of equal numbers is a rounding error, not zero
        range_Q1 = one_QN.amax(1, keepdim=True) - one_QN.amin(1, keepdim=True)
        rounding_Q1 = _ROUNDING * torch.finfo(one_QN.dtype).eps * one_QN.abs().amax(1, keepdim=True)
        total_QN += (factor * one_QN / spread_Q1).masked_fill(range_Q1 <= rounding_Q1, 0.0)
    return total_QN / sum(factors)


def ridge_solution(cross_QN: Tensor, gram_NN: Tensor, ridge: float) -> Tensor:
    """``cross (gram + ρ κ I)⁻¹`` in float64 on the CPU, ``κ`` being the gram matrix' mean diagonal.

    Args:
        cross_QN: The kernel of queries and training examples.
        gram_NN: That of the training examples.
        ridge: ``ρ``.

    Raises:
        ValueError: If the matrix is not positive definite.
    """
    gram_NN = gram_NN.to("cpu", torch.float64)
    gram_NN = (gram_NN + gram_NN.T) / 2
    mean = float(gram_NN.diagonal().mean())
    gram_NN.diagonal().add_(ridge * mean)
    root_NN, failed = torch.linalg.cholesky_ex(gram_NN)
    if failed or not mean > 0:
        raise ValueError(
            f"The kernel matrix is not positive definite with a ridge of {ridge:g} (mean diagonal "
            f"entry {mean:g}): rounding is larger. Pass a larger ridge, or operators in float64."
        )
    return torch.cholesky_solve(cross_QN.to(gram_NN).T, root_NN).T


def iterated_solution(
    cross_QN: Tensor,
    gram: LinearOperator,
    damping: float,
    max_iter: int,
    tolerance: float,
    progressbar: bool = False,
) -> Tensor:
    """``cross (gram + λ I)⁻¹`` by conjugate gradients, from products with the gram matrix.

    Args:
        cross_QN: The kernel of queries and training examples.
        gram: That of the training examples, ``[N, N]``.
        damping: ``λ``.
        max_iter: Iterations at most.
        tolerance: The relative residual; where it is not reached, a warning says so.
        progressbar: Whether to show progress.
    """
    inverse = CGRefinedInverseLinearOperator(
        gram, damping, max_iter=max_iter, tolerance=tolerance, progressbar=progressbar
    )
    scores_NQ: Tensor = inverse @ cross_QN.T
    refinement = inverse.refinement
    if not refinement.converged.all():
        warnings.warn(
            "Conjugate gradients ended at a relative residual of "
            f"{float(refinement.residuals[-1].max()):.1e} after {refinement.num_iterations} "
            f"iterations; {tolerance:.1e} was asked for. Pass a larger ridge or max_iter.",
            stacklevel=3,
        )
    return scores_NQ.T


def _sums(several: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Sums of corresponding tensors, each of them dropped when it is added."""
    totals = next(several)
    for tensors in several:
        for total, tensor in zip(totals, tensors, strict=True):
            total += tensor
    return totals


def _functions(J_query: Gradients, J_train: Gradients) -> list[list[tuple[One, One]]]:
    """The pairs of queries and training examples whose kernels are added, for each function."""

    def lists(J: Gradients) -> list[list[One]]:
        several: list[Any] = [J] if isinstance(J, One) else list(J)
        return [[one] if isinstance(one, One) else list(one) for one in several]

    queries, trains = lists(J_query), lists(J_train)
    sizes = [[[J.shape[0] for J in some] for some in every] for every in (queries, trains)]
    alike = [len(some) for some in queries] == [len(some) for some in trains]
    if not alike or not all(queries) or any(len(set(chain(*size))) != 1 for size in sizes):
        raise ValueError(
            f"J_query arrived for functions of {sizes[0]} queries, J_train of {sizes[1]} training "
            "examples. Pass one of each, or the same lists of them, of the same queries and "
            "examples."
        )
    return [list(zip(q, t, strict=True)) for q, t in zip(queries, trains, strict=True)]


class _Kernel:
    """``k(q, n) = ∇m_qᵀ G_inv ∇f_n`` of the training examples, by passes over their gradients.

    Args:
        J_train: Gradients ``∇f_n``.
        G_inv: Inverse curvature.
        name: What the passes are called.
        gradient_bytes: Bytes of gradients that are held at once.
        passes: Checkpoints, processes and progress.
    """

    def __init__(
        self,
        J_train: ExampleGradientLinearOperator,
        G_inv: PyTorchLinearOperator,
        name: str,
        gradient_bytes: int,
        passes: PassOptions,
    ):
        self.J_train = J_train
        self.G_inv = G_inv
        self.passes = passes
        self._name = name
        self._processes = Processes.of(passes.distributed)
        self._block = max(1, gradient_bytes // (J_train.shape[1] * J_train.dtype.itemsize))

    @property
    def num_data(self) -> int:
        """``N``."""
        return self.J_train.shape[0]

    def both(self, J_query: One) -> tuple[Tensor, Tensor]:
        """Those of queries ``[Q, N]`` and of training examples ``[N, N]``, this on the CPU."""
        if self._block < self.num_data:
            return self.cross(J_query), self._rows_of(self.J_train, "examples")
        rows = GradientRows(self.J_train)
        self._stream(rows, "gradients", {})
        preconditioned_PN = self.G_inv @ rows.rows_NP.T
        cross_QN = [
            gradient_columns(J_query, block, self._processes).T @ preconditioned_PN
            for block in query_blocks(J_query, self._block)
        ]
        return torch.cat(cross_QN), (rows.rows_NP @ preconditioned_PN).cpu()

    def cross(self, J_query: ExampleGradientLinearOperator) -> Tensor:
        """That of queries, ``[Q, N]``."""
        return self._rows_of(J_query, "queries")

    def _rows_of(self, J: ExampleGradientLinearOperator, what: str) -> Tensor:
        own = {"params": common_list(J.param_names), "measured": name_of(J.measurement)}
        settings = self.settings({"for": name_of(self.J_train.measurement), **own}, J)
        parts = []
        for block in query_blocks(J, self._block):
            found = computed_once(
                f"{self._name}, {what} from {block.start}".capitalize(),
                self.J_train.regression,
                partial(self._block_rows, J, block, what, settings),
                self.passes,
                {**settings, "block": [block.start, block.stop]},
            )
            parts.append(found["kernel"].to(self._kept_on(J)))
        return torch.cat(parts)

    def _kept_on(self, J: One) -> torch.device:
        """Where the kernel's rows are kept: of all training examples they may be too large."""
        return torch.device("cpu") if J is self.J_train else self.J_train.device

    def _block_rows(
        self, J: One, block: range, what: str, settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        preconditioned_PB = self.G_inv @ gradient_columns(J, block, self._processes)
        name = f"products with {what} from {block.start}"
        block_settings = {**settings, "block": [block.start, block.stop]}
        return {"kernel": self.products(preconditioned_PB, name, block_settings)}

    def products(self, vectors_PK: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """``[∇f_nᵀ v_k]``, ``[K, N]``."""
        scorer = inner_products(self.num_data)([vectors_PK])
        consumer = PairwiseScores(lambda: scorer, self.num_data)
        self._stream(consumer, name, settings)
        return consumer.scores_QN * self.num_data

    def sums(self, weights_NK: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """``Σ_n w_nk ∇f_n``, ``[P, K]``."""
        consumer = GroupSums(weights_NK, self.J_train.shape[1])
        self._stream(consumer, name, settings)
        return consumer.sums_KP.T

    def mean_diagonal(self) -> float:
        """``κ``; where blocks are shared among processes, these multiply every batch together."""
        if getattr(self.G_inv, "processes", ALONE).count > 1:
            name = f"{self._name}, shared diagonal of the kernel".capitalize()
            data, settings = self.J_train.regression, self.settings({})
            found = computed_once(name, data, self._shared_trace, self.passes, settings)
            return float(found["trace"]) / self.num_data
        consumer = SelfInfluence(self.G_inv, self.num_data)
        self._stream(consumer, "diagonal of the kernel", self.settings({}))
        return float(consumer.values_N.sum())  # which are divided by N

    def _shared_trace(self) -> dict[str, Tensor]:
        """The kernel's trace, batch by batch on all processes."""
        data, total = self.J_train.regression, 0.0
        shown = self.passes.progressbar and self._processes.rank == 0
        with draws_bar(data.num_samples, self._name, shown) as bar:
            for clean in data.clean_batches():
                columns_PB = batch_columns(self.J_train, clean, self._processes)
                total += float((columns_PB * (self.G_inv @ columns_PB)).sum())
                bar.update(len(clean.indices) * data.num_draws)
        return {"trace": torch.tensor(total, dtype=torch.float64)}

    def _stream(self, consumer: Any, name: str, settings: dict[str, Any]) -> None:
        stream_gradients(
            self.J_train,
            {"kernel": consumer},
            name=f"{self._name}, {name}".capitalize(),
            settings=settings,
            passes=self.passes,
        )

    def settings(self, more: dict[str, Any], J: One | None = None) -> dict[str, Any]:
        """Describe what passes depend on besides the training gradients, for checkpoints."""
        if self.passes.checkpoint is None:
            return {}
        of = more if J is None else {"of": J.regression.identity(more)}
        return {**of, "curvature": curvature_settings(self.G_inv)}


class _KernelMatrix(LinearOperator):
    """The sum of kernel matrices of the training examples, ``[N, N]``, which is never formed."""

    def __init__(self, kernels: Sequence[_Kernel]):
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
