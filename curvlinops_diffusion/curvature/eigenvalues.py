"""Eigenvalues of EK-FAC: second moments of gradients in the factors' eigenbases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from curvlinops_diffusion.curvature.gradient_pass import GradientPass
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer
from curvlinops_diffusion.linalg.factors import Eigendecomposition
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sums import Sums


def eigenvalue_moments(
    regression: NoisedRegression,
    plan: BlockPlan,
    input_bases: Mapping[str, Eigendecomposition],
    output_bases: Mapping[str, Eigendecomposition],
    passes: PassOptions = PLAIN,
) -> dict[str, Tensor]:
    """Compute EK-FAC's eigenvalues ``Λ_ij = E[(U_Bᵀ g U_A)_ij²]`` in one pass over the data.

    Args:
        regression: Objective, data and draws.
        plan: The blocks; its options say the Fisher type, as for the factors.
        input_bases: Eigenbases of the input factors, by their key.
        output_bases: Eigenbases of the output factors, by their key.
        passes: Checkpoints, processes and progress.

    Returns:
        ``Λ`` of shape ``[*g, O, I]`` for every block of Kronecker form, by its key.
    """
    dtype = regression.objective.working_dtype
    sums = Sums()

    def consume(layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]) -> None:
        for part in plan.by_layer[layer.name]:
            U_B = output_bases[part.output_key].vectors
            U_A = None if part.is_bias else input_bases[part.input_key].vectors
            sums.add(part.key, part.squares(xs, gs, len(indices), U_A, U_B))

    GradientPass(regression, plan, passes).run("Eigenvalues", consume, sums)
    return {
        part.key: sums.take_mean(
            part.key, regression.num_samples, partial(part.new_zeros, dtype, *part.shape)
        )
        for part in plan.parts
    }
