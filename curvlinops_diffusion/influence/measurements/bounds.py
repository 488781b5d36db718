"""Evidence lower bounds, simplified and whole.

Legend: B batch, D entries of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.ancestral import (
    AncestralSteps,
    discretised_log_probability,
)
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.influence.measurements.base import Measurement, ObjectiveMeasurement


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
        """The measurement for an objective.

        Raises:
            ValueError: If the bound is infinite or does not exist for the objective's noise.
        """
        steps = AncestralSteps.of(objective.process, self.variance)
        factor_T = steps.noise_error_factor_T() * objective.process.num_levels
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
        """The measurement for an objective.

        Raises:
            ValueError: As :meth:`SimplifiedELBO.bind`.
        """
        process, T = objective.process, objective.process.num_levels
        steps = AncestralSteps.of(process, self.variance)
        transitions = SimplifiedELBO(self.variance).bind(objective)
        variance = float(steps.variance_T[0] if steps.variance_T[0] > 0 else steps.small_T[1])
        # of the two Gaussians' variances; zero for the small one
        ratio_T = steps.small_T / steps.variance_T
        constant_T = 0.5 * (ratio_T - 1 - ratio_T.log())
        constant_T[0] = 0
        _check_bounded(constant_T)

        def value(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
            def clean(y_BD: Tensor) -> Tensor:
                return process.clean(batch.noised_BD.to(y_BD), y_BD, batch.level_B)

            x0_BD = clean(batch.target_BD)
            last = x0_BD.new_full((len(x0_BD),), T - 1, dtype=torch.int64).cpu()
            alpha, sigma = (s.to(x0_BD) for s in (process.alphas_T[last], process.sigmas_T[last]))
            alpha_B1, sigma_B1 = alpha.unsqueeze(1), sigma.unsqueeze(1)
            divergence = sigma_B1.square() + (alpha_B1 * x0_BD).square() - 1 - 2 * sigma_B1.log()
            at_first_B = (batch.level_B == 0).to(x0_BD)
            # elsewhere it does not count, and might be infinite
            mean_BD = torch.where(at_first_B.bool().unsqueeze(1), clean(prediction_BD), x0_BD)
            reconstruction_B = -discretised_log_probability(x0_BD, mean_BD, variance**0.5)
            constant_B = x0_BD.shape[1] * constant_T[batch.level_B].to(x0_BD)
            total_B = transitions(batch, prediction_BD) + T * at_first_B * reconstruction_B
            return total_B + T * constant_B + 0.5 * divergence.sum(1)

        return value


def _check_bounded(table_T: Tensor) -> None:
    """Check that the bound is finite at every noise level.

    Raises:
        ValueError: If it is not: the step to a level without noise has no variance.
    """
    infinite = (~table_T.isfinite()).nonzero().flatten().tolist()
    if infinite:
        raise ValueError(
            f"The evidence lower bound is infinite at the noise levels {infinite[:4]}: the steps "
            "from there have no variance, or their levels no signal (is there a level without "
            "noise?). Leave that level out of the noise process, or measure 'loss' or a "
            "WeightedLoss."
        )
