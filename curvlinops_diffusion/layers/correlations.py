"""Running correlations of the channels of images, which a convolution's second moment is made of.

Along the rows of the image all shifts come at once: by Fourier transforms, with the fewest
multiplications; or, on a GPU, whose tensor cores multiply matrices many times faster than anything
else, by few and large products of shifted images.

Legend: N batch, C channels, H, W image, F frequencies, M pixels in a row of memory, s shifts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product as pairs
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from curvlinops_diffusion.layers.geometry import Geometry, Interval, Key
from curvlinops_diffusion.layers.moments import add_product, product, summed_dtype

# Spectra are held for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**22
# Spectra of moments are kept in up to so many times the memory of the moment itself
_MAX_PRODUCTS = 2
#: A range of rows, and the pair of vertical phases and the shift between them.
Part = tuple[Key, Interval]
#: A pair of horizontal phases.
Phases = tuple[int, int]
#: Pixels of an example that a product sums over, its results, and the rows of each in units of C.
Product = tuple[int, int, int]


class CorrelationSums(ABC):
    """The running sum by correlations; put together only when it is asked for.

    Args:
        geometry: The pixels that the convolution's taps read.
        x: A padded input, for its channels, type and device.
        kept: How many matrices ``[C, C]`` are kept for each pair of horizontal phases; by default
            the correlations at each shift.

    Attributes:
        NAME: What the names of the sums begin with.
    """

    NAME: ClassVar[str]

    def __init__(self, geometry: Geometry, x: Tensor, kept: Mapping[Phases, int] | None = None):
        self._geometry = geometry
        self._num_channels = C = x.shape[1]
        if kept is None:
            kept = {phases: len(shifts) for phases, shifts in geometry.shifts().items()}
        # by range of rows, then by pair of horizontal phases
        self._sums: dict[Part, dict[Phases, Tensor]] = {
            part: {phases: new_sums(x, count, C, C) for phases, count in kept.items()}
            for part in geometry.row_parts()
        }
        # by range of rows, then by range of columns: [C, C]
        self._strips = {
            part: {strip: new_sums(x, C, C) for strip in geometry.column_parts()}
            for part in self._sums
        }

    @staticmethod
    @abstractmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """The products that adding an example takes."""

    @abstractmethod
    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``, padded."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, in an order that follows from the geometry."""
        held = [z for group in self._sums.values() for z in group.values()]
        held += [z for group in self._strips.values() for z in group.values()]
        return {f"{self.NAME}{i}": z for i, z in enumerate(held)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums by name."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def correlations(self, part: Part, phases: Phases) -> Tensor:
        """The sums over a range of rows, at all horizontal shifts of a pair of phases."""
        return self._sums[part][phases]

    def total(self) -> Tensor:
        """The second moment, shape ``[I, I]``."""
        rows, columns = self._geometry.rows, self._geometry.columns
        sums = {part: self._column_correlations(part) for part in self._sums}
        K1, K2, C = len(rows.taps), len(columns.taps), self._num_channels
        some = next(iter(next(iter(sums.values())).values()))
        result = some.new_empty(C, K1, K2, C, K1, K2)
        for (k1, l1), (k2, l2) in pairs(self._geometry.row_pairs(), self._geometry.column_pairs()):
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
        for phases, shifts in self._geometry.shifts().items():
            correlations = self.correlations(part, phases)
            whole |= {(*phases, s): c for s, c in zip(shifts, correlations, strict=True)}
        result = {}
        for k, l in self._geometry.column_pairs():
            key = columns.key(k, l)
            result[k, l] = whole[key]
            for interval in columns.outside(k, l):
                result[k, l] = result[k, l] - self._strips[part][key, interval]
        return result


def new_sums(x: Tensor, *shape: int) -> Tensor:
    """Zeros to add products of inputs to, which are not summed in less than float32."""
    return x.new_zeros(shape, dtype=summed_dtype(x))


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

    def __init__(self, geometry: Geometry, x: Tensor):
        F, shifts = geometry.num_frequencies, geometry.shifts()
        entries = 3 * F * len(shifts) * len(geometry.row_parts())
        self._keeps_spectra = entries <= _MAX_PRODUCTS * geometry.num_taps**2  # p, q and r
        super().__init__(geometry, x, dict.fromkeys(shifts, 3 * F) if self._keeps_spectra else None)
        self._inverses = {
            phases: self._inverse_transform(own).to(x) for phases, own in shifts.items()
        }
        self._transforms = {
            phase: self._row_transform(geometry.columns.length(phase)).to(x)
            for phase in geometry.columns.phases
        }

    @staticmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """Of each range of rows: for all frequencies, and for the strips."""
        results = 3 * geometry.num_frequencies * len(geometry.shifts())
        results += sum(stop - start for _, (start, stop) in geometry.column_parts())
        return [(stop - start, results, 1) for _, (start, stop) in geometry.row_parts()]

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches."""
        H, C = self._geometry.rows.length(0), x.shape[1]
        chunk = max(1, _MAX_ENTRIES // (4 * self._geometry.num_frequencies * H * C))
        for part in x.split(chunk):
            self._add(part, weight)

    def _add(self, x: Tensor, weight: float) -> None:
        rows, columns = self._geometry.rows, self._geometry.columns
        N, C = x.shape[:2]
        F = self._geometry.num_frequencies
        images, spectra = {}, {}
        for top, left in pairs(rows.phases, columns.phases):
            # [W, H, N, C]: a range of rows of all examples is a range of memory, for every column
            image = x[:, :, top :: rows.stride, left :: columns.stride].permute(3, 2, 0, 1)
            image = image.flatten(1, 2)
            images[top, left] = image
            spectrum = self._transforms[left] @ image.flatten(1)
            spectra[top, left] = spectrum.view(4, F, image.shape[1], C)
        for part, sums in self._sums.items():
            (top, bottom, down), (start, stop) = part
            first = slice(start * N, stop * N)
            second = slice((start + down) * N, (stop + down) * N)
            for (left, right), total in sums.items():
                X, Y = spectra[top, left][:, :, first], spectra[bottom, right][:, :, second]
                pqr = total if self._keeps_spectra else x.new_zeros(3 * F, C, C)
                pq, r = pqr[: 2 * F], pqr[2 * F :]
                pq.baddbmm_(X[1:3].flatten(0, 1).mT, Y[1:3].flatten(0, 1), alpha=weight)
                r.baddbmm_(X[0].mT, Y[3], alpha=weight)
                if not self._keeps_spectra:
                    total.view(-1, C * C).addmm_(self._inverses[left, right], pqr.flatten(1))
            for ((left, right, across), (begin, end)), total in self._strips[part].items():
                a = images[top, left][begin:end, first]
                b = images[bottom, right][begin + across : end + across, second]
                total.addmm_(a.reshape(-1, C).T, b.reshape(-1, C), alpha=weight)

    def _angular_frequencies(self) -> Tensor:
        F = self._geometry.num_frequencies
        return 2 * pi / self._geometry.columns.period * torch.arange(F, dtype=torch.float64)

    def _row_transform(self, length: int) -> Tensor:
        """``Re + Im``, ``Re``, ``Im`` and ``Re - Im`` of a row's transform, ``[4F, length]``."""
        pixels = torch.arange(length, dtype=torch.float64)
        angle = self._angular_frequencies().unsqueeze(1) * pixels
        re, im = angle.cos(), -angle.sin()
        return torch.cat([re + im, re, im, re - im])

    def _inverse_transform(self, shifts: list[int]) -> Tensor:
        """The matrix that turns ``p``, ``q`` and ``r`` into correlations, ``[shifts, 3F]``."""
        period = self._geometry.columns.period
        angle = torch.tensor(shifts, dtype=torch.float64).unsqueeze(1) * self._angular_frequencies()
        cos, sin = angle.cos(), angle.sin()
        # every frequency stands for its conjugate as well, but for the lowest and (even) highest
        share = torch.full((self._geometry.num_frequencies,), 2 / period, dtype=torch.float64)
        share[0] = 1 / period
        if period % 2 == 0:
            share[-1] = 1 / period
        return torch.cat([(cos - sin) * share, (cos + sin) * share, sin * share], 1)

    def correlations(self, part: Part, phases: Phases) -> Tensor:
        """Transformed back, if it is spectra that are kept."""
        sums = super().correlations(part, phases)
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

    def __init__(self, geometry: Geometry, x: Tensor):
        super().__init__(geometry, x)
        self._together = _strips_together(geometry)

    @staticmethod
    def products(geometry: Geometry) -> Sequence[Product]:
        """Of each range of rows: at all shifts, and column by column of the strips."""
        period, shifts = geometry.columns.period, geometry.shifts().values()
        strips = [len(own) for _, own in _strips_together(geometry) for _ in range(*own[0])]
        parts = [stop - start for _, (start, stop) in geometry.row_parts()]
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
        shifts = self._geometry.shifts()
        for part, correlations in self._sums.items():
            (top, bottom, down), (start, stop) = part
            for (left, right), total in correlations.items():
                X, Y = images[top, left], images[bottom, right]
                seen = X.shifted(start, stop, [0])
                first = 0
                for run in _equally_spaced(shifts[left, right]):
                    others = Y.shifted(start + down, stop + down, run)
                    own = total[first : first + len(run)]
                    add_product(own, seen.mT.expand(len(run), -1, -1), others, weight)
                    first += len(run)
            for (left, right, across), strips in self._together:
                X, Y = images[top, left], images[bottom, right]
                sums = [self._strips[part][(left, right, across), strip] for strip in strips]
                for column in range(*strips[0]):
                    places = [column + begin - strips[0][0] for begin, _ in strips]
                    a = X.columns(start, stop, places)
                    b = Y.columns(start + down, stop + down, [place + across for place in places])
                    for own, found in zip(sums, product(a.mT, b), strict=True):
                        own.add_(found, alpha=weight)


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
    for key, (begin, end) in geometry.column_parts():
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
