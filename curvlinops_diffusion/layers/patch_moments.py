"""Second moments of a convolution's patches, by the cheapest of three ways.

Entries of the moment are correlations of channels of images at the shifts between two taps (see
:mod:`~curvlinops_diffusion.layers.geometry`). Along the rows of the image all shifts come at once:
by Fourier transforms, with the fewest multiplications; or, on a GPU, whose tensor cores multiply
matrices many times faster than anything else, by few and large products of shifted images. Patches
themselves are cheaper for small kernels, images, or numbers of channels.

Legend: N batch, C channels, H, W image, K kernel taps along an axis, S output pixels, I = C K1 K2,
F frequencies, M pixels in a row of memory, s shifts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product as pairs
from math import ceil, pi, prod
from typing import ClassVar

import torch
from torch import Tensor

from curvlinops_diffusion.layers.geometry import (
    Convolution2d,
    Geometry,
    Interval,
    Key,
    Padding,
    windows,
)
from curvlinops_diffusion.layers.moments import (
    add_product,
    on_tensor_cores,
    product,
    summed_dtype,
)
from curvlinops_diffusion.runtime.sums import prefixed, within

#: Patches are formed for so many entries at a time, to bound the memory.
MAX_ENTRIES = 2**25
# Spectra are held for so many entries at a time, to bound the memory
_MAX_SPECTRA = 2**22
# Spectra of moments are kept in up to so many times the memory of the moment itself
_MAX_PRODUCTS = 2
# Products on a GPU, in units of the time that one tile of a result, of 128 rows and columns, takes
# for a pixel. They take as long for fewer tiles than are computed at once. A product's launch is
# shared by 128 examples. With these the ratios of the times of patches and shifted images that an
# H200 took in single precision for 128 and 256 channels, 1.7 and 0.6, come out to a factor of 1.5.
_TILE = 128
_TILES_AT_ONCE = 64
_LAUNCH = 200
#: A range of rows, and the pair of vertical phases and the shift between them.
Part = tuple[Key, Interval]
#: Pixels of an example that a product sums over, its results, and the rows of each in units of C.
Product = tuple[int, int, int]


class PatchMoment:
    """A running sum of the patches' second moments, ``Σ_n Σ_s a_s a_sᵀ``, of shape ``[I, I]``."""

    def __init__(self, conv: Convolution2d):
        self._conv = conv
        # one geometry for each image size that occurs
        self._sums: dict[tuple[int, ...], PatchSums] = {}

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
            for name, z in sums.tensors().items():
                z.copy_(own[name])


def cheapest_sums(conv: Convolution2d, x: Tensor, zeros: Padding) -> PatchSums:
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
    ways = [GatheredSums, ShiftedSums if gpu else SpectralSums]
    return min(ways, key=lambda way: way.cost(geometry, x.shape[1], gpu))(conv, geometry, x)


class PatchSums(ABC):
    """A running sum of the second moments of patches, of images of one size.

    Args:
        conv: The convolution.
        geometry: The pixels that its taps read.
        x: A padded input, for its channels, type and device.

    Attributes:
        NAME: What the names of the sums begin with.
    """

    NAME: ClassVar[str]

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        self._conv = conv
        self._geometry = geometry
        self._num_channels = x.shape[1]
        self._x = x.new_empty(0)
        self._sums: dict[object, Tensor] = {}

    def _begin(self, key: object, *shape: int) -> None:
        """Begin a sum of products of inputs, which are not summed in less than float32."""
        self._sums[key] = self._x.new_zeros(shape, dtype=summed_dtype(self._x))

    @staticmethod
    @abstractmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """The products that adding an example takes."""

    @classmethod
    def cost(cls, geometry: Geometry, channels: int, gpu: bool) -> int:
        """Count multiplications in units of ``C²``, or time on a GPU."""
        total = 0
        for pixels, results, rows in cls.products(geometry):
            tiles = results * ceil(rows * channels / _TILE) ** 2
            on_gpu = pixels * max(tiles, _TILES_AT_ONCE) + _LAUNCH
            total += on_gpu if gpu else pixels * results * rows**2
        return total

    @abstractmethod
    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, padded."""

    @abstractmethod
    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, in an order that follows from the geometry."""
        return {f"{self.NAME}{i}": z for i, z in enumerate(self._sums.values())}


