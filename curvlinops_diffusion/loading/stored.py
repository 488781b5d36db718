"""Images of ``.npz`` files and of the library ``datasets``, checked before anything is computed."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from curvlinops_diffusion.loading.folders import kind_of_data
from curvlinops_diffusion.loading.headers import readable
from curvlinops_diffusion.loading.labels import Classes
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.metadata import IMAGE_COLUMNS
from curvlinops_diffusion.loading.named_images import NamedImages
from curvlinops_diffusion.loading.preprocessing import FILE_CHANNELS, Form, Loaded, Place
from curvlinops_diffusion.runtime.checks import quoted
from curvlinops_diffusion.runtime.digests import digest_of

_HOLDS = (
    "It must hold 'images': bytes [N, height, width, channels], or floating point in [-1, 1], "
    "[N, channels, height, width], with the network's channels, or bytes with 1 or 3"
)
_ROUNDING = 1e-4
# the column that training scripts take by default, and that is taken among several
_IMAGE = "image"


def images_of_arrays(path: Path, form: Form) -> NamedImages:
    """Read the images of an ``.npz`` file, and their labels if there are any.

    Raises:
        ValueError: If the file cannot be read, or its arrays are of no accepted kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). {_HOLDS}.") from error
    key = "images" if "images" in arrays else "x0"
    if key not in arrays or arrays[key].ndim not in (3, 4):
        shapes = {key: value.shape for key, value in arrays.items()}
        raise ValueError(f"'{path}' holds {shapes}. {_HOLDS}.")
    images, notes = arrays[key], []
    if "labels" not in arrays:
        _check_is_several(path, images, form)
    own = {form.channels} if form.channels is not None else set(FILE_CHANNELS)
    if images.dtype == np.uint8:
        # grey and RGB are converted into each other
        _check_channels(path, images, -1, {*FILE_CHANNELS} if own <= {*FILE_CHANNELS} else own)
    elif np.issubdtype(images.dtype, np.floating):
        _check_channels(path, images, 1, own)
        if key == "images":
            _check_range(path, images)
            if len(images) and images.min() >= 0:
                notes = ["no pixel is negative, and [-1, 1] is what floating point is taken for"]
    else:
        raise ValueError(f"'{key}' of '{path}' is of {images.dtype}. {_HOLDS}.")
    labels = arrays.get("labels")
    if labels is not None and (
        labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)
    ):
        raise ValueError(
            f"'labels' of '{path}' is of {labels.dtype} and shape {labels.shape} beside "
            f"{len(images)} images. It must hold a whole number for each image."
        )
    names = [f"{path.name}[{n}]" for n in range(len(images))]

    def load(n: int, place: Place) -> Loaded:
        array = images[n]
        if array.dtype != np.uint8:
            x = torch.from_numpy(np.asarray(array, dtype=np.float32))
            x = x.unsqueeze(0) if x.ndim == 2 else x
            return form.sized(x, names[n], place), (x.shape[1], x.shape[2])
        height, width = array.shape[:2]
        if form.channels in (None, *FILE_CHANNELS):
            flat = array if array.ndim == 2 or array.shape[-1] > 1 else array[..., 0]
            return form.tensor(Image.fromarray(flat), names[n], place), (height, width)
        x = torch.from_numpy(array).movedim(-1, 0).float() / 127.5 - 1
        return form.sized(x, names[n], place), (height, width)

    return NamedImages(
        names,
        load,
        lambda n: digest_of(images[n]),
        form,
        lambda n: images.shape[1:3] if images.dtype == np.uint8 else images.shape[-2:],
        {} if labels is None else {"class_labels": labels.tolist()},
        unread=[name for name in arrays if name not in (key, "labels")],
        notes=notes,
    )


