"""How much memory do factor passes and scores need beyond the model and a training pass?

On a CPU each pass runs in a process of its own, whose peak resident memory is read from the
operating system; the factors that a pass leaves behind are part of it. Measured on larger images
than the times, since im2col's memory grows with them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch

from benchmarks.factor_pass import reference_passes
from benchmarks.measure import arguments, report
from benchmarks.problems import regression_of, unet
from benchmarks.upstream import fitted_upstream_factors
from curvlinops_diffusion import (
    ExampleGradientLinearOperator,
    NoisedRegression,
    top_influences,
)
from curvlinops_diffusion.curvature.kronecker_factors import kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.linalg.operator import FlatLinearOperator


def our_factors(regression: NoisedRegression) -> object:
    """Our Kronecker factors."""
    coverage = covered_parameters(regression.objective.model, None)
    return kronecker_factors(regression, BlockPlan.of(coverage, KFACOptions()))


def our_scores(images: int) -> Callable[[NoisedRegression], object]:
    """The extreme scores of so many images on eight queries, without curvature."""

    def run(regression: NoisedRegression) -> object:
        objective = regression.objective
        config = objective.model.config
        size = (config.in_channels, config.sample_size, config.sample_size)
        x0 = torch.randn(images, *size)
        batch_size = min(32, images)
        J_train = ExampleGradientLinearOperator(
            NoisedRegression(objective, x0, 1, batch_size=batch_size)
        )
        J_query = ExampleGradientLinearOperator(NoisedRegression(objective, x0[:8], 1))
        return top_influences(J_query, IdentityLinearOperator(J_query), J_train, k=2)

    return run


class IdentityLinearOperator(FlatLinearOperator):
    """The identity on the parameters of another operator."""

    def multiply(self, X_PK: torch.Tensor) -> torch.Tensor:
        """The columns themselves."""
        return X_PK


PASSES = {
    "training pass": lambda regression: reference_passes(regression)["training pass"](),
    "K-FAC factors": our_factors,
    "curvlinops K-FAC factors": fitted_upstream_factors,
    "scores of 64 images": our_scores(64),
    "scores of 512 images": our_scores(512),
}


def peak_mebibytes(name: str, quick: bool, device: str) -> float:
    """Run a pass here, and return this process' peak."""
    torch.manual_seed(0)
    network = unet(quick, size=8 if quick else 32)
    regression = regression_of(network, device, num_data=32, batch_size=4 if quick else 32)
    PASSES[name](regression)
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=PASSES, help="run one pass, and print its memory")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.only:
        print(json.dumps(peak_mebibytes(options.only, options.quick, options.device)))
        return
    measured = {}
    for name in PASSES:
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--only", name]
        command += ["--device", options.device] + ["--quick"] * options.quick
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured[name] = json.loads(output.splitlines()[-1])
    report(
        options,
        "peak_memory",
        __doc__,
        {
            "peak_mebibytes": {name: round(peak) for name, peak in measured.items()},
            "beyond_a_training_pass": {
                name: round(peak - measured["training pass"]) for name, peak in measured.items()
            },
        },
    )


if __name__ == "__main__":
    main()
