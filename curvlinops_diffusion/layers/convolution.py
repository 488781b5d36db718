"""Convolutions and transposed convolutions, of one to three dimensions, with or without groups.

Legend: N batch, C channels, H, W image, K kernel taps along an axis, S output pixels, I = C K1 K2.
"""

from __future__ import annotations

from abc import ABC
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from curvlinops_diffusion.layers.geometry import Convolution2d, as_images, output_sizes, windows
from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.moments import on_tensor_cores
from curvlinops_diffusion.layers.patch_moments import MAX_ENTRIES, PatchMoment
from curvlinops_diffusion.runtime.devices import to_device

# Up to so many entries of a group's patches a product of all groups' patches at once is faster than
# the convolution's own weight gradient, group by group; on a GPU, where the latter are two launches
# each, which take as long as writing and reading so many numbers
_SMALL_GROUP = 2**19
_SMALL_GROUP_ON_GPU = 2**23


class _PixelsKind(SharingKind, ABC):
    """The positions are pixels."""

    def has_batch_axis(self, module: Any, x: Tensor) -> bool:
        """Convolutions also take inputs without a batch axis."""
        return x.ndim == len(module.kernel_size) + 2

    def groups(self, module: Any) -> tuple[int, ...]:
        """One Kronecker pair for each group."""
        return () if module.groups == 1 else (module.groups,)


class ConvolutionKind(_PixelsKind):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    Without groups, and with at most two axes along which the kernel does anything, these are
    two-dimensional convolutions (:class:`Convolution2d`), for which there are fast ways; the others
    form patches.
    """

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """One patch for each output pixel."""
        planar = Convolution2d.of(module)
        if planar is not None:
            return patches(planar, x)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = pad(x, tuple(module._reversed_padding_repeated_twice), mode=mode)
        return _by_window(
            windows(x, module.kernel_size, module.stride, module.dilation), module.groups
        )

    def sampled_inputs(self, module: Any, x: Tensor, index: Tensor) -> Tensor:
        """The patches of some output pixels alone."""
        planar = Convolution2d.of(module)
        if planar is None:
            return super().sampled_inputs(module, x, index)
        return patches_at(planar, x, index)

    def gradients(self, module: Any, g: Tensor) -> Tensor:
        """One entry for each output pixel."""
        return _by_pixel(g, module.groups)

    def rotated(self, module: Any, g: Tensor, U: Tensor) -> Tensor | None:
        """The channels rotated."""
        return (U.T @ g.flatten(2)).view(g.shape) if module.groups == 1 else None

    def weight_gradients(self, module: Any, x: Tensor, g: Tensor, sums: int) -> Tensor:
        """By the convolution's own weight gradient."""
        planar = Convolution2d.of(module)
        if planar is None:
            return super().weight_gradients(module, x, g, sums)
        return patch_gradients(planar, x, g, sums)

    def positions(self, module: Any, x: Tensor) -> int:
        """The number of output pixels."""
        padding = module._reversed_padding_repeated_twice
        sizes = map(sum, zip(x.shape[2:], padding[-2::-2], padding[::-2], strict=True))
        return prod(output_sizes(sizes, module.kernel_size, module.stride, module.dilation))

    def input_sum(self, module: Any, x: Tensor) -> Tensor:
        """Sums over windows."""
        planar = Convolution2d.of(module)
        return super().input_sum(module, x) if planar is None else patch_sum(planar, x)

    def input_norm(self, module: Any, x: Tensor) -> Tensor:
        """From sums over windows."""
        return self.input_sum(module, x.square()).sum().sqrt()

    def patch_moment(self, module: Any) -> PatchMoment | None:
        """Without patches, where that is cheaper."""
        planar = Convolution2d.of(module)
        return None if planar is None else PatchMoment(planar)


