"""Blocks without Kronecker form: exact, from the gradients of single examples.

Biases of their own, norms, and parameters in no known layer. Dense while they are small, diagonal
beyond (``max_dense``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvlinops_diffusion.layers import Layer
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, EigenBlock
from curvlinops_diffusion.linalg.placement import Arrangement
from curvlinops_diffusion.runtime.sums import Sums


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

    def columns(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients ``[N, *shape]`` by name as columns, ``[n, N]``."""
        arrangement = Arrangement((self.num_entries, 1))
        return arrangement.gather([gradients[name].movedim(0, -1) for name in self.params])[:, 0]

    def block(self, moment: Tensor) -> Block:
        """The block from its mean second moment."""
        return DenseBlock(moment) if self.dense else EigenBlock(moment.unsqueeze(1))


class ExactSums(Sums):
    """Running sums ``Σ_n g_n g_nᵀ`` of exact blocks, or of their diagonals, by the blocks' keys.

    Dense blocks of one size are added to together: they are small, and there are many of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stacks: dict[tuple[str, ...], Tensor] = {}  # of which sums are rows

    def add_gradients(self, blocks: Iterable[ExactBlock], gradients: Mapping[str, Tensor]) -> None:
        """Add what is from gradients ``[N, *shape]`` by the parameters' names."""
        dense: dict[int, dict[str, Tensor]] = {}
        for block in blocks:
            g_nN = block.columns(gradients)
            if block.dense:
                dense.setdefault(len(g_nN), {})[block.key] = g_nN
            else:
                self.add(block.key, g_nN.square().sum(1))
        for columns in dense.values():
            g_LnN = torch.stack(list(columns.values()))
            self._stack(tuple(columns), g_LnN).baddbmm_(g_LnN, g_LnN.mT)

    def _stack(self, keys: tuple[str, ...], like: Tensor) -> Tensor:
        """The sums of some keys in one tensor, of which they are rows from now on."""
        stack = self._stacks.get(keys)
        if stack is None:
            stack = like.new_zeros(len(keys), like.shape[1], like.shape[1])
            for own, key in zip(stack, keys, strict=True):
                if key in self._sums:
                    own.copy_(self._sums[key])
                self._sums[key] = own
            changed = set(keys)
            self._stacks = {k: z for k, z in self._stacks.items() if not changed & set(k)}
            self._stacks[keys] = stack
        return stack

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums by name."""
        super().restore(tensors)
        self._stacks.clear()

    def take_mean(self, key: str, count: int, otherwise: Callable[[], Tensor]) -> Tensor:
        """The mean, as of all :class:`~curvlinops_diffusion.runtime.sums.Sums`."""
        self._stacks.clear()
        return super().take_mean(key, count, otherwise)
