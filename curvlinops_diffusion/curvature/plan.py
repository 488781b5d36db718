"""The plan of the blocks: which parameters form one, made of what, under which keys.

Made once, from the coverage and the options, and handed through factors, eigenvalues, operators and
cost. Below it nothing asks again how a layer's parameters fall into blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from curvlinops_diffusion.curvature.exact_blocks import ExactBlock
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.diffusion.regression import NoisedRegression, check_regression
from curvlinops_diffusion.layers.coverage import Coverage, covered_parameters
from curvlinops_diffusion.layers.kind import ExactKind
from curvlinops_diffusion.layers.layer import Layer, Part
from curvlinops_diffusion.layers.probe import probed
from curvlinops_diffusion.linalg.blocks import Block, EigenBlock
from curvlinops_diffusion.linalg.parameters import Parameters
from curvlinops_diffusion.linalg.placement import PlacedBlock, in_order
from curvlinops_diffusion.linalg.storage import versions
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.runtime.sharded_networks import device_of


@dataclass(frozen=True)
class Unit:
    """Parameters whose blocks are computed together.

    Attributes:
        names: The parameters.
        parameters: Their entries.
        entries: Those of factors and exact blocks.
        largest: The rows of the largest of these.
        operations: What their decompositions take, ``n³`` each.
    """

    names: tuple[str, ...]
    parameters: int
    entries: int
    largest: int
    operations: int


@dataclass(frozen=True)
class Holders:
    """The processes that have the blocks of layers.

    Attributes:
        processes: The processes.
        of_layer: The rank of a layer's, by the layer's name; of some layers nobody's turn it is.
    """

    processes: Processes
    of_layer: Mapping[str, int]


@dataclass(frozen=True)
class BlockPlan:
    """The partition of the covered parameters into blocks.

    Attributes:
        coverage: The parameters, and the layers that hold them.
        options: How the blocks are approximated.
        parts: The blocks of Kronecker form, layer by layer.
        exact: The others.
        beside: Layers of other processes' blocks, if these are to be watched as well: each batch is
            divided among them, and all must run the same backward passes.
        holders: Who has which of these.
    """

    coverage: Coverage
    options: KFACOptions
    parts: tuple[Part, ...]
    exact: tuple[ExactBlock, ...]
    beside: tuple[Layer, ...] = ()
    holders: Holders | None = None

    @classmethod
    def of(cls, coverage: Coverage, options: KFACOptions) -> BlockPlan:
        """The plan for parameters and options."""
        parts = [
            part
            for layer in coverage.layers
            for part in layer.parts(options.separate_weight_and_bias, options.exact_bias)
        ]
        inside = {name for part in parts for name in part.params}
        exact: list[ExactBlock] = []

        def add_exact(key: str, names: tuple[str, ...], layer: Layer | None = None) -> None:
            shapes = tuple(tuple(coverage.params[name].shape) for name in names)
            # a bias' block is no larger than its layer's output factor
            is_bias = layer is not None and not isinstance(layer.kind, ExactKind)
            dense = is_bias or sum(map(prod, shapes)) <= options.max_dense
            exact.append(ExactBlock(key, names, shapes, dense, layer))

        for layer in coverage.layers:
            names = tuple(name for name in layer.params if name not in inside)
            if len({coverage.params[name].shape for name in names}) == len(names) == 2:
                for name in names:  # of a kind whose parameters have no common rows
                    add_exact(name, (name,), layer)
            elif names:
                kind = "norm" if isinstance(layer.kind, ExactKind) else "bias"
                add_exact(layer.key(kind), names, layer)
        for name in coverage.others:
            add_exact(name, (name,))
        return cls(coverage, options, tuple(parts), tuple(exact))

    def restricted(self, names: Collection[str], holders: Holders | None = None) -> BlockPlan:
        """The part for some parameters, whole layers; of others' layers, who holds them."""
        coverage = replace(
            self.coverage,
            params={name: p for name, p in self.coverage.params.items() if name in names},
            layers=tuple(x for x in self.coverage.layers if any(n in names for n in x.params)),
            others={name: why for name, why in self.coverage.others.items() if name in names},
        )
        parts = tuple(part for part in self.parts if part.params[0] in names)
        exact = tuple(block for block in self.exact if block.params[0] in names)
        beside = () if holders is None else self.coverage.layers
        return BlockPlan(coverage, self.options, parts, exact, beside, holders)

    def info(self, regression: NoisedRegression) -> dict[str, Any]:
        """Describe an operator that was fitted, for the header of its file."""
        coverage, rounding = self.coverage, set(self.coverage.rounding)
        if not self.options.exact_bias:  # the block of a bias is then the factor of its weight
            mixed = [layer for layer in coverage.layers if not {*layer.params} <= rounding]
            rounding -= {name for layer in mixed for name in layer.params}
        names = [name for name in coverage.params if name in rounding]
        return {
            "options": self.options.as_dict(),
            "regression": regression.description,
            "data": regression.data_identity(),
            "others": coverage.others,
            "versions": versions(),
            **({"rounding": names} if names else {}),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Describe the plan for a model as plain values, for checkpoints."""
        return {"options": self.options.as_dict(), "params": list(self.coverage.params)}

    @cached_property
    def by_layer(self) -> dict[str, tuple[Part, ...]]:
        """The blocks of Kronecker form by the name of their layer, where it has any."""
        names = dict.fromkeys(part.layer.name for part in self.parts)
        return {name: tuple(p for p in self.parts if p.layer.name == name) for name in names}

    @property
    def without_entries(self) -> tuple[str, ...]:
        """The parameters without entries, of layers of size zero."""
        return tuple(name for name, p in self.coverage.params.items() if p.numel() == 0)

    @cached_property
    def with_inputs(self) -> dict[str, Part]:
        """The block of each layer that has an input factor, by the name of the layer."""
        return {part.layer.name: part for part in self.parts if not part.is_bias}

    def factor_sizes(self) -> list[int]:
        """The rows of every factor that is decomposed, one entry for each group."""
        return _factor_sizes(self.parts)

    @property
    def num_entries(self) -> int:
        """The entries of all factors and exact blocks."""
        return sum(unit.entries for unit in self.units)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units that a plan is divided into: layers, and parameters in none."""
        parts: dict[str, list[Part]] = {}
        exact: dict[str, list[ExactBlock]] = {}
        for part in self.parts:
            parts.setdefault(part.params[0], []).append(part)
        for block in self.exact:
            exact.setdefault(block.params[0], []).append(block)

        def unit(*names: str) -> Unit:
            factors = _factor_sizes([part for name in names for part in parts.get(name, [])])
            blocks = [block for name in names for block in exact.get(name, [])]
            decomposed = [*factors, *(b.moment_shape[0] for b in blocks if b.dense)]
            return Unit(
                names,
                parameters=sum(self.coverage.params[name].numel() for name in names),
                entries=sum(n * n for n in factors) + sum(prod(b.moment_shape) for b in blocks),
                largest=max(decomposed, default=0),
                operations=sum(n**3 for n in decomposed),
            )

        alone = (*self.coverage.others, *self.without_entries)
        return (*(unit(*layer.params) for layer in self.coverage.layers), *map(unit, alone))

    def place(self, blocks: Mapping[str, Block]) -> list[PlacedBlock]:
        """Blocks by their key, at their place among the parameters, in the parameters' order."""
        placed = [
            PlacedBlock(part.key, part.params, blocks[part.key], part.kind.transposed)
            for part in self.parts
        ]
        placed += [PlacedBlock(block.key, block.params, blocks[block.key]) for block in self.exact]
        for name in self.without_entries:
            p = self.coverage.params[name]
            empty = torch.zeros(0, 1, dtype=torch.promote_types(p.dtype, torch.float32))
            placed.append(PlacedBlock(name, (name,), EigenBlock(empty.to(device_of(p)))))
        return in_order(placed, self.coverage.params)


def _factor_sizes(parts: Iterable[Part]) -> list[int]:
    """The rows of the factors of some blocks, those that several have once."""
    sizes = {}
    for part in parts:
        *groups, O, I = part.shape
        sizes[part.output_key, "output"] = [O] * prod(groups)
        if not part.kind.one_hot and not part.is_bias:
            sizes[part.key, "input"] = [I] * prod(groups)
    return [size for own in sizes.values() for size in own]


def prepare(regression: NoisedRegression, params: Parameters, options: KFACOptions) -> BlockPlan:
    """Choose the blocks, and try the network out, which is not repeated while nothing has changed.

    Raises:
        ValueError: If a parameter cannot be covered, or the network is not what derivatives assume;
            see :mod:`~curvlinops_diffusion.layers.probe`.
    """
    check_regression(regression)
    coverage = covered_parameters(regression.objective.model, params)
    return BlockPlan.of(probed(regression, coverage), options)