class GatheredSums(PatchSums):
    """The running sum by patches: simple, and cheaper for small kernels or images."""

    NAME = "by_tap"

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        super().__init__(conv, geometry, x)
        I = geometry.num_taps * self._num_channels
        self._begin("total", I, I)  # ordered by tap, then by channel

    @staticmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """The one product."""
        return [(geometry.num_outputs, 1, geometry.num_taps)]

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, padded."""
        total = self._sums["total"]
        entries = self._geometry.num_outputs * len(total)  # of an example
        for part in x.split(max(1, MAX_ENTRIES // entries)):
            a = self._patches_by_tap(part)
            add_product(total, a.T, a, weight)

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""
        K, C = self._geometry.num_taps, self._num_channels
        by_tap = self._sums["total"].view(K, C, K, C)
        return by_tap.permute(1, 0, 3, 2).reshape(C * K, C * K)

    def _patches_by_tap(self, x: Tensor) -> Tensor:
        """The patches of a padded input, a row each, ordered by tap and then by channel.

        In this order, ``[N S, K1 K2 C]``, they are copied from where channels lie side by side in
        runs, and need not be copied once more to be multiplied.
        """
        conv, lines = self._conv, x.permute(0, 2, 3, 1)
        if conv.padding_mode == "zeros" and any(conv.padding):
            left, right, top, bottom = conv.padding
            N, H, W, C = lines.shape
            padded = x.new_zeros(N, top + H + bottom, left + W + right, C)
            padded[:, top : top + H, left : left + W].copy_(lines)
            lines = padded
        images = lines.contiguous().permute(0, 3, 1, 2)
        seen = windows(images, conv.kernel_size, conv.stride, conv.dilation)
        return seen.permute(0, 2, 3, 4, 5, 1).reshape(-1, prod(conv.kernel_size) * x.shape[1])


class CorrelationSums(PatchSums):
    """The running sum by correlations; put together only when it is asked for.

    For each range of rows there are the sums of each pair of horizontal phases ``[kept, C, C]``,
    and of each strip of columns ``[C, C]``.
    """

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        super().__init__(conv, geometry, x)
        C = self._num_channels
        for part in geometry.row_parts:
            for phases, shifts in geometry.shifts.items():
                self._begin((part, phases), self._num_kept(shifts), C, C)
            for strip in geometry.column_parts:
                self._begin((part, strip), C, C)

    def _num_kept(self, shifts: Sequence[int]) -> int:
        """Count the matrices ``[C, C]`` that are kept: the correlations at each shift."""
        return len(shifts)

    def _correlations(self, part: Part, phases: tuple[int, int]) -> Tensor:
        """The sums over a range of rows, at all horizontal shifts of a pair of phases."""
        return self._sums[part, phases]

    def total(self) -> Tensor:
        """The second moment, shape ``[I, I]``."""
        rows, columns = self._geometry.rows, self._geometry.columns
        sums = {part: self._column_correlations(part) for part in self._geometry.row_parts}
        K1, K2, C = len(rows.taps), len(columns.taps), self._num_channels
        some = next(iter(next(iter(sums.values())).values()))
        result = some.new_empty(C, K1, K2, C, K1, K2)
        for (k1, l1), (k2, l2) in pairs(self._geometry.row_pairs, self._geometry.column_pairs):
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
        columns = self._geometry.columns
        whole: dict[Key, Tensor] = {}
        for phases, shifts in self._geometry.shifts.items():
            correlations = self._correlations(part, phases)
            whole |= {(*phases, s): c for s, c in zip(shifts, correlations, strict=True)}
        result = {}
        for k, l in self._geometry.column_pairs:
            key = columns.key(k, l)
            result[k, l] = whole[key]
            for interval in columns.outside(k, l):
                result[k, l] = result[k, l] - self._sums[part, (key, interval)]
        return result


class SpectralSums(CorrelationSums):
    """Sums of the products of spectra.

    With the transforms ``X`` of the rows of one phase image and ``X'`` of another, the
    correlations at all horizontal shifts are the inverse transform of ``Σ conj(X) X'``. Its real
    and imaginary parts are ``p + q`` and ``p - q - r``, with three real products
    ``p = Re(X) Re(X')``, ``q = Im(X) Im(X')`` and ``r = (Re X + Im X) (Re X' - Im X')``. Sums of
    these are kept for small images; for large ones, where they would take more memory than the
    result, the few shifts that occur are transformed back at once.
    """

    NAME = "spectral"

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        shifts, columns = geometry.shifts, geometry.columns
        self._F = F = columns.period // 2 + 1  # those of the other half are conjugates
        entries = 3 * F * len(shifts) * len(geometry.row_parts)
        self._keeps_spectra = entries <= _MAX_PRODUCTS * geometry.num_taps**2  # p, q and r
        super().__init__(conv, geometry, x)
        self._frequencies = 2 * pi / columns.period * torch.arange(F, dtype=torch.float64)
        self._inverses = {
            phases: self._inverse_transform(own).to(x) for phases, own in shifts.items()
        }
        self._transforms = {
            phase: self._row_transform(columns.length(phase)).to(x) for phase in columns.phases
        }

    def _num_kept(self, shifts: Sequence[int]) -> int:
        return 3 * self._F if self._keeps_spectra else len(shifts)

    @staticmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """Two for each range of rows: of all frequencies, and of the strips."""
        results = 3 * (geometry.columns.period // 2 + 1) * len(geometry.shifts)
        results += sum(stop - start for _, (start, stop) in geometry.column_parts)
        return [(stop - start, results, 1) for _, (start, stop) in geometry.row_parts]

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches."""
        chunk = max(1, _MAX_SPECTRA // (4 * self._F * self._geometry.rows.length(0) * x.shape[1]))
        for part in x.split(chunk):
            self._add(part, weight)

    def _add(self, x: Tensor, weight: float) -> None:
        rows, columns, F = self._geometry.rows, self._geometry.columns, self._F
        N, C = x.shape[:2]
        images, spectra = {}, {}
        for top, left in pairs(rows.phases, columns.phases):
            # [W, H, N, C]: a range of rows of all examples is a range of memory, for every column
            image = x[:, :, top :: rows.stride, left :: columns.stride].permute(3, 2, 0, 1)
            image = image.flatten(1, 2)
            images[top, left] = image
            spectrum = self._transforms[left] @ image.flatten(1)
            spectra[top, left] = spectrum.view(4, F, image.shape[1], C)
        for part in self._geometry.row_parts:
            (top, bottom, down), (start, stop) = part
            first = slice(start * N, stop * N)
            second = slice((start + down) * N, (stop + down) * N)
            for (left, right), inverse in self._inverses.items():
                total = self._sums[part, (left, right)]
                X, Y = spectra[top, left][:, :, first], spectra[bottom, right][:, :, second]
                pqr = total if self._keeps_spectra else x.new_zeros(3 * F, C, C)
                pq, r = pqr[: 2 * F], pqr[2 * F :]
                pq.baddbmm_(X[1:3].flatten(0, 1).mT, Y[1:3].flatten(0, 1), alpha=weight)
                r.baddbmm_(X[0].mT, Y[3], alpha=weight)
                if not self._keeps_spectra:
                    total.view(-1, C * C).addmm_(inverse, pqr.flatten(1))
            for strip in self._geometry.column_parts:
                (left, right, across), (begin, end) = strip
                a = images[top, left][begin:end, first]
                b = images[bottom, right][begin + across : end + across, second]
                total = self._sums[part, strip]
                total.addmm_(a.reshape(-1, C).T, b.reshape(-1, C), alpha=weight)

    def _row_transform(self, length: int) -> Tensor:
        """``Re + Im``, ``Re``, ``Im`` and ``Re - Im`` of a row's transform, ``[4F, length]``."""
        angle = self._frequencies.unsqueeze(1) * torch.arange(length, dtype=torch.float64)
        re, im = angle.cos(), -angle.sin()
        return torch.cat([re + im, re, im, re - im])

    def _inverse_transform(self, shifts: list[int]) -> Tensor:
        """The matrix that turns ``p``, ``q`` and ``r`` into correlations, ``[shifts, 3F]``."""
        period = self._geometry.columns.period
        angle = torch.tensor(shifts, dtype=torch.float64).unsqueeze(1) * self._frequencies
        cos, sin = angle.cos(), angle.sin()
        # every frequency stands for its conjugate as well, but for the lowest and (even) highest
        share = torch.full((self._F,), 2 / period, dtype=torch.float64)
        share[0] = 1 / period
        if period % 2 == 0:
            share[-1] = 1 / period
        return torch.cat([(cos - sin) * share, (cos + sin) * share, sin * share], 1)

    def _correlations(self, part: Part, phases: tuple[int, int]) -> Tensor:
        """Transformed back, if it is spectra that are kept."""
        sums = self._sums[part, phases]
        if not self._keeps_spectra:
            return sums
        return (self._inverses[phases] @ sums.flatten(1)).view(-1, *sums.shape[1:])


class ShiftedSums(CorrelationSums):
    """Sums of ``Σ_u X[u] Y[u + s]ᵀ`` over pixels ``u``, at all horizontal shifts ``s`` at once.

    The pixels of a phase image lie in memory row by row, with zeros between the rows, so that a
    shift of the image is one of memory. The images at equally spaced shifts are then a batch of
    matrices that overlap, of which no copy is made.
    """

    NAME = "shifted"

    def __init__(self, conv: Convolution2d, geometry: Geometry, x: Tensor):
        super().__init__(conv, geometry, x)
        self._together = _strips_together(geometry)

    @staticmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """Those at all shifts, and of each column of the strips, for each range of rows."""
        period, shifts = geometry.columns.period, geometry.shifts.values()
        strips = [len(own) for _, own in _strips_together(geometry) for _ in range(*own[0])]
        parts = [stop - start for _, (start, stop) in geometry.row_parts]
        return [
            *((rows * period, len(own), 1) for rows in parts for own in shifts),
            *((rows, number, 1) for rows in parts for number in strips),
        ]

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches."""
        rows, columns = self._geometry.rows, self._geometry.columns
        images = {
            (top, left): _Lines.of(
                x[:, :, top :: rows.stride, left :: columns.stride], columns.period
            )
            for top, left in pairs(rows.phases, columns.phases)
        }
        for part in self._geometry.row_parts:
            (top, bottom, down), (start, stop) = part
            for (left, right), shifts in self._geometry.shifts.items():
                X, Y = images[top, left], images[bottom, right]
                seen, sums = X.shifted(start, stop, [0]).mT, self._sums[part, (left, right)]
                for run in _equally_spaced(shifts):
                    own, sums = sums[: len(run)], sums[len(run) :]
                    others = Y.shifted(start + down, stop + down, run)
                    add_product(own, seen.expand(len(run), -1, -1), others, weight)
            for key, strips in self._together:
                left, right, across = key
                X, Y = images[top, left], images[bottom, right]
                for column in range(*strips[0]):
                    places = [column + begin - strips[0][0] for begin, _ in strips]
                    a = X.columns(start, stop, places)
                    b = Y.columns(start + down, stop + down, [place + across for place in places])
                    for strip, found in zip(strips, product(a.mT, b), strict=True):
                        self._sums[part, (key, strip)].add_(found, alpha=weight)


@dataclass(frozen=True)
class _Lines:
    """Images as lines of pixels, ``[gap + H N (W + gap) + gap, C]`` with zeros in the gaps."""

    memory: Tensor
    gap: int  # zeros after every line, and before the first
    lines: int  # N, of a row of all images
    width: int  # pixels of a line, with its gap

    @classmethod
    def of(cls, image: Tensor, period: int) -> _Lines:
        """Lay out images ``[N, C, H, W]``; with their gap, lines are at least ``period`` long."""
        N, C, H, W = image.shape
        gap = max(period - W, 0)
        width = W + gap
        memory = image.new_zeros(2 * gap + H * N * width, C)
        inner = memory[gap : gap + H * N * width].view(H, N, width, C)
        inner[:, :, :W].copy_(image.permute(2, 0, 3, 1))
        return cls(memory, gap, N, width)

    def shifted(self, start: int, stop: int, shifts: Sequence[int]) -> Tensor:
        """A range of rows of all images at equally spaced shifts, ``[s, M, C]``, which overlap."""
        return self._strided(start, shifts, (stop - start) * self.lines * self.width, 1)

    def columns(self, start: int, stop: int, places: Sequence[int]) -> Tensor:
        """Some equally spaced columns of a range of rows, ``[columns, rows N, C]``."""
        return self._strided(start, places, (stop - start) * self.lines, self.width)

    def _strided(self, start: int, places: Sequence[int], count: int, pixels: int) -> Tensor:
        """From each of some places of a row on, so many pixels at a distance."""
        C = self.memory.shape[1]
        step = places[1] - places[0] if len(places) > 1 else 1
        offset = self.gap + start * self.lines * self.width + places[0]
        return self.memory.as_strided(
            (len(places), count, C), (step * C, pixels * C, 1), offset * C
        )


def _strips_together(geometry: Geometry) -> list[tuple[Key, list[Interval]]]:
    """Strips that are multiplied together: of equally many columns, equally spaced."""
    by_width: dict[tuple[Key, int], list[int]] = {}
    for key, (begin, end) in geometry.column_parts:
        by_width.setdefault((key, end - begin), []).append(begin)
    return [
        (key, [(begin, begin + wide) for begin in run])
        for (key, wide), begins in by_width.items()
        for run in _equally_spaced(begins)
    ]


def _equally_spaced(shifts: Sequence[int]) -> list[list[int]]:
    """Rising shifts in runs of equal steps."""
    runs: list[list[int]] = []
    for shift in shifts:
        if runs and (len(runs[-1]) == 1 or runs[-1][1] - runs[-1][0] == shift - runs[-1][-1]):
            runs[-1].append(shift)
        else:
            runs.append([shift])
    return runs
