"""Batches divided among processes, whose number changes: every example once, nobody idle."""

import random
from dataclasses import dataclass

import pytest

from curvlinops_diffusion.runtime.division import Division
from curvlinops_diffusion.runtime.processes import Processes


@dataclass
class Batch:
    indices: list[int]

    def select(self, positions):
        return Batch([self.indices[p] for p in positions])


def batches(num_data, size):
    starts = range(0, num_data, size)
    return [(k, Batch(list(range(s, min(s + size, num_data))))) for k, s in enumerate(starts)]


def own_of(rank, count, every, done, known=True):
    division = Division(Processes(rank, count), len(every) if known else None, done)
    return list(division.own((k, batch) for k, batch in every if division.wants(k)))


@pytest.mark.parametrize(("num_data", "size"), [(9, 2), (7, 7), (40, 3), (5, 1), (64, 16)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_example_once_and_nobody_idle(num_data, size, count):
    every = batches(num_data, size)
    seen = [[n for _, b in own_of(r, count, every, []) for n in b.indices] for r in range(count)]
    assert sorted(n for own in seen for n in own) == list(range(num_data))
    # but for the last batch, which is smaller, and pieces that are no whole examples
    assert max(map(len, seen)) - min(map(len, seen)) <= size - 1 + len(every) % count


def test_of_a_number_that_is_not_known_batches_are_not_cut():
    every = batches(9, 2)
    assert [len(own_of(rank, 2, every, [], known=False)) for rank in range(2)] == [3, 2]


@pytest.mark.parametrize("seed", range(30))
def test_numbers_of_processes_that_change(seed):
    """Each attempt is stopped somewhere; the next one has another number of processes."""
    chance = random.Random(seed)
    every = batches(chance.randint(1, 40), chance.randint(1, 6))
    done, seen = set(), []
    for _ in range(6):
        count = chance.randint(1, 5)
        new = []
        for rank in range(count):
            work = own_of(rank, count, every, done)
            for units, batch in work[: chance.randint(0, len(work))]:
                new += units
                seen += batch.indices
        done |= set(new)
    for rank in range(3):
        for _, batch in own_of(rank, 3, every, done):
            seen += batch.indices
    assert sorted(seen) == [n for _, batch in every for n in batch.indices]
