"""Tensors on their way from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(z: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, perhaps in another precision, without waiting for the device.

    A copy that is waited for also waits for all that the device was told before, which is idle
    afterwards for as long as it takes to tell it something new.
    """
    return z.to(device, dtype, non_blocking=device.type != "cpu")


def sent_beside(z: Tensor, other: Tensor) -> Tensor:
    """A tensor where another one is, and in its precision, see :func:`sent`."""
    return sent(z, other.device, other.dtype)


def ready_to_send(z: Tensor, device: torch.device) -> Tensor:
    """A tensor in memory that a GPU reads by itself, if it is for one; the copy takes a moment."""
    return z.pin_memory() if device.type == "cuda" and z.device.type == "cpu" else z
