"""Blocks without Kronecker form: exact, from the gradients of single examples.

Biases of their own, norms, and parameters in no known layer. Dense while they are small, diagonal
beyond (``max_dense``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers import Coverage, ExactKind, Layer
from curvlinops_diffusion.layers.mapped_gradients import mapped_gradients
from curvlinops_diffusion.layers.observation import Observer, in_precision
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, EigenBlock
from curvlinops_diffusion.linalg.placement import Arrangement
from curvlinops_diffusion.runtime.sums import Sums


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


class ExactSums(Sums):
    """Running sums ``Σ_n g_n g_nᵀ`` of exact blocks, or of their diagonals, by the blocks' keys.

    Dense blocks of one size are added to together: they are small, and there are many of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stacks: dict[tuple[str, ...], Tensor] = {}  # of which sums are rows

    def add_gradients(self, blocks: Iterable[ExactBlock], gradients: Mapping[str, Tensor]) -> None:
        """Add what is from gradients ``[N, *shape]`` by the parameters' names."""
        dense: dict[int, dict[str, Tensor]] = {}
        for block in blocks:
            g_nN = block.columns(gradients)
            if block.dense:
                dense.setdefault(len(g_nN), {})[block.key] = g_nN
            else:
                self.add(block.key, g_nN.square().sum(1))
        for columns in dense.values():
            g_LnN = torch.stack(list(columns.values()))
            self._stack(tuple(columns), g_LnN).baddbmm_(g_LnN, g_LnN.mT)

    def _stack(self, keys: tuple[str, ...], like: Tensor) -> Tensor:
        """The sums of some keys in one tensor, of which they are rows from now on."""
        stack = self._stacks.get(keys)
        if stack is None:
            stack = like.new_zeros(len(keys), like.shape[1], like.shape[1])
            for own, key in zip(stack, keys, strict=True):
                if key in self._sums:
                    own.copy_(self._sums[key])
                self._sums[key] = own
            changed = set(keys)
            self._stacks = {k: z for k, z in self._stacks.items() if not changed & set(k)}
            self._stacks[keys] = stack
        return stack

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from sums by name."""
        super().restore(tensors)
        self._stacks.clear()

    def take_mean(self, key: str, count: int, otherwise: Callable[[], Tensor]) -> Tensor:
        """The mean, as of all :class:`~curvlinops_diffusion.runtime.sums.Sums`."""
        self._stacks.clear()
        return super().take_mean(key, count, otherwise)


class ExactMoments(Observer):
    """Sums that become exact blocks: one term for each backward pass, over all calls of a layer."""

    def __init__(
        self, objective: DenoisingObjective, blocks: Sequence[ExactBlock], coverage: Coverage
    ):
        self.sums = ExactSums()
        self._objective = objective
        self._blocks = blocks
        self._dtype = objective.working_dtype
        self._mapped = {name: coverage.params[name] for name in coverage.others}
        self._layers = {block.layer.name for block in blocks if block.layer is not None}
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
        g = g.to(self._dtype)
        if isinstance(layer.kind, ExactKind):
            (x,) = in_precision([self._inputs[layer.name][call]], self._dtype)
            for name, gradient in layer.example_gradients([x], [g], self._N).items():
                self._gradients.add(name, gradient)
        else:
            assert layer.bias is not None
            self._gradients.add(layer.bias, layer.bias_gradients(g, self._N))

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """Add the gradients of all calls."""
        mapped = mapped_gradients(self._objective, batch, v_BD, self._mapped)
        found = dict(self._gradients.pop_all()) | mapped
        seen = [b for b in self._blocks if any(name in found for name in b.params)]
        self.sums.add_gradients(seen, found)

    def finish(self) -> None:
        """Forget the batch."""
        self._inputs.clear()
        self._gradients.pop_all()
