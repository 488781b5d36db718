"""Accuracy for a given time, by which estimates of a trained network's curvature are compared."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, TypeVar

from torch import Tensor

from benchmarks.problems import trained_on_digits
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors
from curvlinops_diffusion.layers import Coverage, covered_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class DigitsProblem:
    """256 digits (16 for a quick run), and a network that was trained on all of them."""

    objective: DenoisingObjective
    coverage: Coverage
    x0: Tensor
    all_x0: Tensor

    @classmethod
    def of(cls, options: Namespace) -> DigitsProblem:
        """Train the network."""
        network, scheduler, x0 = trained_on_digits(20 if options.quick else 1500)
        network = network.to(options.device)
        some = x0[: 16 if options.quick else 256]
        coverage = covered_parameters(network, None)
        return cls(DenoisingObjective(network, scheduler), coverage, some, x0)

    def regression(self, num_draws: int, seed: int, **options: Any) -> NoisedRegression:
        """The problem with given draws."""
        return NoisedRegression(self.objective, self.x0, num_draws, seed, batch_size=128, **options)


def relative_error(estimate: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Mean over the blocks of the relative Frobenius error."""
    return mean(float((estimate[k] - truth[k]).norm() / truth[k].norm()) for k in truth)


def factor_errors(estimate: KroneckerFactors, truth: KroneckerFactors) -> dict[str, float]:
    """The errors of ``A`` and of ``B``."""
    return {
        "error_A": relative_error(estimate.inputs, truth.inputs),
        "error_B": relative_error(estimate.outputs, truth.outputs),
    }


def accuracy(
    estimate: Callable[[int], T], errors: Callable[[T], Mapping[str, float]], repeats: int
) -> dict[str, float]:
    """Time and errors of an estimate over seeds, and the time for a given accuracy.

    Args:
        estimate: From a seed to an estimate.
        errors: Its errors, by name.
        repeats: Seeds.

    Returns:
        Median seconds, mean errors, and squared error times seconds.
    """
    seconds, found = [], []
    for seed in range(repeats):
        start = time.perf_counter()
        result = estimate(seed)
        seconds.append(time.perf_counter() - start)
        found.append(errors(result))
    means = {name: mean(row[name] for row in found) for name in found[0]}
    taken = median(seconds)
    return (
        {"seconds": round(taken, 3)}
        | {name: round(value, 4) for name, value in means.items()}
        | {f"squared_{name}_times_seconds": round(v**2 * taken, 5) for name, v in means.items()}
    )
