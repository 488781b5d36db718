"""Blocks fitted a group of layers at a time, where those of all do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from curvlinops_diffusion.curvature.plan import BlockPlan, Unit
from curvlinops_diffusion.curvature.shards import part_folder, parts_begun, shard_owners
from curvlinops_diffusion.linalg.placement import PlacedBlock, in_order, moved
from curvlinops_diffusion.runtime.passes import PassOptions

# where finished blocks wait
_HOST = torch.device("cpu")

# a factor that is decomposed, with its eigenvectors and what the decomposition needs
_WORKSPACE = 3

Fit = Callable[[BlockPlan, PassOptions], list[PlacedBlock]]


def fitted_in_groups(
    plan: BlockPlan, passes: PassOptions, fit: Fit, itemsize: int, device: torch.device
) -> list[PlacedBlock]:
    """The blocks of a plan, by one or several groups of passes over the data.

    Each group is fitted as if it were all; its blocks then wait in the host's memory, and go back
    to the device if all of them fit there.

    Args:
        plan: The blocks.
        passes: Checkpoints, processes and progress; the memory that a group may take.
        fit: Fits the blocks of a plan.
        itemsize: Bytes of a number.
        device: Where blocks are computed with.

    Raises:
        ValueError: If a layer alone needs more memory.
    """
    if passes.max_memory is None:
        return fit(plan, passes)
    number = parts_begun(passes, "group") or num_groups(plan, passes.max_memory, itemsize)
    if number == 1:
        return fit(plan, passes)
    owners = shard_owners(plan, number)
    blocks: list[PlacedBlock] = []
    for group in range(number):
        names = {name for name, owner in owners.items() if owner == group}
        if names:
            own = replace(passes, checkpoint=part_folder(passes, "group", group, number))
            blocks += moved(fit(plan.restricted(names), own), _HOST)
    blocks = in_order(blocks, plan.coverage.params)
    return where_they_fit(blocks, passes.max_memory, device)


def where_they_fit(
    blocks: list[PlacedBlock], max_memory: int, device: torch.device
) -> list[PlacedBlock]:
    """Blocks of the host's memory on a device, if all of them fit into so many bytes."""
    fit = sum(placed.num_bytes for placed in blocks) <= max_memory
    return moved(blocks, device) if fit else blocks


def needed_memory(units: Sequence[Unit], itemsize: int) -> int:
    """Bytes of a fit beside the network and a training pass: factors, and what is made of them."""
    largest = max((unit.largest for unit in units), default=0)
    entries = sum(unit.entries + unit.parameters for unit in units)
    return itemsize * (entries + _WORKSPACE * largest**2)


def num_groups(plan: BlockPlan, max_memory: int, itemsize: int) -> int:
    """The least number of groups of layers of which each fits into so many bytes.

    Raises:
        ValueError: If there is none.
    """
    needed = 0
    for number in range(1, len(plan.units) + 1):
        needed = max(needed_memory(units, itemsize) for units in divided_units(plan, number))
        if needed <= max_memory:
            return number
    raise ValueError(
        f"max_memory={max_memory:,} bytes arrived, and the factors of the largest layer take "
        f"{needed:,} with what is made of them. Pass that much, or leave the layer out of params."
    )


def divided_units(plan: BlockPlan, number: int) -> list[list[Unit]]:
    """What each of so many groups, or shards, is of."""
    owners = shard_owners(plan, number)
    found: list[list[Unit]] = [[] for _ in range(number)]
    for unit in plan.units:
        found[owners[unit.names[0]]].append(unit)
    return found
