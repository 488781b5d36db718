"""Collective operations of processes that share work, over ``torch.distributed``."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from curvlinops_diffusion.runtime.checks import quoted

Result = TypeVar("Result")

Form = tuple[tuple[int, ...], torch.dtype]  # of a tensor

# tensors are exchanged in buckets of about so many entries
_BUCKET = 2**24


@dataclass(frozen=True)
class Processes:
    """This process, one of ``count``.

    Attributes:
        rank: Its number.
        count: The number of processes; 1 for a process on its own.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, distributed: bool) -> Processes:
        """This process among those of the default group."""
        if not distributed:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "`distributed` must be False without a process group, got True. Start the program "
                "by torchrun, and call torch.distributed.init_process_group first."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    def of_all(cls) -> Processes:
        """This process among those of the default group, if there is one."""
        return cls.of(dist.is_available() and dist.is_initialized())

    def takes(self, number: int) -> bool:
        """Tell whether this process has the batch, or file, of a number."""
        return number % self.count == self.rank

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Assign each piece of work to a process: the most costly first, to the least busy one."""
        loads, owners = [0.0] * self.count, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[piece] = loads.index(min(loads))
            loads[owners[piece]] += costs[piece]
        return owners

    def all_reduce(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Sum tensors by name over processes; a missing one counts as zero."""
        if self.count == 1:
            return dict(tensors)
        forms = dict(ChainMap(*self.all_gather(_forms(tensors))))
        return _exchanged(forms, tensors, device, dist.all_reduce)

    def all_gather(self, value: Any) -> list[Any]:
        """Gather a plain value of every process, in order of rank."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        with lost_processes_named(by_message=False):
            dist.all_gather_object(everyone, value)
        return everyone

    def all_gather_tensors(
        self, tensors: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        """Gather tensors by name, of which every process has some."""
        if self.count == 1:
            return dict(tensors)
        result: dict[str, Tensor] = {}
        for rank, forms in enumerate(self.all_gather(_forms(tensors))):
            own = tensors if rank == self.rank else {}
            result |= _exchanged(forms, own, device, partial(dist.broadcast, src=rank))
        return result

    def check_alike(self, what: str, value: Any) -> None:
        """Check that all processes agree."""
        everyone = self.all_gather(value)
        other = [rank for rank, its in enumerate(everyone) if its != everyone[0]]
        if other:
            raise ValueError(
                f"Process 0 and process {other[0]} differ in {what}. Give every process the same."
            )

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """Do this process' own work; where one process fails, all do, in place of waiting for it.

        Raises:
            ValueError: If the work of a process has failed; of the kind of its error.
        """
        if self.count == 1:
            return work()
        failure = None
        try:
            result = work()
        except ValueError as error:
            failure = error
        failures = self.all_gather(None if failure is None else (type(failure), str(failure)))
        if failure is not None:
            raise failure
        for rank, failed in enumerate(failures):
            if failed is not None:
                raise failed[0](f"Process {rank} has stopped: {failed[1]}")
        return result

    def barrier(self) -> None:
        """Wait for the others."""
        self.all_gather(None)


#: A process on its own.
ALONE = Processes()


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    return {name: (tuple(z.shape), z.dtype) for name, z in tensors.items()}


def _exchanged(
    forms: Mapping[str, Form],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    exchange: Callable[[Tensor], object],
) -> dict[str, Tensor]:
    """Exchange tensors in buckets of one type; zeros where this process has none."""
    order = sorted(forms, key=lambda name: (str(forms[name][1]), name))
    sizes = {name: prod(forms[name][0]) for name in order}
    starts = accumulate(sizes.values(), initial=0)
    buckets = {n: (forms[n][1], start // _BUCKET) for n, start in zip(order, starts, strict=False)}
    result: dict[str, Tensor] = {}
    for (dtype, _), bucket in groupby(order, buckets.__getitem__):
        names = list(bucket)
        zero = torch.zeros((), dtype=dtype, device=device)
        pieces = (tensors[n].flatten() if n in tensors else zero.expand(sizes[n]) for n in names)
        flat = torch.cat(list(pieces))
        with lost_processes_named(by_message=False):
            exchange(flat)
        for name, piece in zip(names, flat.split([sizes[n] for n in names]), strict=True):
            # a copy of its own, since products of tensors that are not aligned round differently
            result[name] = piece.reshape(forms[name][0]).clone()
    return result


# parts of messages of the engines of torch.distributed
_ENGINES = ("gloo", "NCCL", "ProcessGroup", "process group")


@contextmanager
def lost_processes_named(by_message: bool = True) -> Iterator[None]:
    """Translate errors of ``torch.distributed`` that mean that another process has stopped.

    Args:
        by_message: Whether other errors may happen, so that these are known by their messages.

    Raises:
        ValueError: In place of torch's error.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if by_message and not any(part in str(error) for part in _ENGINES):
            raise
        raise ValueError(
            f"Another process has stopped, or does not answer ({quoted(error)}). Look "
            "for its own message; start all of them again to go on from the checkpoint."
        ) from error


def divided(
    processes: Processes,
    pieces: dict[str, Any],
    cost: Callable[[Any], float],
    work: Callable[[dict[str, Any]], dict[str, dict[str, Tensor]]],
    device: torch.device,
) -> dict[str, dict[str, Tensor]]:
    """Divide pieces of work among processes by cost; every process has all results.

    Pieces are given away: ``work`` takes its own out of what it is given, so that not all of them
    are held beside all results.
    """
    owners = processes.owners([cost(piece) for piece in pieces.values()])
    keys = list(pieces)
    mine = [key for key, owner in zip(keys, owners, strict=True) if owner == processes.rank]
    own = work({key: pieces.pop(key) for key in mine})
    results: dict[str, dict[str, Tensor]] = {}
    for key in keys:
        pieces.pop(key, None)
        results[key] = processes.all_gather_tensors(own.pop(key, {}), device)
    return results
