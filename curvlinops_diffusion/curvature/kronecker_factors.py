"""One pass over the data: what the layers see, reduced at once to sums.

A pass runs the network on every draw and, for each loss vector, one backward pass. The sums are
divided by their number of terms here (``mean``) and nowhere else.

Legend: N batch, g an optional axis of groups, S weight-sharing positions, I inputs, O outputs,
D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.curvature.exact_blocks import exact_blocks
from curvlinops_diffusion.curvature.loss_vectors import (
    check_batch_prediction,
    numbered_loss_vectors,
)
from curvlinops_diffusion.curvature.options import KFACApprox, KFACOptions
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Coverage, ExactKind, Layer
from curvlinops_diffusion.layers.example_gradients import check_observable
from curvlinops_diffusion.layers.hooks import Tap, frozen, in_precision, tapped
from curvlinops_diffusion.layers.mapped_gradients import mapped_gradients
from curvlinops_diffusion.layers.moments import LatestProduct, second_moment
from curvlinops_diffusion.linalg.factors import identity_like
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, run_pass
from curvlinops_diffusion.runtime.sums import Sums, Together, prefixed, within


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of every layer, averaged over examples, timesteps, noise and loss vectors.

    Attributes:
        inputs: ``A``, by the key of the part (see :class:`~curvlinops_diffusion.layers.Part`);
            biases have none.
        outputs: ``B``, by the name of the layer.
        exact: Blocks without Kronecker form, by their key: matrices ``[n, n]``, or their diagonals
            ``[n]``.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    exact: dict[str, Tensor]


def kronecker_factors(
    regression: NoisedRegression,
    coverage: Coverage,
    options: KFACOptions,
    passes: PassOptions = PLAIN,
) -> KroneckerFactors:
    """Compute the Kronecker factors, and the blocks that have none, in one pass over the data.

    With positions ``s = 1..S`` and the expectation over examples, draws and loss vectors::

        expand:  A = E[1/S Σ_s a_s a_sᵀ]                  B = E[Σ_s b_s b_sᵀ]
        reduce:  A = E[(1/S Σ_s a_s)(1/S Σ_s a_s)ᵀ]       B = E[(Σ_s b_s)(Σ_s b_s)ᵀ]
        exact:   F = E[g gᵀ]

    Source: Eschenhagen et al., 2023, Sections 3.2 and 3.3; Mlodozeniec et al., 2025, Section 2.3.

    Args:
        regression: Objective, data and draws.
        coverage: The parameters, and the layers that hold them.
        options: Fisher type and K-FAC approximation.
        passes: Checkpoints, processes and progress.

    Returns:
        The factors, in the working precision.

    Raises:
        ValueError: If hooks cannot observe a layer's gradient (see :func:`check_observable`), a
            prediction is not finite, or a checkpoint is of something else.
    """
    layers = coverage.layers
    calls = check_observable(regression, layers)
    dtype = regression.objective.working_dtype
    inputs = _InputFactors(layers, options, dtype, calls)
    outputs = _OutputFactors(layers, options, dtype)
    exact = _ExactBlocks(coverage, options, dtype)
    backward = options.has_gradients

    def on_input(layer: Layer, x: Tensor) -> None:
        inputs.observe(layer, x)
        exact.observe_input(layer, x)

    def on_gradient(layer: Layer, call: int, g: Tensor) -> None:
        outputs.observe(layer, g)
        exact.observe_gradient(layer, call, g)

    tap = Tap(on_input, on_gradient if backward else None)

    def add(batch: NoisedBatch) -> None:
        N = len(batch.indices)
        tap.restart(N)
        inputs.start_forward(N)
        outputs.start_forward(N)
        exact.start_forward(N)
        with torch.set_grad_enabled(backward):
            prediction_BD = regression.objective.predict(batch)
        check_batch_prediction(regression, batch, prediction_BD)
        inputs.end_forward()
        for v_BD, more in numbered_loss_vectors(regression, batch, prediction_BD, options):
            tap.backward(prediction_BD, v_BD, retain_graph=more)
            outputs.end_backward()
            with tap.paused():
                exact.add_mapped(mapped_gradients(regression.objective, batch, v_BD, exact.mapped))
            exact.end_backward()

    def step(clean: CleanBatch) -> None:
        for batch in regression.noised_batches(clean):
            add(batch)

    running = Together({"inputs": inputs, "outputs": outputs, "exact": exact})
    settings = {"options": options.as_dict(), "params": list(coverage.params)}
    with tapped(layers, tap), frozen(regression.objective.model):
        run_pass("Kronecker factors", regression, running, step, passes, settings)
    count = regression.num_samples
    if not backward:
        return KroneckerFactors(inputs.means(count), outputs.identities(), exact.identities())
    return KroneckerFactors(inputs.means(count), outputs.means(count), exact.means(count))


class _InputFactors:
    """Sums that become ``A``: one term for each forward pass, over all calls of a layer."""

    def __init__(
        self,
        layers: Sequence[Layer],
        options: KFACOptions,
        dtype: torch.dtype,
        calls: Mapping[str, int],
    ):
        self._parts = {
            layer.name: part
            for layer in layers
            for part in layer.parts(options.separate_weight_and_bias, options.exact_bias)
            if not part.is_bias
        }
        self._expand = options.kfac_approx is not KFACApprox.REDUCE
        self._dtype = dtype
        self._calls = calls
        self._latest = LatestProduct()
        self._moments = {
            name: part.input_moment(self._latest)
            for name, part in self._parts.items()
            if self._expand or part.kind.one_hot
        }
        self._sums = Sums()  # with "reduce"
        self._seen: set[str] = set()
        self._arrived: dict[str, list[Tensor]] = {}
        self._N = 0

    def start_forward(self, N: int) -> None:
        self._N = N

    def observe(self, layer: Layer, x: Tensor) -> None:
        if layer.name not in self._parts:
            return
        arrived = self._arrived.setdefault(layer.name, [])
        arrived += in_precision([x], self._dtype)
        if len(arrived) == self._calls[layer.name]:
            self._add(layer.name)

    def end_forward(self) -> None:
        for name in list(self._arrived):
            self._add(name)
        self._latest.forget()

    def _add(self, name: str) -> None:
        part, xs = self._parts[name], self._arrived.pop(name)
        S = sum(part.positions(x, self._N) for x in xs)
        if name in self._moments:
            for x in xs:
                self._moments[name].add(x, 1 / S)
            self._seen.add(name)
        else:
            sums = [part.input_sum(x, self._N) for x in xs]
            mean_NgI = torch.stack(sums).sum(0) / S
            self._sums.add(name, second_moment(mean_NgI.unsqueeze(-2)))

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
            *groups, _, I = part.shape
            shape = (I,) if part.kind.one_hot else (*groups, I, I)
            zeros = part.new_zeros(self._dtype, *shape)
            if name in self._moments:
                seen = name in self._seen
                result[part.key] = self._moments[name].total() / count if seen else zeros
            else:
                result[part.key] = self._sums.mean(name, count, zeros)
        return result


class _OutputFactors:
    """Sums that become ``B``: one term for each backward pass, over all calls of a layer."""

    def __init__(self, layers: Sequence[Layer], options: KFACOptions, dtype: torch.dtype):
        parts = {
            layer.name: layer.parts(options.separate_weight_and_bias, options.exact_bias)
            for layer in layers
        }
        self._parts = {name: own[0] for name, own in parts.items() if own}
        self._expand = options.kfac_approx is not KFACApprox.REDUCE
        self._dtype = dtype
        self._sums = Sums()
        self._calls = Sums()
        self._N = 0

    def start_forward(self, N: int) -> None:
        self._N = N

    def observe(self, layer: Layer, g: Tensor) -> None:
        if layer.name not in self._parts:
            return
        b_NgSO = layer.gradients(g.to(self._dtype), self._N)
        added = second_moment(b_NgSO) if self._expand else b_NgSO.sum(-2, keepdim=True)
        self._calls.add(layer.name, added)

    def end_backward(self) -> None:
        for name, total in self._calls.pop_all():
            self._sums.add(name, total if self._expand else second_moment(total))

    def tensors(self) -> dict[str, Tensor]:
        return self._sums.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._sums.restore(tensors)

    def means(self, count: int) -> dict[str, Tensor]:
        return {name: self._sums.mean(name, count, zeros) for name, zeros in self._zeros().items()}

    def identities(self) -> dict[str, Tensor]:
        """``B = I``, for K-FAC without backward passes."""
        return {name: identity_like(zeros) for name, zeros in self._zeros().items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {
            name: part.new_zeros(self._dtype, *part.shape[:-1], part.shape[-2])
            for name, part in self._parts.items()
        }


class _ExactBlocks:
    """Sums that become exact blocks: one term for each backward pass, over all calls of a layer."""

    def __init__(self, coverage: Coverage, options: KFACOptions, dtype: torch.dtype):
        self._blocks = exact_blocks(coverage, options)
        self._dtype = dtype
        self._params = coverage.params
        self.mapped = {name: coverage.params[name] for name in coverage.others}
        self._layers = {block.layer.name for block in self._blocks if block.layer is not None}
        self._inputs: dict[str, list[Tensor]] = {}  # call by call
        self._gradients = Sums()  # of single examples, by parameter
        self._sums = Sums()
        self._N = 0

    def start_forward(self, N: int) -> None:
        self._N = N
        self._inputs.clear()

    def observe_input(self, layer: Layer, x: Tensor) -> None:
        if isinstance(layer.kind, ExactKind):
            self._inputs.setdefault(layer.name, []).append(x)

    def observe_gradient(self, layer: Layer, call: int, g: Tensor) -> None:
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

    def add_mapped(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            self._gradients.add(name, gradient)

    def end_backward(self) -> None:
        arrived = dict(self._gradients.pop_all())
        for block in self._blocks:
            if any(name in arrived for name in block.params):
                self._sums.add(block.key, block.second_moment(arrived))

    def tensors(self) -> dict[str, Tensor]:
        return self._sums.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._sums.restore(tensors)

    def means(self, count: int) -> dict[str, Tensor]:
        return {key: self._sums.mean(key, count, zeros) for key, zeros in self._zeros().items()}

    def identities(self) -> dict[str, Tensor]:
        """For K-FAC without backward passes."""
        return {key: identity_like(zeros) for key, zeros in self._zeros().items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {
            block.key: self._params[block.params[0]]
            .new_zeros(block.moment_shape, dtype=self._dtype)
            .detach()
            for block in self._blocks
        }
