"""Kernel regression: what each training example counts for in a prediction of a query's value.

Legend: Q queries, N training examples, M measured functions, P parameters, K columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
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
from curvlinops_diffusion.influence.measurements.losses import SignedPrediction
from curvlinops_diffusion.influence.streaming import (
    batch_columns,
    curvature_settings,
    gradient_columns,
    of_gradients,
    query_blocks,
    stream_gradients,
)
from curvlinops_diffusion.linalg.conjugate_gradients import CGRefinedInverseLinearOperator
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import LinearOperator, PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count, check_positive
from curvlinops_diffusion.runtime.digests import digest_of, name_of
from curvlinops_diffusion.runtime.passes import PLAIN, DrawsBar, PassOptions, computed_once
from curvlinops_diffusion.runtime.processes import ALONE, Processes

# units in the last place by which equal scores may differ
_ROUNDING = 8

#: Functions that :func:`regression_scores` regresses: the loss, and the prediction along one sign.
#: On the digits of docs/evidence.rst two signs, and four, predicted retraining no better than one.
FUNCTIONS = 2
#: Settled on the digits, where 3 to 10 for the ridge and one to two for the weights are level; two
#: for what small photographs say as well.
RIDGE = 5.0
WEIGHTS = (1.0, 2.0)

One = ExampleGradientLinearOperator
Gradients = One | Sequence[One | Sequence[One]]


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


def kernel_regression_scores(
    J_query: Gradients,
    G_inv: PyTorchLinearOperator,
    J_train: Gradients,
    *,
    ridge: float = 1.0,
    squared: bool | Sequence[bool] = False,
    weights: Sequence[float] | None = None,
    options: KernelOptions = SOLVED,
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

    Up to ``options.largest_gram`` training examples, ``K`` is computed in blocks and kept in the
    main memory, in float64, whatever the device: one pass over the training gradients if those of
    all fit into ``options.gradient_bytes``, else one more for each block that does. Beyond, the
    system is solved by conjugate gradients, each iteration two passes; with a relative residual
    ``r`` the scores' error is at most ``r ‖k(q, ·)‖ / (ρ κ)``.

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
        options: How the regression is solved.
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
    return _kernels_and_scores(J_query, G_inv, J_train, ridge, squared, weights, options, passes)[1]


def regression_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    options: KernelOptions = SOLVED,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Order the training examples by what training without each would do to a query's loss.

    Training without some examples changes the query's prediction by ``δ``, and its loss by
    ``2⟨ŷ − y, δ⟩ + ‖δ‖²``. Kernel regression of the loss predicts the first term, the squares of a
    regression of the prediction ``f = ⟨s, ŷ⟩`` along random signs ``s`` the second::

        s(q, n) = z(w_ℓ(q, n)) + 2 z(w_f(q, n)²),     w = k(q, ·) (K + ρ κ I)⁻¹

    up to a factor, with ``z`` in units of a query's standard deviation over ``n``; ``k``, ``K`` and
    ``κ`` as in :func:`~curvlinops_diffusion.kernel_regression_scores`. Positive is helpful; the
    size has no unit, and how much the loss would change is not said.

    Source: ``docs/evidence.rst`` (the decomposition, and how it was settled); Park et al., 2023
    (regression on gradients).

    Args:
        J_query: Gradients of the queries' loss, or of something else of which lower is better.
        G_inv: Inverse curvature, ``[P, P]``: K-FAC's or EK-FAC's at a small damping.
        J_train: Gradients of the training loss.
        ridge: ``ρ > 0``.
        seed: The seed of the signs.
        options: How the regressions are solved.
        passes: Checkpoints, processes and progress.

    Returns:
        The scores, ``[Q, N]``, on the operators' device.

    Raises:
        ValueError: As :func:`~curvlinops_diffusion.kernel_regression_scores`.

    Examples:
        >>> K_inv = DiffusionKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> regression_scores(J_query, K_inv, J_train).shape  # [Q, N]
        torch.Size([2, 10])
    """
    return influence_and_regression_scores(
        J_query, G_inv, J_train, ridge=ridge, seed=seed, options=options, passes=passes
    )[1]


