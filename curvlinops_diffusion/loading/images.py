"""Images from folders, saved data sets and arrays, as data for ``NoisedRegression``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.data import Dataset

from curvlinops_diffusion.loading.arrays import Arrays
from curvlinops_diffusion.loading.folders import (
    ACCEPTED,
    SUFFIXES,
    Files,
    captions_left_out,
    classes_of,
    parts_of,
)
from curvlinops_diffusion.loading.labels import Classes, Condition
from curvlinops_diffusion.loading.metadata import Metadata
from curvlinops_diffusion.loading.opened import Source, opened
from curvlinops_diffusion.loading.preprocessing import Form, Loaded, upright_size
from curvlinops_diffusion.loading.saved import SavedDataset
from curvlinops_diffusion.runtime.digests import digest_of


class NamedImages(Dataset[dict[str, Any]]):
    """Images with names, and labels or prompts if there are any.

    Attributes:
        names: A name for each image.
        conditions: Further entries of each item: ``'class_labels'`` or ``'prompt'``, and noted
            sizes.
        beside: Images that an item has beside its image: for each entry, its channels and either
            their files or what they are loaded from.
        classes: Whose numbers the labels are, where classes have names.
        left_out: Files beside the images that were not read.
        unread: Columns or arrays beside the images that are not read.
        notes: What else is to be said of them, each a clause.
        tells_sizes: Whether an item has the size of the original image, and the top left corner
            of what was cut out of it, as Stable Diffusion XL is told in training.
        digests: A digest of each item, from when it was read first; ``None`` until then.
    """

    def __init__(
        self,
        names: list[str],
        load: Callable[[int], Loaded],
        source_digest: Callable[[int], str],
        form: Form,
        conditions: dict[str, list[Any]] | None = None,
        classes: Classes | None = None,
        left_out: Sequence[str] = (),
        unread: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        self.names = names
        self.conditions = conditions or {}
        self.classes = classes
        self.left_out = left_out
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
            beside, _ = _loaded(sources[n], f"{key} of {self.names[n]}", form)
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
        """Say what was read: ``300 images, 10 classes (0 = 'a', …); 3 files left out``."""
        parts = [_counted(len(self), "image")]
        if "class_labels" in self.conditions and self.classes is not None:
            order = self.classes.order
            listed = ", ".join(f"{k} = '{name}'" for k, name in enumerate(order[:10]))
            parts.append(
                f"{_counted(len(order), 'class', 'classes')} ({listed}{', …' * (len(order) > 10)})"
            )
        elif "class_labels" in self.conditions:
            parts.append(_counted(len(set(self.conditions["class_labels"])), "class", "classes"))
        elif "prompt" in self.conditions:
            parts.append(_counted(len(set(self.conditions["prompt"])), "prompt"))
        text = ", ".join(parts)
        if self.left_out:
            some = ", ".join(self.left_out[:3]) + ", …" * (len(self.left_out) > 3)
            text += f"; {len(self.left_out)} other files left out ({some})"
        if self.unread:
            text += f"; not read: {', '.join(self.unread)}"
        return "; ".join([text, *self.notes])


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def open_images(
    path: Path, form: Form, condition: Condition | None = None, training: NamedImages | None = None
) -> NamedImages:
    """Open images of any accepted kind.

    Args:
        path: Folder or file.
        form: The form in which the network takes them.
        condition: The labels or prompts that the network takes; ``None`` to keep what there is,
            unchecked.
        training: For queries, the training images: classes are numbered as those.

    Raises:
        ValueError: If there are none, or they or their conditions are in no known form.
    """
    return conditioned(images_at(path, form), path, form, condition, training)


def images_at(path: Path, form: Form) -> NamedImages:
    """Open images with what stands beside them.

    Raises:
        ValueError: If there are none, or they are in no known form.
    """
    if path.suffix != ".npz":
        form.check_channels()
    if path.is_dir() and SavedDataset.is_at(path):
        images = images_of_dataset(SavedDataset.of(path), form)
    elif path.is_dir():
        images = _folder(path, form)
    elif path.suffix == ".npz" and path.is_file():
        images = _arrays(path, form)
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        images = images_of_files([path], [path.name], form)
    else:
        what = "is in no known form" if path.exists() else "does not exist"
        raise ValueError(f"'{path}' {what}. {ACCEPTED}.")
    if len(images) == 0:
        raise ValueError(f"'{path}' holds no images. {ACCEPTED}.")
    return images


def conditioned(
    images: NamedImages,
    path: Path,
    form: Form,
    condition: Condition | None,
    training: NamedImages | None,
) -> NamedImages:
    """Reduce what stands beside images to what the network takes.

    Args:
        images: The images, which are changed.
        path: Where they are from, for messages.
        form: As for :func:`open_images`.
        condition: Likewise.
        training: Likewise.

    Raises:
        ValueError: If an image lacks a condition, or has one that the network does not know.
    """
    if images.classes is not None and (condition is None or condition.key == "class_labels"):
        if training is None and condition is not None and condition.count != 1:
            images.classes.check_sure()
        elif training is not None:
            images.classes = _as_in_training(path, images, images.classes, training)
        images.conditions["class_labels"] = images.classes.labels()
    if condition is not None:
        found = images.conditions
        images.conditions = condition.of(path, images.names, found, images.unread)
        sources = condition.images_of(path, images.names, found)
        images.beside = {key: (condition.images[key], sources[key]) for key in sources}
        for key, (channels, _) in images.beside.items():
            replace(form, channels=channels).check_channels(key)
        images.tells_sizes = condition.sizes
    return images


def _as_in_training(
    path: Path, images: NamedImages, classes: Classes, training: NamedImages
) -> Classes:
    """The queries' classes, numbered as those of the training images."""
    if training.classes is not None:
        return classes.numbered_as(training.classes, images.names)
    if "class_labels" in training.conditions:
        raise ValueError(
            f"The classes of '{path}' have names ({', '.join(classes.order[:8])}), those of the "
            "training data numbers alone. Give the queries' numbers, as 'label' in metadata.jsonl."
        )
    return classes


