"""Blocks without Kronecker form: exact, from the gradients of single examples.

Biases of their own, norms, and parameters in no known layer. Dense while they are small, diagonal
beyond (``max_dense``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers import Coverage, ExactKind, Layer
from curvlinops_diffusion.layers.mapped_gradients import mapped_gradients
from curvlinops_diffusion.layers.moments import MomentSums
from curvlinops_diffusion.layers.observation import Observer, in_precision
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, EigenBlock
from curvlinops_diffusion.linalg.placement import Arrangement
from curvlinops_diffusion.runtime.sums import Sums

# between the keys of blocks, of which no module's name is empty
_TOGETHER = ".."


@dataclass(frozen=True)
class ExactBlock:
    """Parameters whose block is the second moment of their gradients.

    Attributes:
        key: A name that is unique within the model.
        params: The parameters' names.
        shapes: Their shapes.
        dense: Whether the whole block is kept, or its diagonal.
        layer: The layer that holds them, if its kind is known.
    """

    key: str
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dense: bool
    layer: Layer | None

    @property
    def num_entries(self) -> int:
        """Entries of the parameters."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """``(n, n)``, or ``(n,)`` for a diagonal."""
        return (self.num_entries,) * (1 + self.dense)

    def columns(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients ``[N, *shape]`` by name as columns, ``[n, N]``."""
        arrangement = Arrangement((self.num_entries, 1))
        return arrangement.gather([gradients[name].movedim(0, -1) for name in self.params])[:, 0]

    def block(self, moment: Tensor) -> Block:
        """The block from its mean second moment."""
        return DenseBlock(moment) if self.dense else EigenBlock(moment.unsqueeze(1))


class ExactMoments(Observer):
    """Sums that become exact blocks: one term for each backward pass, over all calls of a layer.

    Dense blocks of one size are added to together: they are small, and there are many of them. They
    may join others in one batch and not in another.
    """

    def __init__(
        self, objective: DenoisingObjective, blocks: Sequence[ExactBlock], coverage: Coverage
    ):
        self.sums = MomentSums()  # of blocks together, by their keys
        self._objective = objective
        self._blocks = blocks
        self._mapped = {name: coverage.params[name] for name in coverage.others}
        self._layers = {block.layer.name for block in blocks if block.layer is not None}
        self._together: dict[int, str] = {}  # the keys of a stack, by the blocks' size
        self._inputs: dict[str, list[Tensor]] = {}  # call by call
        self._gradients = Sums()  # of single examples, by parameter
        self._N = 0

    def start(self, batch: NoisedBatch) -> None:
        """Another batch."""
        self._N = len(batch.indices)

    def input(self, layer: Layer, x: Tensor) -> None:
        """Keep what gradients are made of."""
        if isinstance(layer.kind, ExactKind) and layer.name in self._layers:
            self._inputs.setdefault(layer.name, []).append(x)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Form the gradients of a call."""
        if layer.name not in self._layers:
            return
        g = g.to(self._objective.working_dtype)
        if isinstance(layer.kind, ExactKind):
            x = in_precision(self._inputs[layer.name][call], g.dtype)
            for name, gradient in layer.example_gradients([x], [g], self._N).items():
                self._gradients.add(name, gradient)
        else:
            assert layer.bias is not None
            self._gradients.add(layer.bias, layer.bias_gradients(g, self._N))

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """Add the gradients of all calls."""
        found = dict(self._gradients.pop_all())
        found |= mapped_gradients(self._objective, batch, v_BD, self._mapped)
        dense: dict[int, dict[str, Tensor]] = {}
        for block in self._blocks:
            if not any(name in found for name in block.params):
                continue
            g_nN = block.columns(found)
            if block.dense:
                dense.setdefault(len(g_nN), {})[block.key] = g_nN.T
            else:
                self.sums.add(block.key, g_nN.square().sum(1).unsqueeze(0))
        for n, rows in dense.items():
            together = _TOGETHER.join(rows)
            # only the first to be seen of each size: routed experts make as many as batches
            if self._together.setdefault(n, together) == together:
                g_NL1n = torch.stack(list(rows.values()), 1).unsqueeze(2)
                self.sums.add_second_moment(together, g_NL1n)
            else:
                for key, g_Nn in rows.items():
                    self.sums.add_second_moment(key, g_Nn[:, None, None])

    def by_block(self) -> Sums:
        """The sums block by block, which are given away."""
        found = Sums()
        for keys, total in self.sums.pop_all():
            for key, own in zip(keys.split(_TOGETHER), total, strict=True):
                found.add(key, own)
        return found

    def finish(self) -> None:
        """Forget the batch."""
        self._inputs.clear()
        self._gradients.pop_all()
