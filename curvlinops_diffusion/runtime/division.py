"""Which examples of which batches fall to a process, of those that nobody has done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from curvlinops_diffusion.runtime.processes import Share

#: A batch by its number; or of batch `number` the examples at positions `start` to `stop − 1`.
Unit = int | tuple[int, int, int]


class Divisible(Protocol):
    """A batch of examples, of which some can be taken."""

    @property
    def indices(self) -> Sequence[int]:
        """The numbers of its examples."""

    def select(self: Batch, positions: list[int], /) -> Batch:
        """The examples at some positions."""


Batch = TypeVar("Batch", bound=Divisible)


class Division:
    """The work of a process: batches in turn, and of those of the last round a piece of each.

    Without the pieces, processes would wait for those that have one batch more. What is done may
    have been divided among another number of processes.

    Args:
        share: The process.
        num_batches: All batches; ``None`` if their number is not known, which are not cut then.
        done: What is done already, by whomever.
        in_step: Whether all processes must have equally many batches of equal sizes. Every batch is
            cut into equal pieces then, and what is left of it all must do (:meth:`rest`).
    """

    def __init__(
        self,
        share: Share,
        num_batches: int | None,
        done: Iterable[Unit],
        in_step: bool = False,
    ):
        self._share = share
        self._in_step = in_step
        self._uncut = None if num_batches is None else num_batches - num_batches % share.count
        self._whole: set[int] = set()
        self._pieces: dict[int, set[int]] = {}
        for unit in done:
            if isinstance(unit, int):
                self._whole.add(unit)
            else:
                number, start, stop = unit
                self._pieces.setdefault(number, set()).update(range(start, stop))

    def wants(self, number: int) -> bool:
        """Tell whether a batch may have examples for this process."""
        mine = self._in_step or self._share.takes(number) or self._is_cut(number)
        return mine and number not in self._whole

    def own(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[tuple[list[Unit], Batch]]:
        """The examples of this process in wanted batches, and what to note of them when done."""
        for number, clean in batches:
            size = len(clean.indices)
            positions = self._positions(number, size)
            if len(positions) == size:
                yield [number], clean
            elif positions:
                yield _pieces(number, positions), clean.select(positions)

    def rest(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[Batch]:
        """The examples that all processes must do, of those in step."""
        for number, clean in batches:
            _, rest = in_equal_parts(self._left(number, len(clean.indices)), self._share)
            if rest:
                yield clean.select(rest)

    def _is_cut(self, number: int) -> bool:
        return self._uncut is not None and number >= self._uncut

    def _positions(self, number: int, size: int) -> list[int]:
        rank, count = self._share.rank, self._share.count
        if self._in_step:
            return in_equal_parts(self._left(number, size), self._share)[0]
        own = range(size)
        if self._is_cut(number):
            # larger pieces come last, and in the next batch first
            rank = count - 1 - rank if number % 2 else rank
            own = range(rank * size // count, (rank + 1) * size // count)
        left = set(self._left(number, size))
        return [position for position in own if position in left]

    def _left(self, number: int, size: int) -> list[int]:
        """The positions in a batch that nobody has done."""
        done = self._pieces.get(number, set())
        return [position for position in range(size) if position not in done]


def in_equal_parts(items: list[int], share: Share) -> tuple[list[int], list[int]]:
    """A process' part of equal ones, and what is left."""
    size = len(items) // share.count
    return items[share.rank * size : (share.rank + 1) * size], items[size * share.count :]


def _pieces(number: int, positions: list[int]) -> list[Unit]:
    """Successive positions as one piece."""
    runs = groupby(enumerate(positions), lambda pair: pair[1] - pair[0])
    found = [[position for _, position in run] for _, run in runs]
    return [(number, run[0], run[-1] + 1) for run in found]
