"""Values and gradients of measured quantities, whose change an influence score predicts.

A measurement maps a noised batch and the network's prediction ``[B, D]`` to one value for each
example, ``[B]``; an example's value is the average over its draws. Measurements that depend on the
noise process are bound to an objective first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.influence.measurements.base import (
    ExampleFunction,
    Measurement,
    ObjectiveMeasurement,
    kind_of,
)
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS


def measurement_of(
    measurement: Any, objective: DenoisingObjective, draws: Draws | None = None
) -> Measurement | ExampleFunction:
    """Return the measurement that a user named or passed, for an objective and its draws."""
    if isinstance(measurement, str) and measurement in MEASUREMENTS:
        measurement = MEASUREMENTS[measurement].load()
    if isinstance(measurement, ObjectiveMeasurement):
        if measurement.uniform_levels and draws is not None and not draws.uniform_levels:
            raise ValueError(
                f"{type(measurement).__name__} is a sum over all noise levels, which only "
                "timesteps='stratified', 'uniform' and 'all' estimate, got "
                f"{draws.timesteps}. Take one of these, or a WeightedLoss for some levels."
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
    """Evaluate a measurement, shape ``[B]``."""
    values = measurement(batch, prediction_BD)
    if not isinstance(values, Tensor) or values.shape != (len(batch.indices),):
        raise ValueError(
            "The measurement must return one value for each example, shape [B], got "
            f"{kind_of(values)} for a batch of {len(batch.indices)}."
        )
    return values


def measurement_gradient(
    measurement: Measurement, batch: NoisedBatch, prediction_BD: Tensor
) -> Tensor:
    """Gradients of the examples' measured values in the prediction, shape ``[B, D]``."""
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
