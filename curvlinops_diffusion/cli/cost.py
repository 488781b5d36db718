"""What a command will cost, from a measured batch: ``--dry-run``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from curvlinops_diffusion.cli.options import FitOptions, ScoreOptions
from curvlinops_diffusion.factors import eigendecomposition
from curvlinops_diffusion.fisher import KFACOptions
from curvlinops_diffusion.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.layers import Coverage, covered_parameters
from curvlinops_diffusion.operators.base import BlockDiagonalLinearOperator
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.statistics import kronecker_factors

# a decomposition of this size is timed; others take the cube of the ratio
_PROBE = 512


@dataclass(frozen=True)
class FitCost:
    """The cost of a fit.

    Attributes:
        parameters: Entries covered.
        passes: Samples (image and draw) that go through the network forward and backward.
        file_bytes: Size of the operator's file.
        memory_bytes: Memory for factors, and during decompositions.
        seconds: Time, with the machine as it is now.
    """

    parameters: int
    passes: int
    file_bytes: int
    memory_bytes: int
    seconds: float

    @classmethod
    def of(cls, regression: NoisedRegression, options: FitOptions) -> FitCost:
        """Measure a batch, and extrapolate."""
        kfac = KFACOptions.parse(
            options.fisher_type,
            options.mc_samples,
            options.kfac_approx,
            True,
            "rademacher",
            None,
            options.gradient_group,
        )
        coverage = covered_parameters(regression.objective.model, None)
        sizes = _factor_sizes(coverage, kfac)
        first = _first_batch(regression)
        batch_seconds = _seconds(lambda: kronecker_factors(first, coverage, kfac))
        per_sample = batch_seconds / first.num_samples
        samples = regression.num_samples
        entries = sum(n * n for n in sizes)
        itemsize = regression.objective.working_dtype.itemsize
        parameters = sum(p.numel() for p in coverage.params.values())
        seconds = per_sample * samples
        file_entries = entries
        if options.curvature == "ekfac":
            second = regression.with_draws(kfac.num_eigenvalue_draws(regression)).num_samples
            samples += second
            # a sample of the second pass takes longer (docs/performance.rst)
            seconds += 2 * per_sample * second + _decompositions(sizes)
            file_entries += parameters
        return cls(parameters, samples, file_entries * itemsize, 3 * entries * itemsize, seconds)

    def text(self) -> str:
        """A line for each."""
        return _lines(
            {
                "parameters": f"{self.parameters:,}",
                "samples forward and backward": f"{self.passes:,}",
                "file": _bytes(self.file_bytes),
                "memory beyond a training pass": _bytes(self.memory_bytes),
                "time": _duration(self.seconds),
            }
        )


@dataclass(frozen=True)
class ScoreCost:
    """The cost of scoring; attributes as those of :class:`FitCost`."""

    passes: int
    file_bytes: int
    memory_bytes: int
    seconds: float

    @classmethod
    def of(
        cls,
        train: NoisedRegression,
        query: NoisedRegression,
        operator: BlockDiagonalLinearOperator,
        options: ScoreOptions,
    ) -> ScoreCost:
        """Measure a batch, and extrapolate."""
        first = _first_batch(train)
        J = ExampleGradientLinearOperator(first, operator.param_names)
        per_sample = _seconds(lambda: list(J.row_batches())) / first.num_samples
        blocks = -(-query.num_data // options.query_block)
        samples = blocks * train.num_samples + query.num_samples
        P, itemsize = operator.shape[0], operator.dtype.itemsize
        held = min(options.query_block, query.num_data) + min(options.batch_size, train.num_data)
        return cls(
            samples,
            query.num_data * train.num_data * itemsize,
            P * held * itemsize + sum(placed.num_bytes for placed in operator.blocks),
            per_sample * samples,
        )

    def text(self) -> str:
        """A line for each."""
        return _lines(
            {
                "samples forward and backward": f"{self.passes:,}",
                "file": _bytes(self.file_bytes),
                "memory beyond a training pass": _bytes(self.memory_bytes),
                "time": _duration(self.seconds),
            }
        )


def _factor_sizes(coverage: Coverage, options: KFACOptions) -> list[int]:
    sizes = []
    for layer in coverage.layers:
        for part in layer.parts(options.separate_weight_and_bias, options.exact_bias):
            *groups, O, I = part.shape
            count = groups[0] if groups else 1
            sizes += [O] * count + ([] if part.kind.one_hot else [I] * count)
    return sizes


def _first_batch(regression: NoisedRegression) -> NoisedRegression:
    clean = next(regression.clean_batches())
    data = {"x0": clean.x0, **clean.condition}
    return NoisedRegression(
        regression.objective, data, 1, regression.draws.seed, batch_size=len(clean.indices)
    )


def _seconds(run: Callable[[], Any]) -> float:
    run()  # a first one warms up
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _decompositions(sizes: list[int]) -> float:
    matrix = torch.randn(_PROBE, _PROBE, dtype=torch.float64)
    start = time.perf_counter()
    eigendecomposition(matrix @ matrix.T, "probe")
    unit = time.perf_counter() - start
    return sum(unit * (n / _PROBE) ** 3 for n in sizes)


def _lines(values: dict[str, str]) -> str:
    width = max(map(len, values))
    return "\n".join(f"{name:{width}}  {value}" for name, value in values.items())


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _duration(seconds: float) -> str:
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"about {seconds / divisor:.2g} {unit}"
    return f"about {seconds / 86400:.2g} days"
