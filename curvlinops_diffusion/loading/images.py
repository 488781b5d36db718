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
    captions_beside,
    check_images,
    classes_of,
    files_in,
    is_saved_dataset,
    parts_of,
    read_caption,
    repeats_of,
    tables_left_out,
)
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.metadata import Metadata
from curvlinops_diffusion.loading.named_images import NamedImages, counted
from curvlinops_diffusion.loading.preprocessing import Form, Loaded, upright_size
from curvlinops_diffusion.loading.stored import (
    images_of_arrays,
    images_of_dataset,
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
    images = _of_path(where, form, condition) if on_disk else _of_any(given, form)
    takes = None if condition is None else condition.key
    if isinstance(prompts, str) and condition is not None and takes == "prompt":
        if None not in images.conditions.get("prompt", [None]):
            raise ValueError(
                f"`prompts` must be left out where images have prompts of their own, got "
                f"{prompts!r} for {counted(len(images), 'image')}, all of which have."
            )
        condition, prompts = replace(condition, prompt=prompts), None
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
        if condition.key == "prompt" and condition.prompt is not None:
            _check_prompt(images, path, condition.prompt)
        images.conditions = condition.of(path, images.names, found, images.unread)
        sources = condition.images_of(path, images.names, found)
        images.beside = {key: (condition.images[key], sources[key]) for key in sources}
        for key, (channels, _) in images.beside.items():
            replace(form, channels=channels).check_channels(key)
        images.tells_sizes = condition.sizes


def _check_prompt(images: NamedImages, path: Path, prompt: str) -> None:
    """Refuse one prompt for images beside which their captions lie unread."""
    own = images.conditions.get("prompt", [None] * len(images))
    without = [name for name, text in zip(images.names, own, strict=True) if text is None]
    beside = [images.captions_beside[name] for name in without if name in images.captions_beside]
    if beside:
        raise ValueError(
            f"The prompt {prompt!r} is given for images of '{path}' beside which captions lie, "
            f"'{beside[0]}' first ({len(beside)} of them). Leave the prompt out and pass "
            f"--caption-extension {Path(beside[0]).suffix}, or take these files away."
        )
    if not without:
        images.notes.append(f"all have prompts of their own, and {prompt!r} is of none of them")


def _of_path(path: Path, form: Form, condition: Condition | None) -> NamedImages:
    if path.suffix != ".npz":
        form.check_channels()
    check_images(path)
    if is_saved_dataset(path):
        images = images_of_dataset(saved_dataset(path), path, form)
    elif path.is_dir():
        images = _of_folder(path, form, condition)
    elif path.suffix == ".npz":
        images = images_of_arrays(path, form)
    else:
        images = _of_files([path], [path.name], form)
    if len(images) == 0:
        raise ValueError(f"'{path}' holds no images. {ACCEPTED}.")
    return images


def _of_folder(path: Path, form: Form, condition: Condition | None) -> NamedImages:
    files, tables, others = files_in(path)
    metadata = Metadata(path, tables, files) if tables else None
    names = [name for name in files if metadata is None or name not in metadata.others]
    images = _of_files([files[name] for name in names], names, form)
    if parts := parts_of(names):
        images.notes.append(f"of all parts of a data set: {', '.join(parts)}")
    images.left_out, images.unread = others, tables_left_out(others)
    if metadata is None:
        images.classes = classes_of(path, names)
    else:
        images.conditions = metadata.conditions(names)
        images.columns = metadata.columns(names)
        images.unread += metadata.unread()
        for some, how in (
            ([line.entries["file_name"] for line in metadata.without_image], "without an image"),
            (metadata.alike, "by a name alike"),
        ):
            if some:
                lines = counted(len(some), "line")
                images.notes.append(f"{lines} of metadata {how} ({some[0]}, …)")
    _read_captions(images, path, condition)
    return images


def _read_captions(images: NamedImages, path: Path, condition: Condition | None) -> None:
    """Read captions in files of their own, and repeats and prompts in the names of folders."""
    end = None if condition is None else condition.caption_extension
    end = None if end is None else f".{end.removeprefix('.')}"
    found, read = captions_beside(images.names, images.left_out, end), {}
    names, wanted = images.names, condition is None or condition.key == "prompt"
    if wanted and "prompt" not in images.conditions:
        if end is None and len(found) > 1:
            first, second = (next(iter(files.values())) for files in found.values())
            raise ValueError(
                f"'{path}' holds captions of two kinds, '{first}' and '{second}'. Pass "
                "--caption-extension with the end of those that training read."
            )
        end = end or next(iter(found), "")
        read = found.pop(end, {})
        if read:
            images.notes.append(f"{counted(len(read), 'caption')} from files {end}")
    images.captions_beside = {name: file for own in found.values() for name, file in own.items()}
    images.unread = [*(f"files {suffix}" for suffix in sorted(found)), *images.unread]
    files = set(read.values())
    images.left_out = [name for name in images.left_out if name not in files]
    texts = {name: read_caption(path / file) for name, file in read.items()}
    prompts: list[str | None] = [texts[name][0] if name in texts else None for name in names]
    if longer := [read[name] for name, (_, more) in texts.items() if more]:
        count = counted(len(longer), "longer caption")
        images.notes.append(f"the first line of {count} ({longer[0]}, …)")
    # of networks that take prompts alone: for others such folders may be classes
    named = condition is not None and wanted and "prompt" not in images.conditions
    repeats = repeats_of(path, names) if named else None
    if repeats is not None:
        if without := [name for name in names if name not in texts]:
            count = counted(len(without), "image")
            images.notes.append(f"{count} with the folder's name as prompt ({without[0]}, …)")
            own = [prompt for _, prompt in repeats]
            prompts = [b if a is None else a for a, b in zip(prompts, own, strict=True)]
        counts = [count for count, _ in repeats]
        times = ", ".join(f"'{text}' {n} times" for n, text in list(dict.fromkeys(repeats))[:5])
        images.notes.append(f"repeated: {times}{', …' * (len(set(repeats)) > 5)}")
        if len(set(counts)) > 1:
            images.example_weights = [n * len(counts) / sum(counts) for n in counts]
    if texts or repeats:
        images.conditions["prompt"] = prompts


def _of_files(files: Sequence[Path], names: list[str], form: Form) -> NamedImages:
    images = NamedImages(
        names,
        lambda n: form.load(files[n], names[n]),
        lambda n: digest_of(files[n].read_bytes()),
        form,
    )
    images.paths = [file.absolute() for file in files]
    return images


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
