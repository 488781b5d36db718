"""A folder's ``metadata.jsonl``: what stands beside each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METADATA = "metadata.jsonl"

#: The columns that are read, and what they are called here.
COLUMNS = {
    "text": "prompt",
    "label": "class_labels",
    "original_size": "original_size",
    "crops_coords_top_left": "crops_coords_top_left",
    "target_size": "target_size",
}
#: The entries of an item that are images themselves, in columns of their name.
IMAGE_COLUMNS = ("mask_image", "conditioning_image")
# as data sets of images call columns of files
_FILE = "_file_name"


@dataclass(frozen=True)
class Metadata:
    """The lines of the file, by the names of their images.

    Attributes:
        rows: The entries of each line.
    """

    rows: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Metadata | None:
        """Read a folder's; ``None`` if it has none.

        Raises:
            ValueError: If the file is not understood.
        """
        path = folder / METADATA
        if not path.is_file():
            return None
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            return cls({line["file_name"]: dict(line) for line in lines})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise _not_understood(path, error) from error

    def others(self) -> set[str]:
        """The files that are named beside images, and are none of those to be attributed."""
        return {
            str(Path(value))
            for row in self.rows.values()
            for key, value in row.items()
            if (key in IMAGE_COLUMNS or (key.endswith(_FILE) and key != _FILE[1:]))
            and isinstance(value, str)
        }

    def conditions(self, folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
        """The entries of some images, ``None`` where one lacks.

        Raises:
            ValueError: If an image has no line.
        """
        for name in names:
            if name not in self.rows:
                raise _not_understood(folder / METADATA, KeyError(name))
        found = {
            ours: [self.rows[name].get(theirs) for name in names]
            for theirs, ours in COLUMNS.items()
            if any(theirs in row for row in self.rows.values())
        }
        for entry in IMAGE_COLUMNS:
            files = [self.rows[n].get(entry + _FILE, self.rows[n].get(entry)) for n in names]
            if any(files):
                found[entry] = [None if file is None else folder / file for file in files]
        return found


def _not_understood(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"'{path}' is not understood ({type(error).__name__}: {error}). Each line must "
        'be like {"file_name": "a.png", "text": "a cat"}, with a line for each image.'
    )
