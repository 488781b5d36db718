"""Correlations along the rows of images by Fourier transforms: the fewest multiplications.

Legend: N batch, C channels, H, W image, F frequencies.
"""

from __future__ import annotations

from itertools import product
from math import pi

import torch
from torch import Tensor

from curvlinops_diffusion.layers.correlations import CorrelationSums, Geometry, Part, Phases

# Spectra are held for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**22
# Spectra of moments are kept in up to so many times the memory of the moment itself
_MAX_PRODUCTS = 2


class SpectralSums(CorrelationSums):
    """Sums of the products of spectra.

    With the transforms ``X`` of the rows of one phase image and ``X'`` of another, the
    correlations at all horizontal shifts are the inverse transform of ``Σ conj(X) X'``. Its real
    and imaginary parts are ``p + q`` and ``p - q - r``, with three real products
    ``p = Re(X) Re(X')``, ``q = Im(X) Im(X')`` and ``r = (Re X + Im X) (Re X' - Im X')``. Sums of
    these are kept for small images; for large ones, where they would take more memory than the
    result, the few shifts that occur are transformed back at once.
    """

    def __init__(self, geometry: Geometry, x: Tensor):
        C, F = x.shape[1], geometry.num_frequencies
        entries = 3 * F * len(geometry.shifts()) * len(geometry.row_parts())
        kept = entries <= _MAX_PRODUCTS * geometry.num_taps**2
        super().__init__(geometry, x, summed=not kept)
        # p, q and r, like the correlations: [3F, C, C]
        self._products: dict[Part, dict[Phases, Tensor]] = {
            part: {phases: x.new_zeros(3 * F, C, C) for phases in geometry.shifts()}
            for part in self._strips
            if kept
        }
        self._inverses = {
            phases: self._inverse_transform(shifts, x)
            for phases, shifts in geometry.shifts().items()
        }
        self._transforms = {
            phase: self._row_transform(geometry.columns.length(phase), x)
            for phase in geometry.columns.phases
        }

    @staticmethod
    def cost(geometry: Geometry) -> int:
        """Multiplications for each example, in units of ``C²``."""
        pixels = 3 * geometry.num_frequencies * len(geometry.shifts())
        pixels += sum(stop - start for _, (start, stop) in geometry.column_parts())
        return pixels * sum(stop - start for _, (start, stop) in geometry.row_parts())

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches."""
        H, C = self.geometry.rows.length(0), x.shape[1]
        chunk = max(1, _MAX_ENTRIES // (4 * self.geometry.num_frequencies * H * C))
        for part in x.split(chunk):
            self._add(part, weight)

    def _add(self, x: Tensor, weight: float) -> None:
        rows, columns = self.geometry.rows, self.geometry.columns
        N, C = x.shape[:2]
        F = self.geometry.num_frequencies
        images, spectra = {}, {}
        for top, left in product(rows.phases, columns.phases):
            # [W, H, N, C]: a range of rows of all examples is a range of memory, for every column
            image = x[:, :, top :: rows.stride, left :: columns.stride].permute(3, 2, 0, 1)
            image = image.flatten(1, 2)
            images[top, left] = image
            spectrum = self._transforms[left] @ image.flatten(1)
            spectra[top, left] = spectrum.view(4, F, image.shape[1], C)
        for part, sums in (self._products or self._correlations).items():
            (top, bottom, down), (start, stop) = part
            first = slice(start * N, stop * N)
            second = slice((start + down) * N, (stop + down) * N)
            for (left, right), total in sums.items():
                X, Y = spectra[top, left][:, :, first], spectra[bottom, right][:, :, second]
                pqr = total if self._products else x.new_zeros(3 * F, C, C)
                pq, r = pqr[: 2 * F], pqr[2 * F :]
                pq.baddbmm_(X[1:3].flatten(0, 1).mT, Y[1:3].flatten(0, 1), alpha=weight)
                r.baddbmm_(X[0].mT, Y[3], alpha=weight)
                if not self._products:
                    total.view(-1, C * C).addmm_(self._inverses[left, right], pqr.flatten(1))
            for ((left, right, across), (begin, end)), total in self._strips[part].items():
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
        F = self.geometry.num_frequencies
        return 2 * pi / self.geometry.columns.period * torch.arange(F, dtype=torch.float64)

    def _inverse_transform(self, shifts: list[int], x: Tensor) -> Tensor:
        """The matrix that turns ``p``, ``q`` and ``r`` into correlations, ``[shifts, 3F]``."""
        period = self.geometry.columns.period
        angle = torch.tensor(shifts, dtype=torch.float64).unsqueeze(1) * self._angular_frequencies()
        cos, sin = angle.cos(), angle.sin()
        # every frequency stands for its conjugate as well, but for the lowest and (even) highest
        share = torch.full((self.geometry.num_frequencies,), 2 / period, dtype=torch.float64)
        share[0] = 1 / period
        if period % 2 == 0:
            share[-1] = 1 / period
        return torch.cat([(cos - sin) * share, (cos + sin) * share, sin * share], 1).to(x)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, in an order that follows from the geometry."""
        return self._numbered("", self._products or self._correlations)

    def correlations(self, part: Part, phases: Phases) -> Tensor:
        """Transformed back, if it is spectra that are kept."""
        if not self._products:
            return super().correlations(part, phases)
        products = self._products[part][phases]
        found = self._inverses[phases] @ products.flatten(1)
        return found.view(-1, *products.shape[1:])
