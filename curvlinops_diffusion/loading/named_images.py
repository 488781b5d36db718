"""Images with names, labels and prompts, as data for ``NoisedRegression``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import nextafter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from curvlinops_diffusion.loading.labels import Classes, Conditions
from curvlinops_diffusion.loading.preprocessing import Form, Loaded, Place
from curvlinops_diffusion.loading.sizes import Size
from curvlinops_diffusion.runtime.digests import digest_of


@dataclass(eq=False, repr=False)
class NamedImages(Dataset[dict[str, Any]]):
    """Images with names, and labels or prompts if there are any.

    Attributes:
        names: A name for each image.
        load: Loads an image, cut at a place, with its size before resizing.
        source_digest: Computes the digest of an image as it is stored.
        form: The form in which the network takes images.
        size: The size of an image, without reading pixels.
        conditions: Further entries of each item: ``'class_labels'`` or ``'prompt'``, and noted
            sizes.
        beside: Images that an item has beside its image: for each entry, its channels and either
            their files or functions that load them.
        classes: The classes that the labels are numbers of, where these have names.
        paths: The images' files, where they are files.
        columns: What else stands beside the images, by the names of columns: an artist, say.
        left_out: Files beside the images that were not read.
        unread: Columns or arrays beside the images that are not read.
        notes: Other remarks, each a clause.
        captions_beside: Files that may hold an image's caption and were not read, by its name.
        example_weights: How much more often than others training saw each image, on average 1;
            ``None`` if all alike.
        keep_tokens: The tags at both ends of each caption that training left where they were, where
            these differ or the data say so; ``None`` inside for all.
        regularises: Whether each image is there to preserve a prior.
        tells_sizes: Whether an item has the size of the original image, and the top left corner
            of what was cut out of it, as Stable Diffusion XL takes them.
        digests: A digest of each item, from when it was read first; ``None`` until then.
    """

    names: list[str]
    load: Callable[[int, Place], Loaded]
    source_digest: Callable[[int], str]
    form: Form
    size: Callable[[int], Size]
    conditions: Conditions = field(default_factory=dict)
    classes: Classes | None = None
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beside: dict[str, tuple[int, list[Any]]] = field(default_factory=dict)
    paths: list[str] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    captions_beside: dict[str, str] = field(default_factory=dict)
    example_weights: list[float] | None = None
    keep_tokens: list[tuple[int, int] | None] | None = None
    regularises: list[bool] | None = None
    tells_sizes: bool = False
    _first: tuple[str, torch.Size] | None = None

    def __post_init__(self) -> None:
        self.digests: list[str | None] = [None] * len(self)
        self._source_digests: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def shapes(self) -> list[Size] | None:
        """Height and width of each item, where there are aspect buckets; ``None`` if all share one.

        Batches are of items of one shape.
        """
        if not self.form.buckets:
            return None
        sizes = zip(self.names, map(self.size, range(len(self))), strict=True)
        return [self.form.placed(name, size)[1] for name, size in sizes]

    def __getitem__(self, n: int) -> dict[str, Any]:
        item = self.cropped(n)
        if self.digests[n] is None:
            self.digests[n] = digest_of(item)
        return item

    def cropped(self, n: int, place: Place = None, mirrored: bool = False) -> dict[str, Any]:
        """The item of an image of which another part is cut out.

        If it will be mirrored left to right, its corner is that of the mirror image, as training
        scripts have it.
        """
        x0, (height, width) = self.load(n, place)
        if self._first is None:
            self._first = (self.names[n], x0.shape)
        name, shape = self._first
        if x0.shape != shape and not self.form.buckets:
            raise ValueError(
                f"The image '{self.names[n]}' has shape {tuple(x0.shape)}, and '{name}' has "
                f"{tuple(shape)}. All must have one size. {self.form.proposal()} With --buckets, "
                "too, if training had aspect buckets."
            )
        item: dict[str, Any] = {"x0": x0}
        for key, (channels, sources) in self.beside.items():
            form = replace(self.form, channels=channels)
            beside, _ = form.load(
                sources[n], f"{key} of {self.names[n]}", place, of=(height, width)
            )
            item[key] = (beside + 1) / 2
        if self.tells_sizes:
            item["original_size"] = torch.tensor(self.form.told_size((height, width)))
            if mirrored and place is not None:
                place = (place[0], nextafter(1 - place[1], 0))  # below 1, as places are
            corner = self.form.corner_of(height, width, place)
            item["crops_coords_top_left"] = torch.tensor(corner)
        for key, values in self.conditions.items():
            item[key] = torch.tensor(values[n]) if isinstance(values[n], list) else values[n]
        return item

    def images(self, numbers: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield some of the images in [-1, 1], ``[C, H, W]``, with their numbers."""
        for n in sorted(numbers):
            yield n, self[n]["x0"]

    def digest(self, n: int) -> str | None:
        """A digest of an item; ``None`` before it was read."""
        return self.digests[n]

    def source_digests(self) -> list[str]:
        """A digest of each image as it is stored, whatever form a network takes; read once."""
        if not self._source_digests:
            self._source_digests = [self.source_digest(n) for n in range(len(self))]
        return self._source_digests

    def weights(self, prior_loss_weight: float) -> list[float] | None:
        """The weight of each image: how often it was seen, times the weight of its loss."""
        if prior_loss_weight == 1 or not any(self.regularises or ()):
            return self.example_weights
        seen = self.example_weights or [1.0] * len(self)
        prior = zip(seen, self.regularises or (), strict=True)
        return [each * (prior_loss_weight if yes else 1) for each, yes in prior]

    def caption(self, n: int) -> str:
        """The prompt or class of an image; empty if it has none."""
        if "prompt" in self.conditions:
            return str(self.conditions["prompt"][n])
        if self.classes is not None:
            return self.classes.names[n] or ""
        if "class_labels" in self.conditions:
            return f"class {self.conditions['class_labels'][n]}"
        return ""

    def summary(self) -> str:
        """Say what was read: ``300 images, 10 classes (0 = 'a', …); 3 other files left out``."""
        parts = [counted(len(self), "image")]
        if "class_labels" in self.conditions and self.classes is not None:
            order = self.classes.order
            listed = ", ".join(f"{k} = '{name}'" for k, name in enumerate(order[:10]))
            parts.append(
                f"{counted(len(order), 'class', 'classes')} ({listed}{', …' * (len(order) > 10)})"
            )
        elif "class_labels" in self.conditions:
            parts.append(counted(len(set(self.conditions["class_labels"])), "class", "classes"))
        elif "prompt" in self.conditions:
            parts.append(counted(len(set(self.conditions["prompt"])), "prompt"))
        if self.shapes is not None:
            counts = Counter(self.shapes).most_common()
            some = ", ".join(f"{count} of {h}×{w}" for (h, w), count in counts[:5])
            parts.append(f"{counted(len(counts), 'bucket')} ({some}{', …' * (len(counts) > 5)})")
        text = ", ".join(parts)
        if self.left_out:
            some = ", ".join(self.left_out[:3]) + ", …" * (len(self.left_out) > 3)
            text += f"; {len(self.left_out)} other files left out ({some})"
        if self.unread:
            text += f"; not read: {', '.join(self.unread)}"
        return "; ".join([text, *self.notes])


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number and its noun."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"
