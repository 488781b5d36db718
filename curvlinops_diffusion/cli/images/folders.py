"""The files of a folder of images, and their classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from curvlinops_diffusion.cli.images.labels import Classes
from curvlinops_diffusion.cli.images.metadata import METADATA

SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Files:
    """The files of a folder.

    Attributes:
        images: Those that are read, in order.
        left_out: The names of the others, in order.
    """

    images: list[Path]
    left_out: list[str]

    @classmethod
    def of(cls, folder: Path) -> Files:
        """The images in a folder and its subfolders; linked ones too, hidden ones never.

        Hidden files and folders (``.ipynb_checkpoints``, ``._a.png``) are made by programs beside
        what people put there; as images or classes they would shift the numbers of all others.
        """
        Image.init()
        known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
        readable = SUFFIXES & known
        images, left_out = [], []
        for path in sorted(_walk(folder)):
            relative = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not hidden and path.suffix.lower() in readable:
                images.append(path)
            elif str(relative) != METADATA:
                left_out.append(str(relative))
        return cls(images, left_out)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through links, each folder once."""
    seen: set[Path] = set()
    for found, folders, files in os.walk(folder, followlinks=True):
        here = Path(found)
        if here.resolve() in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add(here.resolve())
        yield from (here / name for name in files)


def classes_of(names: Sequence[str]) -> Classes | None:
    """The first folder of each image as its class, numbered alphabetically; ``None`` without any.

    Args:
        names: Names of images, relative to the whole folder.
    """
    parts = [Path(name).parts for name in names]
    folders = [own[0] if len(own) > 1 else None for own in parts]
    known = sorted({folder for folder in folders if folder is not None})
    return Classes(known, folders) if known else None
