"""Recipes of training besides noising: augmentation, offset noise, masks, weights of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from curvlinops_diffusion.diffusion.batch import CleanBatch, leaves, mapped, named
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.latents import Encoded, Packing
from curvlinops_diffusion.runtime.checks import check_non_negative
from curvlinops_diffusion.runtime.devices import to_device, to_like
from curvlinops_diffusion.runtime.digests import Named, digest_of


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

    def noise(
        self,
        draws: Draws,
        n_B: Sequence[int],
        r: int,
        shape: Sequence[int],
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The noise of the target and that of the input, ``[B, *shape]`` each.

        ``packing`` is how latents were arranged; ``None`` if channels come first.
        """
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


# ---------------------------------------------------------------------------------------------
# Augmented versions of training examples, one of which each draw sees
# ---------------------------------------------------------------------------------------------

#: Maps clean examples ``[B, ...]``, before any autoencoder, to their augmented version.
Augmentation = Callable[[Tensor], Tensor]


def unchanged(x0: Tensor) -> Tensor:
    """The examples as they are."""
    return x0


def flipped(x0: Tensor) -> Tensor:
    """Images ``[B, ..., H, W]`` mirrored left to right."""
    if x0.ndim < 3:
        raise ValueError(
            f"augment='flip' mirrors the last axis of images, got examples of shape "
            f"{tuple(x0.shape[1:])}. Pass a list of functions of examples [B, ...] instead."
        )
    return x0.flip(-1)


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
        """Check a user's ``augment`` and ``augmented_conditions``."""
        if isinstance(conditions, str | Mapping):
            raise ValueError(
                "`augmented_conditions` must be a list of names of entries of the condition, got "
                f"{conditions!r}."
            )
        functions: tuple[Augmentation, ...]
        if isinstance(chosen, str):
            functions = (unchanged, flipped) if chosen == "flip" else ()
        elif chosen is None:
            functions = (unchanged,)
        else:
            functions = tuple(chosen) if isinstance(chosen, Sequence) else ()
        if not functions or not all(callable(function) for function in functions):
            raise ValueError(
                "`augment` must be None, 'flip' (each draw sees the image or its mirror image), or "
                f"a list of functions of clean examples [B, ...] to draw from, got {chosen!r}."
            )
        return cls(functions, None if conditions is None else frozenset(conditions))

    @cached_property
    def _names(self) -> list[Named]:
        return [Named(function) for function in self.functions]

    @property
    def description(self) -> dict[str, Any]:
        """The augmentations, as plain values."""
        moved = {"augmented_conditions": sorted(self.conditions)} if self.conditions else {}
        return {"augmentations": [str(name) for name in self._names], **moved}

    def versions(self, clean: CleanBatch) -> list[CleanBatch]:
        """Every version of some examples, with their mask and the entries that are named."""
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
        x0 = clean.x0
        tensors = {k: z for k, z in leaves(clean.condition) if isinstance(z, Tensor)}
        unknown = sorted((self.conditions or frozenset()) - tensors.keys())
        if unknown:
            raise ValueError(
                f"`augmented_conditions` must name tensors of the condition, which are "
                f"{sorted(tensors)}, got {unknown}."
            )
        images = sorted(  # what may lie in the plane of the image
            name
            for name, z in tensors.items()
            if z.ndim >= 3 and (z.ndim == x0.ndim or z.shape[-2:] == x0.shape[-2:])
        )
        if images and self.conditions is None:
            raise ValueError(
                f"Images are augmented, and the condition holds {images}, of shape "
                f"{tuple(tensors[images[0]].shape)}: images or masks themselves. Pass "
                f"augmented_conditions={images} if training transformed them with the image, [] if "
                "it did not."
            )


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
