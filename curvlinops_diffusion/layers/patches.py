"""A convolution's input as patches, and the patches' second moment without forming them.

Legend: N batch, C channels, H, W image, K kernel taps along an axis, S output pixels, I = C K1 K2,
F frequencies.

A tap ``k`` of the kernel reads, for output pixel ``o``, the input pixel ``o s + k d - p`` (stride
``s``, dilation ``d``, padding ``p``). Written as ``(o + q) s + φ``, it reads pixel ``o + q`` of
the *phase image* ``φ``, every ``s``-th pixel of the input. Entry ``(i, k; j, l)`` of the second
moment of the patches is thus a correlation of channels ``i`` and ``j`` of two phase images at the
shift ``q_l - q_k``, over a window of output pixels that depends on ``k`` alone.

All pairs of taps with the same phases and shift share one correlation over all pixels; their
windows differ from it by thin strips at the borders, which are subtracted. Along the rows of the
image the correlations at all shifts come at once, from the product of Fourier transforms. A 3×3
convolution of stride 1 on a 16×16 image so needs a fourteenth of the multiplications of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from torch.nn.grad import conv2d_weight

# Up to so many entries of a group's patches a product of all groups' patches at once is faster than
# the convolution's own weight gradient, group by group
_SMALL_GROUP = 2**17
Interval = tuple[int, int]
Key = tuple[int, int, int]  # phase, phase, and shift, along one axis


@dataclass(frozen=True)
class Convolution2d:
    """The geometry of a two-dimensional convolution without groups.

    Attributes:
        kernel_size: Taps along the rows' and the columns' axis.
        stride: The strides.
        dilation: The dilations.
        padding: Pixels added at the left, right, top and bottom.
        padding_mode: What with, as in :class:`torch.nn.Conv2d`.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, int, int, int]
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Conv2d) -> Convolution2d:
        """The geometry of a module."""
        left, right, top, bottom = module._reversed_padding_repeated_twice  # strings resolved
        padding = (left, right, top, bottom)
        return cls(module.kernel_size, module.stride, module.dilation, padding, module.padding_mode)


def patches(conv: Convolution2d, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies with its weight.

    Args:
        conv: The convolution.
        x: Its input, shape ``[N, C, H, W]``.

    Returns:
        One patch for each output pixel, shape ``[N, S, I]``; entries are ordered like
        ``weight.flatten(1)``.
    """
    x, padding = _padded_explicitly(conv, x)
    columns = unfold(pad(x, padding), conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    return columns.transpose(1, 2)


def patches_at(conv: Convolution2d, x: Tensor, index: Tensor) -> Tensor:
    """The patches of some output pixels.

    Args:
        conv: The convolution.
        x: Its input, shape ``[N, C, H, W]``.
        index: The numbers of the output pixels, ``[N, m]``, row by row.

    Returns:
        One patch for each, shape ``[N, m, I]``, ordered as by :func:`patches`.
    """
    x, padding = _padded_explicitly(conv, x)
    _, columns = _axes(conv, x, padding)
    x = pad(x, padding)
    width = x.shape[3]
    (down, across), (below, beside) = conv.stride, conv.dilation
    taps = [
        k * below * width + l * beside
        for k in range(conv.kernel_size[0])
        for l in range(conv.kernel_size[1])
    ]
    first = index // columns.outputs * (down * width) + index % columns.outputs * across
    pixels_NmK = first.unsqueeze(-1) + torch.tensor(taps, device=x.device)
    N, C = x.shape[:2]
    seen = x.flatten(2).gather(2, pixels_NmK.view(N, 1, -1).expand(-1, C, -1))
    return seen.view(N, C, -1, len(taps)).transpose(1, 2).flatten(2)


def patch_sum(conv: Convolution2d, x: Tensor) -> Tensor:
    """The sum of the patches of each example, shape ``[N, I]``, without forming them."""
    x, padding = _padded_explicitly(conv, x)
    rows, columns = _axes(conv, x, padding)
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


def patch_gradients(conv: Convolution2d, x: Tensor, g: Tensor, sums: int) -> Tensor:
    """Gradients of the weight, summed over equally many successive examples.

    Args:
        conv: The convolution.
        x: Its input, shape ``[N, C, H, W]``.
        g: The gradient in its output.
        sums: The number of sums.

    Returns:
        The sums, shape ``[sums, O, I]``.
    """
    group = len(x) // sums
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    if group * x.shape[1] * taps * g.shape[2] * g.shape[3] <= _SMALL_GROUP:
        gradients = g.flatten(2) @ patches(conv, x)
        return gradients if group == 1 else gradients.unflatten(0, (sums, group)).sum(1)
    x, padding = _padded_explicitly(conv, x)
    left, right, top, bottom = padding
    symmetric = (top, left)
    if (top, left) != (bottom, right):
        x, symmetric = pad(x, padding), (0, 0)
    shape = (g.shape[1], x.shape[1], *conv.kernel_size)
    result = x.new_empty(sums, *shape)
    for total, x_part, g_part in zip(result, x.split(group), g.split(group), strict=True):
        total.copy_(conv2d_weight(x_part, shape, g_part, conv.stride, symmetric, conv.dilation))
    return result.flatten(2)


def _padded_explicitly(conv: Convolution2d, x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The input and the zero padding (left, right, top, bottom) still to apply to it."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return pad(x, conv.padding, mode=conv.padding_mode), (0, 0, 0, 0)


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


def _axes(conv: Convolution2d, x: Tensor, padding: Sequence[int]) -> tuple[_Axis, _Axis]:
    left, right, top, bottom = padding
    axes = []
    for size, before, after, K, stride, dilation in zip(
        x.shape[2:],
        (top, left),
        (bottom, right),
        conv.kernel_size,
        conv.stride,
        conv.dilation,
        strict=True,
    ):
        outputs = (size + before + after - dilation * (K - 1) - 1) // stride + 1
        starts = tuple(k * dilation for k in range(K))
        taps = tuple(((start - before) % stride, (start - before) // stride) for start in starts)
        axes.append(_Axis(size, outputs, stride, taps, starts))
    return axes[0], axes[1]
