"""Prefetched noise of draws, which a GPU would otherwise wait for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.latents import Packing
from curvlinops_diffusion.diffusion.recipe import Recipe
from curvlinops_diffusion.runtime.devices import pinned, prefetched

# so many entries of noise take longer than a thread takes to start
_WORTH_A_THREAD = 2**15


def noises(
    draws: Draws,
    recipe: Recipe,
    indices: Sequence[int],
    shape: Sequence[int],
    of_latents: bool,
    packing: Packing | None,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the noise of every draw of some examples, that of the next draw prefetched.

    Args:
        draws: The source of the noise.
        recipe: Offset noise and perturbed inputs.
        indices: The examples.
        shape: That of what is noised of one of them.
        of_latents: Whether latents are drawn as well.
        packing: How what is noised was arranged; ``None`` if channels come first.
        device: The device that the noise is for.

    Yields:
        The noise of the target and of the input, ``[B, ...]``, and that of latents, if so.
    """

    def noise(r: int) -> tuple[Tensor, Tensor, Tensor | None]:
        eps, input_eps = recipe.noise(draws, indices, r, shape, packing)
        latent = draws.latent_noise(indices, r, shape) if of_latents else None
        of_target = pinned(eps, device)
        of_input = of_target if input_eps is eps else pinned(input_eps, device)
        return of_target, of_input, None if latent is None else pinned(latent, device)

    make = map if len(indices) * prod(shape) < _WORTH_A_THREAD else prefetched
    return iter(make(noise, range(draws.num_draws)))
