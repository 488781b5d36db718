"""The loss, weighted or not, and functions of the prediction itself.

Legend: B batch, D entries of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective, Reduction
from curvlinops_diffusion.diffusion.weightings import Weighting, weight_table
from curvlinops_diffusion.influence.measurements.base import Measurement, ObjectiveMeasurement


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
