"""How much memory there is, and how much of it a computation takes at most."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def free_bytes(device: torch.device) -> int:
    """Memory that tensors of this process could have."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that a computation holds at once, beyond what there was before.

    On a GPU by its allocator; elsewhere the tensors are counted, not what a single operation takes
    for itself.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _Held() as held:
        run()
    return held.most


class _Held(TorchDispatchMode):
    """Sees the memory that operations within the context make, until it is let go of.

    Attributes:
        most: The most that was held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and add what it makes."""
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)  # of before the context, if it is not known
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        held = weakref.ref(storage, self._let_go)
        if held not in self._known:
            self._known[held] = size
            self._now += size

    def _let_go(self, held: weakref.ref[Any]) -> None:
        self._now -= self._known.pop(held, 0)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (z for z in tree_leaves(values) if isinstance(z, Tensor))
    return [z.untyped_storage() for z in tensors if z.layout == torch.strided]
