"""Answers that a device is asked for, and that are read once it has come to them."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceFlag:
    """A truth value that is read later: asking for it at once would wait for all that is queued.

    A GPU works through what it was told while the program goes on to tell it more; a program that
    waits leaves it idle afterwards, for as long as it takes to tell it something new.

    Args:
        flag: The value, on its device.
    """

    def __init__(self, flag: Tensor):
        self._flag = flag
        self._arrived: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __bool__(self) -> bool:
        """Wait until the device has come to it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
