"""Devices: copies that do not synchronise, prefetching, memory, and the load of the machine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from warnings import warn

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def to_device(z: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to a device, perhaps in another precision, without synchronising.

    A blocking copy synchronises the stream and leaves the GPU idle until new kernels are launched.
    """
    return z.to(device, dtype, non_blocking=device.type != "cpu")


def to_like(z: Tensor, other: Tensor) -> Tensor:
    """Copy a tensor to another one's device, in its precision, see :func:`to_device`."""
    return to_device(z, other.device, other.dtype)


def pinned(z: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to pinned memory if it is for a GPU."""
    return z.pin_memory() if device.type == "cuda" and z.device.type == "cpu" else z


class DeviceFlag:
    """A truth value that is read later, when it no longer synchronises the stream."""

    def __init__(self, flag: Tensor):
        self._flag = flag
        self._copied: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __bool__(self) -> bool:
        """Wait until the device has computed it."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)


def prefetched(
    function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> Iterator[Result]:
    """Yield a function's results in order, the next one computed by a thread meanwhile."""
    waiting: Future[Result] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        for argument in arguments:
            following = pool.submit(function, argument)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process could still allocate."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Measure the most that a computation allocates at once.

    On a GPU by its allocator; elsewhere the tensors are counted, without the workspace of single
    operations.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as allocations:
        run()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Adds up the storages made within the context that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and add what it allocates."""
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)  # of before the context, if it is not known
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        reference = weakref.ref(storage, self._freed)
        if reference not in self._known:
            self._known[reference] = size
            self._now += size

    def _freed(self, reference: weakref.ref[Any]) -> None:
        self._now -= self._known.pop(reference, 0)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (z for z in tree_leaves(values) if isinstance(z, Tensor))
    return [z.untyped_storage() for z in tensors if z.layout == torch.strided]


def machine_load() -> tuple[float, int]:
    """Return the load of the last minute, and the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), cores


def warn_if_busy(device: torch.device) -> None:
    """Warn of more threads than idle cores, where a pass computes on the CPU.

    Small operations of a network are divided among threads, each of which must be scheduled before
    the next operation starts: with neighbours on the cores a pass can take a hundred times as long.
    """
    threads, (load, cores) = torch.get_num_threads(), machine_load()
    if device.type == "cpu" and threads > 1 and load > 1.5 * cores:
        warn(
            f"The machine is busy: a load of {load:.1f} on {cores} cores, and PyTorch uses "
            f"{threads} threads. Small networks can be a hundred times slower so: set "
            "OMP_NUM_THREADS=1 before the start, or torch.set_num_threads(1).",
            stacklevel=4,
        )


def threads_for(load: float, cores: int, threads: int) -> int:
    """Count the threads that find a core beside a load, at least one and at most ``threads``."""
    return max(1, min(threads, cores - round(load)))
