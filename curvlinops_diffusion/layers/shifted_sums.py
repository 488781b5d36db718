"""Correlations along the rows of images by products of shifted images: few, and large.

On a GPU, whose tensor cores multiply matrices many times faster than anything else, these take less
time than Fourier transforms, which need fewer multiplications; and less than patches, which need
more.

Legend: N batch, C channels, H, W image, M pixels in a row of memory, s shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as pairs

from torch import Tensor

from curvlinops_diffusion.layers.correlations import CorrelationSums, Geometry
from curvlinops_diffusion.layers.patches import Interval, Key
from curvlinops_diffusion.layers.products import add_product, product


class ShiftedSums(CorrelationSums):
    """Sums of ``Σ_u X[u] Y[u + s]ᵀ`` over pixels ``u``, at all horizontal shifts ``s`` at once.

    The pixels of a phase image lie in memory row by row, with zeros between the rows, so that a
    shift of the image is one of memory. The images at equally spaced shifts are then a batch of
    matrices that overlap, of which no copy is made.
    """

    def __init__(self, geometry: Geometry, x: Tensor):
        super().__init__(geometry, x)
        self._together = _strips_together(geometry)

    @staticmethod
    def products(geometry: Geometry) -> list[tuple[int, int]]:
        """Each product's sums of outer products: pixels of an example, and results ``[C, C]``."""
        parts = [stop - start for _, (start, stop) in geometry.row_parts()]
        period = geometry.columns.period
        whole = [
            (rows * period, len(shifts)) for rows in parts for shifts in geometry.shifts().values()
        ]
        together = _strips_together(geometry)
        columns = [len(strips) for _, strips in together for _ in range(*strips[0])]
        return whole + [(rows, number) for rows in parts for number in columns]

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the second moment of the patches."""
        rows, columns = self.geometry.rows, self.geometry.columns
        images = {
            (top, left): _Lines.of(
                x[:, :, top :: rows.stride, left :: columns.stride], columns.period
            )
            for top, left in pairs(rows.phases, columns.phases)
        }
        shifts = self.geometry.shifts()
        for part, correlations in self._correlations.items():
            (top, bottom, down), (start, stop) = part
            for (left, right), total in correlations.items():
                X, Y = images[top, left], images[bottom, right]
                seen = X.rows(start, stop)
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

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return self._numbered("shifted", self._correlations)


@dataclass(frozen=True)
class _Lines:
    """Images as lines of pixels, ``[gap + H N (W + gap) + gap, C]`` with zeros in the gaps.

    Attributes:
        memory: The pixels.
        gap: Zeros after every line, and before the first.
        lines: The lines ``N`` of a row of all images.
        width: The pixels of a line, with its gap.
    """

    memory: Tensor
    gap: int
    lines: int
    width: int

    @classmethod
    def of(cls, image: Tensor, period: int) -> _Lines:
        """Those of images ``[N, C, H, W]``; with their gap, lines are at least ``period`` long."""
        N, C, H, W = image.shape
        gap = max(period - W, 0)
        width = W + gap
        memory = image.new_zeros(2 * gap + H * N * width, C)
        inner = memory[gap : gap + H * N * width].view(H, N, width, C)
        inner[:, :, :W].copy_(image.permute(2, 0, 3, 1))
        return cls(memory, gap, N, width)

    def rows(self, start: int, stop: int) -> Tensor:
        """The pixels of a range of rows of all images, ``[M, C]``."""
        row = self.lines * self.width
        return self.memory[self.gap + start * row : self.gap + stop * row]

    def shifted(self, start: int, stop: int, shifts: Sequence[int]) -> Tensor:
        """The same at equally spaced shifts, ``[s, M, C]``, which overlap."""
        row, C = self.lines * self.width, self.memory.shape[1]
        step = shifts[1] - shifts[0] if len(shifts) > 1 else 1
        offset = self.gap + start * row + shifts[0]
        size = (len(shifts), (stop - start) * row, C)
        return self.memory.as_strided(size, (step * C, C, 1), offset * C)

    def columns(self, start: int, stop: int, places: Sequence[int]) -> Tensor:
        """Some equally spaced columns of a range of rows, ``[columns, rows N, C]``."""
        C = self.memory.shape[1]
        step = places[1] - places[0] if len(places) > 1 else 1
        size = (len(places), (stop - start) * self.lines, C)
        offset = self.gap + start * self.lines * self.width + places[0]
        return self.memory.as_strided(size, (step * C, self.width * C, 1), offset * C)


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
