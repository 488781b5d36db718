"""One pass over the data: what the layers see, reduced at once to sums.

A pass runs the network on every draw and, for each loss vector, one backward pass. The sums are
divided by their number of terms here (``means``) and nowhere else.

Legend: N batch, g an optional axis of groups, S weight-sharing positions, I inputs, O outputs,
D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from curvlinops_diffusion.curvature.exact_blocks import ExactSums
from curvlinops_diffusion.curvature.loss_vectors import CheckedLossVectors
from curvlinops_diffusion.curvature.options import KFACApprox
from curvlinops_diffusion.curvature.plan import BlockPlan, Zeros
from curvlinops_diffusion.curvature.position_samples import PositionSamples
from curvlinops_diffusion.curvature.shared_batches import SharedBatches
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import ExactKind, Layer
from curvlinops_diffusion.layers.kind import at_positions
from curvlinops_diffusion.layers.mapped_gradients import mapped_gradients
from curvlinops_diffusion.layers.moments import LatestProduct, MomentSums, second_moment
from curvlinops_diffusion.layers.observable import (
    CallCounter,
    Calls,
    ObservedRetrial,
    call_patterns,
)
from curvlinops_diffusion.layers.observation import (
    Observer,
    Observers,
    WithinEach,
    in_precision,
    observed,
)
from curvlinops_diffusion.layers.products import summable
from curvlinops_diffusion.linalg.factors import identity_like
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, run_pass
from curvlinops_diffusion.runtime.precision import matmuls_in_tf32
from curvlinops_diffusion.runtime.sums import CompositeSums, Sums, prefixed, within


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

    Args:
        regression: Objective, data and draws.
        plan: The blocks.
        passes: Checkpoints, processes and progress.

    Returns:
        The factors, in the working precision.

    Raises:
        ValueError: If a prediction is not finite, the calls of a layer vary in a way that was not
            foreseen, or a checkpoint is of something else.
    """
    objective, layers = regression.objective, plan.watched
    with_inputs = [part.layer for part in plan.with_inputs.values()]
    calls = call_patterns(regression, plan.beside or with_inputs)
    dtype, backward = objective.working_dtype, plan.options.has_gradients
    samples = PositionSamples(regression.draws, plan.options.max_positions, regression.device)
    inputs = _InputFactors(plan, dtype, calls, backward, samples)
    outputs = _OutputFactors(plan, dtype, samples)
    exact = _ExactBlocks(regression, plan, dtype)
    vectors = CheckedLossVectors(regression, plan.options)
    running = CompositeSums({"inputs": inputs, "outputs": outputs, "exact": exact})
    observers: Observer = Observers([samples, inputs, outputs, exact])
    if plan.options.rounds_products(regression.device):
        observers = WithinEach(observers, matmuls_in_tf32)
    shared = SharedBatches(regression, plan.holders, observers)
    retried = ObservedRetrial(regression, layers)
    with observed(objective, layers, shared, backward) as network:

        def step(clean: CleanBatch) -> None:
            for batch in shared.noised_batches(clean):
                network.run(batch, vectors)
            vectors.settle()
            retried(clean)

        run_pass(
            *("Kronecker factors", regression, running, step, passes, plan.settings),
            together=shared.processes,
            on_batch=shared.tell,
        )
    count = regression.num_samples
    if not backward:
        return KroneckerFactors(inputs.means(count), outputs.identities(), exact.identities())
    return KroneckerFactors(inputs.means(count), outputs.means(count), exact.means(count))


class _InputFactors(Observer):
    """Sums that become ``A``: one term for each forward pass, over the calls of a layer.

    Only calls that the prediction depends on count. In the forward pass it is not known yet which
    these are; they are taken to be those of the trial, so that an input need not be held, and
    looked at again after the backward pass. The inputs of layers whose calls vary are held.

    Args:
        plan: The blocks.
        dtype: The working precision.
        calls: The calls of the layers where these do not vary.
        backward: Whether there are backward passes.
        samples: The positions that are looked at.
    """

    def __init__(
        self,
        plan: BlockPlan,
        dtype: torch.dtype,
        calls: Mapping[str, Calls],
        backward: bool,
        samples: PositionSamples,
    ):
        self._parts = plan.with_inputs
        self._zeros = plan.input_zeros(dtype)
        self._expand = plan.options.kfac_approx is not KFACApprox.REDUCE
        self._dtype = dtype
        self._calls = calls
        self._backward = backward
        self._samples = samples
        self._counter = CallCounter()
        self._undecided = True  # until the batch's first backward pass is over
        self._latest = LatestProduct()
        self._moments = {
            name: part.input_moment(self._latest)
            for name, part in self._parts.items()
            if self._expand or part.kind.one_hot
        }
        self._sums = Sums()  # with "reduce", or of samples of positions
        self._seen: set[str] = set()
        self._arrived: dict[str, list[Tensor]] = {}
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
        arrived = self._arrived.setdefault(layer.name, [])
        arrived.append(self._x)
        if calls is not None and len(arrived) == len(calls.differentiated):
            self._add(layer.name, range(len(arrived)))

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        if not self._backward:
            for name, arrived in list(self._arrived.items()):
                self._add(name, range(len(arrived)))
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
        self._arrived.clear()
        self._forget()

    def _forget(self) -> None:
        self._latest.forget()
        self._shown, self._x = None, torch.empty(0)

    def _add(self, name: str, numbers: Sequence[int]) -> None:
        """Add the calls of some numbers among those that arrived."""
        part, arrived = self._parts[name], self._arrived.pop(name)
        xs = [arrived[number] for number in numbers]
        S = sum(part.positions(x, self._N) for x in xs)
        if name in self._moments:
            for x in xs:
                self._add_call(name, x, S)
        else:
            sums = [part.input_sum(x, self._N) for x in xs]
            mean_NgI = torch.stack(sums).sum(0) / S
            self._sums.add(name, second_moment(mean_NgI.unsqueeze(-2)))

    def _add_call(self, name: str, x: Tensor, S: int) -> None:
        """Add the mean over all positions of an example, or what a sample of them tells of it."""
        part = self._parts[name]
        own = part.kind.positions(part.layer.module, x)
        index = None if part.kind.one_hot else self._samples.of(len(x), own)
        if index is None:
            self._moments[name].add(x, 1 / S)
            self._seen.add(name)
            return
        moment = part.sampled_input_moment(x, index, self._latest)
        self._sums.add(name, moment * (own / index.shape[1] / S))

    def tensors(self) -> dict[str, Tensor]:
        result = prefixed("sums", self._sums.tensors())
        for name in self._seen:
            result |= prefixed(f"moments/{name}", self._moments[name].tensors())
        return result

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._sums.restore(within("sums", tensors))
        for name, moment in self._moments.items():
            own = within(f"moments/{name}", tensors)
            if own:
                moment.restore(own)
                self._seen.add(name)

    def means(self, count: int) -> dict[str, Tensor]:
        result = {}
        for name, part in self._parts.items():
            zeros = self._zeros[part.input_key]
            if name in self._seen:  # which are given away one by one, as the sums
                self._sums.add(name, self._moments.pop(name).total().to(self._dtype))
            result[part.input_key] = self._sums.take_mean(name, count, zeros)
        return result


