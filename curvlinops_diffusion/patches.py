"""A convolution's input as patches, and the patches' second moment without forming them.

Legend: N batch, C channels, H, W image, K kernel taps along an axis, S output pixels, I = C K1 K2.

A tap ``k`` of the kernel reads, for output pixel ``o``, the input pixel ``o s + k d - p`` (stride
``s``, dilation ``d``, padding ``p``). Written as ``(o + q) s + φ``, it reads pixel ``o + q`` of
the *phase image* ``φ``, every ``s``-th pixel of the input. Entry ``(i, k; j, l)`` of the second
moment of the patches is thus a correlation of channels ``i`` and ``j`` of two phase images at the
shift ``q_l - q_k``, over a window of output pixels that depends on ``k`` alone. All pairs of taps
with the same phases and shift share one correlation over the whole image; their windows differ
from it by thin strips at the borders, which are subtracted. A 3×3 convolution of stride 1 needs 13
correlations (25 shifts, half of them by symmetry) where patches need 81.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product

from torch import Tensor, nn
from torch.nn.functional import pad, unfold

Interval = tuple[int, int]


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies with its weight.

    Args:
        module: The convolution, without groups. Any stride, dilation, padding and padding mode.
        x: Its input, shape ``[N, C, H, W]``.

    Returns:
        One patch for each output pixel, shape ``[N, S, I]``; entries are ordered like
        ``module.weight.flatten(1)``.
    """
    x, padding = _padded_explicitly(module, x)
    columns = unfold(
        pad(x, padding), module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return columns.transpose(1, 2)


def patch_sum(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The sum of the patches of each example, shape ``[N, I]``, without forming them."""
    x, padding = _padded_explicitly(module, x)
    rows, columns = _axes(module, x, padding)
    x = pad(x, padding)
    sums = x.new_empty(*x.shape[:2], len(rows.taps), len(columns.taps))
    for (k, top), (l, left) in product(enumerate(rows.starts), enumerate(columns.starts)):
        window = x[
            :,
            :,
            top : top + rows.stride * (rows.outputs - 1) + 1 : rows.stride,
            left : left + columns.stride * (columns.outputs - 1) + 1 : columns.stride,
        ]
        sums[:, :, k, l] = window.sum((2, 3))
    return sums.flatten(1)


def num_patches(module: nn.Conv2d, x: Tensor) -> int:
    """The number ``S`` of output pixels of each example."""
    x, padding = _padded_explicitly(module, x)
    rows, columns = _axes(module, x, padding)
    return rows.outputs * columns.outputs


class PatchMoment:
    """A running sum of the patches' second moments, ``Σ_n Σ_s a_s a_sᵀ``, of shape ``[I, I]``.

    Args:
        module: The convolution.
    """

    def __init__(self, module: nn.Conv2d):
        self._module = module
        # one geometry for each image size that occurs
        self._sums: dict[tuple[int, ...], _CorrelationSums | _PatchSums] = {}

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, ``[N, C, H, W]``."""
        x, padding = _padded_explicitly(self._module, x)
        if x.shape[1:] not in self._sums:
            geometry = _Geometry(*_axes(self._module, x, padding))
            cheaper = geometry.cost <= geometry.patch_cost
            self._sums[x.shape[1:]] = (
                _CorrelationSums(geometry) if cheaper else _PatchSums(self._module)
            )
        self._sums[x.shape[1:]].add(x, weight)

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""
        return sum(sums.total() for sums in self._sums.values())  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------


def _padded_explicitly(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input and the zero padding (left, right, top, bottom) still to apply to it."""
    padding: list[int] = module._reversed_padding_repeated_twice  # strings already resolved
    if module.padding_mode == "zeros":
        return x, padding
    return pad(x, padding, mode=module.padding_mode), [0, 0, 0, 0]


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution.

    Attributes:
        size: Input pixels.
        outputs: Output pixels.
        stride: The stride.
        taps: Phase and offset ``(φ, q)`` of every tap.
        starts: The padded input pixel at which every tap starts to read.
    """

    size: int
    outputs: int
    stride: int
    taps: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @property
    def length(self) -> int:
        """Pixels of the largest phase image."""
        return -(-self.size // self.stride)

    @property
    def gap(self) -> int:
        """Zeros after each row that keep a shifted image from running into the next row."""
        offsets = [q for _, q in self.taps]
        return max(offsets) - min(offsets)

    def phase_length(self, phase: int) -> int:
        """Pixels of a phase image."""
        return -(-(self.size - phase) // self.stride)

    def pairs(self) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
        """Pairs of taps ``(k, l)`` that share a correlation, by (phase, phase, shift)."""
        shared: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for (k, (phase_k, q_k)), (l, (phase_l, q_l)) in product(enumerate(self.taps), repeat=2):
            shared.setdefault((phase_k, phase_l, q_l - q_k), []).append((k, l))
        return shared

    def window(self, k: int) -> Interval:
        """The pixels of its phase image that tap ``k`` reads."""
        start = self.taps[k][1]
        return start, start + self.outputs

    def overlap(self, key: tuple[int, int, int]) -> Interval:
        """The pixels of the first phase image for which the shifted second one has a pixel."""
        first, second, shift = key
        low = max(0, -shift)
        return low, max(low, min(self.phase_length(first), self.phase_length(second) - shift))


def _axes(module: nn.Conv2d, x: Tensor, padding: list[int]) -> tuple[_Axis, _Axis]:
    left, right, top, bottom = padding
    axes = []
    for size, before, after, K, stride, dilation in zip(
        x.shape[2:],
        (top, left),
        (bottom, right),
        module.kernel_size,
        module.stride,
        module.dilation,
        strict=True,
    ):
        outputs = (size + before + after - dilation * (K - 1) - 1) // stride + 1
        starts = tuple(k * dilation for k in range(K))
        taps = tuple(((start - before) % stride, (start - before) // stride) for start in starts)
        axes.append(_Axis(size, outputs, stride, taps, starts))
    return axes[0], axes[1]


@dataclass(frozen=True)
class _Geometry:
    """Which correlations a convolution needs, and what they cost.

    Attributes:
        rows: The vertical axis.
        columns: The horizontal axis.
    """

    rows: _Axis
    columns: _Axis

    def correlations(self) -> Iterator[_Correlation]:
        """The correlations, up to transposition."""
        width = self.columns.length + self.columns.gap
        for row_key, row_pairs in self.rows.pairs().items():
            for column_key, column_pairs in self.columns.pairs().items():
                shift = row_key[2] * width + column_key[2]
                transposed_first = (row_key[0], column_key[0]) > (row_key[1], column_key[1])
                if shift > 0 or (shift == 0 and not transposed_first):
                    yield _Correlation(self, row_key, column_key, shift, row_pairs, column_pairs)

    @property
    def cost(self) -> int:
        """Multiplications for each example, in units of ``C²``."""
        pixels = self.rows.length * (self.columns.length + self.columns.gap)
        return sum(
            max(0, pixels - correlation.shift) + correlation.border_pixels
            for correlation in self.correlations()
        )

    @property
    def patch_cost(self) -> int:
        """The same for a product of patches."""
        taps = len(self.rows.taps) * len(self.columns.taps)
        return taps**2 * self.rows.outputs * self.columns.outputs


@dataclass(frozen=True)
class _Correlation:
    """The pairs of taps that read the same phase images at the same shift.

    Attributes:
        geometry: The convolution's geometry.
        row_key: Phases and shift along the vertical axis.
        column_key: Phases and shift along the horizontal axis.
        shift: The shift in the flattened image whose rows are followed by a gap.
        row_pairs: Vertical taps ``(k, l)`` with these phases and this shift.
        column_pairs: Horizontal taps.
    """

    geometry: _Geometry
    row_key: tuple[int, int, int]
    column_key: tuple[int, int, int]
    shift: int
    row_pairs: list[tuple[int, int]]
    column_pairs: list[tuple[int, int]]

    @property
    def phases(self) -> tuple[Interval, Interval]:
        """The phases (vertical, horizontal) of the first and of the second image."""
        return (self.row_key[0], self.column_key[0]), (self.row_key[1], self.column_key[1])

    @property
    def cells(self) -> list[tuple[Interval, Interval]]:
        """A partition of the overlap into rectangles, each within or outside every window."""
        rows, columns = self.geometry.rows, self.geometry.columns
        row_parts = _parts(rows.overlap(self.row_key), [rows.window(k) for k, _ in self.row_pairs])
        column_parts = _parts(
            columns.overlap(self.column_key), [columns.window(k) for k, _ in self.column_pairs]
        )
        return list(product(row_parts, column_parts))

    def outside(self, row_tap: int, column_tap: int) -> list[tuple[Interval, Interval]]:
        """The cells that a pair of taps does not read."""
        row_window = self.geometry.rows.window(row_tap)
        column_window = self.geometry.columns.window(column_tap)
        return [
            (rows, columns)
            for rows, columns in self.cells
            if not (_within(rows, row_window) and _within(columns, column_window))
        ]

    @property
    def border(self) -> list[tuple[Interval, Interval]]:
        """The cells that some pair of taps does not read."""
        taps = product({k for k, _ in self.row_pairs}, {k for k, _ in self.column_pairs})
        cells = {cell for row_tap, column_tap in taps for cell in self.outside(row_tap, column_tap)}
        return sorted(cells)

    @property
    def border_pixels(self) -> int:
        """Pixels in the border."""
        return sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in self.border)


def _parts(overlap: Interval, windows: list[Interval]) -> list[Interval]:
    """Cut an interval at the ends of windows."""
    low, high = overlap
    cuts = {low, high} | {min(max(end, low), high) for window in windows for end in window}
    ordered = sorted(cuts)
    return list(pairwise(ordered))


def _within(part: Interval, window: Interval) -> bool:
    return window[0] <= part[0] and part[1] <= window[1]


# ---------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------


class _PatchSums:
    """The running sum by patches: simple, and cheaper for some small images."""

    def __init__(self, module: nn.Conv2d):
        self._module = module
        self._total: Tensor | None = None

    def add(self, x: Tensor, weight: float) -> None:
        module = self._module
        padding = module._reversed_padding_repeated_twice if module.padding_mode == "zeros" else [0]
        if any(padding):
            x = pad(x, padding)
        a_SI = unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
        a_SI = a_SI.transpose(1, 2).flatten(0, 1)
        if self._total is None:
            self._total = x.new_zeros(a_SI.shape[1], a_SI.shape[1])
        self._total.addmm_(a_SI.T, a_SI, alpha=weight)

    def total(self) -> Tensor:
        assert self._total is not None
        return self._total


@dataclass
class _Sum:
    """Running sums of one correlation: over the whole image, and over each cell of its border."""

    correlation: _Correlation
    border: list[tuple[Interval, Interval]]
    whole: Tensor
    cells: dict[tuple[Interval, Interval], Tensor] = field(default_factory=dict)


class _CorrelationSums:
    """The running sum by correlations; put together only when it is asked for."""

    def __init__(self, geometry: _Geometry):
        self._geometry = geometry
        self._sums: list[_Sum] = []

    def add(self, x: Tensor, weight: float) -> None:
        C = x.shape[1]
        if not self._sums:
            self._sums = [
                _Sum(correlation, correlation.border, x.new_zeros(C, C))
                for correlation in self._geometry.correlations()
            ]
        images = self._phase_images(x)
        for sums in self._sums:
            first, second = (images[phase] for phase in sums.correlation.phases)
            shift = sums.correlation.shift * x.shape[0]
            flat, shifted = first.view(-1, C), second.view(-1, C)
            if shift < len(flat):
                sums.whole.addmm_(flat[: len(flat) - shift].T, shifted[shift:], alpha=weight)
            down, right = sums.correlation.row_key[2], sums.correlation.column_key[2]
            for (top, bottom), (left, end) in sums.border:
                cell = first[top:bottom, left:end].reshape(-1, C)
                moved = second[top + down : bottom + down, left + right : end + right]
                total = sums.cells.setdefault(((top, bottom), (left, end)), x.new_zeros(C, C))
                total.addmm_(cell.T, moved.reshape(-1, C), alpha=weight)

    def _phase_images(self, x: Tensor) -> dict[Interval, Tensor]:
        """Every phase image as ``[H, W, N, C]``, each row followed by a gap of zeros.

        In this order a shifted image is a shifted range of rows ``[C]`` of the whole batch, and
        the gap keeps it from running into the next row; a view of memory serves for each shift.
        """
        rows, columns = self._geometry.rows, self._geometry.columns
        N, C = x.shape[:2]
        images = {}
        for top, left in product({p for p, _ in rows.taps}, {p for p, _ in columns.taps}):
            image = x.new_empty(rows.length, columns.length + columns.gap, N, C)
            phase = x[:, :, top :: rows.stride, left :: columns.stride].permute(2, 3, 0, 1)
            height, width = phase.shape[:2]
            image[:height, :width] = phase
            image[:, width:] = 0
            image[height:] = 0
            images[top, left] = image
        return images

    def total(self) -> Tensor:
        C = len(self._sums[0].whole)
        K1, K2 = len(self._geometry.rows.taps), len(self._geometry.columns.taps)
        result = self._sums[0].whole.new_empty(C, K1, K2, C, K1, K2)
        for sums in self._sums:
            correlation = sums.correlation
            for (k1, l1), (k2, l2) in product(correlation.row_pairs, correlation.column_pairs):
                block = sums.whole.clone()
                for cell in correlation.outside(k1, k2):
                    block -= sums.cells[cell]
                result[:, k1, k2, :, l1, l2] = block
                result[:, l1, l2, :, k1, k2] = block.T
        return result.reshape(C * K1 * K2, -1)
