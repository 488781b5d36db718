"""The pixels that the taps of a convolution read, and which of their correlations are the same.

Legend: N batch, C channels, H, W image, K kernel taps along an axis.

A tap ``k`` of the kernel reads, for output pixel ``o``, the input pixel ``o s + k d - p`` (stride
``s``, dilation ``d``, padding ``p``). Written as ``(o + q) s + φ``, it reads pixel ``o + q`` of
the *phase image* ``φ``, every ``s``-th pixel of the input. Entry ``(i, k; j, l)`` of the second
moment of the patches is thus a correlation of channels ``i`` and ``j`` of two phase images at the
shift ``q_l - q_k``, over a window of output pixels that depends on ``k`` alone.

All pairs of taps with the same phases and shift share one correlation over all pixels; their
windows differ from it by thin strips at the borders, which are subtracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

Interval = tuple[int, int]
#: Phase, phase and shift, along one axis.
Key = tuple[int, int, int]
#: Pixels at the left, right, top and bottom.
Padding = tuple[int, int, int, int]


@dataclass(frozen=True)
class Convolution2d:
    """A two-dimensional convolution without groups.

    Attributes:
        kernel_size: Taps along the rows' and the columns' axis.
        stride: The strides.
        dilation: The dilations.
        padding: Pixels added.
        padding_mode: What with, as in :class:`torch.nn.Conv2d`.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: Any) -> Convolution2d | None:
        """Read a module as such a convolution, of :func:`as_images`; ``None`` if it is none."""
        if module.groups > 1:
            return None
        sizes: Any = (module.kernel_size, module.stride, module.dilation)
        padding = module._reversed_padding_repeated_twice  # strings resolved
        if isinstance(module, nn.Conv1d):  # images of one row
            sizes, padding = [(1, *z) for z in sizes], [*padding, 0, 0]
        elif isinstance(module, nn.Conv3d):
            if {*module.kernel_size[1:], *module.stride[1:]} != {1} or any(padding[:4]):
                return None
            # along time only: rows are times, columns the pixels
            sizes, padding = [(z[0], 1) for z in sizes], [0, 0, *padding[4:]]
        kernel, stride, dilation = sizes
        return cls(kernel, stride, dilation, tuple(padding), module.padding_mode)

    def padded(self, x: Tensor) -> tuple[Tensor, Padding]:
        """Images padded with what is not zero, and the zeros that are still to be added."""
        x = as_images(x)
        if self.padding_mode == "zeros":
            return x, self.padding
        return pad(x, self.padding, mode=self.padding_mode), (0, 0, 0, 0)

    def windows(self, x: Tensor) -> Tensor:
        """The windows of an input, see :func:`windows`."""
        x, zeros = self.padded(x)
        return windows(pad(x, zeros), self.kernel_size, self.stride, self.dilation)


def as_images(z: Tensor) -> Tensor:
    """Input or output of a convolution of up to three axes as images ``[N, C, H, W]``."""
    return z.unsqueeze(2) if z.ndim == 3 else z.flatten(3)


