"""Images from folders, saved data sets and arrays, as data for ``NoisedRegression``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_ACCEPTED = (
    "Pass a folder of images (subfolders are classes; metadata.jsonl may give 'text' or 'label' "
    "for each 'file_name'), a data set saved by datasets' save_to_disk, or an .npz file with "
    "'images' (and 'labels')"
)


@dataclass(frozen=True)
class Form:
    """The form in which the network takes images.

    Attributes:
        channels: Colour channels, 1 or 3; ``None`` for those of the image.
        size: Height and width; ``None`` for any.
        resolution: What to resize to; ``None`` for no resizing.
    """

    channels: int | None
    size: tuple[int, int] | None
    resolution: int | None

    def tensor(self, image: Image.Image, name: str) -> Tensor:
        """The image in [-1, 1], shape ``[C, H, W]``.

        Raises:
            ValueError: If it has another size than the network's.
        """
        grey = self.channels == 1 or (self.channels is None and image.mode in ("L", "1", "I"))
        x = transforms.pil_to_tensor(image.convert("L" if grey else "RGB")).float() / 127.5 - 1
        return self.sized(x, name)

    def sized(self, x: Tensor, name: str) -> Tensor:
        """Resized where asked for, and checked."""
        if self.resolution is not None:
            x = transforms.resize(x, [self.resolution], antialias=True)
            x = transforms.center_crop(x, [self.resolution]).clamp(-1, 1)
        if self.size is not None and tuple(x.shape[1:]) != self.size:
            raise ValueError(
                f"The image '{name}' is {x.shape[1]}×{x.shape[2]} pixels, the network was trained "
                f"on {self.size[0]}×{self.size[1]}. Pass --resolution {self.size[0]} to resize."
            )
        return x


class NamedImages(Dataset[dict[str, Any]]):
    """Images with names, and labels or prompts if there are any.

    Attributes:
        names: A name for each image.
        conditions: Further entries of each item: ``'class_labels'`` or ``'prompt'``.
    """

    def __init__(
        self,
        names: list[str],
        load: Callable[[int], Tensor],
        conditions: dict[str, list[Any]] | None = None,
    ):
        self.names = names
        self.conditions = conditions or {}
        self._load = load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"x0": self._load(n), **{key: v[n] for key, v in self.conditions.items()}}

    def image(self, n: int) -> Tensor:
        """One image in [-1, 1], shape ``[C, H, W]``."""
        return self._load(n)


def open_images(path: Path, form: Form, conditioned: bool = True) -> NamedImages:
    """Open images of any accepted kind.

    Args:
        path: Folder or file.
        form: The form in which the network takes them.
        conditioned: Whether the network takes labels or prompts.

    Raises:
        ValueError: If there are none, or they are in no known form.
    """
    if path.is_dir() and (path / "dataset_info.json").is_file():
        images = _saved_dataset(path, form)
    elif path.is_dir():
        images = _folder(path, form)
    elif path.suffix == ".npz" and path.is_file():
        images = _arrays(path, form)
    else:
        what = "is in no known form" if path.exists() else "does not exist"
        raise ValueError(f"'{path}' {what}. {_ACCEPTED}.")
    if len(images) == 0:
        raise ValueError(f"'{path}' holds no images. {_ACCEPTED}.")
    if not conditioned:
        images.conditions = {}
    return images


def _folder(path: Path, form: Form) -> NamedImages:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    names = [str(f.relative_to(path)) for f in files]

    def load(n: int) -> Tensor:
        try:
            with Image.open(files[n]) as image:
                image.load()
                return form.tensor(image, names[n])
        except FileNotFoundError as error:
            raise ValueError(
                f"The image '{files[n]}' has vanished. Put it back, and start again to go on."
            ) from error
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(
                f"The image '{files[n]}' cannot be read ({error}). Repair it, or remove it and "
                "start anew."
            ) from error

    return NamedImages(names, load, _conditions(path, names))


def _conditions(path: Path, names: list[str]) -> dict[str, list[Any]]:
    metadata = path / "metadata.jsonl"
    if metadata.is_file():
        try:
            lines = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
            rows = {line["file_name"]: line for line in lines}
            keys = {"text": "prompt", "label": "class_labels"}
            found = {
                ours: theirs for theirs, ours in keys.items() if all(theirs in r for r in lines)
            }
            return {ours: [rows[name][key] for name in names] for ours, key in found.items()}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{metadata}' is not understood ({type(error).__name__}: {error}). Each line must "
                'be like {"file_name": "a.png", "text": "a cat"}, with a line for each image.'
            ) from error
    folders = [str(Path(name).parent) for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2 or "." in classes:
        return {}
    return {"class_labels": [classes.index(folder) for folder in folders]}


def _saved_dataset(path: Path, form: Form) -> NamedImages:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"'{path}' is a data set of the package datasets, which is not installed: pip install "
            "datasets."
        ) from error
    data = datasets.load_from_disk(str(path))
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"'{path}' holds several splits ({list(data)}). Pass one split's folder.")
    column = next((k for k, v in data.features.items() if isinstance(v, datasets.Image)), None)
    if column is None:
        raise ValueError(f"'{path}' has columns {data.column_names}, none of which is of images.")
    conditions = {}
    for theirs, ours in {"text": "prompt", "label": "class_labels"}.items():
        if theirs in data.column_names:
            conditions[ours] = list(data[theirs])
    names = [f"{path.name}[{n}]" for n in range(len(data))]
    return NamedImages(names, lambda n: form.tensor(data[n][column], names[n]), conditions)


def _arrays(path: Path, form: Form) -> NamedImages:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). {_ACCEPTED}.") from error
    images = arrays.get("images", arrays.get("x0"))
    if images is None or images.ndim not in (3, 4):
        shapes = {key: value.shape for key, value in arrays.items()}
        raise ValueError(
            f"'{path}' holds {shapes}. It must hold 'images': bytes [N, height, width, channels], "
            "or floating point in [-1, 1], [N, channels, height, width]."
        )
    names = [f"{path.name}[{n}]" for n in range(len(images))]
    labels = arrays.get("labels")
    conditions = {} if labels is None else {"class_labels": labels.tolist()}

    def load(n: int) -> Tensor:
        array = images[n]
        if array.dtype == np.uint8:
            return form.tensor(Image.fromarray(array.squeeze()), names[n])
        x = torch.from_numpy(np.asarray(array, dtype=np.float32))
        return form.sized(x.unsqueeze(0) if x.ndim == 2 else x, names[n])

    return NamedImages(names, load, conditions)
