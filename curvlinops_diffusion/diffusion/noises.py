"""What draws are noised by, made before it is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.latents import Packing
from curvlinops_diffusion.diffusion.recipe import Recipe
from curvlinops_diffusion.runtime.ahead import Foreseen, one_ahead
from curvlinops_diffusion.runtime.transfers import ready_to_send

#: The noise of the target and of the input, ``[B, ...]``, and what latents are drawn by, if so.
Noise = tuple[Tensor, Tensor, Tensor | None]
# examples, draw, shape of one of them, whether latents are drawn, and how they are packed
_Key = tuple[tuple[int, ...], int, tuple[int, ...], bool, Packing | None]

# so many entries of noise take longer than a thread takes to start
_WORTH_A_THREAD = 2**15


class Noises:
    """The noise of draws, which a GPU would wait for if it were made when it is wanted.

    The next draw's is made ahead, and with the last one the first of the examples that follow as
    these did the ones before.

    Args:
        draws: Its source.
        recipe: Offset noise and perturbed inputs.
        num_data: The number of examples.
        device: Where it is wanted.
    """

    def __init__(self, draws: Draws, recipe: Recipe, num_data: int, device: torch.device):
        self._device = device
        self._draws = draws
        self._recipe = recipe
        self._num_data = num_data
        self._latest: Sequence[int] = ()
        self._foreseen = Foreseen(self._drawn)

    def of(
        self,
        indices: Sequence[int],
        shape: Sequence[int],
        of_latents: bool,
        packing: Packing | None = None,
    ) -> Iterator[Noise]:
        """Yield the noise of every draw of some examples.

        Args:
            indices: The examples.
            shape: That of what is noised of one of them.
            of_latents: Whether latents are drawn as well.
            packing: How it was arranged; ``None`` if channels come first.
        """
        draws = range(self._draws.num_draws)
        keys = [(tuple(indices), r, tuple(shape), of_latents, packing) for r in draws]
        if len(indices) * prod(shape) < _WORTH_A_THREAD:
            yield from map(self._drawn, keys)
            return
        step = indices[0] - self._latest[0] if self._latest else 0
        step = step if step > 0 else len(indices)  # a pass begins
        self._latest = indices
        following = tuple(n + step for n in indices if n + step < self._num_data)
        for key, noise in zip(keys, one_ahead(self._foreseen, keys), strict=True):
            if key is keys[-1] and following:
                self._foreseen.expect((following, 0, *key[2:]))
            yield noise

    def _drawn(self, key: _Key) -> Noise:
        indices, r, shape, of_latents, packing = key
        eps, input_eps = self._recipe.noise(self._draws, indices, r, shape, packing)
        latent = self._draws.latent_noise(indices, r, shape) if of_latents else None
        ready = ready_to_send(eps, self._device)
        of_input = ready if input_eps is eps else ready_to_send(input_eps, self._device)
        return ready, of_input, None if latent is None else ready_to_send(latent, self._device)
