"""Augmented versions of training examples, one of which each draw sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.conditions import mapped
from curvlinops_diffusion.diffusion.latents import Encoded

#: Maps clean examples ``[B, ...]``, before any autoencoder, to their augmented version.
Augmentation = Callable[[Tensor], Tensor]


def unchanged(x0: Tensor) -> Tensor:
    """The examples as they are."""
    return x0


def flipped(x0: Tensor) -> Tensor:
    """Images mirrored left to right."""
    return x0.flip(-1)


_NAMED: dict[str, tuple[Augmentation, ...]] = {"flip": (unchanged, flipped)}


def augmentations(chosen: Any) -> tuple[Augmentation, ...]:
    """The versions that a user's ``augment`` argument names.

    Raises:
        ValueError: If it is neither a known name nor a sequence of functions.
    """
    if chosen is None:
        return (unchanged,)
    if isinstance(chosen, str) and chosen in _NAMED:
        return _NAMED[chosen]
    functions = isinstance(chosen, Sequence) and not isinstance(chosen, str)
    if not functions or not chosen or not all(callable(f) for f in chosen):
        raise ValueError(
            f"augment={chosen!r} arrived. Pass None, 'flip' (each draw sees the image or its "
            "mirror image), or a list of functions of clean examples [B, ...] to draw from."
        )
    return tuple(chosen)


def chosen_versions(versions: Sequence[Encoded], version_B: Tensor) -> Encoded:
    """For each example the version that was drawn for it."""
    if len(versions) == 1:
        return versions[0]

    def choose(*entries: Any) -> Any:
        if isinstance(entries[0], Tensor) and entries[0].ndim > 0:
            index = version_B.to(entries[0].device)
            return torch.stack(entries)[index, torch.arange(len(index), device=index.device)]
        return entries[0]

    return Encoded(
        choose(*(v.mean for v in versions)),
        choose(*(v.std for v in versions)),
        mapped(choose, *(v.condition for v in versions)),
    )
