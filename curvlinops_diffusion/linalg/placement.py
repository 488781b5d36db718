"""Parameters as the matrices that blocks act on, and back.

Legend: g an optional leading axis of groups, O outputs, I inputs, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.blocks import Block


@dataclass(frozen=True)
class Arrangement:
    """The arrangement of parameters as a matrix ``[*g, O, I]``.

    Parameters are reshaped to ``[rows, ...]`` and laid side by side (a weight, and its bias as
    last column); the result is read as ``[*g, O, I]``. The weight of a layer that multiplies from
    the other side, ``[inputs, outputs]``, is transposed.

    Attributes:
        shape: ``(*g, O, I)``.
        transposed: Whether the (only) parameter is ``[*g, I, O]``.
    """

    shape: tuple[int, ...]
    transposed: bool = False

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parameters ``[*p.shape, K]`` as one matrix ``[*g, O, I, K]``."""
        K = tensors[0].shape[-1]
        matrices = [t.reshape(*_rows_and_columns(t.shape[:-1]), K) for t in tensors]
        rows = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
        if not self.transposed:
            return rows.reshape(*self.shape, K)
        *groups, O, I = self.shape
        return rows.reshape(*groups, I, O, K).transpose(-3, -2)

    def scatter(self, X_gOIK: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The matrix as parameters of the given shapes, ``[*p.shape, K]`` each."""
        K = X_gOIK.shape[-1]
        X = X_gOIK.transpose(-3, -2) if self.transposed else X_gOIK
        rows, columns = zip(*map(_rows_and_columns, shapes), strict=True)
        pieces = X.reshape(rows[0], sum(columns), K).split(columns, 1)
        return [piece.reshape(*shape, K) for piece, shape in zip(pieces, shapes, strict=True)]


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """Sizes of a parameter as a matrix, either of which may be zero."""
    return (shape[0] if len(shape) else 1), prod(shape[1:])


@dataclass(frozen=True, eq=False)
class PlacedBlock:
    """A block, and the parameters that it acts on.

    Attributes:
        name: A name for messages and files.
        params: Names of the parameters.
        block: The block.
        transposed: Whether its (only) parameter is ``[inputs, outputs]``, see
            :class:`Arrangement`.
    """

    name: str
    params: tuple[str, ...]
    block: Block
    transposed: bool = False

    @property
    def kind(self) -> str:
        """``'Kronecker'``, ``'eigenbasis'``, ``'dense'`` or ``'diagonal'``."""
        return self.block.kind

    @property
    def num_entries(self) -> int:
        """Entries of the parameters: rows of the block as a matrix."""
        return prod(self.block.shape)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors that determine the block; shared ones are counted in each."""
        return sum(z.nbytes for z in self.block.tensors().values())

    def with_block(self, block: Block) -> PlacedBlock:
        """Another block in the same place."""
        return PlacedBlock(self.name, self.params, block, self.transposed)

    def with_tensors(self, function: Callable[[Tensor], Tensor]) -> PlacedBlock:
        """The block whose tensors are a function's of this one's."""
        tensors = {name: function(z) for name, z in self.block.tensors().items()}
        return self.with_block(type(self.block)(**tensors))

    @property
    def device(self) -> torch.device:
        """Where the block is; perhaps in the host's memory, if the device's is too small."""
        return next(iter(self.block.tensors().values())).device

    def on(self, device: torch.device) -> PlacedBlock:
        """The block on a device; itself if it is there."""
        return self if self.device == device else moved([self], device)[0]

    def multiply(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply onto parameters by name, ``[*p.shape, K]`` each; return those of the block."""
        parts = [given[name] for name in self.params]
        arrangement = Arrangement(self.block.shape, self.transposed)
        product = self.block.multiply(arrangement.gather(parts))
        pieces = arrangement.scatter(product, [p.shape[:-1] for p in parts])
        return dict(zip(self.params, pieces, strict=True))


def moved(
    blocks: Iterable[PlacedBlock], device: torch.device, dtype: torch.dtype | None = None
) -> list[PlacedBlock]:
    """Blocks on a device, perhaps in another precision; tensors that two share stay shared."""
    seen: dict[tuple[int, torch.Size], Tensor] = {}  # weight and bias share a basis

    def elsewhere(z: Tensor) -> Tensor:
        key = (z.data_ptr(), z.shape)
        if key not in seen:
            seen[key] = z.to(device, dtype if z.is_floating_point() else None)
        return seen[key]

    return [placed.with_tensors(elsewhere) for placed in blocks]


def in_order(blocks: Iterable[PlacedBlock], params: Iterable[str]) -> list[PlacedBlock]:
    """Blocks in the order of their parameters."""
    order = {name: place for place, name in enumerate(params)}
    return sorted(blocks, key=lambda placed: min(order[name] for name in placed.params))
