"""Second moments of a convolution's patches, the cheapest of three ways: mostly without patches.

Legend: N batch, C channels, H, W image, K kernel taps along an axis, S output pixels, I = C K1 K2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod

from torch import Tensor

from curvlinops_diffusion.layers.correlations import (
    CorrelationSums,
    Product,
    ShiftedSums,
    SpectralSums,
    new_sums,
)
from curvlinops_diffusion.layers.geometry import Convolution2d, Geometry, Padding, windows
from curvlinops_diffusion.layers.moments import add_product, on_tensor_cores
from curvlinops_diffusion.runtime.sums import prefixed, within

#: Patches are formed for so many entries at a time, to bound the memory.
MAX_ENTRIES = 2**25
# Products on a GPU, in units of the time that one tile of a result, of 128 rows and columns, takes
# for a pixel. They take as long for fewer tiles than are computed at once. A product's launch is
# shared by 128 examples. With these the ratios of the times of patches and shifted images that an
# H200 took in single precision for 128 and 256 channels, 1.7 and 0.6, come out to a factor of 1.5.
_TILE = 128
_TILES_AT_ONCE = 64
_LAUNCH = 200


class PatchMoment:
    """A running sum of the patches' second moments, ``Σ_n Σ_s a_s a_sᵀ``, of shape ``[I, I]``."""

    def __init__(self, conv: Convolution2d):
        self._conv = conv
        # one geometry for each image size that occurs
        self._sums: dict[tuple[int, ...], CorrelationSums | PatchSums] = {}

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of the layer's input ``x``."""
        x, zeros = self._conv.padded(x)
        if x.shape[1:] not in self._sums:
            self._sums[x.shape[1:]] = cheapest_sums(self._conv, x, zeros)
        self._sums[x.shape[1:]].add(x, weight)

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""
        first, *others = self._sums.values()
        return sum((sums.total() for sums in others), first.total())

    def tensors(self) -> dict[str, Tensor]:
        """The sums by the size of the padded image, and name."""
        result: dict[str, Tensor] = {}
        for shape, sums in self._sums.items():
            result |= prefixed("x".join(map(str, shape)), sums.tensors())
        return result

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums by name.

        Raises:
            ValueError: If they were summed another way, on another kind of device.
        """
        self._sums = {}
        for prefix in dict.fromkeys(name.split("/")[0] for name in tensors):
            own = within(prefix, tensors)
            shape = tuple(map(int, prefix.split("x")))
            # the way follows from the size of the images, and the kind of device
            x = next(iter(own.values())).new_zeros(1, *shape)
            zeros = self._conv.padding if self._conv.padding_mode == "zeros" else (0,) * 4
            sums = self._sums[shape] = cheapest_sums(self._conv, x, zeros)
            if sums.tensors().keys() != own.keys():
                raise ValueError(
                    f"The checkpoint's sums of a convolution are computed otherwise on "
                    f"{x.device.type!r}. Go on on the kind of device that it was written on, or "
                    "delete it to start anew."
                )
            sums.restore(own)


def cheapest_sums(conv: Convolution2d, x: Tensor, zeros: Padding) -> CorrelationSums | PatchSums:
    """Choose by count how the second moment of patches is summed.

    On a GPU shifted images need fewer multiplications than patches, but results of few channels
    have few tiles, which leave most of the card idle, and there are more of them to launch.
    Elsewhere Fourier transforms need the fewest: for a 3×3 convolution of stride 1 on a 16×16 image
    a fourteenth of those of patches.

    Args:
        conv: The convolution.
        x: A padded input, for its size, type and device.
        zeros: The zeros that are still to be added around it.
    """
    geometry, gpu = Geometry.of(conv, x, zeros), on_tensor_cores(x)
    correlations = ShiftedSums if gpu else SpectralSums
    by_correlations, by_patches = (
        sum(cost(own, x.shape[1], gpu) for own in products)
        for products in (correlations.products(geometry), PatchSums.products(geometry))
    )
    if by_correlations < by_patches:
        return correlations(geometry, x)
    return PatchSums(conv, geometry, x)


def cost(product: Product, channels: int, gpu: bool) -> int:
    """Multiplications in units of ``C²``, or time on a GPU."""
    pixels, results, rows = product
    if not gpu:
        return pixels * results * rows**2
    tiles = results * ceil(rows * channels / _TILE) ** 2
    return pixels * max(tiles, _TILES_AT_ONCE) + _LAUNCH


class PatchSums:
    """The running sum by patches: simple, and cheaper for small kernels or images.

    Args:
        conv: The convolution.
        geometry: The pixels that its taps read.
        x: A padded input, for its channels, type and device.
    """

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        self._conv = conv
        self._taps, self._channels = geometry.num_taps, x.shape[1]
        self._pixels = geometry.num_outputs
        # ordered by tap, then by channel
        self._total = new_sums(x, self._taps * self._channels, self._taps * self._channels)

    @staticmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """The one product."""
        return [(geometry.num_outputs, 1, geometry.num_taps)]

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, padded."""
        entries = self._pixels * len(self._total)  # of an example
        for part in x.split(max(1, MAX_ENTRIES // entries)):
            a = _patches_by_tap(self._conv, part)
            add_product(self._total, a.T, a, weight)

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""
        K, C = self._taps, self._channels
        return self._total.view(K, C, K, C).permute(1, 0, 3, 2).reshape(C * K, C * K)

    def tensors(self) -> dict[str, Tensor]:
        """The sum by name."""
        return {"by_tap": self._total}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a sum."""
        self._total.copy_(tensors["by_tap"])


def _patches_by_tap(conv: Convolution2d, x: Tensor) -> Tensor:
    """The patches of a padded input, a row each, ordered by tap and then by channel.

    In this order, ``[N S, K1 K2 C]``, they are copied from where channels lie side by side in runs,
    and need not be copied once more to be multiplied.
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
