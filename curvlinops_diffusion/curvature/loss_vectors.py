"""The vectors that are pulled back through the network, by kind of Fisher."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor

from curvlinops_diffusion.curvature.options import FisherType, KFACOptions
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.checks import check_prediction
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.devices import DeviceFlag, to_like


def loss_vectors(
    batch: NoisedBatch, prediction_BD: Tensor, draws: Draws, options: KFACOptions
) -> Iterator[Tensor]:
    """Yield loss vectors ``v`` with ``E[Σ v vᵀ]`` the curvature of each example's loss.

    For the GGN of the model that is ``2 w_t r I``; for the GGN of the loss the outer product of
    the loss' gradient in the prediction.

    Args:
        batch: The noised batch.
        prediction_BD: The network's output on it.
        draws: The source of random loss vectors.
        options: Which curvature.

    Yields:
        Loss vectors for all examples, shape ``[B, D]``.
    """
    prediction_BD = prediction_BD.detach()
    match options.fisher_type:
        case FisherType.MC:
            for k in range(options.mc_samples):
                probe_BD = draws.probe(
                    batch.indices, batch.common_draw, k, prediction_BD.shape[1], options.probe_type
                )
                probe_BD = to_like(probe_BD, prediction_BD)
                yield batch.loss_hessian_root(probe_BD) / sqrt(options.mc_samples)
        case FisherType.TYPE2:
            for d in range(prediction_BD.shape[1]):
                unit_BD = torch.zeros_like(prediction_BD)
                unit_BD[:, d] = 1
                yield batch.loss_hessian_root(unit_BD)
        case FisherType.EMPIRICAL:
            yield batch.loss_gradient(prediction_BD)
        case FisherType.FORWARD_ONLY:
            return


def num_loss_vectors(options: KFACOptions, output_size: int) -> int:
    """Count what :func:`loss_vectors` yields for a prediction ``[B, output_size]``."""
    return {
        FisherType.MC: options.mc_samples,
        FisherType.TYPE2: output_size,
        FisherType.EMPIRICAL: 1,
        FisherType.FORWARD_ONLY: 0,
    }[options.fisher_type]


class CheckedLossVectors:
    """Loss vectors of a batch that is run forward and backward, whose predictions are finite.

    Whether a batch's predictions are is looked at when the next batch comes, or by :meth:`settle`,
    so that a GPU need not be waited for in between. Until then sums may hold what is not finite.

    Args:
        regression: The source of random loss vectors, and of examples' names.
        options: Which curvature.
    """

    def __init__(self, regression: NoisedRegression, options: KFACOptions):
        self._regression = regression
        self._options = options
        self._open: tuple[NoisedBatch, Tensor, DeviceFlag] | None = None

    def __call__(self, batch: NoisedBatch, prediction_BD: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Yield the loss vectors of a batch, each with whether more will follow."""
        self.settle()
        # a fraction of the price of looking at every entry
        finite = DeviceFlag(prediction_BD.sum().isfinite())
        self._open = batch, prediction_BD, finite
        total = num_loss_vectors(self._options, prediction_BD.shape[1])
        found = loss_vectors(batch, prediction_BD, self._regression.draws, self._options)
        for number, v_BD in enumerate(found, start=1):
            yield v_BD, number < total

    def settle(self) -> None:
        """Look at the latest batch.

        Raises:
            ValueError: If a prediction is not finite, naming its example and level.
        """
        latest, self._open = self._open, None
        if latest is None:
            return
        batch, prediction_BD, finite = latest
        if not finite:
            names = map(self._regression.name_of, batch.indices)
            check_prediction(prediction_BD, names, batch.level_B)
