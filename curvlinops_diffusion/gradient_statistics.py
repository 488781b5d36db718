"""Passes that form the gradients of single examples, layer by layer, and reduce them at once.

Legend: N batch, g an optional axis of groups, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from curvlinops_diffusion.data import CleanBatch
from curvlinops_diffusion.factors import (
    Eigendecomposition,
    contracted_inputs,
    contracted_outputs,
    identity_like,
    squared_norm,
    trace,
)
from curvlinops_diffusion.fisher import KFACApprox, KFACOptions
from curvlinops_diffusion.hooks import CallRecorder, frozen, in_precision, tapped
from curvlinops_diffusion.layers import Coverage, Layer, Part
from curvlinops_diffusion.passes import PLAIN, PassOptions, run_pass
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.running import Sums
from curvlinops_diffusion.statistics import (
    KroneckerFactors,
    check_batch_prediction,
    kronecker_factors,
    numbered_loss_vectors,
)

#: Called with a layer, the batch's examples, and the layer's inputs and gradients, call by call.
Consume = Callable[[Layer, Sequence[int], list[Tensor], list[Tensor]], None]


@dataclass(frozen=True)
class GradientPass:
    """Runs every draw and loss vector, and hands on what the layers of Kronecker form saw.

    Attributes:
        regression: Objective, data and draws.
        coverage: The layers.
        options: The loss vectors.
        passes: Checkpoints, processes and progress.
    """

    regression: NoisedRegression
    coverage: Coverage
    options: KFACOptions
    passes: PassOptions = PLAIN

    def parts(self, layer: Layer) -> tuple[Part, ...]:
        """The blocks of Kronecker form of a layer."""
        return layer.parts(self.options.separate_weight_and_bias, self.options.exact_bias)

    def run(self, name: str, consume: Consume, sums: Sums) -> None:
        """Run over the data.

        Args:
            name: What is computed, for messages and checkpoints.
            consume: Reduces what a layer saw.
            sums: What it adds to.
        """
        objective, dtype = self.regression.objective, self.regression.objective.working_dtype
        layers = [layer for layer in self.coverage.layers if self.parts(layer)]
        indices: Sequence[int] = ()

        def on_layer(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
            consume(layer, indices, in_precision(xs, dtype), in_precision(gs, dtype))

        recorder = CallRecorder(on_layer)

        def step(clean: CleanBatch) -> None:
            nonlocal indices
            for batch in self.regression.noised_batches(clean):
                indices = batch.indices
                recorder.start_forward(len(indices))
                prediction_BD = objective.predict(batch)
                check_batch_prediction(self.regression, batch, prediction_BD)
                for v_BD, more in numbered_loss_vectors(
                    self.regression, batch, prediction_BD, self.options
                ):
                    recorder.backward(prediction_BD, v_BD, retain_graph=more)

        settings = {"options": self.options.as_dict(), "params": list(self.coverage.params)}
        with tapped(layers, recorder.tap), frozen(objective.model), torch.enable_grad():
            run_pass(name, self.regression, sums, step, self.passes, settings)


# ---------------------------------------------------------------------------------------------
# Eigenvalues
# ---------------------------------------------------------------------------------------------


def eigenvalue_moments(
    regression: NoisedRegression,
    coverage: Coverage,
    input_bases: Mapping[str, Eigendecomposition],
    output_bases: Mapping[str, Eigendecomposition],
    options: KFACOptions,
    passes: PassOptions = PLAIN,
) -> dict[str, Tensor]:
    """Compute EK-FAC's eigenvalues ``Λ_ij = E[(U_Bᵀ g U_A)_ij²]`` in one pass over the data.

    With random loss vectors the gradients ``g`` of different examples are independent with mean
    zero, so that the square of their sum over a group of examples estimates the sum of their
    squares without bias, for one rotation in place of many.

    Args:
        regression: Objective, data and draws.
        coverage: The parameters, and the layers that hold them.
        input_bases: Eigenbases of the input factors, by the key of the part.
        output_bases: Eigenbases of the output factors, by the name of the layer.
        options: Fisher type, as for the factors, and the size of the groups.
        passes: Checkpoints, processes and progress.

    Returns:
        ``Λ`` of shape ``[*g, O, I]`` for every block of Kronecker form, by its key.
    """
    dtype = regression.objective.working_dtype
    over = GradientPass(regression, coverage, options, passes)
    sums = Sums()

    def consume(layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]) -> None:
        U_B = output_bases[layer.name].vectors
        for part in over.parts(layer):
            U_A = None if part.is_bias else input_bases[part.key].vectors
            for range_ in _aligned_groups(indices, options.gradient_group):
                own_xs, own_gs = ([range_.of(z) for z in zs] for zs in (xs, gs))
                sums.add(part.key, part.squares(own_xs, own_gs, range_.count, U_A, U_B))

    over.run("Eigenvalues", consume, sums)
    return {
        part.key: sums.mean(part.key, regression.num_samples, part.new_zeros(dtype, *part.shape))
        for layer in coverage.layers
        for part in over.parts(layer)
    }


@dataclass(frozen=True)
class _Groups:
    """A range of a batch that falls into groups of one size.

    Attributes:
        start: Its first example.
        stop: The example after its last.
        size: Examples in a group.
        batch: Examples in the batch.
    """

    start: int
    stop: int
    size: int
    batch: int

    @property
    def count(self) -> int:
        """The number of groups."""
        return (self.stop - self.start) // self.size

    def of(self, z: Tensor) -> Tensor:
        """The range of a layer's input or gradient, which may hold several entries an example."""
        entries = len(z) // self.batch
        return z[self.start * entries : self.stop * entries]


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
    return [_Groups(a - start, b - start, n, len(indices)) for a, b, n in pieces if a < b]


