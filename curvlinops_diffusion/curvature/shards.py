"""Blocks shared among processes: each passes over all data for its own layers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

from torch import Tensor, distributed

from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.curvature.shared_batches import Holders
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.diffusion.trial import Trial
from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.observation import Observer, observed, one_vector
from curvlinops_diffusion.linalg.placement import PlacedBlock
from curvlinops_diffusion.runtime.passes import PassOptions, check_same_pass
from curvlinops_diffusion.runtime.processes import Processes


def sharded_blocks(
    regression: NoisedRegression,
    plan: BlockPlan,
    passes: PassOptions,
    fit: Callable[[BlockPlan, PassOptions], list[PlacedBlock]],
) -> list[PlacedBlock]:
    """The blocks of this process.

    Every shard of the plan is fitted by one process. Either it passes over all data alone, for the
    factors of its own layers; or all pass over the data together, each runs the network on its part
    of every batch, and what a layer sees is sent to the process that has it. A shard has a
    checkpoint of its own, so that other numbers of processes go on from there, each with one shard
    after the other.

    Args:
        regression: Objective, data and draws.
        plan: The blocks of all processes.
        passes: Checkpoints, processes and progress.
        fit: Fits the blocks of a plan.

    Raises:
        ValueError: If the processes' weights, data or options differ, or one of them has failed.
    """
    processes = passes.holders
    check_same_pass(processes, regression, plan.settings)
    by_data = batches_are_divided(regression, plan, passes)
    # as many as processes, or as an earlier run was divided into
    number = parts_begun(passes, "shard") or processes.count
    owners = shard_owners(plan, number)

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
                blocks += fit(own_plan, _of_shard(passes, shard, number, processes))
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
            f"max_memory={passes.max_memory} arrived with sharded=True and a network that is "
            "divided among processes itself (fully_shard): these must all run the network equally "
            "often, and may need different numbers of passes. Leave it out, or start more of them."
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
        batch = Trial.of(regression).few
        network.run(batch, one_vector(batch.loss_gradient))
    return counted.sent * _operations_a_byte(count) < (count - 1) * counted.operations


class _Counted(Observer):
    """Counts the bytes that layers see, and the network's multiplications and additions.

    Attributes:
        sent: Bytes of inputs and of gradients in outputs.
        operations: Those of a forward and a backward pass.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.operations = 0

    def input(self, layer: Layer, x: Tensor) -> None:
        """Count an input, and what is made of it."""
        self.sent += x.nbytes
        if isinstance(layer.kind, SharingKind) and layer.weight is not None:
            *groups, O, I = layer.kind.matrix_shape(layer.module)
            positions = len(x) * layer.kind.positions(layer.module, x)
            self.operations += 4 * positions * prod(groups) * O * I

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Count a gradient."""
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


def parts_begun(passes: PassOptions, kind: str) -> int | None:
    """How many parts of a kind an earlier run was divided into, if its checkpoints are there.

    Args:
        passes: The folder of the checkpoints, and the processes that must see the same.
        kind: ``'shard'`` or ``'group'``.

    Raises:
        ValueError: If processes see different folders.
    """
    if passes.checkpoint is None:
        return None
    names = [path.name for path in Path(passes.checkpoint).glob(f"{kind}*of*")]
    found = [re.fullmatch(kind + r"\d+of(\d+)", name) for name in sorted(names)]
    numbers = sorted({int(match.group(1)) for match in found if match})
    Processes.of(passes.distributed).check_alike(f"what they see in '{passes.checkpoint}'", numbers)
    return max(numbers, default=None)


def part_folder(passes: PassOptions, kind: str, part: int, number: int) -> Path | None:
    """The folder of a part's checkpoints; ``None`` for none."""
    if passes.checkpoint is None:
        return None
    return Path(passes.checkpoint) / f"{kind}{part}of{number}"


def _of_shard(passes: PassOptions, shard: int, number: int, processes: Processes) -> PassOptions:
    folder = part_folder(passes, "shard", shard, number)
    shown = passes.progressbar and processes.rank == 0
    return replace(passes, distributed=False, sharded=False, checkpoint=folder, progressbar=shown)
