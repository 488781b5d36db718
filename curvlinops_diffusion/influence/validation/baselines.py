"""Other methods, to compare with: TRAK, D-TRAK, Journey-TRAK, DAS.

Positive is meant to be helpful where a method has a sign. Their settings have no default: their
authors choose them by the linear data-modelling score, which flatters a method that is judged by
the same networks.

Legend: Q queries, N training examples, P parameters, k coordinates, V probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.draws import Draws, make_draws
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernel_regression import (
    kernel_regression_scores,
    ridge_solution,
)
from curvlinops_diffusion.influence.measurements.trajectories import (
    check_states,
    states_as_batch,
)
from curvlinops_diffusion.influence.projection import RandomProjection
from curvlinops_diffusion.linalg.operator import IdentityLinearOperator
from curvlinops_diffusion.runtime.checks import check_count, check_positive
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
    query_Qk, train_Nk = (_projected(J, RandomProjection(size, seed)) for J in (J_query, J_train))
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
    """D-TRAK: the same of the mean square of the prediction, in place of what is measured.

    Source: Zheng et al., 2024; checked against the primal formula in float64 (``tests``).

    Arguments and errors are those of :func:`trak_scores`, of whose operators the draws and
    parameters are taken.
    """
    query, train = (_measuring(J, "squared_norm") for J in (J_query, J_train))
    return trak_scores(query, train, ridge=ridge, size=size, seed=seed)


def das_scores(
    J_query: ExampleGradientLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float,
    num_probes: int = 32,
    seed: int = 0,
) -> Tensor:
    """After the Diffusion Attribution Score: how much a query's prediction would change.

    ``1/R² Σ_r ‖J_qr Φᵀ (ΦΦᵀ + λ)⁻¹ e_n‖²`` over the query's draws, with gradients ``Φ`` of the
    training losses (each a residual times a Jacobian), the squared norm being estimated without
    bias from random signs, independent for every query, draw and probe. It says how much, not
    whether for better or worse: scores are never negative. The authors' code takes gradients of the
    output's mean for the kernel, applies residuals apart, and divides by one minus the leverage.

    Source: Lin et al., 2025; checked against a dense squared norm (``tests``).

    Args:
        J_query: Gives queries, draws and parameters.
        J_train: Gradients of the training losses, ``[N, P]``.
        ridge: In units of the kernel's mean diagonal entry.
        num_probes: Random signs ``V``.
        seed: Their seed.

    Returns:
        The scores, ``[Q, N]``.

    Raises:
        ValueError: As :func:`~curvlinops_diffusion.kernel_regression_scores`.
    """
    check_positive("ridge", ridge)
    check_count("num_probes", num_probes)
    train_NP = J_train.rows()
    draws = replace(J_query.regression.draws, seed=seed)
    crosses = []
    for number in range(num_probes):
        J = _measuring(J_query, ProbedPrediction(draws, number))
        crosses.append(J.rows() @ train_NP.T)
    scores = ridge_solution(torch.cat(crosses), train_NP @ train_NP.T, ridge)
    squares_QN = scores.reshape(num_probes, -1, len(train_NP)).square().mean(0)
    return squares_QN.to(train_NP)


@dataclass(frozen=True)
class ProbedPrediction:
    """The prediction's component along random signs, independent for every example and draw.

    Products of the signs of two draws are zero on average, whatever the draws share: squares of a
    mean over draws have no cross terms.

    Attributes:
        draws: Those of the regression that is measured; their seed is that of the signs.
        number: Of the probe.
    """

    draws: Draws
    number: int = 0

    def __call__(self, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        """The component of each prediction, ``[B]``."""
        D = prediction_BD.shape[1]
        rows = zip(batch.indices, batch.draw_numbers, strict=True)
        signs_BD = torch.stack([self.draws.signs(n, r, self.number, D) for n, r in rows])
        return (prediction_BD * signs_BD.to(prediction_BD)).sum(1)


class JourneyRegression(NoisedRegression):
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
        self,
        objective: DenoisingObjective,
        states: Tensor,
        levels: Sequence[int],
        *,
        condition: Mapping[str, Any] | None = None,
        batch_size: int = 64,
    ):
        check_states(states, levels)
        if not (objective.process.sigmas_T[list(levels)] > 0).all():
            raise ValueError(
                "A level without noise arrived, from which no noise leads to the sample. Leave it "
                "out, with its state."
            )
        draws = make_draws("all", None, 0, len(levels))
        data = {"x0": states, **(condition or {})}
        super().__init__(objective, data, batch_size=batch_size, draws=draws)
        self._levels = torch.tensor(list(levels))

    @property
    def encodes(self) -> bool:
        """States are what the network sees."""
        return False

    @property
    def description(self) -> dict[str, Any]:
        """Describe what determines the states' levels."""
        return {**super().description, "journey": digest_of(self._levels)}

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield states as inputs, with what leads from them to the sample as target."""
        process = self.objective.process
        for r in range(self.num_draws):
            step_B = self.draws.levels(clean.indices, r)
            states = clean.x0[torch.arange(len(step_B)), step_B]
            level_B = self._levels[step_B]
            batch = states_as_batch(
                self.objective, states, clean.condition, level_B, clean.indices, r
            )
            shape = (-1, *[1] * (states.ndim - 1))
            alpha, sigma = (z[level_B].reshape(shape) for z in (process.alphas_T, process.sigmas_T))
            sample = clean.x0[:, -1].double()
            noise = (states.double() - alpha * sample) / sigma
            target = process.target(sample, noise, level_B).flatten(1)
            yield replace(batch, target_BD=target.to(batch.target_BD))


def _measuring(J: ExampleGradientLinearOperator, measurement: Any) -> ExampleGradientLinearOperator:
    return ExampleGradientLinearOperator(J.regression, J.param_names, measurement=measurement)


def _projected(J: ExampleGradientLinearOperator, projection: RandomProjection) -> Tensor:
    """Projected rows, ``[N, k]``."""
    rows_Nk = torch.zeros(J.shape[0], projection.size, dtype=J.dtype, device=J.device)
    for indices, rows_BP in J.row_batches():
        rows_Nk[list(indices)] = projection(rows_BP)
    return rows_Nk
