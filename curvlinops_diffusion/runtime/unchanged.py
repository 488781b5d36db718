"""Whether tensors are what they were, told without reading them on the host.

A digest of a network's weights takes a second for every gigabyte, and first the weights must come
from the device. That nothing has changed since the last one can be told faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Words of 64 bits in a row
_ROW = 1024


def marks(tensors: Mapping[str, Tensor]) -> list[Any]:
    """Plain values that differ if tensors are others, or have other entries.

    Their places in memory, how often they were changed in place, and sums over their bits, which
    also tell of changes that PyTorch does not count (through ``.data``, say).

    Args:
        tensors: The tensors, by name.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    told: list[Any] = []
    for name, z in tensors.items():
        version = None if z.is_inference() else z._version
        told.append((name, z.device, z.dtype, tuple(z.shape), z.stride(), z.data_ptr(), version))
        sums.setdefault(z.device, []).append(_sums(z))
    # one wait for each device
    return [*told, *(torch.stack(own).tolist() for own in sums.values())]


def _sums(z: Tensor) -> Tensor:
    """Sums over rows and over columns of a tensor's words, each with an odd factor of its own."""
    entries = z.detach().contiguous().flatten().view(torch.uint8)
    in_rows = len(entries) // (8 * _ROW) * (8 * _ROW)
    table = entries[:in_rows]
    if table.storage_offset() % 8:
        table = table.clone()
    table = table.view(torch.int64).view(-1, _ROW)
    parts = table.sum(0), table.sum(1), entries[in_rows:].long()
    return torch.stack([_weighted(part) for part in parts])


def _weighted(numbers: Tensor) -> Tensor:
    """Their sum, which tells where each is."""
    odd = torch.arange(1, 1 + 2 * len(numbers), 2, device=numbers.device)
    return (numbers * odd).sum()
