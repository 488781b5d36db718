"""Over how many examples should EK-FAC sum gradients before it squares them?

Sums save rotations and add variance. What counts is the variance for a given time, that is the
product of squared error and seconds. The eigenbases are those of a reference with many draws.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from statistics import mean

import torch
from torch import Tensor

from benchmarks.measure import arguments, report
from benchmarks.problems import trained_on_digits
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.factors import eigendecomposition
from curvlinops_diffusion.fisher import KFACOptions
from curvlinops_diffusion.layers import supported_layers
from curvlinops_diffusion.statistics import eigenvalue_moments, kronecker_factors


def relative_error(estimate: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Mean over the blocks of the relative Frobenius error."""
    return mean(float((estimate[k] - truth[k]).norm() / truth[k].norm()) for k in truth)


def log_error(estimate: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square of the logarithms' differences, small eigenvalues counting like large."""
    logs = [
        (estimate[k] / truth[k])[truth[k] > 1e-6 * truth[k].max()].log().flatten() for k in truth
    ]
    return float(torch.cat(logs).square().mean().sqrt())


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    unet, scheduler, x0 = trained_on_digits(20 if options.quick else 1500)
    unet = unet.to(options.device)
    x0 = x0[: 16 if options.quick else 256]
    objective = DenoisingObjective(unet, scheduler)
    layers = supported_layers(unet, None).layers
    kfac = KFACOptions.parse("mc", 1, "expand", True, "rademacher")

    def problem(num_draws: int, seed: int) -> NoisedRegression:
        return NoisedRegression(objective, x0, num_draws, seed, batch_size=128)

    reference = problem(2 if options.quick else 128, seed=1000)
    factors = kronecker_factors(reference, layers, kfac)
    bases = [
        {key: eigendecomposition(matrix, key) for key, matrix in matrices.items()}
        for matrices in (factors.inputs, factors.outputs)
    ]
    truth = eigenvalue_moments(reference, layers, *bases, kfac)

    rows: dict[int, list[tuple[float, float, float]]] = {}
    for seed in range(options.repeats):
        regression = problem(4, seed)
        for group in (1, 2, 4, 8, 16, 32, 64):
            start = time.perf_counter()
            estimate = eigenvalue_moments(
                regression, layers, *bases, replace(kfac, gradient_group=group)
            )
            seconds = time.perf_counter() - start
            errors = relative_error(estimate, truth), log_error(estimate, truth)
            rows.setdefault(group, []).append((seconds, *errors))
    table = []
    for group, values in rows.items():
        seconds, frobenius, log = (
            sorted(column)[len(column) // 2] for column in zip(*values, strict=True)
        )
        table.append(
            {
                "group": group,
                "seconds": round(seconds, 3),
                "relative_frobenius_error": round(frobenius, 4),
                "rms_log_error": round(log, 4),
                "squared_error_times_seconds": round(frobenius**2 * seconds, 5),
                "squared_log_error_times_seconds": round(log**2 * seconds, 5),
            }
        )
    report(
        options.output,
        f"eigenvalue_groups_{options.device}",
        {
            "question": (__doc__ or "").splitlines()[0],
            "draws": 4 * len(x0),
            "reference_draws": reference.num_samples,
            "groups": table,
        },
    )


if __name__ == "__main__":
    main()
