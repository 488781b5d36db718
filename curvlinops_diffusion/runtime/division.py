"""Division of a pass among processes: which examples of which batches each still has to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from curvlinops_diffusion.runtime.processes import Processes

#: A batch by its number; or of batch `number` the examples at positions `start` to `stop − 1`.
Unit = int | tuple[int, int, int]


class Divisible(Protocol):
    """A batch of examples, of which some can be selected."""

    @property
    def indices(self) -> Sequence[int]:
        """The numbers of its examples."""

    def select(self: Batch, positions: list[int], /) -> Batch:
        """Return the examples at some positions."""


Batch = TypeVar("Batch", bound=Divisible)


class Division:
    """Work of a process: batches in turn, and of those of the last round a piece of each.

    Without the pieces, processes would wait for those that have one batch more. What is done may
    have been divided among another number of processes.

    Args:
        processes: The processes.
        num_batches: All batches; ``None`` if their number is not known, which are not cut then.
        done: What is done already, by whomever.
        in_step: Whether all processes must have equally many batches of equal sizes. Every batch is
            cut into equal pieces then, and all do what is left of it (:meth:`rest`).
    """

    def __init__(
        self,
        processes: Processes,
        num_batches: int | None,
        done: Iterable[Unit],
        in_step: bool = False,
    ):
        self._processes = processes
        self._in_step = in_step
        self._uncut = None if num_batches is None else num_batches - num_batches % processes.count
        self._whole: set[int] = set()
        self._pieces: dict[int, set[int]] = {}
        for unit in done:
            if isinstance(unit, int):
                self._whole.add(unit)
            else:
                self._pieces.setdefault(unit[0], set()).update(range(*unit[1:]))

    def wants(self, number: int) -> bool:
        """Tell whether a batch may have examples for this process."""
        mine = self._in_step or self._processes.takes(number) or self._is_cut(number)
        return mine and number not in self._whole

    def own(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[tuple[list[Unit], Batch]]:
        """Yield this process' examples of wanted batches, and the units that they make up."""
        for number, clean in batches:
            size = len(clean.indices)
            positions = self._positions(number, size)
            if len(positions) == size:
                yield [number], clean
            elif positions:
                runs = groupby(enumerate(positions), lambda pair: pair[1] - pair[0])
                pieces = [[position for _, position in run] for _, run in runs]
                units: list[Unit] = [(number, piece[0], piece[-1] + 1) for piece in pieces]
                yield units, clean.select(positions)

    def rest(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[Batch]:
        """Yield the examples that all processes do, of those in step."""
        for number, clean in batches:
            _, rest = in_equal_parts(self._left(number, len(clean.indices)), self._processes)
            if rest:
                yield clean.select(rest)

    def _is_cut(self, number: int) -> bool:
        return self._uncut is not None and number >= self._uncut

    def _positions(self, number: int, size: int) -> list[int]:
        left = self._left(number, size)
        if self._in_step:
            return in_equal_parts(left, self._processes)[0]
        if not self._is_cut(number):
            return left
        rank, count = self._processes.rank, self._processes.count
        # larger pieces come last, and in the next batch first
        rank = count - 1 - rank if number % 2 else rank
        own = range(rank * size // count, (rank + 1) * size // count)
        return [position for position in left if position in own]

    def _left(self, number: int, size: int) -> list[int]:
        """Return the positions in a batch that are not done."""
        return sorted({*range(size)} - self._pieces.get(number, set()))


def in_equal_parts(items: list[int], processes: Processes) -> tuple[list[int], list[int]]:
    """Divide items into equal parts: this process' part, and what is left of all."""
    rank, size = processes.rank, len(items) // processes.count
    return items[rank * size : (rank + 1) * size], items[size * processes.count :]
