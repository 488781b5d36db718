"""A random sample of a layer's positions in place of all of them.

The positions of one image are alike, so that a few of them tell nearly as much of a second moment
as all do, in a fraction of the time where there are many. With ``m`` of ``S`` positions, each drawn
``m/S`` times on average, ``S/m Σ`` over the sample is an unbiased estimate of the sum over all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.layers.observation import Observer


class PositionSamples(Observer):
    """The positions that are looked at: a function of seed, example and draw.

    Layers with equally many positions share them.

    Args:
        draws: Draws them.
        most: How many there are at most; ``None`` for all.
        device: Of the network.
    """

    def __init__(self, draws: Draws, most: int | None, device: torch.device):
        self._draws = draws
        self._most = most
        self._device = device
        self._batch: NoisedBatch | None = None
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def start(self, batch: NoisedBatch) -> None:
        """Another draw."""
        self._batch, self._drawn = batch, {}

    def of(self, rows: int, positions: int) -> Tensor | None:
        """Those of a layer.

        Args:
            rows: Entries of the first axis of what it sees: equally many for each example.
            positions: The number ``S`` of positions of each of them.

        Returns:
            Their numbers, ``[rows, m]``; ``None`` if all are to be looked at.
        """
        if self._most is None or positions <= self._most:
            return None
        key = rows, positions
        if key not in self._drawn:
            assert self._batch is not None, "a batch starts first"
            examples, draw = self._batch.indices, self._batch.common_draw
            index = self._draws.positions(examples, draw, self._most, positions)
            index = index.repeat_interleave(rows // len(examples), 0)
            self._drawn[key] = index.to(self._device, non_blocking=True)
        return self._drawn[key]

    def finish(self) -> None:
        """Forget them."""
        self._batch, self._drawn = None, {}
