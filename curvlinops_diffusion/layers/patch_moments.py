"""Second moments of a convolution's patches, the cheapest way: mostly without making them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

from torch import Tensor

from curvlinops_diffusion.layers.correlations import CorrelationSums, Geometry, new_sums
from curvlinops_diffusion.layers.patches import (
    _MAX_ENTRIES,
    Convolution2d,
    _axes,
    _padded_explicitly,
    patches_by_tap,
)
from curvlinops_diffusion.layers.products import add_product, on_tensor_cores
from curvlinops_diffusion.layers.shifted_sums import ShiftedSums
from curvlinops_diffusion.layers.spectral_sums import SpectralSums
from curvlinops_diffusion.runtime.sums import prefixed, within

# Products on a GPU, in units of the time that one tile of a result, of 128 rows and columns, takes
# for a pixel. They take as long for fewer tiles than are computed at once. What telling of a
# product takes is for each of 128 examples. With these the ratios of the two ways' times that an
# H200 took in single precision for 128 and 256 channels, 1.7 and 0.6, come out to a factor of 1.5.
_TILE = 128
_TILES_AT_ONCE = 64
_LAUNCH = 200


class PatchMoment:
    """A running sum of the patches' second moments, ``Σ_n Σ_s a_s a_sᵀ``, of shape ``[I, I]``.

    Args:
        conv: The convolution.
        as_images: Maps the layer's input to images ``[N, C, H, W]``; by default it is these.
    """

    def __init__(self, conv: Convolution2d, as_images: Callable[[Tensor], Tensor] = lambda x: x):
        self._conv = conv
        self._as_images = as_images
        # one geometry for each image size that occurs
        self._sums: dict[tuple[int, ...], CorrelationSums | PatchSums] = {}

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``."""
        x, padding = _padded_explicitly(self._conv, self._as_images(x))
        if x.shape[1:] not in self._sums:
            self._sums[x.shape[1:]] = self._new_sums(x, padding)
        self._sums[x.shape[1:]].add(x, weight)

    def _new_sums(self, x: Tensor, padding: Sequence[int]) -> CorrelationSums | PatchSums:
        geometry = Geometry(*_axes(self._conv, x, padding))
        if on_tensor_cores(x):
            if _shifts_are_faster(geometry, x.shape[1]):
                return ShiftedSums(geometry, x)
        elif SpectralSums.cost(geometry) < geometry.patch_cost:
            return SpectralSums(geometry, x)
        return PatchSums(self._conv, geometry, x)

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""
        first, *others = self._sums.values()
        return sum((sums.total() for sums in others), first.total())

    def tensors(self) -> dict[str, Tensor]:
        """The sums by the size of the (explicitly padded) image, and name."""
        result: dict[str, Tensor] = {}
        for shape, sums in self._sums.items():
            result |= prefixed("x".join(map(str, shape)), sums.tensors())
        return result

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums by name.

        Raises:
            ValueError: If they are sums of something else than is summed here.
        """
        self._sums = {}
        for prefix in dict.fromkeys(name.split("/")[0] for name in tensors):
            own = within(prefix, tensors)
            shape = tuple(map(int, prefix.split("x")))
            # what sums are of follows from the size of the images, and the kind of device
            x = next(iter(own.values())).new_zeros(1, *shape)
            padding = self._conv.padding if self._conv.padding_mode == "zeros" else (0,) * 4
            sums = self._new_sums(x, padding)
            if sums.tensors().keys() != own.keys():
                raise ValueError(
                    f"A checkpoint arrived with sums of a convolution that are computed otherwise "
                    f"on {x.device.type!r}. Go on on the kind of device that it was written on, or "
                    "delete it to start anew."
                )
            sums.restore(own)
            self._sums[shape] = sums


class PatchSums:
    """The running sum by patches: simple, and cheaper for small kernels or images.

    Args:
        conv: The convolution.
        geometry: The pixels that its taps read.
        x: An explicitly padded input, for its channels, type and device.
    """

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        self._conv = conv
        self._taps, self._channels = geometry.num_taps, x.shape[1]
        self._pixels = geometry.num_outputs
        # ordered by tap, then by channel
        self._total = new_sums(x, self._taps * self._channels, self._taps * self._channels)

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, explicitly padded."""
        entries = self._pixels * len(self._total)  # of an example
        for part in x.split(max(1, _MAX_ENTRIES // entries)):
            a = patches_by_tap(self._conv, part)
            add_product(self._total.unsqueeze(0), a.T.unsqueeze(0), a.unsqueeze(0), weight)

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


def _shifts_are_faster(geometry: Geometry, channels: int) -> bool:
    """Decide by counted time on a GPU whether to multiply shifted images rather than patches.

    Shifted images need the fewer multiplications, but results of few channels have few tiles,
    which leave most of the card idle, and there are more of them to be told of.
    """
    shifted = [
        (pixels, results * _tiles(channels)) for pixels, results in ShiftedSums.products(geometry)
    ]
    by_patches = [(geometry.num_outputs, _tiles(geometry.num_taps * channels))]
    return _time_on_gpu(shifted) < _time_on_gpu(by_patches)


def _tiles(rows: int) -> int:
    return ceil(rows / _TILE) ** 2


def _time_on_gpu(told: Sequence[tuple[int, int]]) -> int:
    """The time of products by their depth and their results' tiles."""
    return sum(depth * max(tiles, _TILES_AT_ONCE) + _LAUNCH for depth, tiles in told)
