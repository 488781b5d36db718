"""Images in whatever form people have them: on disk, or in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from curvlinops_diffusion.loading.images import (
    NamedImages,
    conditioned,
    images_at,
    images_of_dataset,
    images_of_files,
)
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form, Loaded, upright_size
from curvlinops_diffusion.loading.saved import SavedDataset
from curvlinops_diffusion.runtime.digests import digest_of

_ACCEPTED = (
    "Pass a folder, a file, a list of files, of PIL images or of tensors [C, H, W] in [-1, 1], a "
    "tensor [N, C, H, W], or a data set of the library datasets"
)


def given_images(
    given: Any,
    form: Form,
    condition: Condition,
    training: NamedImages | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
) -> NamedImages:
    """Open images that somebody passes, with prompts or labels if these are passed beside.

    Args:
        given: A folder, a file, a list of files, PIL images or tensors ``[C, H, W]`` in [-1, 1], a
            tensor ``[N, C, H, W]``, or a ``datasets.Dataset``.
        form: The form in which the network takes images.
        condition: The labels or prompts that it takes.
        training: For queries, the training images: classes are numbered as those.
        prompts: A prompt for each image, or one for all that have none of their own.
        labels: A class for each image.

    Raises:
        ValueError: If they are in no known form, or do not fit together.
    """
    where = Path(given) if isinstance(given, str | os.PathLike) else Path("images")
    images = _opened(given, form)
    if isinstance(prompts, str) and condition.key == "prompt":
        own = images.conditions.get("prompt", [None] * len(images))
        images.conditions["prompt"] = [prompts if one is None else one for one in own]
        prompts = None
    beside: list[tuple[str, str, Any]] = [
        ("prompts", "prompt", prompts),
        ("labels", "class_labels", labels),
    ]
    for name, key, given_values in beside:
        if given_values is None:
            continue
        if condition.key != key:
            takes = "no condition" if condition.key is None else f"'{condition.key}'"
            raise ValueError(f"The network takes {takes}, got `{name}`. Leave them out.")
        arrays = isinstance(given_values, Tensor | np.ndarray)
        values = given_values.tolist() if arrays else list(given_values)
        if len(values) != len(images):
            raise ValueError(
                f"`{name}` must have one for each image, got {len(values)} for {len(images)} "
                "images."
            )
        images.conditions[key], images.classes = values, None
    return conditioned(images, where, form, condition, training)


def _opened(given: Any, form: Form) -> NamedImages:
    if isinstance(given, NamedImages):
        return given
    if isinstance(given, str | os.PathLike):
        return images_at(Path(given), form)
    if hasattr(given, "features") and hasattr(given, "cast_column"):
        return images_of_dataset(SavedDataset.of_data(given, Path("images")), form)
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
        return images_of_files(files, [str(f) for f in files] if alike else names, form)
    wrong = [z for z in things if not isinstance(z, Image.Image | Tensor | np.ndarray)]
    if wrong:
        raise ValueError(f"`images` holds a {type(wrong[0]).__name__}. {_ACCEPTED}.")
    return _in_memory(things, form)


def _in_memory(things: Sequence[Any], form: Form) -> NamedImages:
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
