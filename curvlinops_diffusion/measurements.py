"""Measured quantities: what an influence score predicts the change of.

A measurement maps a noised batch and the network's prediction ``[B, D]`` to one value for each
example, ``[B]``; an example's value is the average over its draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.objective import NoisedBatch

Measurement = Callable[[NoisedBatch, Tensor], Tensor]


def loss(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """The training loss ``w_t r ‖f − y‖²``, shape ``[B]``."""
    return batch.loss(prediction_BD)


def squared_norm(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
    """The mean square ``1/D ‖f‖²`` of the prediction (Zheng et al., 2024, D-TRAK), ``[B]``."""
    return prediction_BD.square().mean(1)


MEASUREMENTS: dict[str, Measurement] = {"loss": loss, "squared_norm": squared_norm}


def measurement_of(measurement: Any) -> Measurement:
    """Return the measurement that a user named or passed.

    Raises:
        ValueError: If it is neither a known name nor callable.
    """
    if callable(measurement):
        return measurement
    if isinstance(measurement, str) and measurement in MEASUREMENTS:
        return MEASUREMENTS[measurement]
    raise ValueError(
        f"measurement={measurement!r} is unknown. Pass one of {sorted(MEASUREMENTS)}, or a "
        "function of (noised batch, prediction [B, D]) that returns values [B]."
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
