"""Augmented versions of training examples, one of which each draw sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.conditions import leaves, mapped, named
from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.diffusion.latents import Encoded
from curvlinops_diffusion.runtime.devices import to_device
from curvlinops_diffusion.runtime.digests import Named

#: Maps clean examples ``[B, ...]``, before any autoencoder, to their augmented version.
Augmentation = Callable[[Tensor], Tensor]


def unchanged(x0: Tensor) -> Tensor:
    """The examples as they are."""
    return x0


def flipped(x0: Tensor) -> Tensor:
    """Images ``[B, ..., H, W]`` mirrored left to right.

    Raises:
        ValueError: If an example has no height and width.
    """
    if x0.ndim < 3:
        raise ValueError(
            f"augment='flip' mirrors the last axis of images, got examples of shape "
            f"{tuple(x0.shape[1:])}. Pass a list of functions of examples [B, ...] instead."
        )
    return x0.flip(-1)


_NAMED: dict[str, tuple[Augmentation, ...]] = {"flip": (unchanged, flipped)}


@dataclass(frozen=True)
class Augmentations:
    """The versions of an example that training chose from.

    Attributes:
        functions: What makes each version of the examples, before any autoencoder.
        conditions: The entries of the condition that are transformed with the examples; ``None`` if
            nobody said, which is refused where there could be one.
    """

    functions: tuple[Augmentation, ...]
    conditions: frozenset[str] | None

    @classmethod
    def of(cls, chosen: Any, conditions: Any) -> Augmentations:
        """Check a user's ``augment`` and ``augmented_conditions``.

        Raises:
            ValueError: If they are neither known names nor sequences, of functions and of names.
        """
        if conditions is not None and isinstance(conditions, str | Mapping):
            raise ValueError(
                f"augmented_conditions={conditions!r} arrived. Pass a list of names of entries of "
                "the condition."
            )
        return cls(_functions(chosen), None if conditions is None else frozenset(conditions))

    @cached_property
    def _names(self) -> list[Named]:
        return [Named(function) for function in self.functions]

    @property
    def description(self) -> dict[str, Any]:
        """Describe them, as plain values."""
        moved = {"augmented_conditions": sorted(self.conditions)} if self.conditions else {}
        return {"augmentations": [str(name) for name in self._names], **moved}

    def versions(self, clean: CleanBatch) -> list[CleanBatch]:
        """Every version of some examples, with what is transformed beside them: the mask, always.

        Raises:
            ValueError: If an entry of the condition may have to be transformed, too, and nobody
                said; or one that is to be is none of its tensors.
        """
        if self.functions == (unchanged,):
            return [clean]
        self._check(clean)
        _ = self._names  # before they are called
        moved = self.conditions or frozenset()

        def version(augment: Augmentation) -> CleanBatch:
            condition = mapped(
                lambda name, entry: augment(entry) if name in moved else entry,
                named(clean.condition),
                clean.condition,
            )
            mask = None if clean.mask is None else augment(clean.mask)
            return replace(clean, x0=augment(clean.x0), condition=condition, mask=mask)

        return [version(augment) for augment in self.functions]

    def _check(self, clean: CleanBatch) -> None:
        tensors = {k: v for k, v in leaves(clean.condition) if isinstance(v, Tensor)}
        unknown = sorted((self.conditions or frozenset()) - tensors.keys())
        if unknown:
            raise ValueError(
                f"augmented_conditions names {unknown}, and the tensors of the condition are "
                f"{sorted(tensors)}. Name entries of the data."
            )
        images = sorted(name for name, entry in tensors.items() if _is_image(entry, clean.x0))
        if images and self.conditions is None:
            raise ValueError(
                f"Images are augmented, and the condition holds {images}, of shape "
                f"{tuple(tensors[images[0]].shape)}: images or masks themselves. Pass "
                f"augmented_conditions={images} if training transformed them with the image, [] if "
                "it did not."
            )


def _is_image(entry: Tensor, x0: Tensor) -> bool:
    """Whether an entry of the condition may lie in the plane of the image."""
    return entry.ndim >= 3 and (entry.ndim == x0.ndim or entry.shape[-2:] == x0.shape[-2:])


def _functions(chosen: Any) -> tuple[Augmentation, ...]:
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


def chosen_versions(
    versions: Sequence[Encoded], masks: Sequence[Tensor | None], version_B: Tensor
) -> tuple[Encoded, Tensor | None]:
    """For each example the version that was drawn for it, and its mask."""
    if len(versions) == 1:
        return versions[0], masks[0]

    def choose(*entries: Any) -> Any:
        if isinstance(entries[0], Tensor) and entries[0].ndim > 0:
            index = to_device(version_B, entries[0].device)
            return torch.stack(entries)[index, torch.arange(len(index), device=index.device)]
        return entries[0]

    encoded = Encoded(
        choose(*(v.mean for v in versions)),
        choose(*(v.std for v in versions)),
        mapped(choose, *(v.condition for v in versions)),
    )
    return encoded, choose(*masks)
