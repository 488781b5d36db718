"""TRAK, D-TRAK, Journey-TRAK and DAS, to compare with.

Positive is helpful where a method has a sign. Ridges have no default: the authors choose them by
the linear data-modelling score, which flatters a method that is judged by the same networks.

Legend: Q queries, N training examples, P parameters, k coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.influence.compression import RandomProjection
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernel_regression import (
    kernel_regression_scores,
    ridge_solution,
)
from curvlinops_diffusion.influence.measurements.trajectories import StatesRegression
from curvlinops_diffusion.linalg.operator import IdentityLinearOperator
from curvlinops_diffusion.runtime.checks import check_positive
from curvlinops_diffusion.runtime.digests import digest_of


def trak_scores(
    J_query: ExampleGradientLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float,
    size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """TRAK for generative losses: a kernel regression on plain gradients.

    With gradients ``Φ`` of the training losses, projected or not, in the dual form of the authors'
    ``φ_qᵀ (ΦᵀΦ + λ)⁻¹ Φᵀ`` (they are the same matrix); ``λ`` is the ridge times the mean diagonal
    entry of ``ΦΦᵀ``. One checkpoint; averaging over several is the user's.

    Source: Park et al., 2023, without the factor of residuals, which the loss' gradients hold;
    checked against the primal formula in float64 (``tests``).

    Args:
        J_query: Gradients of what is measured at the queries, ``[Q, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        ridge: In units of the kernel's mean diagonal entry.
        size: Coordinates of a :class:`~curvlinops_diffusion.RandomProjection`; ``None`` for none.
        seed: Its seed.

    Returns:
        The scores, ``[Q, N]``.

    Raises:
        ValueError: As :func:`~curvlinops_diffusion.kernel_regression_scores`.
    """
    if size is None:
        return kernel_regression_scores(
            J_query, IdentityLinearOperator(J_train), J_train, ridge=ridge
        )
    check_positive("ridge", ridge)
    project = RandomProjection(size, seed)
    query_Qk, train_Nk = (
        torch.cat([project(rows_BP) for _, rows_BP in J.row_batches()]) for J in (J_query, J_train)
    )
    scores = ridge_solution(query_Qk @ train_Nk.T, train_Nk @ train_Nk.T, ridge)
    return scores.to(query_Qk)


def d_trak_scores(
    J_query: ExampleGradientLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float,
    size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """D-TRAK: TRAK with the mean square of the prediction in place of either loss.

    Source: Zheng et al., 2024; checked against the primal formula in float64 (``tests``).

    Arguments and errors are those of :func:`trak_scores`; of the operators only draws and
    parameters count.
    """
    query, train = (J.measuring("squared_norm") for J in (J_query, J_train))
    return trak_scores(query, train, ridge=ridge, size=size, seed=seed)


def das_scores(
    J_query: ExampleGradientLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float,
) -> Tensor:
    """A Diffusion Attribution Score: squared leave-one-out weights of a query's mean prediction.

    ::

        [ψ_q Ψᵀ (ΨΨᵀ + λ)⁻¹ e_n · r_n / (1 − h_n)]²,    h = diag(ΨΨᵀ (ΨΨᵀ + λ)⁻¹)

    with gradients ``Ψ`` of the mean of the output's entries and the root mean square residual
    ``r_n`` of a training image, as the authors compute it; ``λ`` is the ridge times the mean
    diagonal entry of ``ΨΨᵀ``. Scores are never negative: they do not tell better from worse. The
    authors' code also scales each draw's gradient to length one and the residuals of an image's
    draws likewise, and projects; masks of the loss are no part of it. The squared norm of the
    change of all entries, of which their paper speaks, predicts retraining far worse (*Evidence*).

    Source: Lin et al., 2025; checked against the primal form (``tests``).

    Args:
        J_query: Gives queries, draws and parameters.
        J_train: Gives training images, draws and parameters.
        ridge: In units of the kernel's mean diagonal entry.

    Returns:
        The scores, ``[Q, N]``.

    Raises:
        ValueError: If the ridge is not positive.
    """
    check_positive("ridge", ridge)
    query_QP, train_NP = (J.measuring(_mean).rows() for J in (J_query, J_train))
    gram_NN = train_NP @ train_NP.T
    both = ridge_solution(torch.cat([query_QP @ train_NP.T, gram_NN]), gram_NN, ridge)
    weights_QN, hat_NN = both.split([len(query_QP), len(train_NP)])
    residual_N = J_train.measuring(_mean_squared_residual).values().to(hat_NN).sqrt()
    scores_QN = weights_QN * residual_N / (1 - hat_NN.diagonal())
    return scores_QN.square().to(train_NP)


def _mean(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    return prediction_BD.mean(1)


def _mean_squared_residual(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    return batch.squares(prediction_BD) / prediction_BD.shape[1]


class JourneyRegression(StatesRegression):
    r"""Recorded samplings, whose loss is that at the states they went through, for Journey-TRAK.

    At each state ``x_t`` the network should have predicted the noise that leads from there to the
    sample that came out, ``ε = (x_t − α_t x̂) / σ_t``. ``ExampleGradientLinearOperator`` of it, in
    place of a query's, makes :func:`trak_scores` Journey-TRAK. The authors' code noises each
    level's predicted ``x0`` anew.

    Source: Georgiev et al., 2023.

    Args:
        objective: The denoising objective.
        states: The states, ``[Q, S + 1, ...]``, as
            :func:`~curvlinops_diffusion.measurements.record_trajectories` returns them; the last
            are the samples.
        levels: The noise levels of the first ``S``.
        condition: Keyword arguments of the network, one entry for each sample.
        batch_size: Trajectories that are held at once.

    Raises:
        ValueError: If states and levels do not fit together, or a level has no noise.
    """

    def __init__(
        self, objective: DenoisingObjective, states: Tensor, levels: Sequence[int], **options: Any
    ):
        if not (objective.process.sigmas_T[list(levels)] > 0).all():
            raise ValueError(
                "Every level of a journey must have noise, got one without. Leave it out, with its "
                "state."
            )
        super().__init__(objective, states, levels, **options)

    @property
    def description(self) -> dict[str, Any]:
        """Describe what determines the states' levels."""
        return {**super().description, "journey": digest_of(self.levels)}

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield states as inputs, with what leads from them to the sample as target."""
        process, sample = self.objective.process, clean.x0[:, -1].double()
        for batch, states, _ in self.steps(clean):
            shape = (-1, *[1] * (states.ndim - 1))
            alpha, sigma = (
                z_T[batch.level_B].reshape(shape) for z_T in (process.alphas_T, process.sigmas_T)
            )
            noise = (states.double() - alpha * sample) / sigma
            target = process.target(sample, noise, batch.level_B).flatten(1)
            yield replace(batch, target_BD=target.to(batch.target_BD))
