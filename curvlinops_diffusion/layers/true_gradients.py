"""Gradients of a function of the prediction by automatic differentiation alone, without hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers.hooks import frozen
from curvlinops_diffusion.runtime.modes import recomputation_named
from curvlinops_diffusion.runtime.processes import lost_processes_named
from curvlinops_diffusion.runtime.sharded_networks import is_sharded

#: Maps a prediction ``[B, D]`` to a number.
Value = Callable[[Tensor], Tensor]


def example_shares(batch: NoisedBatch, dtype: torch.dtype) -> Tensor:
    """Weights ``[B]`` of examples, all different, so that these are told apart."""
    return 1 / torch.arange(1.0, len(batch.indices) + 1, dtype=dtype, device=batch.x_t.device)


def loss_value(batch: NoisedBatch) -> Value:
    """The weighted sum of the losses of a batch."""

    def value(prediction_BD: Tensor) -> Tensor:
        losses_B = batch.loss(prediction_BD)
        return (example_shares(batch, losses_B.dtype) * losses_B).sum()

    return value


def true_gradients(
    objective: DenoisingObjective, names: Sequence[str], batch: NoisedBatch, value: Value
) -> Mapping[str, Tensor | None]:
    """The gradients of a value of the prediction, by name.

    Args:
        objective: Supplies the network.
        names: The parameters.
        batch: What is predicted from.
        value: The function of the prediction.

    Returns:
        The gradients; ``None`` for a parameter that the value does not depend on.
    """
    own = dict(objective.model.named_parameters())
    with frozen(objective.model), recomputation_named(), torch.enable_grad():
        for name in names:
            own[name].requires_grad_(True)
        result = value(objective.predict(batch))
        if not result.requires_grad:  # of none of them
            return dict.fromkeys(names)
        if is_sharded(objective.model):
            return _accumulated_gradients(result, {name: own[name] for name in names})
        gradients = torch.autograd.grad(result, [own[n] for n in names], allow_unused=True)
    return dict(zip(names, gradients, strict=True))


def _accumulated_gradients(
    value: Tensor, params: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    """Gradients as a training step forms them; those that were there before are put back.

    Of a network that is divided among processes, these get a part of the processes' mean each,
    which is the gradient if all have the same value.
    """
    before = {name: p.grad for name, p in params.items()}
    try:
        for p in params.values():
            p.grad = None
        with lost_processes_named():
            value.backward()
        return {name: p.grad for name, p in params.items()}
    finally:
        for name, p in params.items():
            p.grad = before[name]
