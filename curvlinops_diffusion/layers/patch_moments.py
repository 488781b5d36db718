"""Second moments of a convolution's patches, the cheapest way: mostly without making them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn.functional import pad, unfold

from curvlinops_diffusion.layers.correlations import CorrelationSums, Geometry, new_sums
from curvlinops_diffusion.layers.moments import SummedMoment, second_moment
from curvlinops_diffusion.layers.patches import Convolution2d, _axes, _padded_explicitly
from curvlinops_diffusion.layers.products import add_product
from curvlinops_diffusion.layers.shifted_sums import ShiftedSums
from curvlinops_diffusion.layers.spectral_sums import SpectralSums
from curvlinops_diffusion.runtime.sums import prefixed, within


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
        self._sums: dict[tuple[int, ...], CorrelationSums | _PatchSums] = {}

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``."""
        x, padding = _padded_explicitly(self._conv, self._as_images(x))
        if x.shape[1:] not in self._sums:
            self._sums[x.shape[1:]] = self._new_sums(x, padding)
        self._sums[x.shape[1:]].add(x, weight)

    def _new_sums(self, x: Tensor, padding: Sequence[int]) -> CorrelationSums | _PatchSums:
        geometry = Geometry(*_axes(self._conv, x, padding))
        # a GPU multiplies large matrices so fast that what needs the fewest products does not win
        kind = ShiftedSums if on_tensor_cores(x) else SpectralSums
        cheaper = kind.cost(geometry) < geometry.patch_cost
        return kind(geometry, x) if cheaper else _PatchSums(self._conv)

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
            if (sums.tensors() or {"total": x}).keys() != own.keys():
                raise ValueError(
                    f"A checkpoint arrived with sums of a convolution that are computed otherwise "
                    f"on {x.device.type!r}. Go on on the kind of device that it was written on, or "
                    "delete it to start anew."
                )
            sums.restore(own)
            self._sums[shape] = sums


class _PatchSums(SummedMoment):
    """The running sum by patches: simple, and cheaper for small kernels or images."""

    def __init__(self, conv: Convolution2d):
        super().__init__(lambda x: second_moment(_unfolded(conv, x)))
        self._conv = conv

    def add(self, x: Tensor, weight: float) -> None:
        """Add in place, without the product's own memory."""
        a_SI = _unfolded(self._conv, x).flatten(0, 1)
        if self._total is None:
            self._total = new_sums(x, a_SI.shape[1], a_SI.shape[1])
        add_product(self._total.unsqueeze(0), a_SI.T.unsqueeze(0), a_SI.unsqueeze(0), weight)


def _unfolded(conv: Convolution2d, x: Tensor) -> Tensor:
    """The patches of explicitly padded images, ``[N, S, I]``."""
    if conv.padding_mode == "zeros" and any(conv.padding):  # others are applied already
        x = pad(x, conv.padding)
    return unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride).mT


def on_tensor_cores(x: Tensor) -> bool:
    """Whether products of a tensor are computed where large ones cost far less than others."""
    return x.is_cuda
