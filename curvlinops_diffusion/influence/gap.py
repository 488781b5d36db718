"""The generalisation gap: by how much the loss of held-out images exceeds that of training images.

Legend: N training images, H held-out images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from curvlinops_diffusion.influence.consumers import AllRows
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.score_files import HALVED
from curvlinops_diffusion.influence.streaming import of_gradients
from curvlinops_diffusion.runtime.adapters import adapted_modules, without_adapters
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, run_pass


@dataclass(frozen=True)
class GeneralisationGap:
    """The mean loss of held-out images less that of training images.

    Attributes:
        value: The gap, in the loss' unit.
        error: Its standard error, over images.
        num_held_out: The number ``H`` of held-out images.
    """

    value: float
    error: float
    num_held_out: int

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Self | None:
        """Read the gap from the header of scores; ``None`` if there were no held-out images."""
        return cls(**header["gap"]) if "gap" in header else None

    @property
    def is_told(self) -> bool:
        """Tell if the gap is positive by at least two standard errors."""
        return self.value > 2 * self.error

    def __str__(self) -> str:
        """Name the gap with its uncertainty."""
        return f"{self.value:.2g} ± {self.error:.1g}, from {self.num_held_out} held-out images"


def generalisation_gap(
    J_train: ExampleGradientLinearOperator,
    J_held_out: ExampleGradientLinearOperator,
    passes: PassOptions = PLAIN,
) -> GeneralisationGap:
    r"""Estimate the generalisation gap of a network.

    Of a network with adapters, the loss ``b`` of the base network, which has seen neither, says how
    hard an image is; it is a control variate, with the coefficient ``β`` of the pooled regression::

        gap = (ℓ̄_H − ℓ̄_N) − β (b̄_H − b̄_N)

    Source: Owen, *Monte Carlo theory, methods and examples*, 2013, Section 8.9 (control variates).

    Args:
        J_train: Losses of the training images, without augmentation.
        J_held_out: Those of images like them that no training has seen, of as many draws.
        passes: Checkpoints, processes and progress.

    Raises:
        ValueError: If there are fewer than two images of either kind.
    """
    kinds = {"training images": J_train, "held-out images": J_held_out}
    N, H = (J.shape[0] for J in kinds.values())
    if min(N, H) < 2:
        raise ValueError(
            f"A generalisation gap needs at least two images of either kind, got {N} training "
            f"images and {H} held-out ones. Pass more, a hundred say."
        )

    losses = [_losses(J, kind, passes) for kind, J in kinds.items()]
    model = J_train.regression.objective.model
    if adapted_modules(model):
        with without_adapters(model):
            base = [_losses(J, f"{kind} by the base network", passes) for kind, J in kinds.items()]
        y, x = (torch.cat([z - z.mean() for z in some]) for some in (losses, base))
        spread = float(x @ x)
        beta = float(x @ y) / spread if spread > 0 else 0.0
        losses = [own - beta * other for own, other in zip(losses, base, strict=True)]
    train_N, held_out_H = losses
    error = sum(z.var() / len(z) for z in losses) ** 0.5
    return GeneralisationGap(float(held_out_H.mean() - train_N.mean()), float(error), H)


def _losses(J: ExampleGradientLinearOperator, of: str, passes: PassOptions) -> Tensor:
    """Losses of images, one by one, in float64 on the CPU."""
    found = AllRows(J.shape[0])
    run_pass(
        f"Losses of {of}",
        J.regression,
        found,
        lambda values: found.add(*values),
        passes,
        of_gradients(J),
        lambda clean: (clean.indices, J.values_of(clean).unsqueeze(1)),
    )
    return found.tensors()[HALVED[0]].squeeze(1).cpu().double()
