"""Eigenvalues of EK-FAC: second moments of gradients in the factors' eigenbases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from curvlinops_diffusion.curvature.gradient_pass import GradientPass
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer
from curvlinops_diffusion.linalg.factors import Eigendecomposition
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sums import Sums


def eigenvalue_moments(
    regression: NoisedRegression,
    plan: BlockPlan,
    input_bases: Mapping[str, Eigendecomposition],
    output_bases: Mapping[str, Eigendecomposition],
    passes: PassOptions = PLAIN,
) -> dict[str, Tensor]:
    """Compute EK-FAC's eigenvalues ``Λ_ij = E[(U_Bᵀ g U_A)_ij²]`` in one pass over the data.

    With random loss vectors the gradients ``g`` of different examples are independent with mean
    zero, so that the square of their sum over a group of examples estimates the sum of their
    squares without bias, for one rotation in place of many.

    Args:
        regression: Objective, data and draws.
        plan: The blocks; its options say the Fisher type, as for the factors, and the size of the
            groups.
        input_bases: Eigenbases of the input factors, by their key.
        output_bases: Eigenbases of the output factors, by their key.
        passes: Checkpoints, processes and progress.

    Returns:
        ``Λ`` of shape ``[*g, O, I]`` for every block of Kronecker form, by its key.
    """
    dtype = regression.objective.working_dtype
    sums = Sums()

    def consume(layer: Layer, indices: Sequence[int], xs: list[Tensor], gs: list[Tensor]) -> None:
        for part in plan.by_layer[layer.name]:
            U_B = output_bases[part.output_key].vectors
            U_A = None if part.is_bias else input_bases[part.input_key].vectors
            for range_ in _aligned_groups(indices, plan.options.gradient_group):
                own_xs, own_gs = ([range_.of(z) for z in zs] for zs in (xs, gs))
                sums.add(part.key, part.squares(own_xs, own_gs, range_.count, U_A, U_B))

    GradientPass(regression, plan, passes).run("Eigenvalues", consume, sums)
    return {
        part.key: sums.take_mean(
            part.key, regression.num_samples, partial(part.new_zeros, dtype, *part.shape)
        )
        for part in plan.parts
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
