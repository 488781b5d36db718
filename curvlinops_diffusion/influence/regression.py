"""Regression scores: by how much a query's loss would rise without each training image.

Legend: Q queries, N training examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernel_regression import iterated_solution, regularised_root
from curvlinops_diffusion.influence.kernels import (
    SOLVED,
    KernelMatrix,
    KernelOptions,
    Kernels,
    One,
)
from curvlinops_diffusion.influence.measurements.losses import SignedPrediction
from curvlinops_diffusion.influence.streaming import halves_of
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_positive
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions

#: Functions that are regressed: the loss, and the prediction along one sign.
FUNCTIONS = 2
#: In units of the kernel's mean diagonal entry.
RIDGE = 5.0
#: The weight ``β`` of the rises of the variance.
SQUARE = 2.0
#: The factor ``η``: retraining shows less than what noisy predictions say.
SHRINKAGE = 0.4
#: Single draws from which their gradients' length is estimated, at least.
SINGLE_DRAWS = 64


def regression_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float = RIDGE,
    gap: float = 1.0,
    seed: int = 0,
    options: KernelOptions = SOLVED,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Predict by how much training without each example would raise a query's loss.

    Training without some examples changes the query's prediction by ``δ``, and its loss by
    ``2⟨ŷ − y, δ⟩ + ‖δ‖²``. Kernel regression of the loss ``ℓ`` predicts the first term; the second
    is the rise of a Gaussian process' variance, of the prediction ``f = ⟨s, ŷ⟩`` along random signs
    ``s``, at the query without the example::

        s(q, n) = η gap · ( w_ℓ(q, n) / h̄  +  β (κ₁ / κ) w_f(q, n)² / (M_nn v̄) )
        w = k(q, ·) M,    M = (K + ρ κ I)⁻¹,    h̄ = mean_n [K M]_nn,    v̄ = mean_n 1/M_nn − ρ κ

    with ``k``, ``K`` and ``κ`` as in :func:`~curvlinops_diffusion.kernel_regression_scores`, those
    of ``ℓ`` in the first part and of ``f`` in the second. ``h̄`` is the mean weight of an example in
    the regression of its own loss, ``v̄`` the mean variance at an example without itself, so that
    both parts are in units of what an example adds to itself: in the mean over examples, the
    generalisation *gap*, the held-out loss less the training loss; ``η`` shrinks them to what
    retraining was found to show. Gradients that are averaged over draws know of ``δ`` what draws
    have in common alone, while the loss is a mean of squares: ``κ₁ / κ`` is how much longer
    gradients of single draws are, ``κ₁`` being ``κ`` of one draw of each example. Positive is
    helpful.

    Source: ``docs/evidence.rst`` (the decomposition; how ``ρ``, ``β`` and ``η`` were chosen); Park
    et al., 2023 (regression on gradients); Rasmussen and Williams, 2006, Section 5.4.2 (variances
    without an example).

    Args:
        J_query: Gradients of the queries' loss, or of something else of which lower is better,
            whose squares count as much more than the loss' as its value is larger.
        G_inv: Inverse curvature, ``[P, P]``: K-FAC's or EK-FAC's at a small damping.
        J_train: Gradients of the training loss.
        ridge: ``ρ > 0``.
        gap: The held-out loss less the training loss, by which the scores are multiplied.
        seed: The seed of the signs.
        options: How the regressions are solved.
        passes: Checkpoints, processes and progress.

    Returns:
        The scores, ``[Q, N]``, on the operators' device.

    Raises:
        ValueError: If the operators act on different parameters or devices, the ridge or the gap is
            not positive, or the ridge so small that rounding makes a matrix indefinite.

    Examples:
        >>> K_inv = DiffusionKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> regression_scores(J_query, K_inv, J_train).shape  # [Q, N]
        torch.Size([2, 10])
    """
    check_positive("gap", gap)
    _, (scores_QN,) = influence_and_regression_scores(
        J_query,
        G_inv,
        J_train,
        ridge=ridge,
        seed=seed,
        halved=False,
        options=options,
        passes=passes,
    )
    return gap * scores_QN


