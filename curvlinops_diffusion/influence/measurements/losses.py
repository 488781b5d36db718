"""The loss, functions of the prediction, evidence lower bounds, and the log-likelihood.

Legend: T noise levels, R draws, B batch, D entries of the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.ancestral import AncestralSteps, discretised_log_probability
from curvlinops_diffusion.diffusion.batch import NoisedBatch, rows_of
from curvlinops_diffusion.diffusion.objective import DenoisingObjective, Reduction
from curvlinops_diffusion.diffusion.weightings import Weighting, weight_table
from curvlinops_diffusion.influence.measurements.base import (
    Example,
    ExampleDraws,
    ExampleFunction,
    Measurement,
    ObjectiveMeasurement,
)
from curvlinops_diffusion.runtime.checks import check_count


def loss(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """The training loss ``w_t r ‖f − y‖²``, of a mask's entries if there is one, ``[B]``."""
    return batch.loss(prediction_BD)


def squared_norm(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """The mean square ``1/D ‖f‖²`` of the prediction (Zheng et al., 2024, D-TRAK), ``[B]``."""
    return prediction_BD.square().mean(1)


@dataclass(frozen=True)
class SignedPrediction:
    """The prediction's component ``⟨s, f⟩`` along random signs ``s``, the same at every draw.

    No loss, but what the network says: gradients of several seeds, compared with each other, give
    the neural tangent kernel of the prediction averaged over draws, ``Σ_s (sᵀ J_q)(sᵀ J_n)ᵀ``.

    Attributes:
        seed: The seed of the signs.
    """

    seed: int = 0

    def __call__(self, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        """The component of each prediction, ``[B]``."""
        generator = torch.Generator().manual_seed(self.seed)
        signs_D = 2 * torch.randint(2, prediction_BD.shape[1:], generator=generator) - 1
        return prediction_BD @ signs_D.to(prediction_BD)


@dataclass(frozen=True)
class WeightedLoss(ObjectiveMeasurement):
    """The loss ``w'_t r ‖f − y‖²`` with another weighting than the one trained with.

    For the loss at given noise levels, give these to the regression:
    ``NoisedRegression(..., timesteps=[10, 50])``.

    Attributes:
        weighting: As that of :class:`~curvlinops_diffusion.DenoisingObjective`.
    """

    weighting: Weighting = None

    def bind(self, objective: DenoisingObjective) -> Measurement:
        """The measurement for an objective."""
        weights_T = weight_table(self.weighting, objective.process)
        mean = objective.reduction is Reduction.MEAN

        def value(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
            squares_B = batch.squares(prediction_BD)
            scale = 1 / prediction_BD.shape[1] if mean else 1.0
            return weights_T[batch.level_B].to(squares_B) * scale * squares_B

        return value


@dataclass(frozen=True)
class SimplifiedELBO(ObjectiveMeasurement):
    r"""The transitions of the negative evidence lower bound, in nats.

    With ``α_t = ᾱ_t / ᾱ_{t−1}``, ``β_t = 1 − α_t`` and the sampler's variance ``σ_t²``::

        Σ_{t=2}^T  β_t² / (2 σ_t² α_t (1 − ᾱ_t)) · ‖ε − ε_θ(x_t, t)‖²

    estimated by ``T`` times the average over uniformly drawn levels. Reconstruction (``t = 1``) and
    prior are left out. Predictions of ``x0`` and ``v`` are converted to ``ε``.

    Source: Ho et al., 2020, Equation 12; Mlodozeniec et al., 2025, Section 4.

    Attributes:
        variance: ``'small'`` for ``σ_t² = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)``, ``'large'`` for ``β_t``,
            ``None`` for what the scheduler's ``variance_type`` says.
    """

    uniform_levels: ClassVar[bool] = True

    variance: str | None = None

    def bind(self, objective: DenoisingObjective) -> Measurement:
        """Bind the bound, if it exists for the objective's noise and is finite."""
        steps = AncestralSteps.of(objective.process, self.variance)
        factor_T = objective.process.num_levels * steps.noise_error_factor_T()
        factor_T[0] = 0
        _check_bounded(factor_T)

        def value(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
            squares_B = (prediction_BD - batch.target_BD).square().sum(1)
            return factor_T[batch.level_B].to(squares_B) * squares_B

        return value


@dataclass(frozen=True)
class ELBO(ObjectiveMeasurement):
    r"""The negative evidence lower bound on ``log p(x0)``, in nats.

    The transitions of :class:`SimplifiedELBO` (with what the variances' ratio adds), the prior's
    divergence ``KL(q(x_T | x0) ‖ N(0, I))``, and for ``t = 1`` the reconstruction
    ``−log p_θ(x0 | x_1)``: a Gaussian around the predicted ``x0``, with standard deviation ``σ_1``,
    in bins of width ``2/255`` around 256 grey values from −1 to 1, the outermost of which are open.
    Its variance is ``β̃_2`` where ``σ_1² = 0``. Estimated by ``T`` times the average over uniformly
    drawn levels; exact in ``t`` with ``timesteps='all'``.

    Source: Ho et al., 2020, Equations 5 and 13.

    Attributes:
        variance: As in :class:`SimplifiedELBO`.
    """

    uniform_levels: ClassVar[bool] = True

    variance: str | None = None

    def bind(self, objective: DenoisingObjective) -> Measurement:
        """The measurement for an objective, likewise."""
        process, T = objective.process, objective.process.num_levels
        steps = AncestralSteps.of(process, self.variance)
        transitions = SimplifiedELBO(self.variance).bind(objective)
        variance = float(steps.variance_T[0] if steps.variance_T[0] > 0 else steps.small_T[1])
        ratio_T = steps.small_T / steps.variance_T  # one for the small variance
        constant_T = 0.5 * (ratio_T - 1 - ratio_T.log())
        constant_T[0] = 0
        _check_bounded(constant_T)

        def value(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
            def clean(y_BD: Tensor) -> Tensor:
                return process.clean(batch.noised_BD.to(y_BD), y_BD, batch.level_B)

            x0_BD = clean(batch.target_BD)
            alpha, sigma = (s_T[-1].to(x0_BD) for s_T in (process.alphas_T, process.sigmas_T))
            divergence = sigma.square() + (alpha * x0_BD).square() - 1 - 2 * sigma.log()
            at_first_B = (batch.level_B == 0).to(x0_BD)
            # elsewhere it does not count, and might be infinite
            mean_BD = torch.where(at_first_B.bool().unsqueeze(1), clean(prediction_BD), x0_BD)
            reconstruction_B = -discretised_log_probability(x0_BD, mean_BD, variance**0.5)
            constant_B = x0_BD.shape[1] * constant_T[batch.level_B].to(x0_BD)
            total_B = transitions(batch, prediction_BD) + T * at_first_B * reconstruction_B
            return total_B + T * constant_B + 0.5 * divergence.sum(1)

        return value


def _check_bounded(table_T: Tensor) -> None:
    """Refuse an infinite bound: the step to a level without noise has no variance."""
    infinite = (~table_T.isfinite()).nonzero().flatten().tolist()
    if infinite:
        raise ValueError(
            f"The evidence lower bound is infinite at the noise levels {infinite[:4]}: the steps "
            "from there have no variance, or their levels no signal (is there a level without "
            "noise?). Leave that level out of the noise process, or measure 'loss' or a "
            "WeightedLoss."
        )


@dataclass(frozen=True)
class LogLikelihood(ObjectiveMeasurement):
    r"""``log p_θ(x0)`` by the probability-flow ODE, in nats.

    In the coordinates ``y = x_t / (alpha_t + sigma_t)`` and ``s = sigma_t / (alpha_t + sigma_t)``
    every noise process is ``y = (1 − s) x0 + s ε``, and the deterministic sampler follows the
    velocity ``u = ε_θ − x0_θ`` that the network predicts::

        dy/ds = u(y, s),    log p(y_0) = log p(y_1) + ∫ div u ds,    div u ≈ ηᵀ (∂u/∂y) η

    from the lowest noise level to the highest, where ``x_T`` has the sampler's Gaussian
    distribution, by Heun's method over some of the levels. The divergence is Hutchinson's estimate
    with a random sign vector ``η`` for each draw of the regression: unbiased. Of the example at its
    lowest noise level the density is that of ``x_t / alpha_t`` at ``x0``. Keeps the activations of
    all steps when it is differentiated.

    Source: Song et al., 2021, Section 4.3 and Appendix D.2; Karras et al., 2022, Algorithm 1.

    Attributes:
        num_steps: Steps of the solver, each of two evaluations of the network.
    """

    num_steps: int = 20

    @property
    def calls(self) -> int:
        """Runs of the network for each draw."""
        return 2 * self.num_steps

    def bind(self, objective: DenoisingObjective) -> ExampleFunction:
        """The measurement for an objective whose levels all determine the velocity."""
        check_count("num_steps", self.num_steps)
        T = objective.process.num_levels
        if self.num_steps >= T:
            raise ValueError(
                f"`num_steps` must be below the number of noise levels, {T}, got {self.num_steps}."
            )
        levels = torch.linspace(0, T - 1, self.num_steps + 1, dtype=torch.float64).round().long()
        objective.process.check_clean_is_told(levels, "the velocity of the probability flow")
        of_x_T, of_y_T = objective.process.noise_coefficients()
        silent = [n for n in levels.tolist() if not (of_x_T[n] + of_y_T[n]).isfinite()]
        if silent:
            raise ValueError(
                f"Noise level {silent[0]} has no noise, where a prediction of the clean example "
                "does not determine the velocity of the probability flow. Leave that level out of "
                "the noise process, or predict 'epsilon' or 'v_prediction'."
            )
        return ExampleFunction(_Flow(objective, levels.tolist()))


class _Flow:
    """The log-likelihood of one example, averaged over the draws' sign vectors."""

    def __init__(self, objective: DenoisingObjective, levels: list[int]):
        process = objective.process
        self._objective = objective
        self._levels = levels
        self._scale_T = process.alphas_T + process.sigmas_T
        self._s_T = process.sigmas_T / self._scale_T

    def __call__(self, model: nn.Module, example: Example, draws: ExampleDraws) -> Tensor:
        """``log p_θ(x0)``."""
        process, x0 = self._objective.process, example.x0
        R, D = draws.num_draws, x0[0].numel()
        sign_RX = torch.stack([draws.normal(r, x0.shape[1:]).sign() for r in range(R)])
        condition = rows_of(example.condition, [0] * R)
        first, last = self._levels[0], self._levels[-1]
        y = (x0 * process.alphas_T[first] / self._scale_T[first]).to(x0).repeat_interleave(R, 0)
        change_R = y.new_zeros(R)
        u, divergence_R = self._velocity(y, first, condition, sign_RX)
        for here, there in pairwise(self._levels):
            step = float(self._s_T[there] - self._s_T[here])
            u_there, divergence_there_R = self._velocity(y + step * u, there, condition, sign_RX)
            y = y + step / 2 * (u + u_there)
            change_R = change_R + step / 2 * (divergence_R + divergence_there_R)
            if there != last:
                u, divergence_R = self._velocity(y, there, condition, sign_RX)
        x_T = y[0] * float(self._scale_T[last])
        variance = float(process.alphas_T[last] ** 2 + process.sigmas_T[last] ** 2)
        log_prior = -0.5 * (x_T.square().sum() / variance + D * log(2 * pi * variance))
        # densities of y to those of x_t / alpha_t, at either end
        scales = self._scale_T[last].log() - (self._scale_T[first] / process.alphas_T[first]).log()
        return log_prior + change_R.mean() + D * float(scales)

    def _velocity(
        self, y: Tensor, level: int, condition: dict[str, Any], sign_RX: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``u`` and ``ηᵀ (∂u/∂y) η``."""
        objective, process, R = self._objective, self._objective.process, len(y)
        level_R = torch.full((R,), level)
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            x_t = y * float(self._scale_T[level])
            empty = torch.zeros_like(x_t)
            batch = objective.noise(empty, condition, level_R, empty, [0] * R, 0)
            batch = replace(batch, x_t=x_t.to(objective.dtype), state_BD=None)
            x_RD, prediction = x_t.flatten(1), objective.predict(batch)
            noise = process.noise(x_RD, prediction, level_R)
            u = (noise - process.clean(x_RD, prediction, level_R)).reshape(y.shape)
            (pulled,) = torch.autograd.grad(
                u, y, sign_RX, create_graph=differentiated, retain_graph=True
            )
            divergence_R = (pulled * sign_RX).flatten(1).sum(1)
        return (u, divergence_R) if differentiated else (u.detach(), divergence_R.detach())
