"""Kronecker factors from whole gradients: Shampoo's.

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
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer, Part
from curvlinops_diffusion.linalg.factors import trace
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sums import Sums


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

        shampoo:  B = E[g gᵀ],    A = E[gᵀ g] / E‖g‖²

    The scale makes the trace exact (Morwani et al., 2024, *A New Perspective on Shampoo's
    Preconditioner*).

    Args:
        over: A pass over the data.
        start: K-FAC's factors. Blocks without Kronecker form, and a bias' factor, are kept.

    Returns:
        The factors.
    """
    parts = over.plan.with_inputs
    moments = _Moments(over, parts)
    A = _divided_by_trace(moments.of_inputs("Input factors"))
    B = moments.of_outputs("Output factors")
    outputs = {part.output_key: B[part.key] for part in parts.values()}
    return replace(start, inputs={**start.inputs, **A}, outputs={**start.outputs, **outputs})


@dataclass(frozen=True)
class _Moments:
    """Second moments of gradients.

    Attributes:
        over: A pass over the data.
        parts: The blocks, by the name of the layer.
    """

    over: GradientPass
    parts: Mapping[str, Part]

    def of_outputs(self, name: str) -> dict[str, Tensor]:
        """``E[g gᵀ]``, ``[*g, O, O]``, by the key of the part."""
        return self._means(name, lambda part, g: moments_of_rows(g))

    def of_inputs(self, name: str) -> dict[str, Tensor]:
        """``E[gᵀ g]``, ``[*g, I, I]`` or its diagonal ``[I]``, by the key of the part."""
        return self._means(name, lambda part, g: moments_of_columns(g, part.kind.one_hot))

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


def _divided_by_trace(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide by the trace, for each group; what is zero stays zero."""
    result = {}
    for key, moment in moments.items():
        divisor = trace(moment)
        divisor = divisor.where(divisor > 0, torch.ones_like(divisor))
        if divisor.ndim > 0:  # one for each group
            divisor = divisor[..., None, None]
        result[key] = moment / divisor
    return result
