"""Second moments of a convolution's patches without making them, by Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from math import pi
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from curvlinops_diffusion.layers.moments import SummedMoment, second_moment
from curvlinops_diffusion.layers.patches import (
    Convolution2d,
    Interval,
    Key,
    _axes,
    _Axis,
    _padded_explicitly,
)
from curvlinops_diffusion.runtime.sums import prefixed, within

# Spectra are held for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**22
# Spectra of moments are kept in up to so many times the memory of the moment itself
_MAX_PRODUCTS = 2


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
        self._sums: dict[tuple[int, ...], _SpectralSums | _PatchSums] = {}

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches of ``x``."""
        x, padding = _padded_explicitly(self._conv, self._as_images(x))
        if x.shape[1:] not in self._sums:
            self._sums[x.shape[1:]] = self._new_sums(x, padding)
        self._sums[x.shape[1:]].add(x, weight)

    def _new_sums(self, x: Tensor, padding: Sequence[int]) -> _SpectralSums | _PatchSums:
        geometry = _Geometry(*_axes(self._conv, x, padding))
        cheaper = geometry.spectral_cost < geometry.patch_cost
        return _SpectralSums(geometry, x) if cheaper else _PatchSums(self._conv)

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
        """Go on from sums by name."""
        self._sums = {}
        for name in tensors:
            prefix = name.split("/")[0]
            shape = torch.Size(map(int, prefix.split("x")))
            if shape not in self._sums:
                # what sums are of follows from the size of the images alone
                x = tensors[name].new_zeros(1, *shape)
                padding = self._conv.padding if self._conv.padding_mode == "zeros" else (0,) * 4
                self._sums[shape] = self._new_sums(x, padding)
                self._sums[shape].restore(within(prefix, tensors))


@dataclass(frozen=True)
class _Geometry:
    """The pixels that a convolution's taps read, and the cost of their second moment.

    Attributes:
        rows: The vertical axis.
        columns: The horizontal axis.
    """

    rows: _Axis
    columns: _Axis

    def row_pairs(self) -> list[tuple[int, int]]:
        """Pairs of vertical taps; the others follow by transposition."""
        return list(combinations_with_replacement(range(len(self.rows.taps)), 2))

    def column_pairs(self) -> list[tuple[int, int]]:
        """Pairs of horizontal taps."""
        taps = range(len(self.columns.taps))
        return list(product(taps, taps))

    def row_parts(self) -> list[tuple[Key, Interval]]:
        """The ranges of rows over which is summed: the overlaps, and what windows leave out."""
        parts: dict[tuple[Key, Interval], None] = {}  # a set in order
        for k, l in self.row_pairs():
            key = self.rows.key(k, l)
            for interval in [self.rows.overlap(key), *self.rows.outside(k, l)]:
                parts[key, interval] = None
        return list(parts)

    def column_parts(self) -> list[tuple[Key, Interval]]:
        """The ranges of columns that windows leave out."""
        return sorted(
            {
                (self.columns.key(k, l), interval)
                for k, l in self.column_pairs()
                for interval in self.columns.outside(k, l)
            }
        )

    def shifts(self) -> dict[tuple[int, int], list[int]]:
        """The horizontal shifts that occur, by the pair of phases."""
        keys = sorted({self.columns.key(k, l) for k, l in self.column_pairs()})
        shifts: dict[tuple[int, int], list[int]] = {}
        for first, second, shift in keys:
            shifts.setdefault((first, second), []).append(shift)
        return shifts

    @property
    def num_frequencies(self) -> int:
        """Frequencies of a row; those of a real signal's other half are conjugates."""
        return self.columns.period // 2 + 1

    @property
    def spectral_cost(self) -> int:
        """Multiplications for each example, in units of ``C²``."""
        pixels = 3 * self.num_frequencies * len(self.shifts())
        pixels += sum(stop - start for _, (start, stop) in self.column_parts())
        return pixels * sum(stop - start for _, (start, stop) in self.row_parts())

    @property
    def patch_cost(self) -> int:
        """The same for a product of patches."""
        taps = len(self.rows.taps) * len(self.columns.taps)
        return taps**2 * self.rows.outputs * self.columns.outputs


