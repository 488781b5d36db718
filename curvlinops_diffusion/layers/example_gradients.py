"""Gradients of single examples by one backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers import Coverage, Layer
from curvlinops_diffusion.layers.mapped_gradients import mapped_gradients
from curvlinops_diffusion.layers.observation import WholeLayers, observed, one_vector


def example_gradients(
    coverage: Coverage,
    objective: DenoisingObjective,
    batch: NoisedBatch,
    loss_vector: Callable[[Tensor], Tensor],
    examples: int | None = None,
) -> dict[str, Tensor]:
    """Per-example gradients of the covered parameters on one noised batch.

    Parameters of known layers get theirs from what the layers see, the others by differentiating
    example by example.

    Args:
        coverage: The parameters, and the layers that hold them.
        objective: Supplies the model.
        batch: The noised batch.
        loss_vector: Maps the prediction ``[B, D]`` to the vectors ``[B, D]`` that are pulled back.
        examples: The number ``N`` of examples, each with equally many draws in a row, whose
            gradients are summed; default: ``B``.

    Returns:
        The gradients, of shape ``[N, *param.shape]``, by the parameter's name.
    """
    dtype, N = objective.working_dtype, examples or len(batch.indices)
    gradients: dict[str, Tensor] = {}
    mapped = {name: coverage.params[name] for name in coverage.others}

    class Gradients(WholeLayers):
        def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
            super().pulled_back(batch, v_BD)
            for name, gradient in mapped_gradients(objective, batch, v_BD, mapped).items():
                gradients[name] = gradient.unflatten(0, (N, -1)).sum(1)

    def consume(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        gradients.update(layer.example_gradients(xs, gs, N))

    with observed(objective, coverage.layers, Gradients(consume, dtype)) as network:
        network.run(batch, one_vector(loss_vector))
    for name, p in coverage.params.items():
        if name not in gradients:  # no influence on the prediction
            gradients[name] = torch.zeros(N, *p.shape, dtype=dtype, device=objective.device)
    return gradients
