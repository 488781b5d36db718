"""Convolutions and transposed convolutions, of one to three dimensions, with or without groups."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn.functional import pad

from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.moments import LatestProduct, Moment
from curvlinops_diffusion.layers.patch_moments import PatchMoment
from curvlinops_diffusion.layers.patches import (
    Convolution2d,
    patch_gradients,
    patch_sum,
    patches,
    patches_at,
    windows,
)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvolutionKind(SharingKind):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    Without groups, and with at most two axes along which the kernel does anything, these are
    two-dimensional convolutions, for which ``patches.py`` has fast ways; the others form patches.
    """

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """Convolutions also take inputs without a batch axis."""
        assert isinstance(module, Convolution)
        return x.ndim == len(module.kernel_size) + 2

    def groups(self, module: nn.Module) -> tuple[int, ...]:
        """One Kronecker pair for each group."""
        assert isinstance(module, Convolution)
        return () if module.groups == 1 else (module.groups,)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """One patch for each output pixel."""
        assert isinstance(module, Convolution)
        planar = _planar(module)
        if planar is not None:
            return patches(planar, _as_images(module, x))
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = pad(x, tuple(module._reversed_padding_repeated_twice), mode=mode)
        seen = windows(x, module.kernel_size, module.stride, module.dilation)
        dims = len(module.kernel_size)
        by_group = seen.unflatten(1, (module.groups, -1))
        a_NGSI = by_group.flatten(3, 2 + dims).movedim(2, 3).flatten(3)
        return a_NGSI if module.groups > 1 else a_NGSI.squeeze(1)

    def sampled_inputs(self, module: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """The patches of some output pixels alone."""
        assert isinstance(module, Convolution)
        planar = _planar(module)
        if planar is None:
            return super().sampled_inputs(module, x, index)
        return patches_at(planar, _as_images(module, x), index)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """One entry for each output pixel."""
        assert isinstance(module, Convolution)
        by_group = g.flatten(2).unflatten(1, (module.groups, -1)).mT
        return by_group if module.groups > 1 else by_group.squeeze(1)

    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor | None:
        """The channels rotated."""
        assert isinstance(module, Convolution)
        return (U.T @ g.flatten(2)).view(g.shape) if module.groups == 1 else None

    def weight_gradients(self, module: nn.Module, x: Tensor, g: Tensor, sums: int) -> Tensor:
        """By the convolution's own weight gradient."""
        assert isinstance(module, Convolution)
        planar = _planar(module)
        if planar is None:
            return super().weight_gradients(module, x, g, sums)
        return patch_gradients(planar, _as_images(module, x), _as_images(module, g), sums)

    def positions(self, module: nn.Module, x: Tensor) -> int:
        """The number of output pixels."""
        assert isinstance(module, Convolution)
        total = 1
        for size, K, s, d, before, after in zip(
            x.shape[2:],
            module.kernel_size,
            module.stride,
            module.dilation,
            module._reversed_padding_repeated_twice[-2::-2],
            module._reversed_padding_repeated_twice[::-2],
            strict=True,
        ):
            total *= (size + before + after - d * (K - 1) - 1) // s + 1
        return total

    def input_sum(self, module: nn.Module, x: Tensor) -> Tensor:
        """Sums over windows."""
        assert isinstance(module, Convolution)
        planar = _planar(module)
        if planar is None:
            return super().input_sum(module, x)
        return patch_sum(planar, _as_images(module, x))

    def input_norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """From sums over windows."""
        return self.input_sum(module, x.square()).sum().sqrt()

    def input_moment(self, module: nn.Module, latest: LatestProduct) -> Moment:
        """Without patches, where that is cheaper."""
        convolution = module
        assert isinstance(convolution, Convolution)
        planar = _planar(convolution)
        if planar is None:
            return super().input_moment(module, latest)
        return PatchMoment(planar, lambda x: _as_images(convolution, x))


def _planar(module: Convolution) -> Convolution2d | None:
    """The module as a two-dimensional convolution, if it is one."""
    if module.groups > 1:
        return None
    if isinstance(module, nn.Conv2d):
        return Convolution2d.of(module)
    padding = tuple(module._reversed_padding_repeated_twice)
    if isinstance(module, nn.Conv1d):  # images of one row
        return Convolution2d(
            (1, module.kernel_size[0]),
            (1, module.stride[0]),
            (1, module.dilation[0]),
            (padding[0], padding[1], 0, 0),
            module.padding_mode,
        )
    if _acts_along_time_only(module):  # rows are times, columns the pixels
        return Convolution2d(
            (module.kernel_size[0], 1),
            (module.stride[0], 1),
            (module.dilation[0], 1),
            (0, 0, padding[4], padding[5]),
            module.padding_mode,
        )
    return None


def _acts_along_time_only(module: Convolution) -> bool:
    kernel, stride = module.kernel_size[1:], module.stride[1:]
    return prod(kernel) == prod(stride) == 1 and not any(
        module._reversed_padding_repeated_twice[:4]
    )


def _as_images(module: Convolution, z: Tensor) -> Tensor:
    """Input or output of the module as images ``[N, C, H, W]``, see :func:`_planar`."""
    if isinstance(module, nn.Conv1d):
        return z.unsqueeze(2)
    return z.flatten(3) if isinstance(module, nn.Conv3d) else z


class TransposedConvolutionKind(SharingKind):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``.

    The adjoint of a convolution: at every input pixel ``s`` the weight ``[I, O K]`` multiplies the
    channels ``a_s``, and what it gives is added to a window of the output. So ``b_s`` is a patch
    of the gradient in the output, and a bias, added to every output pixel, is a block of its own.
    """

    transposed = True
    joint = False

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """As for convolutions."""
        assert isinstance(module, TransposedConvolution)
        return x.ndim == len(module.kernel_size) + 2

    def groups(self, module: nn.Module) -> tuple[int, ...]:
        """One Kronecker pair for each group."""
        assert isinstance(module, TransposedConvolution)
        return () if module.groups == 1 else (module.groups,)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """One entry for each input pixel."""
        assert isinstance(module, TransposedConvolution)
        by_group = x.flatten(2).unflatten(1, (module.groups, -1)).mT
        return by_group if module.groups > 1 else by_group.squeeze(1)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """One patch of the output for each input pixel."""
        assert isinstance(module, TransposedConvolution)
        sizes = []
        for size, K, s, d, p, op in zip(
            g.shape[2:],
            module.kernel_size,
            module.stride,
            module.dilation,
            module.padding,
            module.output_padding,
            strict=True,
        ):
            sizes.append((size - op - 1 - d * (K - 1) + 2 * p) // s + 1)
        padding: list[int] = []
        for p in reversed(module.padding):
            padding += [p, p]  # type: ignore[list-item]
        seen = windows(pad(g, padding), module.kernel_size, module.stride, module.dilation)
        for axis, size in enumerate(sizes, start=2):
            seen = seen.narrow(axis, 0, size)  # what output_padding added is read by no pixel
        by_group = seen.unflatten(1, (module.groups, -1))
        b_NGSO = by_group.flatten(3, 2 + len(sizes)).movedim(2, 3).flatten(3)
        return b_NGSO if module.groups > 1 else b_NGSO.squeeze(1)

    def bias_gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """The sum over output pixels."""
        return g.flatten(2).sum(2)
