"""Blocks divided by layers: among processes (shards), and in time where memory is short (groups).

Either is fitted as if it were all. Processes pass over the data together: each runs the network on
its part of every batch, and what a layer sees is sent to the process that has it; or, where that
cannot be, each passes over all data for its own layers. The blocks of a group wait in the host's
memory. Each part has checkpoints of its own, so that other numbers of processes, or another memory,
go on from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from curvlinops_diffusion.curvature.plan import BlockPlan, Holders, Unit
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.blocks import Block
from curvlinops_diffusion.linalg.placement import PlacedBlock, in_order, moved
from curvlinops_diffusion.runtime.files import check_space
from curvlinops_diffusion.runtime.passes import PassOptions, check_same_pass
from curvlinops_diffusion.runtime.processes import ALONE, Processes

# where finished blocks wait
_HOST = torch.device("cpu")
# a factor that is decomposed, with its eigenvectors and what the decomposition needs
_WORKSPACE = 3

#: Fits the blocks of a plan, by their key.
Fit = Callable[[NoisedRegression, BlockPlan, PassOptions], dict[str, Block]]


def fitted_blocks(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions, fit: Fit
) -> list[PlacedBlock]:
    """Fit the blocks of this process, in one shard or several, and in groups that fit into memory.

    Raises:
        ValueError: If the processes' weights, data or options differ, or one of them has failed; if
            a layer alone needs more memory than there is, or checkpoints more space on the disk.
    """
    itemsize = regression.objective.working_dtype.itemsize
    if passes.checkpoint is not None:
        # one is held while the next is written, and the operator's own file is as large
        folder = Path(passes.checkpoint)
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        check_space(folder, 2 * plan.num_entries * itemsize - there, "Checkpoints of the factors")

    def in_groups(plan: BlockPlan, passes: PassOptions) -> list[PlacedBlock]:
        number, most = 1, passes.max_memory
        if most is not None:
            number = parts_begun(passes, "group") or num_groups(plan, most, itemsize)
        if most is None or number == 1:
            return plan.place(fit(regression, plan, passes))

        def kept(part: BlockPlan, own: PassOptions) -> list[PlacedBlock]:
            return moved(part.place(fit(regression, part, own)), _HOST)

        blocks = _in_parts("group", number, plan, passes, ALONE, kept)
        return where_they_fit(in_order(blocks, plan.coverage.params), most, regression.device)

    if not passes.sharded:
        return in_groups(plan, passes)
    processes = passes.holders
    check_same_pass(processes, regression, plan.settings)
    together = batches_are_divided(regression, plan, passes)
    # as many as processes, or as an earlier run was divided into
    number = parts_begun(passes, "shard") or processes.count
    shown = passes.progressbar and processes.rank == 0
    alone = replace(passes, distributed=False, sharded=False, progressbar=shown)
    return processes.all_or_none(
        lambda: _in_parts("shard", number, plan, alone, processes, in_groups, together)
    )


def _in_parts(
    kind: Literal["shard", "group"],
    number: int,
    plan: BlockPlan,
    passes: PassOptions,
    processes: Processes,
    fit: Callable[[BlockPlan, PassOptions], list[PlacedBlock]],
    together: bool = False,
) -> list[PlacedBlock]:
    """Fit a plan in parts, one after the other, as many at once as there are processes.

    With ``together`` every process sees a part of each batch, and so takes part in all.
    """
    owners, blocks = shard_owners(plan, number), []
    for first in range(0, number, processes.count):
        part, holders = first + processes.rank, None
        if together:
            turn = range(first, first + processes.count)
            of_layer = {layer.name: owners[layer.params[0]] for layer in plan.coverage.layers}
            holders = Holders(processes, {k: p - first for k, p in of_layer.items() if p in turn})
        names = {name for name, owner in owners.items() if owner == part}
        if names or together:
            folder = None
            if passes.checkpoint is not None:
                folder = Path(passes.checkpoint) / f"{kind}{part}of{number}"
            blocks += fit(plan.restricted(names, holders), replace(passes, checkpoint=folder))
    return blocks


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
        f"`max_memory` must hold the factors of the largest layer with what is made of them, "
        f"{needed:,} bytes; got {max_memory:,}. Pass that much, or leave the layer out of params."
    )


def divided_units(plan: BlockPlan, number: int) -> list[list[Unit]]:
    """List the units of each group or shard."""
    owners = shard_owners(plan, number)
    found: list[list[Unit]] = [[] for _ in range(number)]
    for unit in plan.units:
        found[owners[unit.names[0]]].append(unit)
    return found


def batches_are_divided(regression: NoisedRegression, plan: BlockPlan, passes: PassOptions) -> bool:
    """Tell whether processes pass over the data once together, and send what layers see.

    They do where they can: parameters in no layer are differentiated example by example where their
    block is, and processes that fit groups by memory may need different numbers of passes.

    Raises:
        ValueError: If batches must be divided, as the network is, and cannot be.
    """
    if passes.max_memory is not None and regression.in_step:
        raise ValueError(
            f"`max_memory` must be None for sharded=True and a network that is divided among "
            f"processes itself (fully_shard), got {passes.max_memory}: these must all run the "
            "network equally often, and may need different numbers of passes. Leave it out, or "
            "start more of them."
        )
    can = not plan.coverage.others and passes.max_memory is None
    return regression.in_step or (passes.holders.count > 1 and can)


def shard_owners(plan: BlockPlan, number: int) -> dict[str, int]:
    """The shard of each parameter; those of a layer have the same one.

    Balanced by the bytes of the factors, and by the operations of their decomposition, ``n³``.
    """
    total_entries = max(1, sum(unit.entries for unit in plan.units))
    total_operations = max(1, sum(unit.operations for unit in plan.units))
    costs = [
        unit.entries / total_entries + unit.operations / total_operations for unit in plan.units
    ]
    owners = Processes(0, number).owners(costs)
    return {
        name: owner for unit, owner in zip(plan.units, owners, strict=True) for name in unit.names
    }


def parts_begun(passes: PassOptions, kind: Literal["shard", "group"]) -> int | None:
    """Count the parts of an earlier run, whose checkpoints all processes must see alike."""
    if passes.checkpoint is None:
        return None
    names = [path.name for path in Path(passes.checkpoint).glob(f"{kind}*of*")]
    found = [re.fullmatch(kind + r"\d+of(\d+)", name) for name in sorted(names)]
    numbers = sorted({int(match.group(1)) for match in found if match})
    Processes.of(passes.distributed).check_alike(f"what they see in '{passes.checkpoint}'", numbers)
    return max(numbers, default=None)
