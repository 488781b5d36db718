"""Blocks divided by layers: among processes (shards), and in time where memory is short (groups).

A shard is fitted by one process. Either it passes over all data alone, for the factors of its own
layers; or all pass over the data together, each runs the network on its part of every batch, and
what a layer sees is sent to the process that has it. A group is fitted as if it were all; its
blocks then wait in the host's memory. Both have checkpoints of their own, so that other numbers of
processes, or another memory, go on from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed

from curvlinops_diffusion.curvature.plan import BlockPlan, Holders, Unit
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.observation import Observer, observed, one_vector
from curvlinops_diffusion.layers.probe import trial_of
from curvlinops_diffusion.linalg.blocks import Block
from curvlinops_diffusion.linalg.placement import PlacedBlock, in_order, moved
from curvlinops_diffusion.runtime.files import check_space
from curvlinops_diffusion.runtime.passes import PassOptions, check_same_pass
from curvlinops_diffusion.runtime.processes import Processes

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
        number = 1
        if passes.max_memory is not None:
            number = parts_begun(passes, "group") or num_groups(plan, passes.max_memory, itemsize)
        if passes.max_memory is None or number == 1:
            return plan.place(fit(regression, plan, passes))
        owners = shard_owners(plan, number)
        blocks: list[PlacedBlock] = []
        for group in range(number):
            names = {name for name, owner in owners.items() if owner == group}
            if names:
                own = replace(passes, checkpoint=_part_folder(passes, "group", group, number))
                part = plan.restricted(names)
                blocks += moved(part.place(fit(regression, part, own)), _HOST)
        blocks = in_order(blocks, plan.coverage.params)
        return where_they_fit(blocks, passes.max_memory, regression.device)

    if passes.sharded:
        return _sharded_blocks(regression, plan, passes, in_groups)
    return in_groups(plan, passes)


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


def _sharded_blocks(
    regression: NoisedRegression,
    plan: BlockPlan,
    passes: PassOptions,
    fit: Callable[[BlockPlan, PassOptions], list[PlacedBlock]],
) -> list[PlacedBlock]:
    processes = passes.holders
    check_same_pass(processes, regression, plan.settings)
    by_data = batches_are_divided(regression, plan, passes)
    # as many as processes, or as an earlier run was divided into
    number = parts_begun(passes, "shard") or processes.count
    owners = shard_owners(plan, number)

    def own_passes(shard: int) -> PassOptions:
        folder = _part_folder(passes, "shard", shard, number)
        shown = passes.progressbar and processes.rank == 0
        return replace(
            passes, distributed=False, sharded=False, checkpoint=folder, progressbar=shown
        )

    def own() -> list[PlacedBlock]:
        blocks = []
        for first in range(0, number, processes.count):
            shard = first + processes.rank
            names = {name for name, owner in owners.items() if owner == shard}
            holders = None
            if by_data:
                layers = {layer.name: owners[layer.params[0]] for layer in plan.coverage.layers}
                turn = range(first, first + processes.count)
                of_layer = {name: s - first for name, s in layers.items() if s in turn}
                holders = Holders(processes, of_layer)
            if names or by_data:
                own_plan = plan.restricted(names, holders)
                blocks += fit(own_plan, own_passes(shard))
        return blocks

    return processes.all_or_none(own)


def batches_are_divided(regression: NoisedRegression, plan: BlockPlan, passes: PassOptions) -> bool:
    """Whether shards are fitted from batches that are divided, too; by counted cost, if it is free.

    With ``n`` processes a sample then costs each of them a part of ``1/n`` of the network's passes,
    and of sending what layers see, in place of all passes and nothing to send.

    Raises:
        ValueError: If batches must be divided, as the network is, and cannot be.
    """
    in_step = regression.in_step
    if passes.max_memory is not None and in_step:
        raise ValueError(
            f"`max_memory` must be None for sharded=True and a network that is divided among "
            f"processes itself (fully_shard), got {passes.max_memory}: these must all run the "
            "network equally often, and may need different numbers of passes. Leave it out, or "
            "start more of them."
        )
    # parameters in no layer are differentiated example by example, where their block is
    impossible = plan.coverage.others or passes.max_memory is not None
    if in_step or impossible or passes.sharded == "layers":
        return in_step
    count = passes.holders.count
    if passes.sharded == "data" or count == 1:
        return count > 1
    counted = _Counted()
    with observed(regression.objective, plan.coverage.layers, counted) as network:
        batch = trial_of(regression).few
        network.run(batch, one_vector(batch.loss_gradient))
    return counted.sent * _operations_a_byte(count) < (count - 1) * counted.operations


class _Counted(Observer):
    """Counts the bytes that layers see, and the network's multiplications and additions."""

    def __init__(self) -> None:
        self.sent = self.operations = 0

    def input(self, layer: Layer, x: Tensor) -> None:
        self.sent += x.nbytes
        if isinstance(layer.kind, SharingKind) and layer.weight is not None:
            *groups, O, I = layer.kind.matrix_shape(layer.module)
            positions = len(x) * layer.kind.positions(layer.module, x)
            self.operations += 4 * positions * prod(groups) * O * I

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        self.sent += g.nbytes


def _operations_a_byte(count: int) -> float:
    """Multiplications and additions that a process does while it sends a byte; assumed.

    400 TFLOP/s and 300 GB/s within a machine, 50 between machines; 50 GFLOP/s and 1 GB/s on CPUs.
    """
    if distributed.get_backend() != "nccl":
        return 50.0
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == count
    return 400e12 / 300e9 if alone else 400e12 / 50e9


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


def _part_folder(passes: PassOptions, kind: str, part: int, number: int) -> Path | None:
    """The folder of a part's checkpoints; ``None`` for none."""
    if passes.checkpoint is None:
        return None
    return Path(passes.checkpoint) / f"{kind}{part}of{number}"