def _arrays(path: Path, form: Form) -> NamedImages:
    arrays = Arrays.of(path, form)
    given = {} if arrays.labels is None else {"class_labels": arrays.labels}
    return NamedImages(
        arrays.names,
        arrays.load,
        lambda n: digest_of(arrays.images[n]),
        form,
        given,
        unread=arrays.unread,
        notes=arrays.notes,
    )


def _folder(path: Path, form: Form) -> NamedImages:
    found = Files.of(path)
    files = {file.relative_to(path).as_posix(): file for file in found.images}
    metadata = Metadata.of(path, found.tables, list(files))
    others = set() if metadata is None else metadata.others
    names = [name for name in files if name not in others]
    images = images_of_files([files[name] for name in names], names, form)
    images.left_out = found.left_out
    images.unread = captions_left_out(names, found.left_out)
    if parts := parts_of(names):
        images.notes.append(f"of all parts of a data set: {', '.join(parts)}")
    if metadata is None:
        images.classes = classes_of(path, names)
        return images
    images.conditions = metadata.conditions(path, names)
    images.unread += metadata.unread()
    if metadata.without_image:
        line, count = metadata.without_image[0], len(metadata.without_image)
        name = line.entries["file_name"]
        images.notes.append(f"{_counted(count, 'line')} of metadata without an image ({name}, …)")
    if metadata.alike:
        count, name = len(metadata.alike), metadata.alike[0]
        images.notes.append(f"{_counted(count, 'line')} of metadata by a name alike ({name}, …)")
    return images


def images_of_files(files: Sequence[Path], names: list[str], form: Form) -> NamedImages:
    """Images of files, by names of their own."""

    def load(n: int) -> Loaded:
        return _loaded(files[n], names[n], form)

    return NamedImages(names, load, lambda n: digest_of(files[n].read_bytes()), form)


def images_of_dataset(data: SavedDataset, form: Form) -> NamedImages:
    """The images of a data set of the library ``datasets``."""

    def load(n: int) -> Loaded:
        return _loaded(partial(data.image, n), data.names[n], form)

    return NamedImages(
        data.names,
        load,
        data.source_digest,
        form,
        data.conditions,
        data.classes,
        unread=data.unread,
    )


def _loaded(source: Source, name: str, form: Form) -> Loaded:
    with opened(source, name) as image:
        return form.tensor(image, name), upright_size(image)
