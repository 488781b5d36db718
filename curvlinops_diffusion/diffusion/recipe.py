"""What training did besides noising: offset noise, perturbed inputs, weights of examples, masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.latents import Packing
from curvlinops_diffusion.runtime.checks import check_non_negative
from curvlinops_diffusion.runtime.devices import to_like
from curvlinops_diffusion.runtime.digests import digest_of


@dataclass(frozen=True)
class Recipe:
    """The recipe of training.

    Attributes:
        noise_offset: The strength ``s`` of offset noise, ``eps + s o`` with one ``o ~ N(0, 1)`` for
            each channel of the latents, as they are before they are packed into tokens.
        input_perturbation: The strength ``γ`` of what is added to the noise of the input alone,
            ``eps + γ eps'``.
        weights_N: A factor of each example's loss, float64; ``None`` for one.
        loss_mask: The name of the data's entry that weights pixels; ``None`` for none.
    """

    noise_offset: float
    input_perturbation: float
    weights_N: Tensor | None
    loss_mask: str | None

    @classmethod
    def of(
        cls,
        noise_offset: float,
        input_perturbation: float,
        example_weights: Any,
        loss_mask: str | None,
        count: int,
    ) -> Recipe:
        """Check a user's choice, for so many examples.

        Raises:
            ValueError: If a strength is negative, or the weights are not a number of at least zero
                for each example.
        """
        offset = check_non_negative("noise_offset", noise_offset)
        perturbation = check_non_negative("input_perturbation", input_perturbation)
        if example_weights is None:
            return cls(offset, perturbation, None, loss_mask)
        weights_N = torch.as_tensor(example_weights, dtype=torch.float64, device="cpu").detach()
        if weights_N.shape != (count,) or not (weights_N.isfinite() & (weights_N >= 0)).all():
            raise ValueError(
                f"example_weights arrived with shape {tuple(weights_N.shape)}. Pass a finite "
                f"number of at least 0 for each of the {count} examples."
            )
        return cls(offset, perturbation, weights_N, loss_mask)

    @property
    def description(self) -> dict[str, Any]:
        """Describe what there is of it, as plain values."""
        weights = None if self.weights_N is None else digest_of(self.weights_N)
        entries = {
            "noise_offset": self.noise_offset,
            "input_perturbation": self.input_perturbation,
            "example_weights": weights,
            "loss_mask": self.loss_mask,
        }
        return {name: value for name, value in entries.items() if value}

    def noise(
        self,
        draws: Draws,
        n_B: Sequence[int],
        r: int,
        shape: Sequence[int],
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The noise of the target and that of the input, ``[B, *shape]`` each.

        Args:
            draws: The draws.
            n_B: The examples.
            r: The number of the draw.
            shape: The shape of what is noised of one of them.
            packing: How it was arranged; ``None`` if channels come first.
        """
        eps = draws.noise(n_B, r, shape)
        if self.noise_offset > 0 and packing is None:
            eps = eps + self.noise_offset * draws.noise_offset(n_B, r, shape)
        elif self.noise_offset > 0:
            assert packing is not None
            # entries of one channel share a number wherever they are packed to
            offset = draws.noise_offset(n_B, r, packing.shape)
            offset = packing.pack(offset.expand(len(n_B), *packing.shape))
            eps = eps + self.noise_offset * offset
        if self.input_perturbation == 0:
            return eps, eps
        return eps, eps + self.input_perturbation * draws.perturbation(n_B, r, shape)

    def weighted(self, weight_B: Tensor, n_B: Sequence[int]) -> Tensor:
        """The weights of the examples' losses."""
        return (
            weight_B
            if self.weights_N is None
            else weight_B * to_like(self.weights_N[list(n_B)], weight_B)
        )
