"""Measured quantities: what an influence score predicts the change of.

A measurement maps a noised batch and the network's prediction ``[B, D]`` to one value for each
example, ``[B]``; an example's value is the average over its draws. Measurements that depend on the
noise process are bound to an objective first.

Legend: T noise levels, B batch, D entries of a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlinops_diffusion.ancestral import (
    AncestralSteps,
    clean_from,
    discretised_log_probability,
)
from curvlinops_diffusion.draws import Draws
from curvlinops_diffusion.functions import ExampleFunction, Measurement, ObjectiveMeasurement
from curvlinops_diffusion.noise import Weighting, weight_table
from curvlinops_diffusion.objective import DenoisingObjective, NoisedBatch, Reduction
from curvlinops_diffusion.probability_flow import LogLikelihood


def loss(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """The training loss ``w_t r ‖f − y‖²``, shape ``[B]``."""
    return batch.loss(prediction_BD)


def squared_norm(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """The mean square ``1/D ‖f‖²`` of the prediction (Zheng et al., 2024, D-TRAK), ``[B]``."""
    return prediction_BD.square().mean(1)


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
            squares_B = (prediction_BD - batch.target_BD).square().sum(1)
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
        """The measurement for an objective."""
        steps = AncestralSteps.of(objective.process, self.variance)
        factor_T = steps.noise_error_factor_T() * objective.process.num_levels
        factor_T[0] = 0

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
        """The measurement for an objective."""
        process, T = objective.process, objective.process.num_levels
        steps = AncestralSteps.of(process, self.variance)
        transitions = SimplifiedELBO(self.variance).bind(objective)
        variance = float(steps.variance_T[0] if steps.variance_T[0] > 0 else steps.small_T[1])
        # of the two Gaussians' variances; zero for the small one
        ratio_T = steps.small_T / steps.variance_T
        constant_T = 0.5 * (ratio_T - 1 - ratio_T.log())
        constant_T[0] = 0

        def value(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
            x0_BD = clean_from(process, batch, batch.target_BD)
            last = x0_BD.new_full((len(x0_BD),), T - 1, dtype=torch.int64).cpu()
            alpha, sigma = (s.to(x0_BD) for s in (process.alphas_T[last], process.sigmas_T[last]))
            alpha_B1, sigma_B1 = alpha.unsqueeze(1), sigma.unsqueeze(1)
            divergence = sigma_B1.square() + (alpha_B1 * x0_BD).square() - 1 - 2 * sigma_B1.log()
            reconstruction_B = -discretised_log_probability(
                x0_BD, clean_from(process, batch, prediction_BD), variance**0.5
            )
            at_first_B = (batch.level_B == 0).to(x0_BD)
            constant_B = x0_BD.shape[1] * constant_T[batch.level_B].to(x0_BD)
            total_B = transitions(batch, prediction_BD) + T * at_first_B * reconstruction_B
            return total_B + T * constant_B + 0.5 * divergence.sum(1)

        return value


MEASUREMENTS: dict[str, Measurement | ObjectiveMeasurement] = {
    "loss": loss,
    "squared_norm": squared_norm,
    "simplified_elbo": SimplifiedELBO(),
    "elbo": ELBO(),
    "log_likelihood": LogLikelihood(),
}


def measurement_of(
    measurement: Any, objective: DenoisingObjective, draws: Draws | None = None
) -> Measurement | ExampleFunction:
    """Return the measurement that a user named or passed, for an objective.

    Args:
        measurement: The name or measurement.
        objective: The objective.
        draws: What it is estimated from, where that is known.

    Raises:
        ValueError: If it is neither a known name nor callable, or not for this objective or these
            draws.
    """
    if isinstance(measurement, str) and measurement in MEASUREMENTS:
        measurement = MEASUREMENTS[measurement]
    if isinstance(measurement, ObjectiveMeasurement):
        if measurement.uniform_levels and draws is not None and not draws.uniform_levels:
            raise ValueError(
                f"{type(measurement).__name__} arrived with {draws.timesteps}. It is a sum over "
                "all noise levels, which only timesteps='stratified', 'uniform' and 'all' "
                "estimate. Take one of these, or a WeightedLoss for some levels."
            )
        return measurement.bind(objective)
    if callable(measurement) or isinstance(measurement, ExampleFunction):
        return measurement
    raise ValueError(
        f"measurement={measurement!r} is unknown. Pass one of {sorted(MEASUREMENTS)}, a "
        "WeightedLoss or the like, a function of (noised batch, prediction [B, D]) that returns "
        "values [B], or an ExampleFunction of (model, example, draws)."
    )


def measure(measurement: Measurement, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """Evaluate a measurement, shape ``[B]``.

    Raises:
        ValueError: If its values do not have shape ``[B]``.
    """
    values = measurement(batch, prediction_BD)
    if not isinstance(values, Tensor) or values.shape != (len(batch.indices),):
        arrived = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"The measurement returned {arrived} for a batch of {len(batch.indices)}. It must "
            "return one value for each example, shape [B]."
        )
    return values


def measurement_gradient(
    measurement: Measurement, batch: NoisedBatch, prediction_BD: Tensor
) -> Tensor:
    """Gradients of the examples' measured values in the prediction, shape ``[B, D]``.

    Raises:
        ValueError: If the values are not a differentiable function of the prediction.
    """
    with torch.enable_grad():
        prediction_BD = prediction_BD.detach().requires_grad_()
        values_B = measure(measurement, batch, prediction_BD)
        if not values_B.requires_grad:
            raise ValueError(
                "The measurement does not depend on the prediction, or not differentiably. It must "
                "be computed from its second argument by differentiable operations of torch."
            )
        (gradient,) = torch.autograd.grad(values_B.sum(), prediction_BD)
    return gradient
