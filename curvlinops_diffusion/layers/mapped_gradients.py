"""Gradients of single examples: of known layers, and by automatic differentiation of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers.coverage import Coverage
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.observation import WholeLayers, observed, one_vector
from curvlinops_diffusion.runtime.modes import differentiable_attention
from curvlinops_diffusion.runtime.sharded_networks import check_whole_parameters

# Gradients of so many entries are formed at once, to bound the memory
_MAX_ENTRIES = 2**25


def mapped_gradients(
    objective: DenoisingObjective,
    batch: NoisedBatch,
    v_BD: Tensor,
    params: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of ``v_nᵀ f_n`` for each example ``n``, ``[B, *shape]`` by name.

    By a vectorised map over the examples; where the network has operations that cannot be mapped
    (data-dependent control flow, say), by a loop.
    """
    if not params:
        return {}
    some = f"The gradient of '{next(iter(params))}' ({len(params)} parameters in no known layer)"
    check_whole_parameters(objective.model, some, "Leave them out of params.")
    params = {name: p.detach() for name, p in params.items()}
    example = (batch.level_B, batch.x_t, batch.timestep_B, batch.condition, v_BD)
    in_dims = tree_map(lambda z: 0 if isinstance(z, Tensor) and z.ndim > 0 else None, example)

    def value(params: Mapping[str, Tensor], *example: Any) -> Tensor:
        # an example of its own is a batch of one
        level, x_t, timestep, condition, v = tree_map(
            lambda z, dim: z if dim is None else z.unsqueeze(0), example, in_dims
        )
        single = NoisedBatch([0], [0], level, x_t, timestep, condition, v, batch.weight_B[:1])
        return (objective.predict(single, params) * v).sum()

    chunk = max(1, _MAX_ENTRIES // sum(p.numel() for p in params.values()))
    with differentiable_attention():
        try:
            gradients = vmap(grad(value), in_dims=(None, *in_dims), chunk_size=chunk)(
                params, *example
            )
        except RuntimeError:  # what vmap cannot map; an error of the network's own comes again
            gradients = _looped(value, params, example, in_dims)
    return {name: g.to(objective.working_dtype) for name, g in gradients.items()}


def _looped(value: Any, params: dict[str, Tensor], example: Any, in_dims: Any) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for b in range(len(example[0])):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        single = tree_map(lambda z, dim, b=b: z if dim is None else z[b], example, in_dims)
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                value(leaves, *single), list(leaves.values()), allow_unused=True
            )
        for (name, p), gradient in zip(params.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if gradient is None else gradient)
    return {name: torch.stack(rows) for name, rows in found.items()}


def example_gradients(
    coverage: Coverage,
    objective: DenoisingObjective,
    batch: NoisedBatch,
    loss_vector: Callable[[Tensor], Tensor],
    examples: int | None = None,
) -> dict[str, Tensor]:
    """Per-example gradients ``[N, *shape]`` of the covered parameters on one noised batch, by name.

    Parameters of known layers get theirs from what the layers see, the others by differentiating
    example by example.

    Args:
        coverage: The parameters, and the layers that hold them.
        objective: Supplies the model.
        batch: The noised batch.
        loss_vector: Maps the prediction ``[B, D]`` to the vectors ``[B, D]`` that are pulled back.
        examples: The number ``N`` of examples, each with equally many draws in a row, whose
            gradients are summed; default: ``B``.
    """
    dtype, N = objective.working_dtype, examples or len(batch.indices)
    gradients: dict[str, Tensor] = {}
    mapped = {name: coverage.params[name] for name in coverage.others}

    class Gradients(WholeLayers):
        def whole(self, layer: Layer, xs: list[Tensor], gs: list[Tensor], batch_size: int) -> None:
            gradients.update(layer.example_gradients(xs, gs, N))

        def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
            super().pulled_back(batch, v_BD)
            for name, gradient in mapped_gradients(objective, batch, v_BD, mapped).items():
                gradients[name] = gradient.unflatten(0, (N, -1)).sum(1)

    with observed(objective, coverage.layers, Gradients(dtype)) as network:
        network.run(batch, one_vector(loss_vector))
    for name, p in coverage.params.items():
        if name not in gradients:  # no influence on the prediction
            gradients[name] = torch.zeros(N, *p.shape, dtype=dtype, device=objective.device)
    return gradients
