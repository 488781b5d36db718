"""Which draws give the least error of the Kronecker factors for a given time?

Errors are relative Frobenius errors, averaged over the layers, of the factors of 256 digits against
those of many draws. What counts is squared error times seconds: the time for a given accuracy.
"""

from __future__ import annotations

import warnings
from functools import partial

from benchmarks.accuracy import DigitsProblem, accuracy, factor_errors
from benchmarks.measure import arguments, report
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan

# (timesteps, draws, distribution of the loss vectors, loss vectors for each draw)
SETTINGS = [
    ("uniform", 1, "gaussian", 1),
    ("uniform", 1, "rademacher", 1),
    ("stratified", 1, "gaussian", 1),
    ("stratified", 1, "rademacher", 1),
    ("stratified", 1, "rademacher", 2),
    ("stratified", 1, "rademacher", 4),
    ("stratified", 4, "rademacher", 1),
    ("stratified", 4, "rademacher", 2),
    ("uniform", 4, "rademacher", 1),
    ("stratified", 16, "rademacher", 1),
    ("uniform", 16, "rademacher", 1),
]


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    problem = DigitsProblem.of(options)

    def factors(setting: tuple[str, int, str, int], seed: int) -> KroneckerFactors:
        timesteps, num_draws, probe, probes = setting
        regression = problem.regression(num_draws, seed, timesteps=timesteps)
        kfac = KFACOptions(mc_samples=probes, probe_type=probe)
        return kronecker_factors(regression, BlockPlan.of(problem.coverage, kfac))

    truth = factors(("stratified", 2 if options.quick else 256, "rademacher", 2), seed=1000)

    table = [
        dict(zip(("timesteps", "draws", "probe_type", "mc_samples"), setting, strict=True))
        | accuracy(
            partial(factors, setting),
            lambda estimate: factor_errors(estimate, truth),
            options.repeats,
        )
        for setting in SETTINGS
    ]
    report(options, "draws", __doc__, {"examples": len(problem.x0), "settings": table})


if __name__ == "__main__":
    main()
