"""Kronecker factors from one pass over the data: what the layers see, reduced at once to sums.

Legend: N batch, g an optional axis of groups, S weight-sharing positions, I inputs, O outputs,
D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.curvature.exact_blocks import ExactMoments
from curvlinops_diffusion.curvature.options import KFACApprox
from curvlinops_diffusion.curvature.passes import run_observed
from curvlinops_diffusion.curvature.plan import BlockPlan, Zeros
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer
from curvlinops_diffusion.layers.kind import at_positions
from curvlinops_diffusion.layers.moments import LatestProduct, Moment, MomentSums, second_moment
from curvlinops_diffusion.layers.observation import Observer, Observers, in_precision
from curvlinops_diffusion.layers.probe import CallCounter, Calls, call_patterns
from curvlinops_diffusion.layers.products import summable
from curvlinops_diffusion.linalg.factors import identity_like
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sums import Sums, Together, prefixed, within


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of every layer, averaged over examples, timesteps, noise and loss vectors.

    Attributes:
        inputs: ``A``, by :attr:`~curvlinops_diffusion.layers.layer.Part.input_key`; biases have
            none.
        outputs: ``B``, by :attr:`~curvlinops_diffusion.layers.layer.Part.output_key`.
        exact: Blocks without Kronecker form, by their key: matrices ``[n, n]``, or their diagonals
            ``[n]``.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    exact: dict[str, Tensor]


def kronecker_factors(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions = PLAIN
) -> KroneckerFactors:
    """Compute the Kronecker factors, and the blocks that have none, in one pass over the data.

    With positions ``s = 1..S`` and the expectation over examples, draws and loss vectors::

        expand:  A = E[1/S Σ_s a_s a_sᵀ]                  B = E[Σ_s b_s b_sᵀ]
        reduce:  A = E[(1/S Σ_s a_s)(1/S Σ_s a_s)ᵀ]       B = E[(Σ_s b_s)(Σ_s b_s)ᵀ]
        exact:   F = E[g gᵀ]

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
        Together({"inputs": inputs, "outputs": outputs.sums, "exact": exact.sums}),
    )
    # sums are divided by their number of terms here and nowhere else
    count = regression.num_samples

    def means(sums: Sums, zeros: Mapping[str, Zeros]) -> dict[str, Tensor]:
        if not plan.options.has_gradients:
            return {key: identity_like(make()) for key, make in zeros.items()}
        return {key: sums.take_mean(key, count, make) for key, make in zeros.items()}

    return KroneckerFactors(
        inputs.means(count),
        means(outputs.sums, plan.output_zeros(dtype)),
        means(exact.sums, plan.exact_zeros(dtype)),
    )


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
        self._zeros = plan.input_zeros(dtype)
        self._expand = plan.options.kfac_approx is not KFACApprox.REDUCE
        self._dtype = dtype
        self._calls = calls
        self._backward = plan.options.has_gradients
        self._samples = samples
        self._counter = CallCounter()
        self._undecided = True  # until the batch's first backward pass is over
        self._latest = LatestProduct()
        self._moments: dict[str, Moment] = {}
        self._sums = Sums()  # with "reduce", or of samples of positions
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
        number = self._counter.of(layer.name).count
        self._counter.input(layer, x)
        calls = self._calls.get(layer.name)
        if calls is not None and number not in calls.differentiated:
            return
        if x is not self._shown:  # layers that share an input share what is computed from it
            # means over positions are no products
            (z,) = [summable(x, self._dtype)] if self._expand else in_precision([x], self._dtype)
            self._shown, self._x = x, z
        held = self._held.setdefault(layer.name, [])
        held.append(self._x)
        if calls is not None and len(held) == len(calls.differentiated):
            self._add(layer.name, range(len(held)))

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        if not self._backward:
            for name, held in list(self._held.items()):
                self._add(name, range(len(held)))
            self._undecided = False
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
                    f"Layer '{name}' was called {now.count} times in the batch of example "
                    f"{batch.indices[0]} (noise level {int(batch.level_B[0])}), and the prediction "
                    f"depends on {len(now.differentiated)} of these calls; on the first examples "
                    f"it was called {expected.count} times, {len(expected.differentiated)} of "
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
        if not (self._expand or part.kind.one_hot):
            sums = [part.input_sum(x, self._N) for x in xs]
            mean_NgI = torch.stack(sums).sum(0) / S
            self._sums.add(name, second_moment(mean_NgI.unsqueeze(-2)))
            return
        for x in xs:
            own = part.kind.positions(part.layer.module, x)
            index = None if part.kind.one_hot else self._samples.of(len(x), own)
            if index is None:
                self._moment(name).add(x, 1 / S)
            else:
                moment = part.sampled_input_moment(x, index, self._latest)
                self._sums.add(name, moment * (own / index.shape[1] / S))

    def _moment(self, name: str) -> Moment:
        if name not in self._moments:
            self._moments[name] = self._parts[name].input_moment(self._latest)
        return self._moments[name]

    def tensors(self) -> dict[str, Tensor]:
        result = prefixed("sums", self._sums.tensors())
        for name, moment in self._moments.items():
            result |= prefixed(f"moments/{name}", moment.tensors())
        return result

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._sums.restore(within("sums", tensors))
        self._moments = {}
        for name in self._parts:
            own = within(f"moments/{name}", tensors)
            if own:
                self._moment(name).restore(own)

    def means(self, count: int) -> dict[str, Tensor]:
        result = {}
        for name, part in self._parts.items():
            zeros = self._zeros[part.input_key]
            if name in self._moments:  # which are given away one by one, as the sums
                self._sums.add(name, self._moments.pop(name).total().to(self._dtype))
            result[part.input_key] = self._sums.take_mean(name, count, zeros)
        return result


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
        b_NgSO = layer.position_gradients(g)
        S, weight = b_NgSO.shape[-2], 1.0
        index = self._samples.of(len(b_NgSO), S)
        if index is not None:
            b_NgSO, weight = at_positions(b_NgSO, index), S / index.shape[1]
        self.sums.add_second_moment(layer.name, summable(b_NgSO, self._dtype), weight)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        for name, total in self._calls.pop_all():  # with "reduce"
            self.sums.add_second_moment(name, total)
