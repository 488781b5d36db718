"""Whether tensors are what they were, told without reading them on the host.

A digest of a network's weights takes a second for every gigabyte, and first the weights must come
from the device. That nothing has changed since the last one can be told faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Words of 64 bits in a row
_ROW = 1024
_PLAIN = (bool, int, float, str)


def marks(tensors: Mapping[str, Tensor]) -> list[Any]:
    """Plain values that differ if tensors have other names, forms or entries, wherever they lie.

    Sums over their bits, which also tell of changes that PyTorch does not count (through ``.data``,
    say), and are alike after a move to another device and back.

    Args:
        tensors: The tensors, by name.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for z in tensors.values():
        sums.setdefault(z.device, []).append(_sums(z))
    forms = [(name, z.dtype, tuple(z.shape)) for name, z in tensors.items()]
    # one wait for each device
    return [*forms, *(torch.stack(own).tolist() for own in sums.values())]


def touched(module: nn.Module) -> list[Any]:
    """List what differs if a network may have changed, without reading its tensors.

    Their places in memory and how often they were changed in place; and modules' kinds, plain
    attributes and configs.
    """
    return [(type(part), _marks_of(vars(part))) for part in module.modules()]


def _marks_of(entries: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for name, z in entries.items():
        if z is None or name == "_modules":
            continue
        if isinstance(z, dict):
            if z:  # most of a module's are not
                found.append((name, _marks_of(z)))
        elif isinstance(z, _PLAIN):
            found.append((name, z))
        elif isinstance(z, Tensor):
            found.append((name, z.data_ptr(), z.dtype, None if z.is_inference() else z._version))
        elif isinstance(z, list | tuple) and all(isinstance(entry, _PLAIN) for entry in z):
            found.append((name, list(z)))
        elif name == "config":
            found.append((name, _marks_of(getattr(z, "__dict__", {}))))
    return found


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
