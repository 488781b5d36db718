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

from curvlinops_diffusion.loading import folders as disk
from curvlinops_diffusion.loading.dataset_config import (
    DatasetConfig,
    is_config,
    names_of,
    weights_of,
)
from curvlinops_diffusion.loading.embedded_prompts import embedded_prompt
from curvlinops_diffusion.loading.headers import cut_to_squares, readable
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.layout import FILE_NAME, TRIGGERS, Layout
from curvlinops_diffusion.loading.metadata import Metadata, first_of
from curvlinops_diffusion.loading.named_images import NamedImages, counted
from curvlinops_diffusion.loading.preprocessing import Form, Loaded, Place
from curvlinops_diffusion.loading.sizes import Size
from curvlinops_diffusion.loading.stored import (
    images_of_arrays,
    images_of_dataset,
    split_of,
    stored_dataset,
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
    layout: Layout | None = None,
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
        layout: How the training images lie on disk; ``None`` for what can be read off them.

    Raises:
        ValueError: If there are none, they are in no known form, an image lacks a condition or has
            one that the network does not know, or prompts or labels do not fit.
    """
    on_disk = isinstance(given, str | os.PathLike)
    where = Path(given) if on_disk else Path("images")
    layout = Layout() if layout is None else layout
    layout = layout if training is None else layout.for_queries()
    takes = None if condition is None else condition.key
    if condition is not None:
        layout.check_taken(takes)
    images = _of_path(where, form, condition, layout) if on_disk else _of_any(given, form, layout)
    if layout.caption_column == FILE_NAME and not layout.of_queries:
        images.conditions["prompt"] = [Path(name).stem for name in images.names]
    if isinstance(prompts, str) and condition is not None and takes == "prompt":
        if None not in images.conditions.get("prompt", [None]):
            raise ValueError(
                f"`prompts` must be left out where images have prompts of their own, got "
                f"{prompts!r} for {counted(len(images), 'image')}, all of which have."
            )
        condition, prompts = replace(condition, prompt=prompts), None
    beside: dict[str, Any] = {"prompt": prompts, "class_labels": labels}
    for key, values in beside.items():
        if values is None:
            continue
        name = "prompts" if key == "prompt" else "labels"
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
    if training is not None and takes == "prompt" and images.paths is not None:
        _read_embedded_prompts(images, images.paths)
    _set_conditions(images, where, form, condition, training)
    if takes == "prompt":
        _put_triggers(images, where, layout)
    return images


def _read_embedded_prompts(images: NamedImages, paths: Sequence[str]) -> None:
    """Give queries without a prompt the one that the program which made them has written."""
    own = images.conditions.get("prompt", [None] * len(images))
    without = [n for n, text in enumerate(own) if text is None]
    found = {n: text for n in without if (text := embedded_prompt(Path(paths[n])))}
    if found:
        images.conditions["prompt"] = [found.get(n, text) for n, text in enumerate(own)]
        count = counted(len(found), "prompt")
        images.notes.append(f"{count} as the images' files have them, without weights of words")


def _set_conditions(
    images: NamedImages,
    path: Path,
    form: Form,
    condition: Condition | None,
    training: NamedImages | None,
) -> None:
    """Reduce the conditions of images to those that the network takes."""
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


def _put_triggers(images: NamedImages, path: Path, layout: Layout) -> None:
    """Put in the trigger word, or refuse captions that wait for one."""
    prompts = images.conditions["prompt"]
    waiting = [n for n, text in enumerate(prompts) if any(place in text for place in TRIGGERS)]
    if waiting and layout.trigger_word is None:
        raise ValueError(
            f"The prompt of '{images.names[waiting[0]]}' of '{path}' is "
            f"{prompts[waiting[0]]!r}, where ai-toolkit puts its trigger word ({len(waiting)} are "
            "like it). Pass --trigger-word WORD, '' if training had none."
        )
    if (word := layout.trigger_word) is not None:
        for place in TRIGGERS:
            prompts = [text.replace(place, word) for text in prompts]
        put = [text if word in text else f"{word} {text}" for text in prompts]
        images.conditions["prompt"] = put


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
    elif len(without) < len(images):
        count = counted(len(without), "image")
        images.notes.append(f"{prompt!r} for {count} without a prompt: {first_of(without)}")


def _of_path(path: Path, form: Form, condition: Condition | None, layout: Layout) -> NamedImages:
    if path.suffix != ".npz":
        form.check_channels()
    disk.check_images(path)
    if is_config(path):
        images = _of_config(path, form, layout)
    elif disk.kind_of_data(path) in ("saved", *disk.TABLES.values()):
        images = images_of_dataset(stored_dataset(path, layout), path, form, layout)
    elif path.is_dir():
        images = _of_folder(path, form, condition, layout)
    else:
        layout.check_no_columns(f"'{path}'")
        images = (
            images_of_arrays(path, form)
            if path.suffix == ".npz"
            else _of_files([path], [path.name], form, layout)
        )
        split_of(images, path, layout)
    if len(images) == 0:
        raise ValueError(f"'{path}' holds no images. {disk.ACCEPTED}.")
    return images


def _of_config(path: Path, form: Form, layout: Layout) -> NamedImages:
    """The images that a file of kohya's scripts lists, with their prompts and weights."""
    config = DatasetConfig(path)
    listed, notes = config.images(layout.end)
    by_name = dict(zip(names_of(listed), listed, strict=True))
    images = _of_files([image.file for image in listed], list(by_name), form, layout)
    own = [by_name[name] for name in images.names]
    images.conditions["prompt"] = [image.prompt for image in own]
    images.example_weights = weights_of(own)
    images.keep_tokens = [image.kept for image in own]
    images.regularises = [image.regularises for image in own]
    images.unread += config.unread
    images.notes += notes
    return images


def _of_folder(path: Path, form: Form, condition: Condition | None, layout: Layout) -> NamedImages:
    files, tables, others = disk.files_in(path, layout)
    metadata = Metadata(path, tables, files, layout) if tables else None
    names = [name for name in files if metadata is None or name not in metadata.others]
    inner = path  # of which folders are classes
    if layout.split is not None:
        folders = disk.folders_of_split(path, names, layout.split)
        names = [name for name in names if Path(name).parts[0] in folders]
        inner = path / folders[0] if len(folders) == 1 else path
    images = _of_files([files[name] for name in names], names, form, layout)
    names = images.names
    if parts := disk.parts_of(names):
        images.notes.append(f"of all parts of a data set: {', '.join(parts)} (--split takes one)")
    images.left_out, images.unread = others, disk.tables_left_out(others, layout)
    if masks := [name for name in others if Path(name).stem.endswith(disk.BESIDE)]:
        count = counted(len(masks), "mask")
        images.notes.append(f"{count} of OneTrainer's, not used: {first_of(masks)}")
    if metadata is None:
        layout.check_no_columns(f"'{path}'")
        below = "" if inner == path else f"{inner.relative_to(path)}/"
        images.classes = disk.classes_of(inner, [name.removeprefix(below) for name in names])
    else:
        images.conditions, columns = metadata.conditions(names), metadata.unread()
        images.columns = metadata.columns(names)
        images.unread += columns
        for some, how in (
            ([line.name for line in metadata.without_image], "without an image"),
            (metadata.alike, "by a name alike"),
        ):
            if some:
                lines = counted(len(some), "line")
                images.notes.append(f"{lines} of metadata {how}: {first_of(some)}")
        if columns and (condition is None or condition.key == "prompt"):
            images.notes.append("--caption-column takes prompts from another column")
    _read_captions(images, path, condition, layout, list(files))
    return images


def _read_captions(
    images: NamedImages,
    path: Path,
    condition: Condition | None,
    layout: Layout,
    there: Sequence[str],  # all images in the folder, used or not
) -> None:
    """Read captions in files of their own, and repeats and prompts in the names of folders."""
    end, names = layout.end, images.names
    found, read = disk.captions_beside(names, images.left_out, end), {}
    wanted = condition is None or condition.key == "prompt"
    wanted = wanted and (layout.caption_column is None or layout.of_queries)
    if wanted and "prompt" not in images.conditions:
        if end is None and len(found) > 1:
            both = [name for name in names if all(name in files for files in found.values())]
            first, second = (
                files[both[0]] if both else next(iter(files.values())) for files in found.values()
            )
            raise ValueError(
                f"'{path}' holds captions of two kinds, '{first}' and '{second}'. Pass "
                "--caption-extension with the end of those that training read."
            )
        end = end or next(iter(found), "")
        read = found.pop(end, {})
    images.captions_beside = {name: file for own in found.values() for name, file in own.items()}
    unread = [f"files {other} (--caption-extension {other})" for other in sorted(found)]
    images.unread = [*unread, *images.unread]
    files = set(read.values())
    images.left_out = [name for name in images.left_out if name not in files]
    if read:
        images.notes.append(f"{counted(len(read), 'caption')} from files {end}")
    alone = disk.captions_alone(there, images.left_out, end)
    if alone and wanted and condition is not None and "prompt" not in images.conditions:
        count = counted(len(alone), "file")
        told = f"{count} {Path(alone[0]).suffix} without an image: {first_of(alone)}"
        (images.notes if read else images.unread).append(told)
    texts = {name: disk.read_caption(path / file, layout) for name, file in read.items()}
    prompts: list[str | None] = [texts[name][0] if name in texts else None for name in names]
    if longer := [read[name] for name, (_, more) in texts.items() if more]:
        count = counted(len(longer), "longer caption")
        images.notes.append(
            f"the first line of {count}: {first_of(longer)} (--caption-lines all for all of them; "
            "OneTrainer draws one, which no option does)"
        )
    # of networks that take prompts alone: for others such folders may be classes
    named = condition is not None and wanted and "prompt" not in images.conditions
    repeats = disk.repeats_of(path, names) if named else None
    if named and repeats is None and (below := disk.repeats_below(names)):
        images.notes.append(f"no repeats of folders in '{below}': pass '{path / below}' for these")
    if repeats is not None:
        if without := [name for name in names if name not in texts]:
            count = counted(len(without), "image")
            images.notes.append(f"{count} with the folder's name as prompt: {first_of(without)}")
            by_folder = [prompt for _, prompt in repeats]
            prompts = [b if a is None else a for a, b in zip(prompts, by_folder, strict=True)]
        counts = [count for count, _ in repeats]
        times = ", ".join(f"'{text}' {n} times" for n, text in list(dict.fromkeys(repeats))[:5])
        images.notes.append(f"repeated: {times}{', …' * (len(set(repeats)) > 5)}")
        if len(set(counts)) > 1:
            images.example_weights = [n * len(counts) / sum(counts) for n in counts]
    if texts or repeats:
        images.conditions["prompt"] = prompts


def _of_files(
    files: Sequence[Path], names: Sequence[str], form: Form, layout: Layout
) -> NamedImages:
    kept, notes = readable(
        files, names, form, layout.skip_unreadable, lambda n: form.load(files[n], names[n])
    )
    files, names = [files[n] for n in kept], [names[n] for n in kept]
    return NamedImages(
        names,
        lambda n, place: form.load(files[n], names[n], place),
        lambda n: digest_of(files[n].read_bytes()),
        form,
        lambda n: form.size_in(files[n], names[n]),
        notes=notes,
        paths=[str(file.absolute()) for file in files],
    )


def _of_any(given: Any, form: Form, layout: Layout) -> NamedImages:
    """Images that are open already, or a list of files."""
    given = split_of(given, Path("images"), layout)
    if hasattr(given, "features") and hasattr(given, "cast_column"):
        return images_of_dataset(given, Path("images"), form, layout)
    layout.check_no_columns("a list of images")
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
        return _of_files(files, [str(f) for f in files] if alike else names, form, layout)
    wrong = [z for z in things if not isinstance(z, Image.Image | Tensor | np.ndarray)]
    if wrong:
        raise ValueError(f"`images` holds a {type(wrong[0]).__name__}. {_ACCEPTED}.")
    names = [str(n) for n in range(len(things))]
    sizes = [thing.size for thing in things if isinstance(thing, Image.Image)]

    def size(n: int) -> Size:
        thing = things[n]
        is_image = isinstance(thing, Image.Image)
        return form.size_of(thing) if is_image else (thing.shape[1], thing.shape[2])

    def load(n: int, place: Place) -> Loaded:
        thing = things[n]
        if isinstance(thing, Image.Image):
            return form.tensor(thing, names[n], place), size(n)
        x = torch.as_tensor(thing)
        if not x.is_floating_point() or x.ndim != 3:
            raise ValueError(
                f"Image {n} must be floating point in [-1, 1], [C, H, W], got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        return form.sized(x, names[n], place), size(n)

    digest, notes = (lambda n: digest_of(load(n, None)[0])), cut_to_squares(sizes, form)
    return NamedImages(names, load, digest, form, size, notes=notes)
