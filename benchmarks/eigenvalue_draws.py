"""Over how many draws are EK-FAC's eigenvalues known?

The eigenbases are those of a reference with many draws.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from benchmarks.accuracy import DigitsProblem, accuracy, relative_error
from benchmarks.measure import arguments, report
from curvlinops_diffusion.curvature.kronecker_factors import eigenvalue_moments, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.linalg.factors import eigendecomposition

# draws of each image
SETTINGS = (1, 2, 4, 8, 16)


def log_error(estimate: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square of the logarithms' differences, small eigenvalues counting like large."""
    logs = [
        (estimate[k] / truth[k])[truth[k] > 1e-6 * truth[k].max()].log().flatten() for k in truth
    ]
    return float(torch.cat(logs).square().mean().sqrt())


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    problem = DigitsProblem.of(options)
    plan = BlockPlan.of(problem.coverage, KFACOptions())
    reference = problem.regression(2 if options.quick else 128, seed=1000)
    factors = kronecker_factors(reference, plan)
    bases = [
        {key: eigendecomposition(M, key) for key, M in matrices.items()}
        for matrices in (factors.inputs, factors.outputs)
    ]
    truth = eigenvalue_moments(reference, plan, *bases)

    def eigenvalues(draws: int, seed: int) -> dict[str, Tensor]:
        return eigenvalue_moments(problem.regression(draws, seed), plan, *bases)

    def errors(estimate: dict[str, Tensor]) -> dict[str, float]:
        return {
            "relative_frobenius_error": relative_error(estimate, truth),
            "rms_log_error": log_error(estimate, truth),
        }

    table = [
        {"draws": draws * len(problem.x0)}
        | accuracy(lambda seed, draws=draws: eigenvalues(draws, seed), errors, options.repeats)
        for draws in SETTINGS
    ]
    report(
        options,
        "eigenvalue_draws",
        __doc__,
        {"reference_draws": reference.num_samples, "settings": table},
    )


if __name__ == "__main__":
    main()
