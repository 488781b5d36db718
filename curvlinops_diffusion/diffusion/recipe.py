"""Recipes of training besides noising: offset noise, masks, weights of examples; and all noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.latents import Packing
from curvlinops_diffusion.runtime.checks import check_non_negative
from curvlinops_diffusion.runtime.devices import pinned, prefetched, to_like
from curvlinops_diffusion.runtime.digests import digest_of

# so many entries of noise take longer than a thread takes to start
_WORTH_A_THREAD = 2**15


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
        """Check a user's choice, for so many examples."""
        offset = check_non_negative("noise_offset", noise_offset)
        perturbation = check_non_negative("input_perturbation", input_perturbation)
        if example_weights is None:
            return cls(offset, perturbation, None, loss_mask)
        weights_N = torch.as_tensor(example_weights, dtype=torch.float64, device="cpu").detach()
        if weights_N.shape != (count,) or not (weights_N.isfinite() & (weights_N >= 0)).all():
            raise ValueError(
                f"`example_weights` must be a finite number of at least 0 for each of the {count} "
                f"examples, got {_shown(weights_N)}."
            )
        return cls(offset, perturbation, weights_N, loss_mask)

    @property
    def description(self) -> dict[str, Any]:
        """The choices that were made, as plain values."""
        weights = None if self.weights_N is None else digest_of(self.weights_N)
        entries = {
            "noise_offset": self.noise_offset,
            "input_perturbation": self.input_perturbation,
            "example_weights": weights,
            "loss_mask": self.loss_mask,
        }
        return {name: value for name, value in entries.items() if value}

    def noises(
        self,
        draws: Draws,
        n_B: Sequence[int],
        shape: Sequence[int],
        of_latents: bool,
        packing: Packing | None,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield the noise of every draw of some examples, prefetched, for which a GPU would wait.

        Args:
            draws: The source of the noise.
            n_B: The examples.
            shape: That of what is noised of one of them.
            of_latents: Whether latents are drawn as well.
            packing: How what is noised was arranged; ``None`` if channels come first.
            device: The device that the noise is for.

        Yields:
            The noise of the target and of the input, ``[B, ...]``, and that of latents, if so.
        """

        def noise(r: int) -> tuple[Tensor, Tensor, Tensor | None]:
            eps, input_eps = self._noise(draws, n_B, r, shape, packing)
            of_target = pinned(eps, device)
            of_input = of_target if input_eps is eps else pinned(input_eps, device)
            latent = pinned(draws.latent_noise(n_B, r, shape), device) if of_latents else None
            return of_target, of_input, latent

        make = map if len(n_B) * prod(shape) < _WORTH_A_THREAD else prefetched
        return iter(make(noise, range(draws.num_draws)))

    def _noise(
        self, draws: Draws, n_B: Sequence[int], r: int, shape: Sequence[int], packing: Any
    ) -> tuple[Tensor, Tensor]:
        """The noise of the target and that of the input, ``[B, *shape]`` each."""
        eps = draws.noise(n_B, r, shape)
        if self.noise_offset > 0:
            offset = draws.noise_offset(n_B, r, shape if packing is None else packing.shape)
            if packing is not None:
                # entries of one channel share a number wherever they are packed to
                offset = packing.pack(offset.expand(len(n_B), *packing.shape))
            eps = eps + self.noise_offset * offset
        if self.input_perturbation == 0:
            return eps, eps
        return eps, eps + self.input_perturbation * draws.perturbation(n_B, r, shape)

    def weighted(self, weight_B: Tensor, n_B: Sequence[int]) -> Tensor:
        """The weights of the examples' losses."""
        if self.weights_N is None:
            return weight_B
        return weight_B * to_like(self.weights_N[list(n_B)], weight_B)


def _shown(weights: Tensor) -> str:
    """The shape and, if there is any, the least weight."""
    least = f" and values from {float(weights.min()):g}" if weights.numel() else ""
    return f"shape {tuple(weights.shape)}{least}"


# ---------------------------------------------------------------------------------------------
# Masks of pixels: weights of an example's entries in the loss
# ---------------------------------------------------------------------------------------------


def loss_mask(name: str, condition: Mapping[str, Any], x0: Tensor) -> Tensor:
    """The mask among the entries of a batch, with as many axes as the examples ``[B, ...]``.

    Returns:
        Weights ``[B, ...]``, float32 at least; ``[B, H, W]`` has become ``[B, 1, H, W]``.
    """
    if name not in condition:
        raise ValueError(
            f"`loss_mask` must name the entry that holds the weights of pixels, one of "
            f"{sorted(condition)}, got '{name}'."
        )
    mask = condition[name]
    fits = isinstance(mask, Tensor) and x0.ndim - 1 <= mask.ndim <= x0.ndim
    if not fits or mask.is_complex():
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"The loss mask '{name}' must hold weights [B, height, width] or [B, channels or 1, "
            f"height, width] beside examples of shape {tuple(x0.shape)}, got {found}."
        )
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
    if not (mask.isfinite() & (mask >= 0)).all():
        raise ValueError(
            f"The loss mask '{name}' must be finite and at least 0, got {_shown(mask)}."
        )
    return mask.unsqueeze(1) if mask.ndim < x0.ndim else mask


def entry_weights(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask as weights of the entries that the network predicts, ``[B, *shape]``.

    Where these are latents of another height and width, weights are averages over the pixels of
    each (``area``, as by the training scripts that have masks).
    """
    if len(shape) == 3 and mask.ndim == 4 and mask.shape[2:] != tuple(shape[1:]):
        mask = interpolate(mask, tuple(shape[1:]), mode="area")
    try:
        return mask.expand(len(mask), *shape)
    except RuntimeError as error:
        raise ValueError(
            f"The loss mask must have the shape of what the network predicts, {tuple(shape)}, got "
            f"{tuple(mask.shape[1:])}."
        ) from error
