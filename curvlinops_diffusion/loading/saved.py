"""Data sets that ``datasets`` saved to disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from curvlinops_diffusion.loading.labels import Classes
from curvlinops_diffusion.loading.metadata import COLUMNS, IMAGE_COLUMNS
from curvlinops_diffusion.runtime.digests import digest_of

# what training scripts take by default, and what is taken among several
_IMAGE = "image"


@dataclass(frozen=True)
class SavedDataset:
    """A saved data set, its columns by what they are.

    Attributes:
        images: The data set, its column of images alone.
        stored: The same, not decoded.
        column: The name of that column.
        names: A name for each image.
        conditions: The conditions of each image by name; those that are images, as what loads them.
        classes: The classes, if they have names.
        unread: The other columns.
    """

    images: Any
    stored: Any
    column: str
    names: list[str]
    conditions: dict[str, list[Any]]
    classes: Classes | None
    unread: list[str]

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a folder holds one, or several splits."""
        return any((path / n).is_file() for n in ("dataset_info.json", "dataset_dict.json"))

    @classmethod
    def of(cls, path: Path) -> SavedDataset:
        """Open a folder.

        Raises:
            ValueError: If it cannot be read, holds several splits, or it is not clear which column
                is of images.
        """
        return cls.of_data(_opened(path), path)

    @classmethod
    def of_data(cls, data: Any, path: Path) -> SavedDataset:
        """The columns of a data set that is open, from a folder or of a name.

        Raises:
            ValueError: As :meth:`of`.
        """
        import datasets

        data = data.with_format(None)  # whatever form of tensors it has
        pictures = [k for k, v in data.features.items() if isinstance(v, datasets.Image)]
        column = _column(path, pictures, data.column_names)
        for name in pictures:  # whether saved as files alone or not
            if not data.features[name].decode:
                mode = data.features[name].mode
                data = data.cast_column(name, datasets.Image(mode=mode))
        conditions: dict[str, list[Any]] = {
            ours: list(data[theirs])
            for theirs, ours in COLUMNS.items()
            if theirs in data.column_names
        }

        def picture(images: Any, column: str, n: int) -> Any:
            return images[n][column]

        beside = [name for name in pictures if name in IMAGE_COLUMNS]
        for name in beside:
            # of one column, or those of all others would be decoded, too
            load = partial(picture, data.select_columns(name), name)
            conditions[name] = [partial(load, n) for n in range(len(data))]
        classes = None
        label = data.features.get("label")
        if isinstance(label, datasets.ClassLabel):
            numbers = [-1 if n is None else n for n in conditions.pop("class_labels")]
            classes = Classes(label.names, [label.names[n] if n >= 0 else None for n in numbers])
        names = [f"{path.name}[{n}]" for n in range(len(data))]
        read = {column, *COLUMNS, *beside}
        unread = [name for name in data.column_names if name not in read]
        images = data.select_columns(column)
        stored = images.cast_column(column, datasets.Image(decode=False))
        return cls(images, stored, column, names, conditions, classes, unread)

    def source_digest(self, n: int) -> str:
        """A digest of an image as it is stored."""
        stored = self.stored[n][self.column]
        if stored is not None and stored["bytes"] is None:
            return digest_of(Path(stored["path"]).read_bytes())
        return digest_of(None if stored is None else stored["bytes"])

    def image(self, n: int) -> Any:
        """Load an image."""
        return self.images[n][self.column]


def _opened(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"'{path}' is a data set of the package datasets, which is not installed: pip install "
            "datasets."
        ) from error
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a data set ({error}). Save it again by save_to_disk."
        ) from error
    if not isinstance(data, datasets.Dataset):
        some = f"for instance '{path / next(iter(data), 'train')}'"
        raise ValueError(
            f"'{path}' holds splits: {', '.join(data)}. Pass the folder of one, {some}."
        )
    return data


def _column(path: Path, pictures: list[str], columns: list[str]) -> str:
    """The column of images: 'image' among several, else the only one."""
    images = [name for name in pictures if name not in IMAGE_COLUMNS]
    if not images:
        raise ValueError(
            f"'{path}' has the columns {columns}, none of which is of images. Cast the one that is "
            "by data.cast_column(name, datasets.Image()), and save it again."
        )
    if _IMAGE in images or len(images) == 1:
        return _IMAGE if _IMAGE in images else images[0]
    raise ValueError(
        f"'{path}' has several columns of images: {', '.join(images)}. Rename the one that "
        f"training saw by data.rename_column('{images[0]}', '{_IMAGE}') say, and save it again."
    )
