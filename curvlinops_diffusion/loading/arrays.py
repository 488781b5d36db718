"""Images from ``.npz`` files, checked before anything is computed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from curvlinops_diffusion.loading.preprocessing import FILE_CHANNELS, Form, Loaded

_HOLDS = (
    "It must hold 'images': bytes [N, height, width, channels], or floating point in [-1, 1], "
    "[N, channels, height, width], with the network's channels, or bytes with 1 or 3"
)


_ROUNDING = 1e-4


@dataclass(frozen=True)
class Arrays:
    """The images of a file.

    Attributes:
        images: ``[N, height, width, channels]`` of bytes, or ``[N, channels, height, width]`` of
            floating point; without channels for one.
        names: A name for each image.
        labels: A label for each image, if there are any.
        form: The form in which the network takes them.
        unread: The other arrays.
        notes: What is to be said of them.
    """

    images: Any
    names: list[str]
    labels: list[int] | None
    form: Form
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, form: Form) -> Arrays:
        """Read a file.

        Raises:
            ValueError: If the file cannot be read, or its arrays are of no accepted kind.
        """
        arrays = _read(path)
        key = "images" if "images" in arrays else "x0"
        if key not in arrays or arrays[key].ndim not in (3, 4):
            shapes = {key: value.shape for key, value in arrays.items()}
            raise ValueError(f"'{path}' holds {shapes}. {_HOLDS}.")
        images, notes = arrays[key], []
        if "labels" not in arrays:
            _check_is_several(path, images, form)
        own = {form.channels} if form.channels is not None else set(FILE_CHANNELS)
        if images.dtype == np.uint8:
            taken = set(FILE_CHANNELS) if own <= set(FILE_CHANNELS) else own
            _check_channels(path, images, -1, taken)
        elif np.issubdtype(images.dtype, np.floating):
            _check_channels(path, images, 1, own)
            if key == "images":
                _check_range(path, images)
                if len(images) and images.min() >= 0:
                    notes = [
                        "no pixel is negative, and [-1, 1] is what floating point is taken for"
                    ]
        else:
            raise ValueError(f"'{key}' of '{path}' is of {images.dtype}. {_HOLDS}.")
        names = [f"{path.name}[{n}]" for n in range(len(images))]
        unread = [name for name in arrays if name not in (key, "labels")]
        return cls(images, names, _labels(path, arrays, len(images)), form, unread, notes)

    def load(self, n: int) -> Loaded:
        """An image as the network takes it, and its size before."""
        array, name = self.images[n], self.names[n]
        if array.dtype != np.uint8:
            x = torch.from_numpy(np.asarray(array, dtype=np.float32))
            x = x.unsqueeze(0) if x.ndim == 2 else x
            return self.form.sized(x, name), (x.shape[1], x.shape[2])
        height, width = array.shape[:2]
        if self.form.channels in (None, *FILE_CHANNELS):
            flat = array if array.ndim == 2 or array.shape[-1] > 1 else array[..., 0]
            return self.form.tensor(Image.fromarray(flat), name), (height, width)
        x = torch.from_numpy(array).movedim(-1, 0).float() / 127.5 - 1
        return self.form.sized(x, name), (height, width)


def _read(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). {_HOLDS}.") from error


def _labels(path: Path, arrays: dict[str, Any], count: int) -> Any:
    if "labels" not in arrays:
        return None
    labels = arrays["labels"]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"'labels' of '{path}' is of {labels.dtype} and shape {labels.shape} beside {count} "
            "images. It must hold a whole number for each image."
        )
    return labels.tolist()


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
