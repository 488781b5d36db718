"""Kernel regression: what each training example counts for in a prediction of a query's value.

Legend: Q queries, N training examples, M measured functions, P parameters, K columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.kernels import (
    SOLVED,
    KernelMatrix,
    KernelOptions,
    Kernels,
    One,
)
from curvlinops_diffusion.linalg.conjugate_gradients import CGRefinedInverseLinearOperator
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import LinearOperator, PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_positive
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions

# units in the last place by which equal scores may differ
_ROUNDING = 8

Gradients = One | Sequence[One | Sequence[One]]


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
    found, number = [], count()
    for pairs, is_squared in zip(functions, are_squared, strict=True):
        kernels = [
            Kernels(train, G_inv, f"function {next(number)}", options.gradient_bytes, passes)
            for _, train in pairs
        ]
        queries = [[query] for query, _ in pairs]
        if kernels[0].num_data <= options.largest_gram:
            cross_QN, gram_NN = _sums(map(Kernels.both, kernels, queries))
            scores_QN = ridge_solution(cross_QN, gram_NN, ridge)
        else:
            (cross_QN,) = _sums((k.cross(q),) for k, q in zip(kernels, queries, strict=True))
            damping = ridge * sum(kernel.mean_diagonal() for kernel in kernels)
            scores_QN = iterated_solution(
                cross_QN, KernelMatrix(kernels), damping, options, passes.progressbar
            )
        found.append((scores_QN.square() if is_squared else scores_QN).to(cross_QN))
    return found[0] if M == 1 else averaged_scores(found, weights)


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
    """Solve ``cross (gram + ρ κ I)⁻¹`` in float64 on the CPU, ``κ`` being the mean diagonal."""
    root_NN, _ = regularised_root(gram_NN, ridge)
    return torch.cholesky_solve(cross_QN.to(root_NN).T, root_NN).T


def regularised_root(gram_NN: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor of ``K + ρ κ I`` in float64 on the CPU, and ``ρ κ``."""
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
    return root_NN, ridge * mean


def iterated_solution(
    cross_QN: Tensor,
    gram: LinearOperator,
    damping: float,
    options: KernelOptions,
    progressbar: bool = False,
) -> Tensor:
    """Solve ``cross (gram + λ I)⁻¹`` by conjugate gradients, and warn if they do not converge."""
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
    totals = tuple(z[0, 0] for z in next(several))  # of the one stream
    for tensors in several:
        for total, tensor in zip(totals, tensors, strict=True):
            total += tensor[0, 0]
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
