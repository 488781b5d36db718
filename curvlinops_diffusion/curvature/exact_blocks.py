"""Blocks without Kronecker form: exact, from the gradients of single examples.

Biases of their own, norms, and parameters in no known layer. Dense while they are small, diagonal
beyond (``max_dense``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from curvlinops_diffusion.layers import Layer
from curvlinops_diffusion.layers.moments import MomentSums
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, EigenBlock
from curvlinops_diffusion.linalg.placement import Arrangement


@dataclass(frozen=True)
class ExactBlock:
    """Parameters whose block is the second moment of their gradients.

    Attributes:
        key: A name that is unique within the model.
        params: The parameters' names.
        shapes: Their shapes.
        dense: Whether the whole block is kept, or its diagonal.
        layer: The layer that holds them, if its kind is known.
    """

    key: str
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dense: bool
    layer: Layer | None

    @property
    def num_entries(self) -> int:
        """Entries of the parameters."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """``(n, n)``, or ``(n,)`` for a diagonal."""
        return (self.num_entries,) * (1 + self.dense)

    def add_to(self, sums: MomentSums, gradients: Mapping[str, Tensor]) -> None:
        """Add ``Σ_n g_n g_nᵀ``, or its diagonal, from gradients ``[N, *shape]`` by name."""
        arrangement = Arrangement((self.num_entries, 1))
        g_nN = arrangement.gather([gradients[name].movedim(0, -1) for name in self.params])[:, 0]
        if self.dense:
            sums.add_second_moment(self.key, g_nN.T.unsqueeze(0))
        else:
            sums.add(self.key, g_nN.square().sum(1))

    def block(self, moment: Tensor) -> Block:
        """The block from its mean second moment."""
        return DenseBlock(moment) if self.dense else EigenBlock(moment.unsqueeze(1))