def _check_is_several(path: Path, images: Any, form: Form) -> None:
    """Refuse one image in colours whose rows would be taken for grey images."""
    if images.ndim != 3:
        return
    last = images.shape[-1] in (1, 3, 4) and images.shape[1] > 4
    first = images.shape[0] in (3, 4) and form.channels == images.shape[0]
    if last or first:
        raise ValueError(
            f"The images of '{path}' are of shape {images.shape}, which may be one image or "
            "several grey ones. Save one as images[None], grey ones with an axis for the channel."
        )


def _check_channels(path: Path, images: Any, axis: int, accepted: set[int]) -> None:
    """Check that the axis of the channels can be that."""
    channels = 1 if images.ndim == 3 else images.shape[axis]
    if channels in accepted:
        return
    other, order = (1, (0, 2, 3, 1)) if axis == -1 else (-1, (0, 3, 1, 2))
    swapped = images.ndim == 4 and images.shape[other] in accepted
    wanted = " or ".join(map(str, sorted(accepted)))
    raise ValueError(
        f"The images of '{path}' are of {images.dtype} and shape {images.shape}: {channels} "
        f"channels, and {wanted} can be taken. "
        + (f"Save images.transpose{order}: " if swapped else "")
        + "bytes have channels last, floating point has them first."
    )


def _check_range(path: Path, images: Any) -> None:
    for n, image in enumerate(images):
        low, high = float(image.min()), float(image.max())
        if not (low >= -1 - _ROUNDING and high <= 1 + _ROUNDING):  # NaN is refused, too
            raise ValueError(
                f"The image '{path.name}[{n}]' has pixels from {low:g} to {high:g}. Floating point "
                "must be in [-1, 1]; save images with pixels from 0 to 255 as uint8."
            )


