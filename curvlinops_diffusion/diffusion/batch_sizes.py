"""The largest batch that fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.runtime.devices import free_bytes, peak_bytes
from curvlinops_diffusion.runtime.processes import Processes

_logger = logging.getLogger("curvlinops_diffusion")

# examples of the two passes that are measured
MEASURED = (2, 4)
_MOST = 1024  # more are not faster, on whatever device


def largest_batch_size(
    objective: DenoisingObjective, batch_of: Callable[[int], NoisedBatch]
) -> int:
    """The most examples whose forward and backward pass takes half of the memory that is free.

    The other half is for factors, gradients and scores. A power of two, so that it stays the same
    where a little more or less is free; the same on all processes. On a GPU it is tried out.
    """
    device = objective.device

    def run(count: int) -> None:
        with torch.enable_grad():
            batch = batch_of(count)
            x_t = batch.x_t.detach().requires_grad_()
            loss = batch.loss(objective.predict(replace(batch, x_t=x_t))).sum()
            torch.autograd.grad(loss, x_t)

    budget = free_bytes(device) // 2
    run(MEASURED[0])  # what libraries take for themselves is not an example's
    few, many = (peak_bytes(partial(run, count), device) for count in MEASURED)
    one = max(1, (many - few) // (MEASURED[1] - MEASURED[0]))
    fitting = (budget - (few - MEASURED[0] * one)) // one
    size = 2 ** (min(max(1, fitting), _MOST).bit_length() - 1)
    while device.type == "cuda" and size > MEASURED[1] and not _fits(run, size):
        size //= 2
    size = min(Processes.of_all().all_gather(size))
    _logger.info(
        "batch size", extra={"fields": {"examples": size, "bytes": one, "free bytes": 2 * budget}}
    )
    return size


def _fits(run: Callable[[int], None], size: int) -> bool:
    try:
        run(size)
    except torch.OutOfMemoryError:
        return False
    return True
