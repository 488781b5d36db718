"""Second moments of whole gradients: EK-FAC's eigenvalues, and Shampoo's factors.

Legend: N batch, g groups, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACApprox
from curvlinops_diffusion.curvature.passes import run_on_gradients
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer, Part
from curvlinops_diffusion.linalg.factors import Eigendecomposition, trace
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

    ``[*g, O, I]`` for every block of Kronecker form, by its key; eigenbases are by the factor's.
    """
    dtype = regression.objective.working_dtype
    sums = Sums()

    def consume(layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]) -> None:
        for part in plan.by_layer[layer.name]:
            U_B = output_bases[part.output_key].vectors
            U_A = None if part.is_bias else input_bases[part.input_key].vectors
            sums.add(part.key, part.squares(xs, gs, len(indices), U_A, U_B))

    run_on_gradients("Eigenvalues", regression, plan, passes, consume, sums)
    return {
        part.key: sums.take_mean(
            part.key, regression.num_samples, partial(part.new_zeros, dtype, *part.shape)
        )
        for part in plan.parts
    }


def fitted_factors(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions = PLAIN
) -> KroneckerFactors:
    """Compute the Kronecker factors that the options ask for, in one pass over the data or three.

    From gradients ``g = Σ_s b_s a_sᵀ``, ``[O, I]``, rather than their parts::

        shampoo:  B = E[g gᵀ],    A = E[gᵀ g] / E‖g‖²

    whose scale makes the trace exact (Morwani et al., 2024, *A New Perspective on Shampoo's
    Preconditioner*). Blocks without Kronecker form, and a bias' factor, are K-FAC's.
    """
    factors = kronecker_factors(regression, plan, passes)
    if plan.options.kfac_approx is not KFACApprox.SHAMPOO:
        return factors
    parts, dtype = plan.with_inputs, regression.objective.working_dtype

    def means(name: str, moment: Callable[[Part, Tensor], Tensor]) -> dict[str, Tensor]:
        sums = Sums()

        def consume(
            layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]
        ) -> None:
            if layer.name in parts:
                part = parts[layer.name]
                sums.add(part.key, moment(part, part.weight_gradients(xs, gs, len(indices))))

        def zeros(part: Part) -> Tensor:
            return moment(part, part.new_zeros(dtype, 1, *part.shape))

        run_on_gradients(name, regression, plan, passes, consume, sums)
        count = regression.num_samples
        return {p.key: sums.take_mean(p.key, count, partial(zeros, p)) for p in parts.values()}

    A = means("Input factors", lambda part, g: moments_of_columns(g, part.kind.one_hot))
    B = means("Output factors", lambda part, g: moments_of_rows(g))
    inputs = {key: _divided_by_trace(moment) for key, moment in A.items()}
    outputs = {part.output_key: B[part.key] for part in parts.values()}
    return replace(factors, inputs=factors.inputs | inputs, outputs=factors.outputs | outputs)


def moments_of_rows(g_NgOI: Tensor) -> Tensor:
    """``Σ_n g gᵀ``, ``[*g, O, O]``."""
    g = g_NgOI.movedim(0, -1).flatten(-2)  # [*g, O, I N]
    return g @ g.mT


def moments_of_columns(g_NgOI: Tensor, diagonal: bool = False) -> Tensor:
    """``Σ_n gᵀ g``, ``[*g, I, I]``, or its diagonal ``[I]``."""
    if diagonal:
        return g_NgOI.square().sum((0, -2))
    g = g_NgOI.movedim(0, -2).flatten(-3, -2)  # [*g, O N, I]
    return g.mT @ g


def _divided_by_trace(moment: Tensor) -> Tensor:
    """Divide by the trace, for each group; zeros stay."""
    divisor = trace(moment)
    divisor = divisor.where(divisor > 0, 1.0)
    if divisor.ndim > 0:  # one for each group
        divisor = divisor[..., None, None]
    return moment / divisor
