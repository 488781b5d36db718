"""Images with names, labels and prompts, as data for ``NoisedRegression``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.data import Dataset

from curvlinops_diffusion.loading.labels import Classes, Conditions
from curvlinops_diffusion.loading.preprocessing import Form, Loaded
from curvlinops_diffusion.runtime.digests import digest_of


class NamedImages(Dataset[dict[str, Any]]):
    """Images with names, and labels or prompts if there are any.

    Attributes:
        names: A name for each image.
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
        tells_sizes: Whether an item has the size of the original image, and the top left corner
            of what was cut out of it, as Stable Diffusion XL takes them.
        digests: A digest of each item, from when it was read first; ``None`` until then.
    """

    def __init__(
        self,
        names: list[str],
        load: Callable[[int], Loaded],
        source_digest: Callable[[int], str],
        form: Form,
        conditions: Conditions | None = None,
        classes: Classes | None = None,
        unread: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        self.names = names
        self.conditions = conditions or {}
        self.classes = classes
        self.paths: list[Path] | None = None
        self.columns: Mapping[str, Sequence[Any]] = {}
        self.left_out: list[str] = []
        self.captions_beside: dict[str, str] = {}
        self.example_weights: list[float] | None = None
        self.unread = list(unread)
        self.notes = list(notes)
        self.digests: list[str | None] = [None] * len(names)
        self.tells_sizes = False
        self.beside: dict[str, tuple[int, list[Any]]] = {}
        self._load = load
        self._source_digest = source_digest
        self._source_digests: list[str] = []
        self._form = form
        self._first: tuple[str, Size] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, n: int) -> dict[str, Any]:
        x0, (height, width) = self._load(n)
        if self._first is None:
            self._first = (self.names[n], x0.shape)
        name, shape = self._first
        if x0.shape != shape:
            raise ValueError(
                f"The image '{self.names[n]}' has shape {tuple(x0.shape)}, and '{name}' has "
                f"{tuple(shape)}. All must have one size: pass --resolution to resize."
            )
        item: dict[str, Any] = {"x0": x0}
        if self.tells_sizes:
            item["original_size"] = torch.tensor([height, width])
            item["crops_coords_top_left"] = torch.tensor(self._form.corner_of(height, width))
        for key, values in self.conditions.items():
            item[key] = torch.tensor(values[n]) if isinstance(values[n], list) else values[n]
        for key, (channels, sources) in self.beside.items():
            form = replace(self._form, channels=channels)
            beside, _ = form.load(sources[n], f"{key} of {self.names[n]}")
            item[key] = (beside + 1) / 2
        if self.digests[n] is None:
            self.digests[n] = digest_of(item)
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
            self._source_digests = [self._source_digest(n) for n in range(len(self))]
        return self._source_digests

    def caption(self, n: int) -> str:
        """The prompt or class of an image; nothing if it has none."""
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
