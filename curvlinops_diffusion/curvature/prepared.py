"""Preparation of a fit: the parameters, their blocks, and the findings of a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression, check_regression
from curvlinops_diffusion.layers import Coverage, covered_parameters
from curvlinops_diffusion.layers.probe import probed
from curvlinops_diffusion.linalg.parameters import Parameters, ParameterSpace
from curvlinops_diffusion.linalg.storage import versions
from curvlinops_diffusion.runtime.digests import fingerprint


@dataclass(frozen=True)
class Prepared:
    """Preparation that operators of one problem, parameters and options share.

    Attributes:
        coverage: The parameters, the layers that hold them, and what a probe found of them.
        plan: The blocks.
        fingerprint: Digests of the network.
        space: The parameters' space.
        header: Describes all of this, for the header of a file.
    """

    coverage: Coverage
    plan: BlockPlan
    fingerprint: dict[str, str]
    space: ParameterSpace
    header: dict[str, Any]

    def info(self, regression: NoisedRegression) -> dict[str, Any]:
        """Describe an operator that was fitted: what is known after a pass over the data."""
        data = regression.data_identity()
        return {**self.header, "data": data, "fingerprint": self.fingerprint}


def prepare(regression: NoisedRegression, params: Parameters, options: KFACOptions) -> Prepared:
    """Choose the blocks, and try the network out, which is not repeated while nothing has changed.

    Raises:
        ValueError: If a parameter cannot be covered, or the network is not what derivatives assume;
            see :mod:`~curvlinops_diffusion.layers.probe`.
    """
    check_regression(regression)
    model = regression.objective.model
    coverage = covered_parameters(model, params, options.has_gradients)
    coverage = probed(regression, coverage, options.has_gradients)
    header: dict[str, Any] = {
        "options": options.as_dict(),
        "regression": regression.description,
        "left_out": coverage.left_out,
        "others": coverage.others,
        "versions": versions(),
    }
    rounding = set(coverage.rounding)
    if not options.exact_bias:  # the block of a bias is then the factor of its weight
        mixed = [layer for layer in coverage.layers if not {*layer.params} <= rounding]
        rounding -= {name for layer in mixed for name in layer.params}
    if rounding:
        header["rounding"] = [name for name in coverage.params if name in rounding]
    return Prepared(
        coverage,
        BlockPlan.of(coverage, options),
        fingerprint(model),
        ParameterSpace.of(coverage.params),
        header,
    )
