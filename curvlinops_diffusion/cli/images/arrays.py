"""Images from ``.npz`` files, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from curvlinops_diffusion.cli.images.preprocessing import Form

_HOLDS = (
    "It must hold 'images': bytes [N, height, width, channels], or floating point in [-1, 1], "
    "[N, channels, height, width], with 1 or 3 channels"
)


_ROUNDING = 1e-4


def read_arrays(path: Path, form: Form) -> tuple[list[str], Callable[[int], Tensor], Any]:
    """Names of the images of a file, a function that loads one, and their labels, if any.

    Raises:
        ValueError: If the file cannot be read, or its arrays are of no accepted kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). {_HOLDS}.") from error
    key = "images" if "images" in arrays else "x0"
    if key not in arrays or arrays[key].ndim not in (3, 4):
        shapes = {key: value.shape for key, value in arrays.items()}
        raise ValueError(f"'{path}' holds {shapes}. {_HOLDS}.")
    images = arrays[key]
    names = [f"{path.name}[{n}]" for n in range(len(images))]
    if images.dtype == np.uint8:
        _check_channels(path, images, -1, {1, 3})
    elif np.issubdtype(images.dtype, np.floating):
        _check_channels(path, images, 1, {1, 3} if form.channels is None else {form.channels})
        if key == "images":
            _check_range(path, images)
    else:
        raise ValueError(f"'{key}' of '{path}' is of {images.dtype}. {_HOLDS}.")

    def load(n: int) -> Tensor:
        array = images[n]
        if array.dtype == np.uint8:
            flat = array if array.ndim == 2 or array.shape[-1] > 1 else array[..., 0]
            return form.tensor(Image.fromarray(flat), names[n])
        x = torch.from_numpy(np.asarray(array, dtype=np.float32))
        return form.sized(x.unsqueeze(0) if x.ndim == 2 else x, names[n])

    return names, load, _labels(path, arrays, len(images))


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
