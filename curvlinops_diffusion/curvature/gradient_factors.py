"""Kronecker factors from whole gradients: Shampoo's, and the nearest product.

Legend: N batch, g groups, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from curvlinops_diffusion.curvature.gradient_pass import GradientPass
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACApprox
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer, Part
from curvlinops_diffusion.linalg.factors import identity_like, squared_norm, trace
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sums import Sums


def contracted_inputs(g_NgOI: Tensor, A: Tensor) -> Tensor:
    """``Σ_n g A gᵀ``, ``[*g, O, O]``; ``A`` is ``[*g, I, I]``, or the diagonal ``[I]`` of one."""
    product = g_NgOI * A if A.ndim == 1 else g_NgOI @ A
    product, g = (z.movedim(0, -1).flatten(-2) for z in (product, g_NgOI))  # [*g, O, I N]
    return product @ g.mT


def contracted_outputs(g_NgOI: Tensor, B: Tensor, diagonal: bool = False) -> Tensor:
    """``Σ_n gᵀ B g``, ``[*g, I, I]``, or its diagonal ``[I]``; ``B`` is ``[*g, O, O]``."""
    product = B @ g_NgOI
    if diagonal:
        return (product * g_NgOI).sum((0, -2))
    product, g = (z.movedim(0, -2).flatten(-3, -2) for z in (product, g_NgOI))  # [*g, O N, I]
    return g.mT @ product


def fitted_factors(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions = PLAIN
) -> KroneckerFactors:
    """The Kronecker factors that the options ask for, in one pass over the data or in several."""
    factors = kronecker_factors(regression, plan, passes)
    if not plan.options.kfac_approx.from_gradients:
        return factors
    return gradient_factors(GradientPass(regression, plan, passes), factors)


def gradient_factors(over: GradientPass, start: KroneckerFactors) -> KroneckerFactors:
    """Kronecker factors from gradients ``g = Σ_s b_s a_sᵀ``, ``[O, I]``, rather than their parts.

    ::

        shampoo:   B = E[g gᵀ],              A = E[gᵀ g] / E‖g‖²
        rank-one:  B = E[g A gᵀ] / ‖A‖²,     A = E[gᵀ B g] / ‖B‖²,     in turn

    The second line minimises ``‖E[vec(g) vec(g)ᵀ] − B ⊗ A‖`` in one factor while the other one is
    fixed, which is the power method for the leading singular vectors of the rearranged matrix (Van
    Loan & Pitsianis, 1993). From K-FAC's ``A``, three passes over the data give ``B``, ``A`` and
    ``B``. Shampoo's factors are a step of it from the identity, scaled so that the trace is exact
    (Morwani et al., 2024, *A New Perspective on Shampoo's Preconditioner*).

    Args:
        over: A pass over the data.
        start: K-FAC's factors. Blocks without Kronecker form, and a bias' factor, are kept.

    Returns:
        The factors.
    """
    parts = over.plan.with_inputs
    moments = _Moments(over, parts)
    A = {part.key: start.inputs[part.input_key] for part in parts.values()}
    B = {part.key: start.outputs[part.output_key] for part in parts.values()}
    if over.plan.options.kfac_approx is KFACApprox.SHAMPOO:
        one_A = {key: identity_like(M) for key, M in A.items()}
        one_B = {key: identity_like(M) for key, M in B.items()}
        A = _divided(moments.of_inputs("Input factors", one_B), trace)
        B = moments.of_outputs("Output factors", one_A)
    else:
        B = _divided(moments.of_outputs("Output factors", A), squared_norm, A)
        A = _divided(moments.of_inputs("Input factors", B), squared_norm, B)
        B = _divided(moments.of_outputs("Output factors again", A), squared_norm, A)
    outputs = {part.output_key: B[part.key] for part in parts.values()}
    return replace(start, inputs={**start.inputs, **A}, outputs={**start.outputs, **outputs})


@dataclass(frozen=True)
class _Moments:
    """Second moments of gradients with one factor in between.

    Attributes:
        over: A pass over the data.
        parts: The blocks, by the name of the layer.
    """

    over: GradientPass
    parts: Mapping[str, Part]

    def of_outputs(self, name: str, A: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``E[g A gᵀ]``, ``[*g, O, O]``, by the key of the part."""
        return self._means(name, lambda part, g: contracted_inputs(g, A[part.key]))

    def of_inputs(self, name: str, B: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``E[gᵀ B g]``, ``[*g, I, I]`` or its diagonal ``[I]``, by the key of the part."""
        return self._means(
            name, lambda part, g: contracted_outputs(g, B[part.key], part.kind.one_hot)
        )

    def _means(self, name: str, moment: Callable[[Part, Tensor], Tensor]) -> dict[str, Tensor]:
        sums = Sums()

        def consume(
            layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]
        ) -> None:
            if layer.name in self.parts:
                part = self.parts[layer.name]
                sums.add(part.key, moment(part, part.weight_gradients(xs, gs, len(indices))))

        self.over.run(name, consume, sums)
        dtype = self.over.regression.objective.working_dtype
        return {
            part.key: sums.take_mean(
                part.key,
                self.over.regression.num_samples,
                partial(_of_zeros, moment, part, dtype),
            )
            for part in self.parts.values()
        }


def _of_zeros(moment: Callable[[Part, Tensor], Tensor], part: Part, dtype: torch.dtype) -> Tensor:
    return moment(part, part.new_zeros(dtype, 1, *part.shape))


def _divided(
    moments: Mapping[str, Tensor],
    size: Callable[[Tensor], Tensor],
    of: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Divide by the size of a factor, for each group; what is zero stays zero."""
    result = {}
    for key, moment in moments.items():
        divisor = size((moments if of is None else of)[key])
        divisor = divisor.where(divisor > 0, torch.ones_like(divisor))
        if divisor.ndim > 0:  # one for each group
            divisor = divisor[..., None, None]
        result[key] = moment / divisor
    return result