def output_sizes(
    sizes: Iterable[int], kernel: Iterable[int], stride: Iterable[int], dilation: Iterable[int]
) -> list[int]:
    """Output pixels along each axis, from the sizes of the padded input."""
    axes = zip(sizes, kernel, stride, dilation, strict=True)
    return [(size - d * (K - 1) - 1) // s + 1 for size, K, s, d in axes]


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The pixels that a kernel's taps read for every output pixel, in any number of dimensions.

    Of an input ``[N, C, *size]``, already padded: a view ``[N, C, *output size, *kernel]``, as
    windows overlap in memory.
    """
    outputs, steps = output_sizes(x.shape[2:], kernel, stride, dilation), x.stride()[2:]
    pixels = [step * s for step, s in zip(steps, stride, strict=True)]
    taps = [step * d for step, d in zip(steps, dilation, strict=True)]
    return x.as_strided((*x.shape[:2], *outputs, *kernel), (*x.stride()[:2], *pixels, *taps))


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution.

    Attributes:
        size: Input pixels.
        outputs: Output pixels.
        stride: The stride.
        taps: Phase and offset ``(φ, q)`` of every tap.
    """

    size: int
    outputs: int
    stride: int
    taps: tuple[tuple[int, int], ...]

    @property
    def phases(self) -> list[int]:
        """The phases that occur."""
        return sorted({phase for phase, _ in self.taps})

    def length(self, phase: int) -> int:
        """Pixels of a phase image."""
        return -(-(self.size - phase) // self.stride)

    @property
    def period(self) -> int:
        """Pixels of a phase image, with a gap that keeps shifted images from wrapping around."""
        offsets = [q for _, q in self.taps]
        return self.length(0) + max(offsets) - min(offsets)

    def key(self, k: int, l: int) -> Key:
        """The phases of two taps, and the shift from the first to the second."""
        (phase_k, q_k), (phase_l, q_l) = self.taps[k], self.taps[l]
        return phase_k, phase_l, q_l - q_k

    def overlap(self, key: Key) -> Interval:
        """The pixels of the first phase image for which the shifted second one has a pixel."""
        first, second, shift = key
        low = max(0, -shift)
        return low, max(low, min(self.length(first), self.length(second) - shift))

    def outside(self, k: int, l: int) -> list[Interval]:
        """The pixels of the overlap that tap ``k`` does not read."""
        low, high = self.overlap(self.key(k, l))
        start = min(max(self.taps[k][1], low), high)
        stop = min(max(self.taps[k][1] + self.outputs, start), high)
        return [part for part in ((low, start), (stop, high)) if part[0] < part[1]]


@dataclass(frozen=True)
class Geometry:
    """The pixels that a convolution's taps read, and the sums that their second moment needs.

    Attributes:
        rows: The vertical axis.
        columns: The horizontal axis.
    """

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, conv: Convolution2d, x: Tensor, zeros: Padding) -> Geometry:
        """The geometry of a convolution on images of a size, and the zeros around them."""
        left, right, top, bottom = zeros
        sizes, steps = x.shape[2:], (conv.kernel_size, conv.stride, conv.dilation)
        axes = []
        for size, before, after, K, s, d in zip(
            sizes, (top, left), (bottom, right), *steps, strict=True
        ):
            (outputs,) = output_sizes([size + before + after], [K], [s], [d])
            taps = tuple(divmod(k * d - before, s)[::-1] for k in range(K))
            axes.append(Axis(size, outputs, s, taps))
        return cls(*axes)

    @cached_property
    def row_pairs(self) -> list[tuple[int, int]]:
        """Pairs of vertical taps; the others follow by transposition."""
        return list(combinations_with_replacement(range(len(self.rows.taps)), 2))

    @cached_property
    def column_pairs(self) -> list[tuple[int, int]]:
        """Pairs of horizontal taps."""
        taps = range(len(self.columns.taps))
        return list(product(taps, taps))

    @cached_property
    def row_parts(self) -> list[tuple[Key, Interval]]:
        """The ranges of rows over which is summed: the overlaps, and what windows leave out."""
        parts: dict[tuple[Key, Interval], None] = {}  # a set in order
        for k, l in self.row_pairs:
            key = self.rows.key(k, l)
            for interval in [self.rows.overlap(key), *self.rows.outside(k, l)]:
                parts[key, interval] = None
        return list(parts)

    @cached_property
    def column_parts(self) -> list[tuple[Key, Interval]]:
        """The ranges of columns that windows leave out."""
        columns = self.columns
        return sorted(
            {(columns.key(k, l), i) for k, l in self.column_pairs for i in columns.outside(k, l)}
        )

    @cached_property
    def shifts(self) -> dict[tuple[int, int], list[int]]:
        """The horizontal shifts that occur, by the pair of phases."""
        shifts: dict[tuple[int, int], list[int]] = {}
        for first, second, shift in sorted({self.columns.key(k, l) for k, l in self.column_pairs}):
            shifts.setdefault((first, second), []).append(shift)
        return shifts

    @property
    def num_taps(self) -> int:
        """Taps of the kernel."""
        return len(self.rows.taps) * len(self.columns.taps)

    @property
    def num_outputs(self) -> int:
        """Output pixels."""
        return self.rows.outputs * self.columns.outputs