# ---------------------------------------------------------------------------------------------
# Kronecker factors
# ---------------------------------------------------------------------------------------------


def fitted_factors(
    regression: NoisedRegression,
    coverage: Coverage,
    options: KFACOptions,
    passes: PassOptions = PLAIN,
) -> KroneckerFactors:
    """The Kronecker factors that the options ask for, in one pass over the data or in several."""
    factors = kronecker_factors(regression, coverage, options, passes)
    if not options.kfac_approx.from_gradients:
        return factors
    return gradient_factors(GradientPass(regression, coverage, options, passes), factors)


def gradient_factors(over: GradientPass, start: KroneckerFactors) -> KroneckerFactors:
    """Kronecker factors from gradients ``g = Σ_s b_s a_sᵀ``, ``[O, I]``, rather than their parts.

    ::

        shampoo:   B = E[g gᵀ],              A = E[gᵀ g] / E‖g‖²
        rank-one:  B = E[g A gᵀ] / ‖A‖²,     A = E[gᵀ B g] / ‖B‖²,     in turn

    The second line minimises ``‖E[vec(g) vec(g)ᵀ] − B ⊗ A‖`` in one factor while the other one is
    fixed, which is the power method for the leading singular vectors of the rearranged matrix (Van
    Loan & Pitsianis, 1993). From K-FAC's ``A``, three passes over the data give ``B``, ``A`` and
    ``B``. Shampoo's factors are a step of it from the identity, scaled so that the trace is exact
    (Morwani et al., 2024, *A New Perspective on Shampoo's Preconditioner*).

    Args:
        over: A pass over the data.
        start: K-FAC's factors. Blocks without Kronecker form, and a bias' factor, are kept.

    Returns:
        The factors.
    """
    # the factor of outputs is the weight's where a bias has a block of its own
    parts = [own[0] for layer in over.coverage.layers if (own := over.parts(layer))]
    parts = [part for part in parts if not part.is_bias]
    moments = _Moments(over, {part.layer.name: part for part in parts})
    A = {part.key: start.inputs[part.key] for part in parts}
    B = {part.key: start.outputs[part.layer.name] for part in parts}
    if over.options.kfac_approx is KFACApprox.SHAMPOO:
        one_A = {key: identity_like(M) for key, M in A.items()}
        one_B = {key: identity_like(M) for key, M in B.items()}
        A = _divided(moments.of_inputs("Input factors", one_B), trace)
        B = moments.of_outputs("Output factors", one_A)
    else:
        B = _divided(moments.of_outputs("Output factors", A), squared_norm, A)
        A = _divided(moments.of_inputs("Input factors", B), squared_norm, B)
        B = _divided(moments.of_outputs("Output factors again", A), squared_norm, A)
    outputs = {part.layer.name: B[part.key] for part in parts}
    return replace(start, inputs={**start.inputs, **A}, outputs={**start.outputs, **outputs})


@dataclass(frozen=True)
class _Moments:
    """Second moments of gradients with one factor in between.

    Attributes:
        over: A pass over the data.
        parts: The blocks, by the name of the layer.
    """

    over: GradientPass
    parts: Mapping[str, Part]

    def of_outputs(self, name: str, A: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``E[g A gᵀ]``, ``[*g, O, O]``, by the key of the part."""
        return self._means(name, lambda part, g: contracted_inputs(g, A[part.key]))

    def of_inputs(self, name: str, B: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``E[gᵀ B g]``, ``[*g, I, I]`` or its diagonal ``[I]``, by the key of the part."""
        return self._means(
            name, lambda part, g: contracted_outputs(g, B[part.key], part.kind.one_hot)
        )

    def _means(self, name: str, moment: Callable[[Part, Tensor], Tensor]) -> dict[str, Tensor]:
        sums = Sums()

        def consume(
            layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]
        ) -> None:
            if layer.name in self.parts:
                part = self.parts[layer.name]
                sums.add(part.key, moment(part, part.weight_gradients(xs, gs, len(indices))))

        self.over.run(name, consume, sums)
        dtype = self.over.regression.objective.working_dtype
        return {
            part.key: sums.mean(
                part.key,
                self.over.regression.num_samples,
                moment(part, part.new_zeros(dtype, 1, *part.shape)),
            )
            for part in self.parts.values()
        }


def _divided(
    moments: Mapping[str, Tensor],
    size: Callable[[Tensor], Tensor],
    of: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Divide by the size of a factor, for each group; what is zero stays zero."""
    result = {}
    for key, moment in moments.items():
        divisor = size((moments if of is None else of)[key])
        divisor = divisor.where(divisor > 0, torch.ones_like(divisor))
        if divisor.ndim > 0:  # one for each group
            divisor = divisor[..., None, None]
        result[key] = moment / divisor
    return result
