"""Networks that take lists of images and embeddings, or answer with another sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AdaptedDenoiser(nn.Module):
    """A network of a pipeline that speaks for it, called like any other.

    Its parameters are called ``transformer.…``.

    Args:
        transformer: The network.
        names: What it calls images and times.
        listed: Whether it takes a list of images ``[C, 1, H, W]``, and returns one.
        ragged: The entries of the condition that it takes as lists of tensors ``[L_b, E]``. They
            arrive here padded, ``[B, L, E]``, beside their lengths.
        sign: What its answer is multiplied by.
    """

    def __init__(
        self,
        transformer: nn.Module,
        names: tuple[str, str],
        listed: bool,
        ragged: Sequence[str],
        sign: int,
    ):
        super().__init__()
        self.transformer = transformer
        self._names = names
        self._listed = listed
        self._ragged = list(ragged)
        self._sign = sign

    @property
    def config(self) -> Any:
        """The network's."""
        return self.transformer.config

    def forward(self, sample: Tensor, timestep: Tensor, **entries: Any) -> tuple[Tensor]:
        """Denoise a batch of images."""
        for name in self._ragged:
            rows = zip(entries[name], entries.pop(length_of(name)).tolist(), strict=True)
            entries[name] = [row[:length] for row, length in rows]
        image, time = self._names
        images = list(sample.unsqueeze(2)) if self._listed else sample
        answer = self.transformer(**{image: images, time: timestep}, **entries, return_dict=False)
        prediction: Tensor = torch.stack(answer[0]).squeeze(2) if self._listed else answer[0]
        return (self._sign * prediction,)


def length_of(entry: str) -> str:
    """The entry of a condition with the lengths of a padded one."""
    return f"{entry}_length"
