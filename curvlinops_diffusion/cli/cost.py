"""``--dry-run`` counts what a command will cost; ``--time`` estimates its time from a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from curvlinops_diffusion.attributor import GAP_DRAWS, Attributor
from curvlinops_diffusion.cli.running import num_processes
from curvlinops_diffusion.curvature.division import (
    batches_are_divided,
    divided_units,
    needed_memory,
    num_groups,
)
from curvlinops_diffusion.curvature.kronecker_factors import fitted_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan, prepare
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernels import SOLVED
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.influence.more_draws import numbers_of_draws
from curvlinops_diffusion.influence.regression import FUNCTIONS, SINGLE_DRAWS
from curvlinops_diffusion.influence.scores import can_be_halved
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.linalg.factors import eigendecomposition
from curvlinops_diffusion.runtime.adapters import adapted_modules
from curvlinops_diffusion.runtime.passes import PLAIN

#: What a cost is known by, for people.
COUNTED = (
    "Counted from images, draws and layers: the network was not run. --time runs a batch, and adds "
    "how long it takes."
)
MEASURED = "Counted, and the time estimated from a batch on this machine as it is now."
_PROBE = 512


@dataclass(frozen=True)
class Cost:
    """The cost of a command, divided among its processes.

    Attributes:
        passes: Samples (image and draw) that go through the network forward and backward.
        file_bytes: Size of the output.
        checkpoint_bytes: Size of the checkpoints at the end, before they are removed.
        memory_bytes: Memory of each process for what a training pass does not hold.
        seconds: Time, with the machine as it is now, others taken to be as fast; ``None`` if it was
            not measured.
        parameters: Entries covered by a fit.
    """

    passes: int
    file_bytes: int
    checkpoint_bytes: int
    memory_bytes: int
    seconds: float | None = None
    parameters: int | None = None

    def times(self, count: int) -> Cost:
        """The cost of several, one after the other."""
        return replace(
            self,
            passes=count * self.passes,
            file_bytes=count * self.file_bytes,
            seconds=None if self.seconds is None else count * self.seconds,
        )

    def then(self, other: Cost) -> Cost:
        """The cost of another one after this."""
        seconds = None
        if self.seconds is not None and other.seconds is not None:
            seconds = self.seconds + other.seconds
        return replace(
            self,
            passes=self.passes + other.passes,
            file_bytes=self.file_bytes + other.file_bytes,
            checkpoint_bytes=max(self.checkpoint_bytes, other.checkpoint_bytes),
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            seconds=seconds,
        )

    def text(self) -> str:
        """A line for each."""
        lines = {} if self.parameters is None else {"parameters": f"{self.parameters:,}"}
        lines["samples forward and backward"] = f"{self.passes:,}"
        lines["file"] = _bytes(self.file_bytes)
        lines["checkpoints, until it is done"] = _bytes(self.checkpoint_bytes)
        lines["memory beyond a training pass"] = _bytes(self.memory_bytes)
        if num_processes() > 1:
            lines["processes, of such memory"] = f"{num_processes()}"
        if self.seconds is not None:
            lines["time"] = _duration(self.seconds)
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def fit_cost(
    attributor: Attributor,
    *,
    curvature: str,
    num_draws: int,
    options: dict[str, Any],
    timed: bool,
    **others: Any,
) -> Cost:
    """Count the cost of :meth:`Attributor.fit` with these arguments, ``timed`` with its time.

    Layers are counted as their types say; a fit tries out whether they behave so.
    """
    kfac, passes = KFACOptions(**options), attributor.passes
    regression = attributor.regression.with_draws(num_draws, antithetic=False)
    params = attributor.params
    coverage = covered_parameters(regression.objective.model, params)
    plan = BlockPlan.of(coverage, kfac)
    samples, second = regression.num_samples, 0
    entries = plan.num_entries
    itemsize, n = regression.objective.working_dtype.itemsize, num_processes()
    parameters = sum(p.numel() for p in coverage.params.values())
    file_entries, checkpoint_entries = entries, n * entries
    if curvature == "ekfac":
        second = regression.with_draws(kfac.num_eigenvalue_draws(regression)).num_samples
        file_entries += parameters
        checkpoint_entries += entries + n * parameters  # of the bases, and of the eigenvalues
    shards, most = n if passes.sharded else 1, passes.max_memory
    # a shard's process may go over all images, for some of the factors: that these take less time
    # than all is not in the estimate
    divided = shards == 1 or batches_are_divided(regression, plan, passes)
    times = 1 if divided else n
    held = divided_units(plan, shards)
    memory = max(needed_memory(units, itemsize) for units in held)
    groups = 1
    if most is not None:
        owned = [plan.restricted({n for unit in units for n in unit.names}) for units in held]
        groups = max(num_groups(own, most, itemsize) for own in owned if own.units)

    def fit(some: NoisedRegression) -> None:
        fitted_factors(some, prepare(some, params, kfac), PLAIN)

    seconds = None
    if timed:
        each, once = _measured(_first_batch(regression), fit)
        # a sample of the second pass takes longer (docs/performance.rst)
        seconds = once + each * (samples + 2 * second)
        if second:  # a decomposition is timed; others take the cube of the ratio of sizes
            matrix, start = torch.randn(_PROBE, _PROBE, dtype=torch.float64), time.perf_counter()
            eigendecomposition(matrix @ matrix.T, "probe")
            unit = time.perf_counter() - start
            seconds += sum(unit * (size / _PROBE) ** 3 for size in plan.factor_sizes())
        seconds *= groups * times / n
    return Cost(
        groups * times * (samples + second),
        file_entries * itemsize,
        checkpoint_entries // shards * itemsize,
        memory if most is None else min(memory, most),
        seconds,
        parameters,
    )


def score_cost(
    attributor: Attributor,
    queries: Any,
    fit: Cost | None = None,
    *,
    method: str | Sequence[str] | None,
    measurement: str,
    num_draws: int | Literal["auto"],
    max_draws: int,
    query_draws: int | None,
    query_block: int,
    held_out: Any = None,
    embedding: Any = None,
    timed: bool,
    **others: Any,
) -> Cost:
    """Count the cost of :meth:`Attributor.score` with these arguments, ``timed`` with its time.

    ``fit`` is the cost of the curvature where there is none yet.
    """
    if fit is None:
        operator = attributor.operator
        params: Any = operator.param_names
        P, itemsize = operator.shape[0], operator.dtype.itemsize
        curvature_bytes = sum(placed.num_bytes for placed in operator.blocks)
    else:
        params, P = attributor.params, fit.parameters or 0
        itemsize = attributor.objective.working_dtype.itemsize
        curvature_bytes = fit.file_bytes // (num_processes() if attributor.passes.sharded else 1)
    times = 1
    if isinstance(num_draws, str):  # at most, each of them anew
        numbers = numbers_of_draws(attributor.regression, max_draws)
        num_draws, times = sum(numbers), len(numbers)
        query_draws = None if query_draws is None else times * query_draws
    train = attributor.gradients(num_draws=num_draws).regression
    draws = num_draws if query_draws is None else query_draws
    query = attributor.gradients(queries, num_draws=draws).regression

    def rows(some: NoisedRegression, measured: str = "loss") -> None:
        J = ExampleGradientLinearOperator(some, params, measurement=measured)
        list(J.row_batches())

    n = num_processes()
    halved = can_be_halved(train) and can_be_halved(query)
    scores = query.num_data * train.num_data * itemsize * (3 if halved else 1)
    methods = attributor.methods(method, measurement, num_draws, held_out, embedding)
    if not any(each.takes_draws for each in methods):
        passes, held = (0, 0), 0  # a kernel matrix of the images
        curvature_bytes += 24 * train.num_data**2
    elif Method.REGRESSION in methods:
        # halves of the draws are held side by side
        runs, streams = FUNCTIONS, 2 if halved else 1
        block = max(1, SOLVED.gradient_bytes // (P * itemsize * streams))
        parts = [-(-some.num_data // block) for some in (train, query)]
        # all gradients once if they are held, else once for each block that they stream past
        past = 1 if parts[0] == 1 else 1 + sum(parts)
        singles = train.single_draws(SINGLE_DRAWS)
        passes = (
            runs * past * train.num_samples + times * len(singles) * singles[0].num_samples,
            runs * query.num_samples,
        )
        # kernels of halves with each other, and what is solved of them
        curvature_bytes += (2 * streams**2 * itemsize + 4 * 8) * train.num_data**2
        held = 3 * streams * min(block, max(train.num_data, query.num_data))
    else:
        blocks = -(-query.num_data // query_block)
        passes = (blocks * train.num_samples, query.num_samples)
        held = min(query_block, query.num_data) + min(
            train.batch_size or train.num_data, train.num_data
        )
        held *= 2 if halved else 1
    calls = getattr(MEASUREMENTS[measurement].load(), "calls", 1)
    seconds = None
    if timed:
        each, once = _measured(_first_batch(train), rows)
        of_query, once_too = _measured(_first_batch(query, 1), lambda some: rows(some, measurement))
        seconds = once + once_too + (passes[0] * each + passes[1] * of_query) / n
    gap = 0
    if held_out is not None:  # of network and base network; forward alone
        networks = 2 if adapted_modules(train.objective.model) else 1
        gap = networks * train.draws.rounded_up(GAP_DRAWS) * (train.num_data + len(held_out))
    return Cost(
        passes[0] + calls * passes[1] + times * gap,
        scores,
        scores if attributor.passes.sharded else n * scores,
        P * held * itemsize + curvature_bytes,
        seconds,
    )


# draws of a batch in the shorter and in the longer of two runs, whose difference is measured; two,
# so that the network is tried out in both on as many samples
_SHORT, _LONG = 2, 4


def _measured(
    problem: Callable[[int], NoisedRegression], run: Callable[[NoisedRegression], Any]
) -> tuple[float, float]:
    """Seconds of each sample; and once, of trying out the network before the first."""

    def timed(draws: int) -> float:
        some, start = problem(draws), time.perf_counter()  # each tries out the network
        run(some)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(problem(1))  # a first one warms up
    short, long = timed(_SHORT), timed(_LONG)
    num_data = problem(1).num_data
    # a busy machine may take longer for less
    seconds = max(long - short, long / 10) / ((_LONG - _SHORT) * num_data)
    return seconds, max(0.0, short - seconds * _SHORT * num_data)


def _first_batch(
    regression: NoisedRegression, most: int | None = None
) -> Callable[[int], NoisedRegression]:
    """The problem of the first examples, given a number of draws."""
    clean = next(regression.clean_batches())
    clean = clean.select(range(len(clean.indices))[:most])
    data = {"x0": clean.x0, **clean.condition}
    seed, size = regression.draws.seed, len(clean.indices)
    return lambda draws: NoisedRegression(regression.objective, data, draws, seed, batch_size=size)


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