def influence_and_regression_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    halved: bool = True,
    options: KernelOptions = SOLVED,
    passes: PassOptions = PLAIN,
) -> tuple[list[Tensor], list[Tensor]]:
    """Influence scores and those of :func:`regression_scores`, out of the same gradients.

    The kernel of queries and training examples is ``N`` times the influence. Both are ``[Q, N]``,
    of a gap of one, of all draws; if ``halved``, and then of either half, by one pass over the
    halves' gradients.
    """
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    check_positive("ridge", ridge)
    signed = SignedPrediction(seed)

    solver = _Solver(G_inv, ridge, halved, options, passes)
    lengths = [  # of few images one draw each tells it badly
        solver.kernels(
            J_train.measuring(signed).on(one), f"single draws {number}", passes
        ).mean_diagonal()
        for number, one in enumerate(J_train.regression.single_draws(SINGLE_DRAWS))
    ]
    single = sum(lengths) / len(lengths)
    of_loss = solver.solved(J_query, J_train, "loss")
    of_prediction = solver.solved(
        J_query.measuring(signed), J_train.measuring(signed), "prediction"
    )
    square: float | Tensor = SQUARE
    if J_query.measurement != J_train.measurement:  # a square weighted otherwise, by the values
        of_both = (J_query, J_query.measuring(J_train.measurement))
        values_Q, losses_Q = (J.values().abs() for J in of_both)
        square = (SQUARE * values_Q / losses_Q).unsqueeze(1)
    influence = [loss.cross_QN / J_train.shape[0] for loss in of_loss]
    pairs = zip(of_loss, of_prediction, strict=True)
    return influence, [
        SHRINKAGE * (loss.parts() + square * single / (f.damping / ridge) * f.rises())
        for loss, f in pairs
    ]


@dataclass(frozen=True)
class _Solved:
    """A regression with ``M = (K + λ I)⁻¹``: ``k``, ``k M``, ``M``'s diagonal or mean, ``λ``."""

    cross_QN: Tensor
    weights_QN: Tensor
    diagonal: Tensor
    damping: float

    def parts(self) -> Tensor:
        """Weights in units of an example's mean weight in its own regression, ``[K M]_nn``."""
        return (self.weights_QN / (1 - self.damping * self.diagonal.mean())).to(self.cross_QN)

    def rises(self) -> Tensor:
        """Rises of the variance in units of its mean at an example without itself."""
        mean = (1 / self.diagonal).mean() - self.damping
        return (self.weights_QN.square() / (self.diagonal * mean)).to(self.cross_QN)


@dataclass(frozen=True)
class _Solver:
    """Solves the regressions of one function, of all draws and if ``halved`` of either half."""

    G_inv: PyTorchLinearOperator
    ridge: float
    halved: bool
    options: KernelOptions
    passes: PassOptions

    def solved(self, query: One, train: One, name: str) -> list[_Solved]:
        """Solve by a factorisation, or by iteration if there are too many training examples."""
        formed = train.shape[0] <= self.options.largest_gram
        return (self._formed if formed else self._iterated)(query, train, name)

    def kernels(self, train: One | Sequence[One], name: str, passes: PassOptions) -> Kernels:
        """Kernels of training examples."""
        return Kernels(train, self.G_inv, name, self.options.gradient_bytes, passes)

    def _formed(self, query: One, train: One, name: str) -> list[_Solved]:
        """Solve by a factorisation; kernels of all draws are the means of those of halves."""
        queries, trains = ([J] if not self.halved else halves_of(J) for J in (query, train))
        cross_SSQN, gram_SSNN = self.kernels(trains, name, self.passes).both(queries)

        def solved(cross_QN: Tensor, gram_NN: Tensor) -> _Solved:
            root_NN, damping = regularised_root(gram_NN, self.ridge)
            weights_QN = torch.cholesky_solve(cross_QN.to(root_NN).T, root_NN).T
            diagonal_N = torch.cholesky_inverse(root_NN).diagonal()
            return _Solved(cross_QN, weights_QN, diagonal_N, damping)

        whole = solved(cross_SSQN.mean((0, 1)), gram_SSNN.mean((0, 1)))
        halves = range(2) if self.halved else ()
        return [whole, *(solved(cross_SSQN[half, half], gram_SSNN[half, half]) for half in halves)]

    def _iterated(self, query: One, train: One, name: str) -> list[_Solved]:
        """Solve by conjugate gradients, for all draws and each half by itself.

        The mean diagonal is Hutchinson's estimate from one more column of random signs. The mean
        weight ``h̄`` of an example in its own regression is then known with a relative standard
        error of ``sqrt(2 / (N h̄))`` at most, ``N h̄`` being the regression's degrees of freedom:
        all scores of a part share it.
        """

        def solved(J_query: One, J_train: One, passes: PassOptions) -> _Solved:
            kernels = self.kernels(J_train, name, passes)
            cross_QN = kernels.cross([J_query])[0, 0]
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(2, (1, cross_QN.shape[1]), generator=generator)
            signs_1N = (2 * signs - 1).to(cross_QN)
            damping = self.ridge * kernels.mean_diagonal()
            found = iterated_solution(
                torch.cat([cross_QN, signs_1N]),
                KernelMatrix([kernels]),
                damping,
                self.options,
                passes.progressbar,
            )
            return _Solved(cross_QN, found[:-1], (found[-1:] * signs_1N).mean(), damping)

        found, passes = [solved(query, train, self.passes)], self.passes
        for half in range(2) if self.halved else ():
            if self.passes.checkpoint is not None:  # those of both halves have the same names
                passes = replace(passes, checkpoint=Path(self.passes.checkpoint) / f"half{half}")
            found.append(solved(halves_of(query)[half], halves_of(train)[half], passes))
        return found