class TransposedConvolutionKind(_PixelsKind):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``.

    The adjoint of a convolution: at every input pixel ``s`` the weight ``[I, O K]`` multiplies the
    channels ``a_s``, and what it gives is added to a window of the output. So ``b_s`` is a patch
    of the gradient in the output, and a bias, added to every output pixel, is a block of its own.
    """

    transposed = True
    joint = False

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """One entry for each input pixel."""
        return _by_pixel(x, module.groups)

    def gradients(self, module: Any, g: Tensor) -> Tensor:
        """One patch of the output for each input pixel."""
        padding: list[int] = []
        for p, op in zip(module.padding, module.output_padding, strict=True):
            padding = [p, p - op, *padding]  # what output_padding added is read by no pixel
        seen = windows(pad(g, padding), module.kernel_size, module.stride, module.dilation)
        return _by_window(seen, module.groups)

    def bias_gradients(self, module: Any, g: Tensor) -> Tensor:
        """The sum over output pixels."""
        return g.flatten(2).sum(2)


def _by_pixel(z: Tensor, groups: int) -> Tensor:
    """``[N, g C, *size] -> [N, *g, S, C]``."""
    by_group = z.flatten(2).unflatten(1, (groups, -1)).mT
    return by_group if groups > 1 else by_group.squeeze(1)


def _by_window(seen: Tensor, groups: int) -> Tensor:
    """``[N, g C, *size, *kernel] -> [N, *g, S, I]``."""
    by_group = seen.unflatten(1, (groups, -1)).flatten(3, seen.ndim // 2 + 1)
    by_group = by_group.movedim(2, 3).flatten(3)
    return by_group if groups > 1 else by_group.squeeze(1)


def patches(conv: Convolution2d, x: Tensor) -> Tensor:
    """One patch for each output pixel, ``[N, S, I]``, ordered like ``weight.flatten(1)``."""
    return _columns(conv, x, 1).mT


def _columns(conv: Convolution2d, x: Tensor, group: int) -> Tensor:
    """Patches as columns, those of successive examples side by side: ``[N / group, I, group S]``.

    Copied all at once: PyTorch's ``unfold`` is slower, and on a GPU goes from image to image.
    """
    seen = conv.windows(x)
    I, S = seen.shape[1] * prod(conv.kernel_size), prod(seen.shape[2:4])
    by_group = seen.unflatten(0, (-1, group)).permute(0, 2, 5, 6, 1, 3, 4)
    return by_group.reshape(-1, I, group * S)


def patches_at(conv: Convolution2d, x: Tensor, index: Tensor) -> Tensor:
    """The patches of the output pixels of some numbers ``[N, m]``, row by row: ``[N, m, I]``."""
    x, zeros = conv.padded(x)
    x = pad(x, zeros)  # gathered from, which is faster than to index windows
    width = x.shape[3]
    _, outputs = output_sizes(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation)
    (down, across), (below, beside) = conv.stride, conv.dilation
    taps = [k * below * width + l * beside for k, l in product(*map(range, conv.kernel_size))]
    first = index // outputs * (down * width) + index % outputs * across
    pixels_NmK = first.unsqueeze(-1) + to_device(torch.tensor(taps), x.device)
    N, C = x.shape[:2]
    seen = x.flatten(2).gather(2, pixels_NmK.view(N, 1, -1).expand(-1, C, -1))
    return seen.view(N, C, -1, len(taps)).transpose(1, 2).flatten(2)


def patch_sum(conv: Convolution2d, x: Tensor) -> Tensor:
    """The sum of the patches of each example, shape ``[N, I]``, without forming them."""
    seen = conv.windows(x)
    sums = seen.new_empty(*seen.shape[:2], *conv.kernel_size)
    for k, l in product(*map(range, conv.kernel_size)):
        sums[:, :, k, l] = seen[..., k, l].sum((2, 3))
    return sums.flatten(1)


def patch_gradients(conv: Convolution2d, x: Tensor, g: Tensor, sums: int) -> Tensor:
    """Gradients of the weight, ``[sums, O, I]``, summed over equally many successive examples."""
    x, g = as_images(x), as_images(g)
    group = len(x) // sums
    entries = group * x.shape[1] * prod(conv.kernel_size) * prod(g.shape[2:])
    if entries <= (_SMALL_GROUP_ON_GPU if on_tensor_cores(x) else _SMALL_GROUP):
        chunk = max(1, MAX_ENTRIES // entries) * group
        found = []
        for x_part, g_part in zip(x.split(chunk), g.split(chunk), strict=True):
            b = g_part.flatten(2).unflatten(0, (-1, group)).transpose(1, 2).flatten(2)
            found.append(b @ _columns(conv, x_part, group).mT)
        return found[0] if len(found) == 1 else torch.cat(found)
    x, (left, right, top, bottom) = conv.padded(x)
    symmetric = (top, left)
    if symmetric != (bottom, right):
        x, symmetric = pad(x, (left, right, top, bottom)), (0, 0)
    shape = (g.shape[1], x.shape[1], *conv.kernel_size)
    result = x.new_empty(sums, *shape)
    for total, x_part, g_part in zip(result, x.split(group), g.split(group), strict=True):
        total.copy_(conv2d_weight(x_part, shape, g_part, conv.stride, symmetric, conv.dilation))
    return result.flatten(2)
