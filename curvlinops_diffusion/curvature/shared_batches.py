"""Batches divided among processes of which each has the blocks of some layers.

Each process runs the network on its examples of a batch, and what a layer sees goes to the process
that has the layer, which sees all examples as if it had run the network on them.

Legend: N batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.observation import Observer
from curvlinops_diffusion.runtime.division import in_equal_parts
from curvlinops_diffusion.runtime.processes import ALONE, Processes, lost_processes_named


@dataclass(frozen=True)
class Holders:
    """Which process has the blocks of which layer.

    Attributes:
        processes: The processes.
        of_layer: The rank of a layer's, by the layer's name; of some layers nobody's turn it is.
    """

    processes: Processes
    of_layer: Mapping[str, int]

    def restricted(self, names: Collection[str]) -> Holders:
        """Those of some layers."""
        chosen = {name: rank for name, rank in self.of_layer.items() if name in names}
        return Holders(self.processes, chosen)


class SharedBatches(Observer):
    """Hands what layers see to the processes that have their blocks.

    Args:
        regression: Objective, data and draws.
        holders: Who has which layer; ``None`` if all that is seen here is for here.
        inner: Sees what the layers of this process see of all examples.
    """

    def __init__(self, regression: NoisedRegression, holders: Holders | None, inner: Observer):
        self._regression = regression
        self._holders = holders
        self._inner = inner
        self._whole: Sequence[int] = ()
        self._own = self._rest = 0  # examples of this process, and those that all have
        self._told = inner
        self._latest: tuple[Tensor, int, Tensor | None] | None = None

    @property
    def processes(self) -> Processes:
        """The processes that must go over the same batches together."""
        return ALONE if self._holders is None else self._holders.processes

    def tell(self, new: bool) -> None:
        """Say whether what is seen is new for this process, which may have gone on further."""
        self._told = self._inner if new else Observer()

    def noised_batches(self, clean: CleanBatch) -> Iterator[NoisedBatch]:
        """Yield every draw of the examples that this process runs the network on."""
        if self._holders is None:
            yield from self._regression.noised_batches(clean)
            return
        own, rest = in_equal_parts(list(range(len(clean.indices))), self.processes)
        self._whole, self._own, self._rest = clean.indices, len(own), len(rest)
        # what is left all run, so that all run the network equally often
        yield from self._regression.noised_batches(clean.select([*own, *rest]))

    def start(self, batch: NoisedBatch) -> None:
        """A batch begins; its examples are those of all processes."""
        whole = batch if self._holders is None else replace(batch, indices=self._whole)
        self._told.start(whole)

    def input(self, layer: Layer, x: Tensor) -> None:
        """Hand on the input of a layer."""
        seen = self._gathered(layer, x)
        if seen is not None:
            self._told.input(layer, seen)

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        """The forward pass is over."""
        self._latest = None
        self._told.predicted(batch, prediction_BD)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Hand on the gradient in the output of a layer."""
        seen = self._gathered(layer, g)
        if seen is not None:
            self._told.gradient(layer, call, seen, calls)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """A backward pass is over."""
        self._latest = None
        self._told.pulled_back(batch, v_BD)

    def finish(self) -> None:
        """The batch is over."""
        self._latest = None
        self._told.finish()

    def _gathered(self, layer: Layer, z: Tensor) -> Tensor | None:
        """What all examples have there, on the process that has the layer."""
        if self._holders is None:
            return z
        holder = self._holders.of_layer.get(layer.name)
        if holder is None:
            return None
        if self._latest is None or self._latest[0] is not z or self._latest[1] != holder:
            # layers that share an input share what is computed from it
            self._latest = (z, holder, self._sent(z, holder))
        return self._latest[2]

    def _sent(self, z: Tensor, holder: int) -> Tensor | None:
        count, rank = self.processes.count, self.processes.rank
        rows = self._own * (
            len(z) // (self._own + self._rest)
        )  # an example may have several in a row
        own, rest = z[:rows].contiguous(), z[rows:]
        if rows == 0:
            return rest if rank == holder else None
        received = [torch.empty_like(own) for _ in range(count)] if rank == holder else None
        with lost_processes_named():
            dist.gather(own, received, dst=holder)
        return None if received is None else torch.cat([*received, rest])
