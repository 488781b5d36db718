"""The processes that ``torchrun`` or ``accelerate launch`` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from curvlinops_diffusion.cli.options import ModelOptions

Options = TypeVar("Options", bound=ModelOptions)


def num_processes() -> int:
    """Count the processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(timeout: float) -> Iterator[bool]:
    """Join the other processes, if there are any; yields whether there are."""
    if num_processes() == 1:
        yield False
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield True
    finally:
        distributed.destroy_process_group()


def with_own_device(options: Options) -> Options:
    """Each process has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    if options.device is None and local is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(local))
        return replace(options, device=f"cuda:{local}")
    return options


def is_first() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return not distributed.is_initialized() or distributed.get_rank() == 0
