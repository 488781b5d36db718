"""Correlations of the channels of images, of which a convolution's second moment is put together.

Legend: N batch, C channels, H, W image, K kernel taps along an axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

from torch import Tensor

from curvlinops_diffusion.layers.patches import Interval, Key, _Axis
from curvlinops_diffusion.layers.products import summed_dtype

#: A range of rows, and the pair of vertical phases and the shift between them.
Part = tuple[Key, Interval]
#: A pair of horizontal phases.
Phases = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The pixels that a convolution's taps read, and the cost of their second moment.

    Attributes:
        rows: The vertical axis.
        columns: The horizontal axis.
    """

    rows: _Axis
    columns: _Axis

    def row_pairs(self) -> list[tuple[int, int]]:
        """Pairs of vertical taps; the others follow by transposition."""
        return list(combinations_with_replacement(range(len(self.rows.taps)), 2))

    def column_pairs(self) -> list[tuple[int, int]]:
        """Pairs of horizontal taps."""
        taps = range(len(self.columns.taps))
        return list(product(taps, taps))

    def row_parts(self) -> list[tuple[Key, Interval]]:
        """The ranges of rows over which is summed: the overlaps, and what windows leave out."""
        parts: dict[tuple[Key, Interval], None] = {}  # a set in order
        for k, l in self.row_pairs():
            key = self.rows.key(k, l)
            for interval in [self.rows.overlap(key), *self.rows.outside(k, l)]:
                parts[key, interval] = None
        return list(parts)

    def column_parts(self) -> list[tuple[Key, Interval]]:
        """The ranges of columns that windows leave out."""
        return sorted(
            {
                (self.columns.key(k, l), interval)
                for k, l in self.column_pairs()
                for interval in self.columns.outside(k, l)
            }
        )

    def shifts(self) -> dict[tuple[int, int], list[int]]:
        """The horizontal shifts that occur, by the pair of phases."""
        keys = sorted({self.columns.key(k, l) for k, l in self.column_pairs()})
        shifts: dict[tuple[int, int], list[int]] = {}
        for first, second, shift in keys:
            shifts.setdefault((first, second), []).append(shift)
        return shifts

    @property
    def num_frequencies(self) -> int:
        """Frequencies of a row; those of a real signal's other half are conjugates."""
        return self.columns.period // 2 + 1

    @property
    def num_taps(self) -> int:
        """Taps of the kernel."""
        return len(self.rows.taps) * len(self.columns.taps)

    @property
    def num_outputs(self) -> int:
        """Output pixels."""
        return self.rows.outputs * self.columns.outputs

    @property
    def patch_cost(self) -> int:
        """Multiplications of a product of patches for each example, in units of ``C²``."""
        return self.num_taps**2 * self.num_outputs


class CorrelationSums(ABC):
    """The running sum by correlations; put together only when it is asked for.

    Args:
        geometry: The pixels that the convolution's taps read.
        x: An explicitly padded input, for its channels, type and device.
        summed: Whether correlations are what is summed.
    """

    def __init__(self, geometry: Geometry, x: Tensor, summed: bool = True):
        self.geometry = geometry
        self.num_channels = C = x.shape[1]
        # by range of rows, then by pair of horizontal phases: [shifts, C, C]
        self._correlations: dict[Part, dict[Phases, Tensor]] = {
            part: {
                phases: new_sums(x, len(shifts), C, C)
                for phases, shifts in geometry.shifts().items()
                if summed
            }
            for part in geometry.row_parts()
        }
        # by range of rows, then by range of columns: [C, C]
        self._strips = {
            part: {strip: new_sums(x, C, C) for strip in geometry.column_parts()}
            for part in self._correlations
        }

    @abstractmethod
    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, explicitly padded."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums by name."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def _numbered(
        self, name: str, sums: Mapping[Part, Mapping[Phases, Tensor]]
    ) -> dict[str, Tensor]:
        """Sums and strips by names, in an order that follows from the geometry."""
        held = [z for group in sums.values() for z in group.values()]
        held += [z for group in self._strips.values() for z in group.values()]
        return {f"{name}{i}": z for i, z in enumerate(held)}

    def correlations(self, part: Part, phases: Phases) -> Tensor:
        """The sums over a range of rows, at all horizontal shifts of a pair of phases."""
        return self._correlations[part][phases]

    def total(self) -> Tensor:
        """The second moment, shape ``[I, I]``."""
        rows, columns = self.geometry.rows, self.geometry.columns
        sums = {part: self._column_correlations(part) for part in self._correlations}
        K1, K2, C = len(rows.taps), len(columns.taps), self.num_channels
        some = next(iter(next(iter(sums.values())).values()))
        result = some.new_empty(C, K1, K2, C, K1, K2)
        for (k1, l1), (k2, l2) in product(self.geometry.row_pairs(), self.geometry.column_pairs()):
            if (k1, k2) > (l1, l2):
                continue
            row_key = rows.key(k1, l1)
            block = sums[row_key, rows.overlap(row_key)][k2, l2]
            for interval in rows.outside(k1, l1):
                block = block - sums[row_key, interval][k2, l2]
            if (k1, k2) == (l1, l2):
                block = (block + block.T) / 2  # but for rounding it is symmetric
            result[:, k1, k2, :, l1, l2] = block
            result[:, l1, l2, :, k1, k2] = block.T
        return result.reshape(C * K1 * K2, -1)

    def _column_correlations(self, part: Part) -> dict[tuple[int, int], Tensor]:
        """The correlations over a range of rows and each pair of horizontal taps' window."""
        columns = self.geometry.columns
        whole: dict[Key, Tensor] = {}
        for phases, shifts in self.geometry.shifts().items():
            correlations = self.correlations(part, phases)
            whole |= {(*phases, s): c for s, c in zip(shifts, correlations, strict=True)}
        result = {}
        for k, l in self.geometry.column_pairs():
            key = columns.key(k, l)
            result[k, l] = whole[key]
            for interval in columns.outside(k, l):
                result[k, l] = result[k, l] - self._strips[part][key, interval]
        return result


def new_sums(x: Tensor, *shape: int) -> Tensor:
    """Zeros to add products of inputs to, which are not summed in less than float32."""
    return x.new_zeros(shape, dtype=summed_dtype(x))