class _PatchSums(SummedMoment):
    """The running sum by patches: simple, and cheaper for small kernels or images."""

    def __init__(self, conv: Convolution2d):
        super().__init__(lambda x: second_moment(_unfolded(conv, x)))
        self._conv = conv

    def add(self, x: Tensor, weight: float) -> None:
        """Add in place, without the product's own memory."""
        a_SI = _unfolded(self._conv, x).flatten(0, 1)
        if self._total is None:
            self._total = x.new_zeros(a_SI.shape[1], a_SI.shape[1])
        self._total.addmm_(a_SI.T, a_SI, alpha=weight)


def _unfolded(conv: Convolution2d, x: Tensor) -> Tensor:
    """The patches of explicitly padded images, ``[N, S, I]``."""
    if conv.padding_mode == "zeros" and any(conv.padding):  # others are applied already
        x = pad(x, conv.padding)
    return unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride).mT


class _SpectralSums:
    """The running sum by correlations; put together only when it is asked for.

    With the transforms ``X`` of the rows of one phase image and ``X'`` of another, the
    correlations at all horizontal shifts are the inverse transform of ``Σ conj(X) X'``. Its real
    and imaginary parts are ``p + q`` and ``p - q - r``, with three real products
    ``p = Re(X) Re(X')``, ``q = Im(X) Im(X')`` and ``r = (Re X + Im X) (Re X' - Im X')``. Sums of
    these are kept for small images; for large ones, where they would take more memory than the
    result, the few shifts that occur are transformed back at once.
    """

    def __init__(self, geometry: _Geometry, x: Tensor):
        C = x.shape[1]
        self._geometry = geometry
        # by range of rows, then by pair of horizontal phases: [shifts, C, C]
        self._correlations = {
            part: {
                phases: x.new_zeros(len(shifts), C, C)
                for phases, shifts in geometry.shifts().items()
            }
            for part in geometry.row_parts()
        }
        F = geometry.num_frequencies
        taps = len(geometry.rows.taps) * len(geometry.columns.taps)
        entries = 3 * F * len(geometry.shifts()) * len(self._correlations)
        # p, q and r, like the correlations: [3F, C, C]
        self._products: dict[tuple[Key, Interval], dict[Interval, Tensor]] = (
            {
                part: {phases: x.new_zeros(3 * F, C, C) for phases in geometry.shifts()}
                for part in self._correlations
            }
            if entries <= _MAX_PRODUCTS * taps**2
            else {}
        )
        # by range of rows, then by range of columns: [C, C]
        self._strips = {
            part: {strip: x.new_zeros(C, C) for strip in geometry.column_parts()}
            for part in self._correlations
        }
        self._inverses = {
            phases: self._inverse_transform(shifts, x)
            for phases, shifts in geometry.shifts().items()
        }
        self._transforms = {
            phase: self._row_transform(geometry.columns.length(phase), x)
            for phase in geometry.columns.phases
        }

    def add(self, x: Tensor, weight: float) -> None:
        H, C = self._geometry.rows.length(0), x.shape[1]
        chunk = max(1, _MAX_ENTRIES // (4 * self._geometry.num_frequencies * H * C))
        for part in x.split(chunk):
            self._add(part, weight)

    def _add(self, x: Tensor, weight: float) -> None:
        rows, columns = self._geometry.rows, self._geometry.columns
        N, C = x.shape[:2]
        F = self._geometry.num_frequencies
        images, spectra = {}, {}
        for top, left in product(rows.phases, columns.phases):
            # [W, H, N, C]: a range of rows of all examples is a range of memory, for every column
            image = x[:, :, top :: rows.stride, left :: columns.stride].permute(3, 2, 0, 1)
            image = image.flatten(1, 2)
            images[top, left] = image
            spectrum = self._transforms[left] @ image.flatten(1)
            spectra[top, left] = spectrum.view(4, F, image.shape[1], C)
        for (key, (start, stop)), correlations in self._correlations.items():
            top, bottom, down = key
            first = slice(start * N, stop * N)
            second = slice((start + down) * N, (stop + down) * N)
            held = self._products.get((key, (start, stop)), {})
            for (left, right), total in correlations.items():
                X, Y = spectra[top, left][:, :, first], spectra[bottom, right][:, :, second]
                pqr = held[left, right] if held else x.new_zeros(3 * F, C, C)
                pq, r = pqr[: 2 * F], pqr[2 * F :]
                pq.baddbmm_(X[1:3].flatten(0, 1).mT, Y[1:3].flatten(0, 1), alpha=weight)
                r.baddbmm_(X[0].mT, Y[3], alpha=weight)
                if not held:
                    total.view(-1, C * C).addmm_(self._inverses[left, right], pqr.flatten(1))
            strips = self._strips[key, (start, stop)]
            for ((left, right, across), (begin, end)), total in strips.items():
                a = images[top, left][begin:end, first]
                b = images[bottom, right][begin + across : end + across, second]
                total.addmm_(a.reshape(-1, C).T, b.reshape(-1, C), alpha=weight)

    def _row_transform(self, length: int, x: Tensor) -> Tensor:
        """``Re + Im``, ``Re``, ``Im`` and ``Re - Im`` of a row's transform, ``[4F, length]``."""
        pixels = torch.arange(length, dtype=torch.float64)
        angle = self._angular_frequencies().unsqueeze(1) * pixels
        re, im = angle.cos(), -angle.sin()
        return torch.cat([re + im, re, im, re - im]).to(x)

    def _angular_frequencies(self) -> Tensor:
        F = self._geometry.num_frequencies
        return 2 * pi / self._geometry.columns.period * torch.arange(F, dtype=torch.float64)

    def _inverse_transform(self, shifts: list[int], x: Tensor) -> Tensor:
        """The matrix that turns ``p``, ``q`` and ``r`` into correlations, ``[shifts, 3F]``."""
        period = self._geometry.columns.period
        angle = torch.tensor(shifts, dtype=torch.float64).unsqueeze(1) * self._angular_frequencies()
        cos, sin = angle.cos(), angle.sin()
        # every frequency stands for its conjugate as well, but for the lowest and (even) highest
        share = torch.full((self._geometry.num_frequencies,), 2 / period, dtype=torch.float64)
        share[0] = 1 / period
        if period % 2 == 0:
            share[-1] = 1 / period
        return torch.cat([(cos - sin) * share, (cos + sin) * share, sin * share], 1).to(x)

    def _held(self) -> list[Tensor]:
        """The sums, in an order that follows from the geometry."""
        inner = self._products if self._products else self._correlations
        groups: list[Mapping[Any, Tensor]] = [*inner.values(), *self._strips.values()]
        return [tensor for group in groups for tensor in group.values()]

    def tensors(self) -> dict[str, Tensor]:
        return {str(i): tensor for i, tensor in enumerate(self._held())}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for i, tensor in enumerate(self._held()):
            tensor.copy_(tensors[str(i)])

    def total(self) -> Tensor:
        rows, columns = self._geometry.rows, self._geometry.columns
        sums = {part: self._column_correlations(part) for part in self._correlations}
        K1, K2 = len(rows.taps), len(columns.taps)
        some = next(iter(next(iter(self._correlations.values())).values()))
        C = some.shape[1]
        result = some.new_empty(C, K1, K2, C, K1, K2)
        for (k1, l1), (k2, l2) in product(
            self._geometry.row_pairs(), self._geometry.column_pairs()
        ):
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

    def _column_correlations(self, part: tuple[Key, Interval]) -> dict[tuple[int, int], Tensor]:
        """The correlations over a range of rows and each pair of horizontal taps' window."""
        columns = self._geometry.columns
        whole: dict[Key, Tensor] = {}
        for phases, shifts in self._geometry.shifts().items():
            correlations = self._correlations[part][phases]
            if self._products:
                products = self._products[part][phases]
                correlations = (self._inverses[phases] @ products.flatten(1)).view_as(correlations)
            whole |= {(*phases, s): c for s, c in zip(shifts, correlations, strict=True)}
        result = {}
        for k, l in self._geometry.column_pairs():
            key = columns.key(k, l)
            result[k, l] = whole[key]
            for interval in columns.outside(k, l):
                result[k, l] = result[k, l] - self._strips[part][key, interval]
        return result
