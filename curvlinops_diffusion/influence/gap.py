"""The generalisation gap: by how much the loss of held-out images exceeds that of training images.

Legend: N training images, H held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.runtime.adapters import without_adapters
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, computed_once

_KINDS = ("train", "held_out")


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

    @property
    def is_told(self) -> bool:
        """Whether it is positive by at least two standard errors."""
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
        passes: Checkpoints and processes.

    Raises:
        ValueError: If there are fewer than two images of either kind.
    """
    of = (J_train, J_held_out)
    if min(J.shape[0] for J in of) < 2:
        raise ValueError(
            f"A generalisation gap needs at least two images of either kind, got {of[0].shape[0]} "
            f"training images and {of[1].shape[0]} held-out ones. Pass more, a hundred say."
        )

    def compute() -> dict[str, Tensor]:
        losses = [J.values().double().cpu() for J in of]
        with without_adapters(J_train.regression.objective.model) as there_are:
            if there_are:
                losses = _less_difficulty(losses, [J.values().double().cpu() for J in of])
        return dict(zip(_KINDS, losses, strict=True))

    settings = {"held_out": J_held_out.regression.identity({})} if passes.checkpoint else {}
    found = computed_once("Gap", J_train.regression, compute, passes, settings)
    train_N, held_out_H = losses = [found[kind] for kind in _KINDS]
    error = sum(z.var() / len(z) for z in losses) ** 0.5
    return GeneralisationGap(
        float(held_out_H.mean() - train_N.mean()), float(error), len(held_out_H)
    )


def _less_difficulty(losses: list[Tensor], base: list[Tensor]) -> list[Tensor]:
    """Losses less what those of the base network predict within either kind of images."""
    y, x = (torch.cat([z - z.mean() for z in some]) for some in (losses, base))
    spread = float(x @ x)
    beta = float(x @ y) / spread if spread > 0 else 0.0
    return [own - beta * other for own, other in zip(losses, base, strict=True)]