def influence_and_regression_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    options: KernelOptions = SOLVED,
    passes: PassOptions = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Influence scores and those of :func:`regression_scores`, out of the same gradients.

    The kernel of queries and training examples is ``N`` times the influence.

    Arguments and errors are those of :func:`regression_scores`.

    Returns:
        The scores of :func:`~curvlinops_diffusion.influence_scores`, and the others, ``[Q, N]``.
    """
    signed = SignedPrediction(seed)
    queries, examples = ([J, J.measuring(signed)] for J in (J_query, J_train))
    kernel_QN, scores_QN = _kernels_and_scores(
        queries, G_inv, examples, ridge, [False, True], WEIGHTS, options, passes
    )
    return kernel_QN / J_train.shape[0], scores_QN


def _kernels_and_scores(
    J_query: Gradients,
    G_inv: PyTorchLinearOperator,
    J_train: Gradients,
    ridge: float,
    squared: bool | Sequence[bool],
    weights: Sequence[float] | None,
    options: KernelOptions,
    passes: PassOptions,
) -> tuple[Tensor, Tensor]:
    """The kernel ``k(q, n)`` of the first function, and the scores, ``[Q, N]`` each."""
    functions = _functions(J_query, J_train)
    M = len(functions)
    are_squared = [squared] * M if isinstance(squared, bool) else list(squared)
    for name, entries in (("squared", are_squared), ("weights", weights)):
        if entries is not None and len(entries) != M:
            raise ValueError(
                f"`{name}` must have an entry for each of the {M} functions, got {len(entries)}. "
                "Leave it out to treat all alike."
            )
    for query, train in chain(*functions):
        check_same_parameters({"J_query": query, "J_train": train}, {"G_inv": G_inv})
    check_positive("ridge", ridge)
    found, kernel_QN, number = [], None, count()
    for pairs, is_squared in zip(functions, are_squared, strict=True):
        kernels = [
            _Kernel(train, G_inv, f"function {next(number)}", options.gradient_bytes, passes)
            for _, train in pairs
        ]
        queries = [query for query, _ in pairs]
        if kernels[0].num_data <= options.largest_gram:
            cross_QN, gram_NN = _sums(map(_Kernel.both, kernels, queries))
            scores_QN = ridge_solution(cross_QN, gram_NN, ridge)
        else:
            (cross_QN,) = _sums((k.cross(q),) for k, q in zip(kernels, queries, strict=True))
            damping = ridge * sum(kernel.mean_diagonal() for kernel in kernels)
            scores_QN = iterated_solution(
                cross_QN, _KernelMatrix(kernels), damping, options, passes.progressbar
            )
        found.append((scores_QN.square() if is_squared else scores_QN).to(cross_QN))
        kernel_QN = cross_QN if kernel_QN is None else kernel_QN
    assert kernel_QN is not None, "there are functions"
    return kernel_QN, found[0] if M == 1 else averaged_scores(found, weights)


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
        raise ValueError(f"`scores` must all have one shape [Q, N], got {shapes}.")
    factors = [1.0] * len(scores) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(scores) or min(factors) <= 0:
        raise ValueError(
            f"`weights` must be a positive number for each of {len(scores)} methods, got {factors}."
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
    """Solve ``cross (gram + ρ κ I)⁻¹`` in float64 on the CPU, ``κ`` being the mean diagonal.

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
    options: KernelOptions,
    progressbar: bool = False,
) -> Tensor:
    """Solve ``cross (gram + λ I)⁻¹`` by conjugate gradients, from products with the gram matrix.

    Args:
        cross_QN: The kernel of queries and training examples.
        gram: That of the training examples, ``[N, N]``.
        damping: ``λ``.
        options: Iterations, and the relative residual; where it is not reached, a warning says so.
        progressbar: Whether to show progress.
    """
    inverse = CGRefinedInverseLinearOperator(
        gram,
        damping,
        max_iter=options.max_iter,
        tolerance=options.tolerance,
        progressbar=progressbar,
    )
    scores_NQ: Tensor = inverse @ cross_QN.T
    refinement = inverse.refinement
    if not refinement.converged.all():
        warnings.warn(
            "Conjugate gradients ended at a relative residual of "
            f"{float(refinement.residuals[-1].max()):.1e} after {refinement.num_iterations} "
            f"iterations; {options.tolerance:.1e} was asked for. Pass a larger ridge or max_iter.",
            stacklevel=3,
        )
    return scores_NQ.T


