"""The share of the work that falls to one of several processes, and what they tell each other.

Thin over ``torch.distributed`` (gloo on CPU, NCCL on GPU).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from curvlinops_diffusion.runtime.messages import quoted

Result = TypeVar("Result")

# Sums travel in buckets of about so many entries
_BUCKET = 2**24


@dataclass(frozen=True)
class Share:
    """One of ``count`` processes.

    Attributes:
        rank: Its number.
        count: The number of processes; 1 for a process on its own.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, distributed: bool) -> Share:
        """This process among those of the default group.

        Raises:
            ValueError: If there is no process group.
        """
        if not distributed:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed=True arrived without a process group. Start the program by torchrun, "
                "and call torch.distributed.init_process_group first."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    def of_all(cls) -> Share:
        """This process among those of the default group, if there is one."""
        return cls.of(dist.is_available() and dist.is_initialized())

    def takes(self, number: int) -> bool:
        """Tell whether the batch of this number is one of ours."""
        return number % self.count == self.rank

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Assign each piece of work to a process: the most costly first, to the least busy one."""
        busy = [(0.0, rank) for rank in range(self.count)]
        owners = [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            load, rank = heapq.heappop(busy)
            owners[piece] = rank
            heapq.heappush(busy, (load + costs[piece], rank))
        return owners

    def summed(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The sums over processes of tensors by name; a missing one counts as zero.

        Raises:
            ValueError: If another process has failed.
        """
        if self.count == 1:
            return dict(tensors)
        result: dict[str, Tensor] = {}
        described = {name: (tuple(z.shape), z.dtype) for name, z in tensors.items()}
        with answered(by_message=False):
            everyone = self.gathered(described)
            names = {name: kind for own in everyone for name, kind in own.items()}
            for bucket in _buckets(names):
                dtype = names[bucket[0]][1]
                pieces = [
                    tensors[name].flatten()
                    if name in tensors
                    else torch.zeros(names[name][0], dtype=dtype, device=device).flatten()
                    for name in bucket
                ]
                flat = torch.cat(pieces)
                dist.all_reduce(flat)
                for name, piece in zip(bucket, flat.split([len(p) for p in pieces]), strict=True):
                    result[name] = piece.reshape(names[name][0]).clone()
        return result

    def gathered(self, value: Any) -> list[Any]:
        """Gather what every process says, in order of rank; plain values."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        with answered(by_message=False):
            dist.all_gather_object(everyone, value)
        return everyone

    def said_by(
        self, owner: int, tensors: Mapping[str, Tensor] | None, device: torch.device
    ) -> Any:
        """Tensors by name, as the owner has them; the others pass ``None``."""
        if self.count == 1:
            assert tensors is not None
            return tensors
        described = None
        if self.rank == owner:
            assert tensors is not None
            described = {name: (tuple(z.shape), z.dtype) for name, z in tensors.items()}
        box = [described]
        result = {}
        with answered(by_message=False):
            dist.broadcast_object_list(box, src=owner)
            assert box[0] is not None
            for name, (shape, dtype) in box[0].items():
                if self.rank == owner:
                    assert tensors is not None
                    tensor = tensors[name].contiguous()
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(tensor, src=owner)
                result[name] = tensor
        return result

    def check_alike(self, what: str, value: Any) -> None:
        """Check that all processes agree.

        Raises:
            ValueError: If they do not.
        """
        everyone = self.gathered(value)
        other = [rank for rank, said in enumerate(everyone) if said != everyone[0]]
        if other:
            raise ValueError(
                f"Process 0 and process {other[0]} differ in {what}. Give every process the same."
            )

    def pooled(self, tensors: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Tensors by name of which every process has some; every process has all.

        Args:
            tensors: This process'.
            like: A tensor of their type, on their device.
        """
        if self.count == 1:
            return dict(tensors)
        everyone = self.gathered({name: tuple(z.shape) for name, z in tensors.items()})
        result: dict[str, Tensor] = {}
        with answered(by_message=False):
            for rank, shapes in enumerate(everyone):
                sizes = [torch.Size(shape).numel() for shape in shapes.values()]
                if rank == self.rank:
                    own = [tensors[name].flatten() for name in shapes]
                    flat = torch.cat(own) if own else like.new_empty(0)
                else:
                    flat = like.new_empty(sum(sizes))
                if sizes:
                    dist.broadcast(flat, src=rank)
                for (name, shape), piece in zip(shapes.items(), flat.split(sizes), strict=True):
                    result[name] = piece.reshape(shape)
        return result

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """Do this process' own work; where one process fails, all do, in place of waiting for it.

        Raises:
            ValueError: If the work of this process has failed, or that of another one, whose kind
                of error it is then.
        """
        if self.count == 1:
            return work()
        failure = None
        try:
            result = work()
        except ValueError as error:
            failure = error
        said = self.gathered(None if failure is None else (type(failure), str(failure)))
        if failure is not None:
            raise failure
        for rank, told in enumerate(said):
            if told is not None:
                kind, text = told
                raise kind(f"Process {rank} has stopped: {text}")
        return result

    def barrier(self) -> None:
        """Wait for the others."""
        self.gathered(None)


#: A process on its own.
ALONE = Share()


def _buckets(names: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> Iterator[list[str]]:
    """Names of tensors of one type that travel together."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, (_, dtype) in sorted(names.items()):
        by_dtype.setdefault(dtype, []).append(name)
    for own in by_dtype.values():
        bucket: list[str] = []
        size = 0
        for name in own:
            bucket.append(name)
            size += torch.Size(names[name][0]).numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


# parts of messages of the engines of torch.distributed
_ENGINES = ("gloo", "NCCL", "ProcessGroup", "process group")


@contextmanager
def answered(by_message: bool = True) -> Iterator[None]:
    """Say what it means when the others do not answer.

    Args:
        by_message: Whether other errors may happen, so that one is known by what it says.

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
    share: Share,
    pieces: dict[str, Any],
    cost: Callable[[Any], float],
    work: Callable[[dict[str, Any]], dict[str, dict[str, Tensor]]],
    device: torch.device,
) -> dict[str, dict[str, Tensor]]:
    """Work whose pieces are divided among processes by cost; every process has all results.

    Pieces are given away: ``work`` takes its own out of what it is given, so that not all of them
    are held beside all results.
    """
    keys = list(pieces)
    owners = share.owners([cost(piece) for piece in pieces.values()])
    of_this_one = [key for key, owner in zip(keys, owners, strict=True) if owner == share.rank]
    own = work({key: pieces.pop(key) for key in of_this_one})
    results: dict[str, dict[str, Tensor]] = {}
    for key, owner in zip(keys, owners, strict=True):
        pieces.pop(key, None)
        results[key] = share.said_by(owner, own.pop(key, None), device)
    return results
