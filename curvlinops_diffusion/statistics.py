"""One pass over the data: what the layers see, reduced at once to sums.

A pass runs the network on every draw and, for each loss vector, one backward pass. The sums are
divided by their number of terms here (``mean``) and nowhere else.

Legend: N batch, S weight-sharing positions, I inputs, O outputs, D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion.factors import (
    Eigendecomposition,
    rotated_squares,
    rotated_squares_of_inputs,
    rotation_of_inputs_is_cheaper,
    second_moment,
)
from curvlinops_diffusion.fisher import (
    FisherType,
    KFACApprox,
    KFACOptions,
    loss_vectors,
    num_loss_vectors,
)
from curvlinops_diffusion.hooks import (
    CallRecorder,
    Tap,
    check_observable,
    frozen,
    gradient_of_calls,
    tapped,
)
from curvlinops_diffusion.layers import Layer, Part, PartKind, part_inputs
from curvlinops_diffusion.moments import LatestProduct, RowMoment
from curvlinops_diffusion.objective import NoisedBatch
from curvlinops_diffusion.regression import NoisedRegression


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of every layer, averaged over examples, timesteps, noise and loss vectors.

    Attributes:
        inputs: ``A``, by the key of the part (see :class:`~curvlinops_diffusion.layers.Part`);
            biases of their own have none.
        outputs: ``B``, by the name of the layer.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def kronecker_factors(
    regression: NoisedRegression,
    layers: Sequence[Layer],
    options: KFACOptions,
    progressbar: bool = False,
) -> KroneckerFactors:
    """Compute the Kronecker factors in one pass over the data.

    With positions ``s = 1..S`` and the expectation over examples, draws and loss vectors::

        expand:  A = E[1/S Σ_s a_s a_sᵀ]                  B = E[Σ_s b_s b_sᵀ]
        reduce:  A = E[(1/S Σ_s a_s)(1/S Σ_s a_s)ᵀ]       B = E[(Σ_s b_s)(Σ_s b_s)ᵀ]

    Source: Eschenhagen et al., 2023, Sections 3.2 and 3.3; Mlodozeniec et al., 2025, Section 2.3.

    Args:
        regression: Objective, data and draws.
        layers: The layers.
        options: Fisher type and K-FAC approximation.
        progressbar: Whether to show progress.

    Returns:
        The factors, in the working precision.

    Raises:
        ValueError: If hooks cannot observe a layer's gradient (see :func:`check_observable`).
    """
    calls = check_observable(regression, layers)
    dtype = regression.objective.working_dtype
    inputs = _InputFactors(layers, options, dtype, calls)
    outputs = _OutputFactors(layers, options, dtype)
    backward = options.fisher_type is not FisherType.FORWARD_ONLY
    tap = Tap(inputs.observe, outputs.observe if backward else None)
    with tapped(layers, tap), frozen(regression.objective.model):
        for batch in _with_progress(regression, "Kronecker factors", progressbar):
            tap.restart(len(batch.indices))
            with torch.set_grad_enabled(backward):
                prediction_BD = regression.objective.predict(batch)
            inputs.end_forward()
            for v_BD, more in _loss_vectors(regression, batch, prediction_BD, options):
                tap.backward(prediction_BD, v_BD, retain_graph=more)
                outputs.end_backward()
    count = regression.num_samples
    return KroneckerFactors(
        inputs.means(count), outputs.means(count) if backward else outputs.identities()
    )


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
            for part in layer.parts(options.separate_weight_and_bias)
            if part.kind is not PartKind.BIAS
        }
        self._expand = options.kfac_approx is KFACApprox.EXPAND
        self._dtype = dtype
        self._calls = calls
        self._latest = LatestProduct()
        self._moments = {
            name: part.input_moment(self._latest) if self._expand else RowMoment()
            for name, part in self._parts.items()
        }
        self._arrived: dict[str, list[Tensor]] = {}
        self._seen: set[str] = set()

    def observe(self, layer: Layer, x: Tensor) -> None:
        if layer.name not in self._parts:  # only the bias was selected
            return
        arrived = self._arrived.setdefault(layer.name, [])
        arrived.append(x.to(self._dtype))
        if len(arrived) == self._calls[layer.name]:
            self._add(layer.name)

    def end_forward(self) -> None:
        for name in list(self._arrived):
            self._add(name)
        self._latest.forget()

    def _add(self, name: str) -> None:
        part, moment, xs = self._parts[name], self._moments[name], self._arrived.pop(name)
        S = sum(part.positions(x) for x in xs)
        self._seen.add(name)
        if self._expand:
            for x in xs:
                moment.add(x, 1 / S)
        else:
            mean_NI = sum((part.input_sum(x) for x in xs[1:]), part.input_sum(xs[0])) / S
            moment.add(mean_NI, 1.0)

    def means(self, count: int) -> dict[str, Tensor]:
        return {
            part.key: self._moments[name].total() / count
            if name in self._seen
            else part.new_zeros(self._dtype, part.shape[1], part.shape[1])
            for name, part in self._parts.items()
        }


class _OutputFactors:
    """Sums that become ``B``: one term for each backward pass, over all calls of a layer."""

    def __init__(self, layers: Sequence[Layer], options: KFACOptions, dtype: torch.dtype):
        self._parts = {
            layer.name: layer.parts(options.separate_weight_and_bias)[0] for layer in layers
        }
        self._expand = options.kfac_approx is KFACApprox.EXPAND
        self._dtype = dtype
        self._sums = _Sums()
        self._calls = _Sums()

    def observe(self, layer: Layer, call: int, g: Tensor) -> None:
        b_NSO = layer.gradients(g.to(self._dtype))
        self._calls.add(layer.name, second_moment(b_NSO) if self._expand else b_NSO.sum(1))

    def end_backward(self) -> None:
        for name, total in self._calls.pop_all():
            self._sums.add(name, total if self._expand else second_moment(total))

    def means(self, count: int) -> dict[str, Tensor]:
        return {name: self._sums.mean(name, count, zeros) for name, zeros in self._zeros().items()}

    def identities(self) -> dict[str, Tensor]:
        """``B = I``, for K-FAC without backward passes."""
        return {name: zeros.fill_diagonal_(1) for name, zeros in self._zeros().items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {
            name: part.new_zeros(self._dtype, part.shape[0], part.shape[0])
            for name, part in self._parts.items()
        }


def eigenvalue_moments(
    regression: NoisedRegression,
    layers: Sequence[Layer],
    input_bases: Mapping[str, Eigendecomposition],
    output_bases: Mapping[str, Eigendecomposition],
    options: KFACOptions,
    progressbar: bool = False,
) -> dict[str, Tensor]:
    """Compute EK-FAC's eigenvalues ``Λ_ij = E[(U_Bᵀ g U_A)_ij²]`` in one pass over the data.

    With random loss vectors the gradients ``g`` of different examples are independent with mean
    zero, so that the square of their sum over a group of examples estimates the sum of their
    squares without bias, for one rotation in place of many.

    Args:
        regression: Objective, data and draws.
        layers: The layers.
        input_bases: Eigenbases of the input factors, by the key of the part.
        output_bases: Eigenbases of the output factors, by the name of the layer.
        options: Fisher type, as for the factors, and the size of the groups.
        progressbar: Whether to show progress.

    Returns:
        ``Λ`` of shape ``[O, I]`` for every part, by its key.
    """
    dtype = regression.objective.working_dtype
    sums = _Sums()
    groups: list[_Groups] = []

    def consume(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        xs, gs = ([z.to(dtype) for z in zs] for zs in (xs, gs))
        U_B = output_bases[layer.name].vectors
        for part in layer.parts(options.separate_weight_and_bias):
            basis = input_bases.get(part.key)
            U_A = None if basis is None else basis.vectors
            for part_of_batch in groups:
                sums.add(part.key, _squares(part, xs, gs, U_A, U_B, part_of_batch))

    recorder = CallRecorder(consume)
    with tapped(layers, recorder.tap), frozen(regression.objective.model), torch.enable_grad():
        for batch in _with_progress(regression, "Eigenvalues", progressbar):
            groups = _aligned_groups(batch.indices, options.gradient_group)
            recorder.start_forward(len(batch.indices))
            prediction_BD = regression.objective.predict(batch)
            for v_BD, more in _loss_vectors(regression, batch, prediction_BD, options):
                recorder.backward(prediction_BD, v_BD, retain_graph=more)

    return {
        part.key: sums.mean(part.key, regression.num_samples, part.new_zeros(dtype, *part.shape))
        for layer in layers
        for part in layer.parts(options.separate_weight_and_bias)
    }


@dataclass(frozen=True)
class _Groups:
    """A range of a batch that falls into groups of one size.

    Attributes:
        range: The range.
        size: Examples in a group.
    """

    range: slice
    size: int


def _aligned_groups(indices: Sequence[int], size: int) -> list[_Groups]:
    """Cut a batch of successive examples at multiples of a group's size.

    Groups are the same for every batch size that is a multiple of theirs; a group that two batches
    share is two smaller groups.
    """
    start, stop = indices[0], indices[0] + len(indices)
    low, high = -(-start // size) * size, stop // size * size
    if low >= high:
        cuts = [start, *([low] if start < low < stop else []), stop]
        pieces = [(a, b, b - a) for a, b in pairwise(cuts)]
    else:
        pieces = [(start, low, low - start), (low, high, size), (high, stop, stop - high)]
    return [_Groups(slice(a - start, b - start), n) for a, b, n in pieces if a < b]


def _squares(
    part: Part,
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    U_A: Tensor | None,
    U_B: Tensor,
    groups: _Groups,
) -> Tensor:
    """Sum over groups of the squared and rotated sums of gradients, the cheaper way by count."""
    xs, gs = ([z[groups.range] for z in zs] for zs in (xs, gs))
    positions = groups.size * sum(part.positions(x) for x in xs)
    if U_A is not None and rotation_of_inputs_is_cheaper(positions, *part.shape):
        a_NSI = part_inputs(part, xs, xs[0].dtype)
        assert a_NSI is not None
        b_NSO = torch.cat([part.layer.gradients(g) for g in gs], 1)
        a, b = (z.reshape(-1, positions, z.shape[2]) for z in (a_NSI, b_NSO))
        return rotated_squares_of_inputs(a, b, U_A, U_B)
    if positions < part.shape[1]:  # outputs are fewer than the gradient's columns
        gs = [part.layer.rotated(g, U_B) for g in gs]
        return rotated_squares(gradient_of_calls(part, xs, gs, groups.size), U_A, None)
    return rotated_squares(gradient_of_calls(part, xs, gs, groups.size), U_A, U_B)


# ---------------------------------------------------------------------------------------------


class _Sums:
    """Running sums of tensors by name; zero for a layer that no prediction depends on."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor) -> None:
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value

    def pop_all(self) -> list[tuple[str, Tensor]]:
        items = list(self._sums.items())
        self._sums.clear()
        return items

    def mean(self, key: str, count: int, otherwise: Tensor) -> Tensor:
        """The sum over ``count``, or ``otherwise`` where nothing arrived."""
        return self._sums[key] / count if key in self._sums else otherwise


def _loss_vectors(
    regression: NoisedRegression, batch: NoisedBatch, prediction_BD: Tensor, options: KFACOptions
) -> Iterator[tuple[Tensor, bool]]:
    """Loss vectors, each with whether more will follow."""
    total = num_loss_vectors(options, prediction_BD.shape[1])
    vectors = loss_vectors(batch, prediction_BD, regression.draws, options)
    for number, v_BD in enumerate(vectors, start=1):
        yield v_BD, number < total


def _with_progress(
    regression: NoisedRegression, description: str, progressbar: bool
) -> Iterator[NoisedBatch]:
    with tqdm(
        total=regression.num_samples, desc=description, unit="draws", disable=not progressbar
    ) as bar:
        for batch in regression.batches():
            yield batch
            bar.update(len(batch.indices))
