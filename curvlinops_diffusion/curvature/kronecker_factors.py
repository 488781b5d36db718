"""Kronecker factors and EK-FAC's eigenvalues: passes over the data, reduced at once to sums.

Legend: N batch, g an optional axis of groups, S weight-sharing positions, I inputs, O outputs,
D entries of a prediction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvlinops_diffusion.curvature.exact_blocks import ExactMoments
from curvlinops_diffusion.curvature.options import KFACApprox
from curvlinops_diffusion.curvature.passes import run_observed, run_on_gradients
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer, Part
from curvlinops_diffusion.layers.kind import at_positions
from curvlinops_diffusion.layers.moments import LatestProduct, MomentSums, second_moment, summable
from curvlinops_diffusion.layers.observation import (
    Observer,
    Observers,
    in_precision,
    observed,
    one_vector,
)
from curvlinops_diffusion.layers.probe import once, state_of, trial_of
from curvlinops_diffusion.linalg.factors import Eigendecomposition, trace
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sums import CompositeSums, Sums


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of every layer, averaged over examples, timesteps, noise and loss vectors.

    Attributes:
        inputs: ``A``, by :attr:`~curvlinops_diffusion.layers.layer.Part.key`; biases have none.
        outputs: ``B``, by :attr:`~curvlinops_diffusion.layers.layer.Part.output_key`.
        exact: Blocks without Kronecker form, by their key: matrices ``[n, n]``, or their diagonals
            ``[n]``.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    exact: dict[str, Tensor]


def fitted_factors(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions = PLAIN
) -> KroneckerFactors:
    """Compute the Kronecker factors that the options ask for, in one pass over the data or three.

    From gradients ``g = Σ_s b_s a_sᵀ``, ``[O, I]``, rather than their parts::

        shampoo:  B = E[g gᵀ],    A = E[gᵀ g] / E‖g‖²

    whose scale makes the trace exact (Morwani et al., 2024, *A New Perspective on Shampoo's
    Preconditioner*). Blocks without Kronecker form, and a bias' factor, are K-FAC's.
    """
    factors = kronecker_factors(regression, plan, passes)
    if plan.options.kfac_approx is not KFACApprox.SHAMPOO:
        return factors
    parts = plan.with_inputs

    def means(
        name: str, shape: Callable[[Part], Sequence[int]], moment: Callable[[Part, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        sums = Sums()

        def consume(layer: Layer, xs: list[Tensor], gs: list[Tensor], N: int) -> None:
            if layer.name in parts:
                part = parts[layer.name]
                sums.add(part.key, moment(part, part.weight_gradients(xs, gs, N)))

        run_on_gradients(name, regression, plan, passes, consume, sums)
        return {p.key: _mean(sums, p.key, regression, shape(p)) for p in parts.values()}

    def of_columns(part: Part, g_NgOI: Tensor) -> Tensor:
        if part.kind.one_hot:
            return g_NgOI.square().sum((0, -2))
        g = g_NgOI.movedim(0, -2).flatten(-3, -2)  # [*g, O N, I]
        return g.mT @ g

    def of_rows(part: Part, g_NgOI: Tensor) -> Tensor:
        g = g_NgOI.movedim(0, -1).flatten(-2)  # [*g, O, I N]
        return g @ g.mT

    A = means("Input factors", lambda part: part.input_shape, of_columns)
    B = means("Output factors", lambda part: part.output_shape, of_rows)
    inputs = {key: _divided_by_trace(moment) for key, moment in A.items()}
    outputs = {part.output_key: B[part.key] for part in parts.values()}
    return replace(factors, inputs=factors.inputs | inputs, outputs=factors.outputs | outputs)


def _divided_by_trace(moment: Tensor) -> Tensor:
    """Divide by the trace, for each group; zeros stay."""
    divisor = trace(moment)
    divisor = divisor.where(divisor > 0, 1.0)
    return moment / (divisor[..., None, None] if divisor.ndim > 0 else divisor)


def _mean(sums: Sums, key: str, regression: NoisedRegression, shape: Sequence[int]) -> Tensor:
    """Divide a sum by its number of terms, here and nowhere else; zeros if there were none."""
    dtype, device = regression.objective.working_dtype, regression.device
    zeros = partial(torch.zeros, shape, dtype=dtype, device=device)
    return sums.take_mean(key, regression.num_samples, zeros).to(dtype)


def eigenvalue_moments(
    regression: NoisedRegression,
    plan: BlockPlan,
    input_bases: Mapping[str, Eigendecomposition],
    output_bases: Mapping[str, Eigendecomposition],
    passes: PassOptions = PLAIN,
) -> dict[str, Tensor]:
    """Compute EK-FAC's eigenvalues ``Λ_ij = E[(U_Bᵀ g U_A)_ij²]`` in one pass over the data.

    ``[*g, O, I]`` for every block of Kronecker form, by its key; eigenbases are by the factor's.
    """
    sums = Sums()

    def consume(layer: Layer, xs: list[Tensor], gs: list[Tensor], N: int) -> None:
        for part in plan.by_layer[layer.name]:
            U_B = output_bases[part.output_key].vectors
            U_A = None if part.is_bias else input_bases[part.key].vectors
            sums.add(part.key, part.squares(xs, gs, N, U_A, U_B))

    run_on_gradients("Eigenvalues", regression, plan, passes, consume, sums)
    return {part.key: _mean(sums, part.key, regression, part.shape) for part in plan.parts}


def kronecker_factors(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions = PLAIN
) -> KroneckerFactors:
    """Compute the Kronecker factors, and the blocks that have none, in one pass over the data.

    By the formulas of :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`, the expectation
    being over examples, draws and loss vectors.

    Source: Eschenhagen et al., 2023, Sections 3.2 and 3.3; Mlodozeniec et al., 2025, Section 2.3.

    Raises:
        ValueError: If a prediction is not finite, the calls of a layer vary in a way that was not
            foreseen, or a checkpoint is of something else.
    """
    dtype = regression.objective.working_dtype
    samples = PositionSamples(regression.draws, plan.options.max_positions, regression.device)
    with_inputs = [part.layer for part in plan.with_inputs.values()]
    calls = call_patterns(regression, plan.beside or with_inputs)
    inputs = _InputFactors(plan, dtype, calls, samples)
    outputs = _OutputFactors(plan, dtype, samples)
    exact = ExactMoments(regression.objective, plan.exact, plan.coverage)
    run_observed(
        "Kronecker factors",
        regression,
        plan,
        passes,
        plan.beside or plan.coverage.layers,
        Observers([samples, inputs, outputs, exact]),
        CompositeSums({"inputs": inputs.running, "outputs": outputs.sums, "exact": exact.sums}),
    )

    by_block = exact.by_block()
    output_shapes = {part.output_key: part.output_shape for part in plan.parts}
    return KroneckerFactors(
        {part.key: inputs.mean(part, regression) for part in plan.with_inputs.values()},
        {key: _mean(outputs.sums, key, regression, shape) for key, shape in output_shapes.items()},
        {b.key: _mean(by_block, b.key, regression, b.moment_shape) for b in plan.exact},
    )


class Calls(NamedTuple):
    """The calls of a layer in one forward pass.

    Attributes:
        number: How many there are; calls under ``torch.no_grad()`` do not count.
        differentiated: The numbers of those that the prediction depends on.
    """

    number: int
    differentiated: tuple[int, ...]


class CallCounter(Observer):
    """Counts the calls of each layer, and the gradients of their outputs in a backward pass."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._differentiated: dict[str, set[int]] = {}

    def start(self, batch: NoisedBatch) -> None:
        """Begin anew."""
        self._numbers, self._differentiated = Counter(), {}

    def input(self, layer: Layer, x: Tensor) -> None:
        """Count a call."""
        self._numbers[layer.name] += 1

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Note that the prediction depends on a call."""
        self._differentiated.setdefault(layer.name, set()).add(call)

    def of(self, name: str) -> Calls:
        """The calls of a layer, once a backward pass is over."""
        return Calls(self._numbers[name], tuple(sorted(self._differentiated.get(name, ()))))


def call_patterns(regression: NoisedRegression, layers: Sequence[Layer]) -> dict[str, Calls]:
    """The calls of each layer by name, where they are the same at a low and a high noise level."""

    def look() -> dict[str, Calls]:
        trial, counter = trial_of(regression), CallCounter()
        patterns: list[dict[str, Calls]] = []
        with observed(regression.objective, layers, counter) as network:
            for batch in (trial.low, trial.high):
                network.run(batch, one_vector(batch.loss_gradient))
                patterns.append({layer.name: counter.of(layer.name) for layer in layers})
        low, high = patterns
        return dict(low.items() & high.items())

    found: dict[str, Calls] = once(regression, ("calls", *state_of(regression, layers)), look)
    return found


class PositionSamples(Observer):
    """A random sample of positions in place of all: a function of seed, example and draw.

    With ``m`` of ``S`` positions, each drawn ``m/S`` times on average, ``S/m Σ`` over the sample is
    an unbiased estimate of the sum over all. There are ``most``, or all if that is ``None``; layers
    with equally many positions share them.
    """

    def __init__(self, draws: Draws, most: int | None, device: torch.device):
        self._draws = draws
        self._most = most
        self._device = device
        self._batch: NoisedBatch | None = None
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def start(self, batch: NoisedBatch) -> None:
        """Another batch."""
        self._batch, self._drawn = batch, {}

    def of(self, rows: int, positions: int) -> Tensor | None:
        """The positions ``[rows, m]`` of a layer that are looked at; ``None`` for all.

        Args:
            rows: Entries of the first axis of what it sees: equally many for each example.
            positions: The number ``S`` of positions of each of them.
        """
        if self._most is None or positions <= self._most:
            return None
        key = rows, positions
        if key not in self._drawn:
            assert self._batch is not None, "a batch starts first"
            examples, draw = self._batch.indices, self._batch.common_draw
            index = self._draws.positions(examples, draw, self._most, positions)
            index = index.repeat_interleave(rows // len(examples), 0)
            self._drawn[key] = index.to(self._device, non_blocking=True)
        return self._drawn[key]

    def finish(self) -> None:
        """Forget the batch."""
        self._batch, self._drawn = None, {}


class _InputFactors(Observer):
    """Sums that become ``A``: one term for each forward pass, over the calls of a layer.

    Only calls that the prediction depends on count. In the forward pass it is not known yet which
    these are; they are taken to be those of the trial (``calls``), so that an input need not be
    held, and looked at again after the backward pass. The inputs of layers whose calls vary are
    held.
    """

    def __init__(
        self,
        plan: BlockPlan,
        dtype: torch.dtype,
        calls: Mapping[str, Calls],
        samples: PositionSamples,
    ):
        self._parts = plan.with_inputs
        self._expand = plan.options.kfac_approx is not KFACApprox.REDUCE
        self._dtype = dtype
        self._calls = calls
        self._samples = samples
        self._counter = CallCounter()
        self._undecided = True  # until the batch's first backward pass is over
        self._latest = LatestProduct()
        self._sums = MomentSums()
        self._rows = Sums()  # the last rows of factors of weight and bias together
        made = {n: p.kind.patch_moment(p.layer.module) for n, p in self._parts.items()}
        self._patches = {name: moment for name, moment in made.items() if moment is not None}
        patches = CompositeSums(self._patches)
        self.running = CompositeSums({"sums": self._sums, "rows": self._rows, "patches": patches})
        self._held: dict[str, list[Tensor]] = {}
        self._shown: Tensor | None = None  # the latest input, and in the working precision
        self._x = torch.empty(0)
        self._N = 0

    def start(self, batch: NoisedBatch) -> None:
        self._N = len(batch.indices)
        self._counter.start(batch)
        self._undecided = True

    def input(self, layer: Layer, x: Tensor) -> None:
        if layer.name not in self._parts:
            return
        number = self._counter.of(layer.name).number
        self._counter.input(layer, x)
        calls = self._calls.get(layer.name)
        if calls is not None and number not in calls.differentiated:
            return
        if x is not self._shown:  # layers that share an input share what is computed from it
            # means over positions are no products
            self._x = summable(x, self._dtype) if self._expand else in_precision(x, self._dtype)
            self._shown = x
        held = self._held.setdefault(layer.name, [])
        held.append(self._x)
        if calls is not None and len(held) == len(calls.differentiated):
            self._add(layer.name, range(len(held)))

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        self._forget()  # the backward pass needs none of it

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        if self._undecided and layer.name in self._parts:
            self._counter.gradient(layer, call, g, calls)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        if not self._undecided:
            return
        self._undecided = False
        for name in self._parts:
            now, expected = self._counter.of(name), self._calls.get(name)
            if expected is None and now.differentiated:
                self._add(name, now.differentiated)
            elif expected is not None and now != expected:
                raise ValueError(
                    f"Layer '{name}' was called {now.number} times in the batch of example "
                    f"{batch.indices[0]} (noise level {int(batch.level_B[0])}), and the prediction "
                    f"depends on {len(now.differentiated)} of these calls; on the first examples "
                    f"it was called {expected.number} times, {len(expected.differentiated)} of "
                    "which count. Its input factor would be wrong: leave it out of params, or pass "
                    "kfac_approx='shampoo', which is made of gradients."
                )

    def finish(self) -> None:
        self._held.clear()
        self._forget()

    def _forget(self) -> None:
        self._latest.forget()
        self._shown, self._x = None, torch.empty(0)

    def _add(self, name: str, numbers: Sequence[int]) -> None:
        """Add the calls of some numbers among those that are held."""
        part, held = self._parts[name], self._held.pop(name)
        xs = [held[number] for number in numbers]
        S = sum(part.positions(x, self._N) for x in xs)
        kind, module = part.kind, part.layer.module
        if not (self._expand or kind.one_hot):
            total_NgI = torch.stack([part.input_sum(x, self._N) for x in xs]).sum(0)
            self._sums.add(name, second_moment((total_NgI / S).unsqueeze(-2)))
            return
        for x in xs:
            own, index, weight = kind.positions(module, x), None, 1 / S
            if not kind.one_hot:
                index = self._samples.of(len(x), own)
            if index is not None:
                weight = own / index.shape[1] / S
            if index is None and name in self._patches:
                self._patches[name].add(x, weight)
            else:
                moment = kind.input_moment(module, x, index, self._latest)
                self._sums.add_times(name, moment, weight)
            if part.joint:
                self._rows.add(name, part.input_row(x, index) * weight)

    def mean(self, part: Part, regression: NoisedRegression) -> Tensor:
        """The factor of a part; its sums are given away."""
        name, shape = part.layer.name, part.input_shape
        moment = self._patches.pop(name, None)
        if moment is not None and moment.tensors():
            self._sums.add(name, moment.total())
        del moment  # its spectra are twice as large as the sum
        if not (part.joint and self._expand):
            return _mean(self._sums, name, regression, shape)
        *groups, I, _ = shape
        inner = _mean(self._sums, name, regression, (*groups, I - 1, I - 1))
        A, row = pad(inner, (0, 1, 0, 1)), _mean(self._rows, name, regression, (*groups, I))
        A[..., -1, :], A[..., :, -1] = row, row
        return A


class _OutputFactors(Observer):
    """Sums that become ``B``: one term for each backward pass, over all calls of a layer."""

    def __init__(self, plan: BlockPlan, dtype: torch.dtype, samples: PositionSamples):
        self.sums = MomentSums()
        self._keys = {part.output_key for part in plan.parts}
        self._expand = plan.options.kfac_approx is not KFACApprox.REDUCE
        self._samples = samples
        self._dtype = dtype
        self._calls = Sums()
        self._N = 0

    def start(self, batch: NoisedBatch) -> None:
        self._N = len(batch.indices)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        if layer.name not in self._keys:
            return
        if not self._expand:
            b_NgSO = layer.gradients(g.to(self._dtype), self._N)
            self._calls.add(layer.name, b_NgSO.sum(-2, keepdim=True))
            return
        b_NgSO = layer.sharing.gradients(layer.module, g)
        S, weight = b_NgSO.shape[-2], 1.0
        index = self._samples.of(len(b_NgSO), S)
        if index is not None:
            b_NgSO, weight = at_positions(b_NgSO, index), S / index.shape[1]
        self.sums.add_second_moment(layer.name, summable(b_NgSO, self._dtype), weight)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        for name, total in self._calls.pop_all():  # with "reduce"
            self.sums.add_second_moment(name, total)
