"""Which draws give the least error of the Kronecker factors for a given time?

Errors are relative Frobenius errors, averaged over the layers, of the factors of 256 digits against
those of many draws. What counts is squared error times seconds: the time for a given accuracy.
"""

from __future__ import annotations

import time
import warnings
from statistics import mean, median

from torch import Tensor

from benchmarks.measure import arguments, report
from benchmarks.problems import trained_on_digits
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.fisher import KFACOptions
from curvlinops_diffusion.layers import supported_layers
from curvlinops_diffusion.statistics import KroneckerFactors, kronecker_factors

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


def error(estimate: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Mean over the layers of the relative Frobenius error."""
    return mean(float((estimate[k] - truth[k]).norm() / truth[k].norm()) for k in truth)


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    unet, scheduler, x0 = trained_on_digits(20 if options.quick else 1500)
    unet = unet.to(options.device)
    x0 = x0[: 16 if options.quick else 256]
    objective = DenoisingObjective(unet, scheduler)
    layers = supported_layers(unet, None).layers

    def factors(
        timesteps: str, num_draws: int, probe: str, probes: int, seed: int
    ) -> KroneckerFactors:
        regression = NoisedRegression(
            objective, x0, num_draws, seed, timesteps=timesteps, batch_size=128
        )
        kfac = KFACOptions.parse("mc", probes, "expand", True, probe)
        return kronecker_factors(regression, layers, kfac)

    truth = factors("stratified", 2 if options.quick else 256, "rademacher", 2, seed=1000)
    table = []
    for timesteps, num_draws, probe, probes in SETTINGS:
        seconds, errors_A, errors_B = [], [], []
        for seed in range(options.repeats):
            start = time.perf_counter()
            estimate = factors(timesteps, num_draws, probe, probes, seed)
            seconds.append(time.perf_counter() - start)
            errors_A.append(error(estimate.inputs, truth.inputs))
            errors_B.append(error(estimate.outputs, truth.outputs))
        A, B, time_taken = mean(errors_A), mean(errors_B), median(seconds)
        table.append(
            {
                "timesteps": timesteps,
                "draws": num_draws,
                "probe_type": probe,
                "mc_samples": probes,
                "seconds": round(time_taken, 3),
                "error_A": round(A, 4),
                "error_B": round(B, 4),
                "squared_error_A_times_seconds": round(A**2 * time_taken, 5),
                "squared_error_B_times_seconds": round(B**2 * time_taken, 5),
            }
        )
    report(
        options.output,
        f"draws_{options.device}",
        {"question": (__doc__ or "").splitlines()[0], "examples": len(x0), "settings": table},
    )


if __name__ == "__main__":
    main()
