"""How does the price of a factor pass grow with the batch, the network's width, and image size?

Ours and curvlinops', as multiples of a training pass over the same 32 images. The eigenbases are
random matrices, on whose entries the time does not depend.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.factor_pass import reference_passes, upstream_operator
from benchmarks.measure import arguments, in_training_passes, report
from benchmarks.problems import regression_of, unet
from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.factors import Eigendecomposition
from curvlinops_diffusion.fisher import KFACOptions
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.statistics import eigenvalue_moments, kronecker_factors

BASE = {"batch_size": 32, "width": 64, "image_size": 16}
VARIED: dict[str, tuple[int, ...]] = {
    "batch_size": (1, 4, 16),
    "width": (32, 96, 128),
    "image_size": (8, 32),
}
COMPARED = ("K-FAC factors", "EK-FAC eigenvalues", "curvlinops K-FAC factors")


def compared(regression: NoisedRegression) -> tuple[Callable[[], object], ...]:
    """The passes that are compared."""
    coverage = covered_parameters(regression.objective.model, None)
    options = KFACOptions.parse("mc", 1, "expand", True, "rademacher")
    factors = kronecker_factors(regression, coverage, options)
    bases = [
        {key: Eigendecomposition(M[:, 0], torch.randn_like(M)) for key, M in matrices.items()}
        for matrices in (factors.inputs, factors.outputs)
    ]
    theirs = upstream_operator(regression)

    def upstream() -> None:
        theirs._input_covariances, theirs._gradient_covariances = {}, {}
        theirs.compute_kronecker_factors()

    return (
        lambda: kronecker_factors(regression, coverage, options),
        lambda: eigenvalue_moments(regression, coverage, *bases, options),
        upstream,
    )


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    settings = [BASE] + [BASE | {name: v} for name, values in VARIED.items() for v in values]
    table: list[dict[str, Any]] = []
    for setting in settings[:2] if options.quick else settings:
        torch.manual_seed(0)
        size = 8 if options.quick else setting["image_size"]
        network = unet(options.quick, size, setting["width"])
        num_data = 4 if options.quick else 32
        regression = regression_of(network, options.device, num_data, setting["batch_size"])
        passes = {"training pass": reference_passes(regression)["training pass"]}
        passes |= dict(zip(COMPARED, compared(regression), strict=True))
        result = in_training_passes(passes, options)
        ratios = {name: result["training_passes"][name] for name in COMPARED}
        table.append(setting | {"training pass": result["seconds"]["training pass"]} | ratios)
    report(options, "scaling", __doc__, {"examples": 32, "settings": table})


if __name__ == "__main__":
    main()