def stored_dataset(path: Path, layout: Layout) -> Any:
    """Open a data set of ``save_to_disk``, or files of Parquet or WebDataset.

    The latter are converted once, into the cache of ``datasets``.

    Raises:
        ValueError: If it cannot be read, or it is not clear which split is meant.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"'{path}' is a data set of the package datasets, which is not installed: pip install "
            "datasets."
        ) from error
    kind = kind_of_data(path)
    try:
        if kind == "saved":
            data = datasets.load_from_disk(str(path))
        elif path.is_dir():  # by splits in the names of files and folders
            data = datasets.load_dataset(kind, data_dir=str(path))
        else:
            data = datasets.load_dataset(kind, data_files=str(path))["train"]
    except Exception as error:  # of a damaged file, which may be any
        raise ValueError(
            f"'{path}' cannot be read as a data set ({quoted(error)}). Save it again"
            f"{' by save_to_disk' if kind == 'saved' else ''}."
        ) from error
    return split_of(data, path, layout)


def split_of(data: Any, path: Path, layout: Layout) -> Any:
    """A data set, of several the one that is asked for, or the only one.

    Raises:
        ValueError: If it is not clear which is meant.
    """
    if not isinstance(data, dict):
        if layout.split is not None:
            raise ValueError(
                f"`split` must be left out, got {layout.split!r}: '{path}' holds no splits."
            )
        return data
    if layout.split in data:
        return data[layout.split]
    if layout.split is None and len(data) == 1:
        return next(iter(data.values()))
    asked = "" if layout.split is None else f", got {layout.split!r}"
    raise ValueError(
        f"'{path}' holds splits: {', '.join(data)}{asked}. Pass one, for instance --split "
        f"{next(iter(data), 'train')}."
    )


def images_of_dataset(data: Any, path: Path, form: Form, layout: Layout) -> NamedImages:
    """The images of a ``datasets.Dataset``, with its captions, labels and images beside.

    Raises:
        ValueError: If it is not clear which column is of images, or an image cannot be read.
    """
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise ValueError(
            f"`images` must be a Dataset, got {type(data).__name__}: images are read by number, "
            "and more than once. Load it without streaming."
        )
    data = data.with_format(None)  # whatever form of tensors it has
    pictures = {k: v for k, v in data.features.items() if isinstance(v, datasets.Image)}
    column = _column(path, list(pictures), data.column_names, layout)
    for name in {**pictures, column: None}:  # whether saved as files alone or not
        if name not in pictures or not pictures[name].decode:
            mode = pictures[name].mode if name in pictures else None
            data = data.cast_column(name, datasets.Image(mode=mode))
    names = [f"{path.name}[{n}]" for n in range(len(data))]

    def picture(images: Any, column: str, n: int) -> Any:
        return images[n][column]

    def parts(data: Any) -> tuple[Any, Any, Any]:
        images = data.select_columns(column)
        encoded = images.cast_column(column, datasets.Image(decode=False))
        return images, encoded, encoded.with_format("arrow")

    images, encoded, rows = parts(data)
    kept, notes = readable(
        [partial(_stored, rows, column, n) for n in range(len(data))],
        names,
        form,
        layout.skip_unreadable,
        lambda n: form.load(partial(picture, images, column, n), names[n]),
    )
    if len(kept) < len(data):
        data, names = data.select(kept), [names[n] for n in kept]
        images, encoded, rows = parts(data)
    read = layout.columns(data.column_names, f"'{path}'")
    conditions: dict[str, list[Any]] = {ours: list(data[theirs]) for theirs, ours in read.items()}
    beside = [name for name in pictures if name in IMAGE_COLUMNS]
    for name in beside:
        # of one column, or those of all others would be decoded, too
        load = partial(picture, data.select_columns(name), name)
        conditions[name] = [partial(load, n) for n in range(len(data))]
    classes = None
    label = data.features.get("label")
    if isinstance(label, datasets.ClassLabel) and "class_labels" in conditions:
        numbers = [-1 if n is None else n for n in conditions.pop("class_labels")]
        classes = Classes(label.names, [label.names[n] if n >= 0 else None for n in numbers])

    upright = replace(form, buckets=False)  # as the library turns them

    def source_digest(n: int) -> str:
        stored = encoded[n][column]
        if stored is not None and stored["bytes"] is None:
            return digest_of(Path(stored["path"]).read_bytes())
        return digest_of(None if stored is None else stored["bytes"])

    if any(name not in {column, *beside} for name in pictures):
        notes.append("--image-column takes images from another column")
    unread = [name for name in data.column_names if name not in {column, *read, *beside}]
    return NamedImages(
        names,
        lambda n, place: form.load(partial(picture, images, column, n), names[n], place),
        source_digest,
        form,
        lambda n: upright.size_in(lambda: Image.open(_stored(rows, column, n)), names[n]),
        conditions,
        classes,
        [name for name in unread if not name.startswith("__")],  # WebDataset's own
        notes,
        columns={name: data[name] for name in data.column_names if name not in pictures},
    )


def _stored(rows: Any, column: str, n: int) -> Any:
    """An image as it is stored, of which no more is read than is looked at."""
    from pyarrow import BufferReader

    row = rows[n][column][0]
    raw = row["bytes"]
    return BufferReader(raw.as_buffer()) if raw.is_valid else Path(row["path"].as_py())


def _column(path: Path, pictures: list[str], columns: list[str], layout: Layout) -> str:
    """The column of images: that which is asked for, or 'image' among several, or the only one."""
    asked = layout.image_column
    if asked in columns:
        return str(asked)
    if asked is not None and not layout.of_queries:
        raise ValueError(
            f"`image_column` must be a column of '{path}', got {asked!r}. There are "
            f"{', '.join(columns)}: pass one of them, or leave it out."
        )
    images = [name for name in pictures if name not in IMAGE_COLUMNS]
    if not images:
        raise ValueError(
            f"'{path}' has the columns {columns}, none of which is of images. Pass --image-column "
            "with the one that holds them, as bytes or files."
        )
    if _IMAGE in images or len(images) == 1:
        return _IMAGE if _IMAGE in images else images[0]
    raise ValueError(
        f"'{path}' has several columns of images: {', '.join(images)}. Pass --image-column with "
        "the one that training saw."
    )
