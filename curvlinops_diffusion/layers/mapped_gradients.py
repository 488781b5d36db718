"""Gradients of single examples by automatic differentiation, for parameters in no known layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
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
