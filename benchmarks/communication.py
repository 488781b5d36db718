"""Counts the bytes that a process sends, as a ring would send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What a process of ``n`` sends, in units of the bytes of the larger side, times ``(n − 1) / n``;
#: a broadcast goes on as it came.
_TIMES = {
    "allreduce_": 2.0,
    "allgather_": 1.0,
    "_allgather_base_": 1.0,
    "_reduce_scatter_base_": 1.0,
    "reduce_scatter_": 1.0,
    "broadcast_": 1.0,
    "gather_": 1.0,
}


class SentBytes(TorchDispatchMode):
    """Sees every collective of ``torch.distributed`` within the context.

    Attributes:
        total: Bytes that this process has sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and count what it sends."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            sizes = [z.nbytes for z in tree_leaves(args[0]) if isinstance(z, Tensor)]
            if name.startswith(("_reduce_scatter", "reduce_scatter", "gather")):
                sizes = [z.nbytes for z in tree_leaves(args[1]) if isinstance(z, Tensor)]
            n = distributed.get_world_size()
            if name in _TIMES:
                self.total += _TIMES[name] * sum(sizes) * (n - 1) / n
        return func(*args, **(kwargs or {}))