AnySums = TypeVar("AnySums", bound=Sums)


class _MeanSums(Observer, Generic[AnySums]):
    """Sums of one term for each backward pass, over all calls of a layer.

    Args:
        zeros: Makes what the sums are where nothing arrives, by their key.
        sums: The sums.
    """

    def __init__(self, zeros: Mapping[str, Zeros], sums: AnySums):
        self._zeros = zeros
        self._sums = sums
        self._N = 0

    def start(self, batch: NoisedBatch) -> None:
        self._N = len(batch.indices)

    def tensors(self) -> dict[str, Tensor]:
        return self._sums.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._sums.restore(tensors)

    def means(self, count: int) -> dict[str, Tensor]:
        return {key: self._sums.take_mean(key, count, zeros) for key, zeros in self._zeros.items()}

    def identities(self) -> dict[str, Tensor]:
        """For K-FAC without backward passes."""
        return {key: identity_like(zeros()) for key, zeros in self._zeros.items()}


class _OutputFactors(_MeanSums[MomentSums]):
    """Sums that become ``B``."""

    def __init__(self, plan: BlockPlan, dtype: torch.dtype, samples: PositionSamples):
        super().__init__(plan.output_zeros(dtype), MomentSums())
        self._expand = plan.options.kfac_approx is not KFACApprox.REDUCE
        self._samples = samples
        self._dtype = dtype
        self._calls = Sums()

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        if layer.name not in self._zeros:
            return
        if self._expand:
            self._add_positions(layer.name, layer.position_gradients(g))
        else:
            b_NgSO = layer.gradients(g.to(self._dtype), self._N)
            self._calls.add(layer.name, b_NgSO.sum(-2, keepdim=True))

    def _add_positions(self, key: str, b_NgSO: Tensor) -> None:
        """Add the second moment over all positions, or what a sample of them tells of it."""
        S = b_NgSO.shape[-2]
        index = self._samples.of(len(b_NgSO), S)
        seen = b_NgSO if index is None else at_positions(b_NgSO, index)
        weight = 1.0 if index is None else S / index.shape[1]
        self._sums.add_second_moment(key, summable(seen, self._dtype), weight)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        for name, total in self._calls.pop_all():  # with "reduce"
            self._sums.add_second_moment(name, total)


class _ExactBlocks(_MeanSums[ExactSums]):
    """Sums that become exact blocks."""

    def __init__(self, regression: NoisedRegression, plan: BlockPlan, dtype: torch.dtype):
        super().__init__(plan.exact_zeros(dtype), ExactSums())
        self._objective = regression.objective
        self._blocks = plan.exact
        self._dtype = dtype
        self._mapped = {name: plan.coverage.params[name] for name in plan.coverage.others}
        self._layers = {block.layer.name for block in self._blocks if block.layer is not None}
        self._inputs: dict[str, list[Tensor]] = {}  # call by call
        self._gradients = Sums()  # of single examples, by parameter

    def input(self, layer: Layer, x: Tensor) -> None:
        if isinstance(layer.kind, ExactKind) and layer.name in self._layers:
            self._inputs.setdefault(layer.name, []).append(x)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        if layer.name not in self._layers:
            return
        g = g.to(self._dtype)
        if isinstance(layer.kind, ExactKind):
            (x,) = in_precision([self._inputs[layer.name][call]], self._dtype)
            for name, gradient in layer.example_gradients([x], [g], self._N).items():
                self._gradients.add(name, gradient)
        else:
            assert layer.bias is not None
            self._gradients.add(layer.bias, layer.bias_gradients(g, self._N))

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        mapped = mapped_gradients(self._objective, batch, v_BD, self._mapped)
        arrived = dict(self._gradients.pop_all()) | mapped
        seen = [b for b in self._blocks if any(name in arrived for name in b.params)]
        self._sums.add_gradients(seen, arrived)

    def finish(self) -> None:
        self._inputs.clear()
        self._gradients.pop_all()
