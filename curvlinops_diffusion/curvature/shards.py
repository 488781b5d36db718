"""Blocks shared among processes: each passes over all data for its own layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.curvature.shared_batches import Holders
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.placement import PlacedBlock
from curvlinops_diffusion.runtime.passes import PassOptions, check_same_pass
from curvlinops_diffusion.runtime.processes import Share


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
    share = passes.holders
    check_same_pass(share, regression, plan.settings)
    by_data = _batches_are_divided(regression, plan, passes)
    number = _number_of_shards(passes, share)
    owners = shard_owners(plan, number)

    def own() -> list[PlacedBlock]:
        blocks = []
        for first in range(0, number, share.count):
            shard = first + share.rank
            names = {name for name, owner in owners.items() if owner == shard}
            holders = None
            if by_data:
                layers = {layer.name: owners[layer.params[0]] for layer in plan.coverage.layers}
                turn = range(first, first + share.count)
                of_layer = {name: s - first for name, s in layers.items() if s in turn}
                holders = Holders(share, of_layer)
            if names or by_data:
                own_plan = plan.restricted(names, holders)
                blocks += fit(own_plan, _of_shard(passes, shard, number, share))
        return blocks

    return share.all_or_none(own)


def _batches_are_divided(
    regression: NoisedRegression, plan: BlockPlan, passes: PassOptions
) -> bool:
    """Whether batches are divided, too.

    Raises:
        ValueError: If they must be, as the network is, and cannot be.
    """
    in_step = regression.in_step
    if passes.max_memory is not None and in_step:
        raise ValueError(
            f"max_memory={passes.max_memory} arrived with sharded=True and a network that is "
            "divided among processes itself (fully_shard): these must all run the network equally "
            "often, and may need different numbers of passes. Leave it out, or start more of them."
        )
    # parameters in no layer are differentiated example by example, where their block is
    possible = not plan.coverage.others and passes.max_memory is None
    return in_step or (passes.sharded == "data" and possible)


def shard_owners(plan: BlockPlan, number: int) -> dict[str, int]:
    """The shard of each parameter; those of a layer have the same one.

    Balanced by the bytes of the factors, and by the operations of their decomposition, ``n³``.
    """
    total_entries = max(1, sum(unit.entries for unit in plan.units))
    total_operations = max(1, sum(unit.operations for unit in plan.units))
    costs = [
        unit.entries / total_entries + unit.operations / total_operations for unit in plan.units
    ]
    owners = Share(0, number).owners(costs)
    return {
        name: owner for unit, owner in zip(plan.units, owners, strict=True) for name in unit.names
    }


def _number_of_shards(passes: PassOptions, share: Share) -> int:
    """As many as processes, or as there are in the checkpoint of an earlier run."""
    number = share.count
    if passes.checkpoint is not None:
        names = [path.name for path in Path(passes.checkpoint).glob("shard*of*")]
        found = [re.fullmatch(r"shard\d+of(\d+)", name) for name in sorted(names)]
        numbers = {int(match.group(1)) for match in found if match}
        share.check_alike(f"what they see in '{passes.checkpoint}'", sorted(numbers))
        number = max(numbers, default=number)
    return number


def _of_shard(passes: PassOptions, shard: int, number: int, share: Share) -> PassOptions:
    folder = None
    if passes.checkpoint is not None:
        folder = Path(passes.checkpoint) / f"shard{shard}of{number}"
    shown = passes.progressbar and share.rank == 0
    return replace(passes, distributed=False, sharded=False, checkpoint=folder, progressbar=shown)
