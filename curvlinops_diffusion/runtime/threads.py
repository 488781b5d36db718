"""Threads on a busy machine: many that wait for each other are far slower than one."""

from __future__ import annotations

import os
from warnings import warn

import torch

# runnable processes for each core, from which on waiting is noticed
_BUSY = 1.5


def warn_if_busy(device: torch.device) -> None:
    """Warn of more threads than idle cores, where a pass computes on the CPU.

    Small operations of a network are shared among threads, each of which must have its turn before
    the next operation starts: with neighbours on the cores a pass can take a hundred times as long.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not hasattr(os, "getloadavg"):
        return
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load > _BUSY * cores:
        warn(
            f"The machine is busy: a load of {load:.1f} on {cores} cores, and PyTorch uses "
            f"{threads} threads. Small networks can be a hundred times slower so: set "
            "OMP_NUM_THREADS=1 before the start, or torch.set_num_threads(1).",
            stacklevel=4,
        )
