"""Images in whatever form people have them, on disk or in memory, as the network takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from curvlinops_diffusion.loading.folders import (
    ACCEPTED,
    SUFFIXES,
    captions_left_out,
    classes_of,
    files_in,
    parts_of,
)
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.metadata import Metadata
from curvlinops_diffusion.loading.named_images import NamedImages, counted
from curvlinops_diffusion.loading.preprocessing import Form, Loaded, upright_size
from curvlinops_diffusion.loading.stored import (
    images_of_arrays,
    images_of_dataset,
    is_saved_dataset,
    saved_dataset,
)
from curvlinops_diffusion.runtime.digests import digest_of

_ACCEPTED = (
    "Pass a folder, a file, a list of files, of PIL images or of tensors [C, H, W] in [-1, 1], a "
    "tensor [N, C, H, W], or a data set of the library datasets"
)


def open_images(
    given: Any,
    form: Form,
    condition: Condition | None = None,
    training: NamedImages | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
) -> NamedImages:
    """Open images with the labels or prompts that the network takes.

    Args:
        given: A folder, a file, a list of files, PIL images or tensors ``[C, H, W]`` in [-1, 1], a
            tensor ``[N, C, H, W]``, or a ``datasets.Dataset``.
        form: The form in which the network takes images.
        condition: The labels or prompts that it takes; ``None`` to keep those there are, unchecked.
        training: For queries, the training images: classes are numbered as those.
        prompts: A prompt for each image, or one for all that have none of their own.
        labels: A class for each image.

    Raises:
        ValueError: If there are none, they are in no known form, an image lacks a condition or has
            one that the network does not know, or prompts or labels do not fit.
    """
    on_disk = isinstance(given, str | os.PathLike)
    where = Path(given) if on_disk else Path("images")
    images = _of_path(where, form) if on_disk else _of_any(given, form)
    takes = None if condition is None else condition.key
    if isinstance(prompts, str) and takes == "prompt":
        own = images.conditions.get("prompt", [None] * len(images))
        images.conditions["prompt"] = [prompts if one is None else one for one in own]
        prompts = None
    beside: list[tuple[str, str, Any]] = [
        ("prompts", "prompt", prompts),
        ("labels", "class_labels", labels),
    ]
    for name, key, values in beside:
        if values is None:
            continue
        if takes != key:
            what = "no condition" if takes is None else f"'{takes}'"
            raise ValueError(f"The network takes {what}, got `{name}`. Leave them out.")
        values = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
        if len(values) != len(images):
            raise ValueError(
                f"`{name}` must have one for each image, got {len(values)} for {len(images)} "
                "images."
            )
        images.conditions[key], images.classes = values, None
    _set_conditions(images, where, form, condition, training)
    return images


def _set_conditions(
    images: NamedImages,
    path: Path,
    form: Form,
    condition: Condition | None,
    training: NamedImages | None,
) -> None:
    """Reduce what stands beside images to what the network takes."""
    classes = images.classes
    if classes is not None and (condition is None or condition.key == "class_labels"):
        if training is None and condition is not None and condition.count != 1:
            classes.check_sure()
        elif training is not None and training.classes is not None:
            images.classes = classes = classes.numbered_as(training.classes, images.names)
        elif training is not None and "class_labels" in training.conditions:
            raise ValueError(
                f"The classes of '{path}' have names ({', '.join(classes.order[:8])}), those of "
                "the training data numbers alone. Give the queries' numbers, as 'label' in "
                "metadata.jsonl."
            )
        images.conditions["class_labels"] = classes.labels()
    if condition is not None:
        found = images.conditions
        images.conditions = condition.of(path, images.names, found, images.unread)
        sources = condition.images_of(path, images.names, found)
        images.beside = {key: (condition.images[key], sources[key]) for key in sources}
        for key, (channels, _) in images.beside.items():
            replace(form, channels=channels).check_channels(key)
        images.tells_sizes = condition.sizes


def _of_path(path: Path, form: Form) -> NamedImages:
    if path.suffix != ".npz":
        form.check_channels()
    if path.is_dir() and is_saved_dataset(path):
        images = images_of_dataset(saved_dataset(path), path, form)
    elif path.is_dir():
        images = _of_folder(path, form)
    elif path.suffix == ".npz" and path.is_file():
        images = images_of_arrays(path, form)
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        images = _of_files([path], [path.name], form)
    else:
        what = "is in no known form" if path.exists() else "does not exist"
        raise ValueError(f"'{path}' {what}. {ACCEPTED}.")
    if len(images) == 0:
        raise ValueError(f"'{path}' holds no images. {ACCEPTED}.")
    return images


def _of_folder(path: Path, form: Form) -> NamedImages:
    files, tables, left_out = files_in(path)
    metadata = Metadata(path, tables, files) if tables else None
    names = [name for name in files if metadata is None or name not in metadata.others]
    images = _of_files([files[name] for name in names], names, form)
    images.left_out = left_out
    images.unread = captions_left_out(names, left_out)
    if parts := parts_of(names):
        images.notes.append(f"of all parts of a data set: {', '.join(parts)}")
    if metadata is None:
        images.classes = classes_of(path, names)
        return images
    images.conditions = metadata.conditions(names)
    images.unread += metadata.unread()
    for some, how in (
        ([line.entries["file_name"] for line in metadata.without_image], "without an image"),
        (metadata.alike, "by a name alike"),
    ):
        if some:
            images.notes.append(f"{counted(len(some), 'line')} of metadata {how} ({some[0]}, …)")
    return images


def _of_files(files: Sequence[Path], names: list[str], form: Form) -> NamedImages:
    return NamedImages(
        names,
        lambda n: form.load(files[n], names[n]),
        lambda n: digest_of(files[n].read_bytes()),
        form,
    )


def _of_any(given: Any, form: Form) -> NamedImages:
    """Images that are open already, or a list of files."""
    if hasattr(given, "features") and hasattr(given, "cast_column"):
        return images_of_dataset(given, Path("images"), form)
    if isinstance(given, Image.Image):
        given = [given]
    if isinstance(given, Tensor | np.ndarray) and given.ndim == 3:
        given = given[None]
    things = list(given) if isinstance(given, Sequence | Tensor | np.ndarray) else []
    if not things:
        what = "none" if isinstance(given, Sequence) else type(given).__name__
        raise ValueError(f"`images` must hold images, got {what}. {_ACCEPTED}.")
    if all(isinstance(thing, str | os.PathLike) for thing in things):
        form.check_channels()
        files = [Path(thing) for thing in things]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"'{missing[0]}' is no file ({len(missing)} are not). {_ACCEPTED}.")
        names = [file.name for file in files]
        alike = len(set(names)) < len(names)
        return _of_files(files, [str(file) for file in files] if alike else names, form)
    wrong = [z for z in things if not isinstance(z, Image.Image | Tensor | np.ndarray)]
    if wrong:
        raise ValueError(f"`images` holds a {type(wrong[0]).__name__}. {_ACCEPTED}.")
    names = [str(n) for n in range(len(things))]

    def load(n: int) -> Loaded:
        thing = things[n]
        if isinstance(thing, Image.Image):
            return form.tensor(thing, names[n]), upright_size(thing)
        x = torch.as_tensor(thing)
        if not x.is_floating_point() or x.ndim != 3:
            raise ValueError(
                f"Image {n} must be floating point in [-1, 1], [C, H, W], got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        return form.sized(x, names[n]), (x.shape[1], x.shape[2])

    return NamedImages(names, load, lambda n: digest_of(load(n)[0]), form)
