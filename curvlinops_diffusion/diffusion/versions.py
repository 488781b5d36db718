"""Versions of training examples, of which each draw sees one: augmented, cut, captions varied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import CleanBatch, leaves, mapped, named
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.diffusion.latents import Encoded
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.runtime.checks import check_non_negative
from curvlinops_diffusion.runtime.devices import to_device
from curvlinops_diffusion.runtime.digests import Named, digest_of

#: Cuts examples out anew, given their numbers, relative places, and whether each is mirrored then.
Cut = Callable[[Sequence[int], Sequence[tuple[float, float]], Sequence[bool]], CleanBatch]
#: Tags that stay at the beginning and at the end of a caption; ``None`` if all stay as they are.
Kept = tuple[int, int] | None

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


@dataclass(frozen=True)
class Captions:
    """Variation of captions in training, of tags with commas between.

    Attributes:
        shuffle: Whether tags came in random order.
        dropout: The probability with which each tag was left out.
        kept: The tags of each example that were neither moved nor left out; one for all alike.
    """

    shuffle: bool
    dropout: float
    kept: Kept | list[Kept]

    @classmethod
    def of(cls, shuffle: bool, keep_tokens: Any, dropout: float, count: int) -> Captions | None:
        """Check a user's choice, for so many examples; ``None`` for captions as they are."""
        probability = check_non_negative("tag_dropout", dropout)
        if probability > 1:
            raise ValueError(f"`tag_dropout` must be a probability, got {dropout}.")
        several = isinstance(keep_tokens, Sequence)
        kept = [_kept(each) for each in (keep_tokens if several else [keep_tokens])]
        if several and len(kept) != count:
            raise ValueError(
                f"`keep_tokens` must be a number, or one for each of the {count} examples, got "
                f"{len(kept)}."
            )
        if not shuffle and probability == 0:
            return None
        return cls(bool(shuffle), probability, kept if several else kept[0])

    @property
    def description(self) -> dict[str, Any]:
        """The choices that were made, as plain values."""
        kept = digest_of(repr(self.kept)) if isinstance(self.kept, list) else self.kept
        return {"shuffle_captions": self.shuffle, "tag_dropout": self.dropout, "keep_tokens": kept}

    def varied(
        self, captions: Sequence[str], draws: Draws, n_B: Sequence[int], r: int
    ) -> list[str]:
        """The captions of some examples in one of their draws."""
        return [
            self._varied(
                caption, self.kept[n] if isinstance(self.kept, list) else self.kept, random
            )
            for caption, n, random in zip(captions, n_B, draws.captions(n_B, r), strict=True)
        ]

    def _varied(self, caption: str, kept: Kept, random: Any) -> str:
        if kept is None:
            return caption
        tags = [tag.strip() for tag in caption.split(",")]
        first = min(kept[0], len(tags))
        last = max(len(tags) - kept[1], first)
        moved = tags[first:last]
        if self.shuffle:
            moved = [moved[i] for i in random.permutation(len(moved))]
        if self.dropout > 0:
            left = random.random(len(moved)) >= self.dropout
            moved = [tag for tag, stays in zip(moved, left, strict=True) if stays]
        return ", ".join([*tags[:first], *moved, *tags[last:]])


def _kept(value: Any) -> Kept:
    """Check how many tags stay at the beginning, or at both ends."""
    ends = value if isinstance(value, tuple) else (value, 0)
    whole = [type(end) is int and end >= 0 for end in ends]
    if value is None or (len(ends) == 2 and all(whole)):
        return None if value is None else ends
    raise ValueError(
        f"`keep_tokens` must be a whole number of at least 0 (for each example, if they differ: "
        f"that, a pair for both ends, or None to leave the caption as it is), got {value!r}."
    )


class SeenByDraws:
    """The examples of a batch as each of their draws sees them, in the network's terms.

    Of augmentations, which are few, every version is encoded once. What has as many versions as
    there are draws (captions, crops) is encoded for each draw that sees another.
    """

    def __init__(
        self,
        objective: DenoisingObjective,
        draws: Draws,
        clean: CleanBatch,
        augmentations: Augmentations,
        captions: Captions | None,
        cut: Cut | None,
    ):
        self._objective = objective
        self._draws = draws
        self._n_B = clean.indices
        self._augmentations = augmentations
        self._captions = captions
        self._cut = cut
        self._prompts = clean.condition.get("prompt")
        if captions is not None and not isinstance(self._prompts, list):
            raise ValueError(
                "Captions can be varied where they stand beside the images as 'prompt', got "
                f"{sorted(clean.condition)}. Leave `shuffle_captions` and `tag_dropout` out."
            )
        self._versions = augmentations.versions(clean) if cut is None else []
        self._latest: Any = None
        self._seen: tuple[Encoded, Tensor | None]

    @cached_property
    def _encoded(self) -> list[tuple[Encoded, Tensor | None]]:
        """Every version with the captions as they are, and its mask."""
        encode, encode_mask = self._objective.encode, self._objective.encode_mask
        return [(encode(version), encode_mask(version)) for version in self._versions]

    def __call__(self, r: int) -> tuple[Encoded, Tensor | None]:
        """The examples, and their mask if there is one, in draw ``r``."""
        draws, n_B, functions = self._draws, self._n_B, self._augmentations.functions
        version_B = draws.versions(n_B, r, len(functions))
        places = None if self._cut is None else draws.places(n_B, r)
        prompts = self._prompts
        if self._captions is not None:
            prompts = self._captions.varied(prompts or [], draws, n_B, r)
        asked = (version_B.tolist(), places, prompts)
        if asked != self._latest:  # draws of a pair see the same
            self._latest, self._seen = asked, self._encode(version_B, places, prompts)
        return self._seen

    def _encode(
        self, version_B: Tensor, places: Any, prompts: list[str] | None
    ) -> tuple[Encoded, Tensor | None]:
        if self._cut is None:
            images, mask = _chosen(version_B, *self._encoded)
            if prompts == self._prompts:
                return images, mask
            clean, latents = _chosen(version_B, *self._versions), images
        else:
            functions = self._augmentations.functions
            mirrored = [functions[v] is flipped for v in version_B.tolist()]
            cut = self._cut(self._n_B, places, mirrored)
            clean, latents = _chosen(version_B, *self._augmentations.versions(cut)), None
            mask = self._objective.encode_mask(clean)
        if prompts is not None:
            clean = replace(clean, condition={**clean.condition, "prompt": prompts})
        return self._objective.encode_drawn(clean, latents), mask


def _chosen(version_B: Tensor, *versions: Any) -> Any:
    """For each example the version that was drawn for it, of all entries."""
    first = versions[0]
    if len(versions) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(_chosen(version_B, *of) for of in zip(*versions, strict=True))
    if isinstance(first, Encoded | CleanBatch):
        own = {f.name for f in fields(first)} - {"indices"}
        return replace(
            first, **{k: _chosen(version_B, *(getattr(v, k) for v in versions)) for k in own}
        )
    if isinstance(first, Mapping):
        return {key: _chosen(version_B, *(v[key] for v in versions)) for key in first}
    if isinstance(first, Tensor) and first.ndim > 0:
        index = to_device(version_B, first.device)
        return torch.stack(versions)[index, torch.arange(len(index), device=index.device)]
    return first
