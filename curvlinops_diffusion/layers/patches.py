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
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from curvlinops_diffusion.layers.products import on_tensor_cores
from curvlinops_diffusion.runtime.devices import to_device

# Up to so many entries of a group's patches a product of all groups' patches at once is faster than
# the convolution's own weight gradient, group by group; on a GPU, where the latter are two launches
# each, which take as long as writing and reading so many numbers
_SMALL_GROUP = 2**19
_SMALL_GROUP_ON_GPU = 2**23
# Patches are formed for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**25
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
    return _columns(conv, x, 1).mT


def _columns(conv: Convolution2d, x: Tensor, group: int) -> Tensor:
    """Patches as columns, those of successive examples side by side: ``[N / group, I, group S]``.

    Copied all at once: PyTorch's ``unfold`` is slower, and on a GPU goes from image to image.
    """
    x, padding = _padded_explicitly(conv, x)
    seen = windows(pad(x, padding), conv.kernel_size, conv.stride, conv.dilation)
    I, S = x.shape[1] * prod(conv.kernel_size), prod(seen.shape[2:4])
    by_group = seen.unflatten(0, (-1, group)).permute(0, 2, 5, 6, 1, 3, 4)
    return by_group.reshape(-1, I, group * S)


def patches_by_tap(conv: Convolution2d, x: Tensor) -> Tensor:
    """The patches of an explicitly padded input, ordered by tap and then by channel.

    In this order they are copied from where channels lie side by side in runs, and need not be
    copied once more to be multiplied.

    Args:
        conv: The convolution.
        x: Its input, shape ``[N, C, H, W]``, with what its padding adds if it does not add zeros.

    Returns:
        One patch a row, shape ``[N S, K1 K2 C]``.
    """
    lines = x.permute(0, 2, 3, 1)
    if conv.padding_mode == "zeros" and any(conv.padding):
        left, right, top, bottom = conv.padding
        N, H, W, C = lines.shape
        padded = x.new_zeros(N, top + H + bottom, left + W + right, C)
        padded[:, top : top + H, left : left + W].copy_(lines)
        lines = padded
    seen = windows(
        lines.contiguous().permute(0, 3, 1, 2), conv.kernel_size, conv.stride, conv.dilation
    )
    return seen.permute(0, 2, 3, 4, 5, 1).reshape(-1, prod(conv.kernel_size) * x.shape[1])


def windows(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """What a kernel's taps read at every output pixel, in any number of dimensions.

    Args:
        x: The input, already padded, shape ``[N, C, *size]``.
        kernel: Taps along each axis.
        stride: Strides.
        dilation: Dilations.

    Returns:
        The windows, shape ``[N, C, *output size, *kernel]``, a view: they overlap in memory.
    """
    axes = list(zip(x.shape[2:], x.stride()[2:], kernel, stride, dilation, strict=True))
    outputs = [(size - d * (K - 1) - 1) // s + 1 for size, _, K, s, d in axes]
    pixels, taps = [step * s for _, step, _, s, _ in axes], [step * d for _, step, *_, d in axes]
    return x.as_strided((*x.shape[:2], *outputs, *kernel), (*x.stride()[:2], *pixels, *taps))


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
    pixels_NmK = first.unsqueeze(-1) + to_device(torch.tensor(taps), x.device)
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
    entries = group * x.shape[1] * prod(conv.kernel_size) * prod(g.shape[2:])
    if entries <= (_SMALL_GROUP_ON_GPU if on_tensor_cores(x) else _SMALL_GROUP):
        chunk = max(1, _MAX_ENTRIES // entries) * group
        found = []
        for x_part, g_part in zip(x.split(chunk), g.split(chunk), strict=True):
            b = g_part.flatten(2).unflatten(0, (-1, group)).transpose(1, 2).flatten(2)
            found.append(b @ _columns(conv, x_part, group).mT)
        return found[0] if len(found) == 1 else torch.cat(found)
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