def _sums(several: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Sum corresponding tensors, each of them dropped when it is added."""
    totals = next(several)
    for tensors in several:
        for total, tensor in zip(totals, tensors, strict=True):
            total += tensor
    return totals


def _functions(J_query: Gradients, J_train: Gradients) -> list[list[tuple[One, One]]]:
    """Pair queries and training examples whose kernels are added, for each function."""

    def lists(J: Gradients) -> list[list[One]]:
        several: list[Any] = [J] if isinstance(J, One) else list(J)
        return [[one] if isinstance(one, One) else list(one) for one in several]

    queries, trains = lists(J_query), lists(J_train)
    sizes = [[[J.shape[0] for J in some] for some in every] for every in (queries, trains)]
    alike = [len(some) for some in queries] == [len(some) for some in trains]
    if not alike or not all(queries) or any(len(set(chain(*size))) != 1 for size in sizes):
        raise ValueError(
            "`J_query` and `J_train` must be one each, or the same lists, of the same queries and "
            f"training examples, got functions of {sizes[0]} queries and of {sizes[1]} examples."
        )
    return [list(zip(q, t, strict=True)) for q, t in zip(queries, trains, strict=True)]


class _Kernel:
    """``k(q, n) = ∇m_qᵀ G_inv ∇f_n`` of the training examples, by passes over their gradients."""

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
        """Kernels of queries ``[Q, N]`` and of training examples ``[N, N]``, this on the CPU."""
        if self._block < self.num_data:
            return self.cross(J_query), self._rows_of(self.J_train, "examples")
        rows_NP = self._stream(AllRows(self.num_data), "gradients", {})["scores"]
        preconditioned_PN = self.G_inv @ rows_NP.T
        cross_QN = [
            gradient_columns(J_query, block, self._processes).T @ preconditioned_PN
            for block in query_blocks(J_query, self._block)
        ]
        return torch.cat(cross_QN), (rows_NP @ preconditioned_PN).cpu()

    def cross(self, J_query: One) -> Tensor:
        """The kernel of queries, ``[Q, N]``."""
        return self._rows_of(J_query, "queries")

    def _rows_of(self, J: One, what: str) -> Tensor:
        of_all = self.settings({"for": name_of(self.J_train.measurement), **of_gradients(J)}, J)

        def compute() -> dict[str, Tensor]:
            preconditioned_PB = self.G_inv @ gradient_columns(J, block, self._processes)
            name = f"products with {what} from {block.start}"
            return {"kernel": self.products(preconditioned_PB, name, settings)}

        # rows of all training examples may be too many for the device
        kept_on = torch.device("cpu") if J is self.J_train else self.J_train.device
        parts = []
        for block in query_blocks(J, self._block):
            settings = {**of_all, "block": [block.start, block.stop]}
            name = f"{self._name}, {what} from {block.start}".capitalize()
            data = self.J_train.regression
            found = computed_once(name, data, compute, self.passes, settings)
            parts.append(found["kernel"].to(kept_on))
        return torch.cat(parts)

    def products(self, vectors_PK: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """``[∇f_nᵀ v_k]``, ``[K, N]``."""
        N = self.num_data
        scored = Scored(AllRows(N), [lambda: vectors_PK], N)
        return self._stream(scored, name, settings)["scores"].T.contiguous() * N

    def sums(self, weights_NK: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """``Σ_n w_nk ∇f_n``, ``[P, K]``."""
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

        name = f"{self._name}, sharded diagonal of the kernel".capitalize()
        found = computed_once(name, data, compute, self.passes, settings)
        return float(found["trace"]) / self.num_data

    def _stream(
        self, consumer: GradientConsumer, name: str, settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        stream_gradients(
            self.J_train,
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
