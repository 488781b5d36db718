"""Measurements, whose change influence predicts: functions of predictions, or of the model.

A measurement maps a noised batch and the network's prediction ``[B, D]`` to one value for each
example, ``[B]``; an example's value is the average over its draws. Measurements that depend on the
noise process are bound to an objective first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS

#: Maps a noised batch and the prediction ``[B, D]`` to values ``[B]``, averaged over draws.
Measurement = Callable[[NoisedBatch, Tensor], Tensor]


@dataclass(frozen=True)
class ExampleDraws:
    """The draws of one example.

    Attributes:
        regression: The problem that they belong to.
        clean: The example, a batch of one.
    """

    regression: NoisedRegression
    clean: CleanBatch

    @property
    def num_draws(self) -> int:
        """The number ``R`` of draws."""
        return self.regression.num_draws

    def noised_batches(self) -> Iterator[NoisedBatch]:
        """Yield the example noised by each draw, in batches of one."""
        yield from self.regression.noised_batches(self.clean)

    def normal(self, r: int, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers that belong to draw ``r``, of any shape, on the model's device.

        They are independent of the noise, and like it a pure function of ``(seed, n, r)``.
        """
        objective = self.regression.objective
        numbers = self.regression.draws.normal(self.clean.indices, r, shape)[0]
        return numbers.to(objective.device, objective.working_dtype)


@dataclass(frozen=True)
class Example:
    """An example in the network's terms, as a batch of one on the model's device.

    Attributes:
        index: Its index ``n`` within the data.
        x0: The clean example (the mean of its latents), shape ``[1, ...]``.
        condition: Keyword arguments of the network.
    """

    index: int
    x0: Tensor
    condition: dict[str, Any]


@dataclass(frozen=True)
class ExampleFunction:
    """A measured quantity ``m_n(θ) = function(model, example, draws)``.

    For what is no average over noised examples of a function of the prediction: anything that
    PyTorch can differentiate in the model's parameters. Examples are taken one by one.

    Attributes:
        function: Maps the model, an :class:`Example` and its :class:`ExampleDraws` to a tensor
            with one entry. Draws are not averaged over unless the function does so.
    """

    function: Callable[[nn.Module, Example, ExampleDraws], Tensor]

    def value(self, regression: NoisedRegression, clean: CleanBatch) -> Tensor:
        """The value of one example, without axes."""
        objective = regression.objective
        encoded = objective.encode(clean)
        example = Example(
            clean.indices[0],
            encoded.mean.to(objective.device, objective.working_dtype),
            objective.to_model(encoded.condition),
        )
        value = self.function(objective.model, example, ExampleDraws(regression, clean))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                "The measured function must return a tensor with one entry for an example, got "
                f"{_kind_of(value)}."
            )
        return value.reshape(()).to(objective.working_dtype)

    def gradient(
        self, regression: NoisedRegression, clean: CleanBatch, params: Sequence[nn.Parameter]
    ) -> Tensor:
        """The gradient of one example's value, shape ``[P]``."""
        with torch.enable_grad():
            value = self.value(regression, clean)
            if not value.requires_grad:
                raise ValueError(
                    "The measured function does not depend on the model's parameters, or not "
                    "differentiably. Compute it from its first argument by operations of torch."
                )
            gradients = torch.autograd.grad(
                value, list(params), allow_unused=True, materialize_grads=True
            )
        return torch.cat([gradient.flatten().to(value.dtype) for gradient in gradients])


class ObjectiveMeasurement(ABC):
    """A measurement that depends on the objective's noise process.

    Attributes:
        uniform_levels: Whether it is a sum over all noise levels, estimated from uniform ones.
    """

    uniform_levels: ClassVar[bool] = False

    @abstractmethod
    def bind(self, objective: DenoisingObjective) -> Measurement | ExampleFunction:
        """The measurement for an objective.

        Raises:
            ValueError: If it does not exist for the objective's noise process.
        """


def measurement_of(
    measurement: Any, objective: DenoisingObjective, draws: Draws | None = None
) -> Measurement | ExampleFunction:
    """Bind the measurement that a user named or passed to an objective and its draws."""
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
            f"{_kind_of(values)} for a batch of {len(batch.indices)}."
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


def _kind_of(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
