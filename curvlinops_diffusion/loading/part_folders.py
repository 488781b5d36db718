"""Folders of some of the images of a folder, as trainers take them: links, captions, metadata."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from curvlinops_diffusion.loading.folders import files_in
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.metadata import Metadata
from curvlinops_diffusion.runtime.files import make_folder, write_bytes


def write_part_folders(
    data: Path, layout: Layout, parts: Mapping[str, Collection[str]], output: Path
) -> None:
    """Write a folder for each part of a folder's images, with the folders within it.

    Images, and what lies beside them under the same name (captions, masks), are links, or copies
    where there are no links. Lines of metadata become a ``metadata.jsonl``, which every trainer
    reads that reads one of the other forms.

    Args:
        data: The folder of the images.
        layout: How they lie in it.
        parts: The names of the images of each part.
        output: Where the folders go, each of the name of its part.

    Raises:
        ValueError: If ``data`` is no folder of images, or a folder cannot be written.
    """
    images, tables, others = files_in(data, layout) if data.is_dir() else ({}, [], [])
    if not images:
        raise ValueError(
            f"`folders` are written of folders of images alone, got '{data}'. Leave it out, and "
            "let the trainer take the images that each PART.txt lists."
        )
    metadata = Metadata(data, tables, images, layout) if tables else None
    beside: dict[str, list[str]] = {}
    for name in others:
        beside.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    for part, names in parts.items():
        lines: dict[Path, list[str]] = {}
        for name in names:
            own = [name, *beside.get(str(PurePosixPath(name).with_suffix("")), [])]
            if metadata is not None and name in metadata.lines:
                line = metadata.lines[name]
                folder = line.file.parent.relative_to(data)
                lines.setdefault(folder, []).append(json.dumps(line.entries, ensure_ascii=False))
                own += [each for each in metadata.beside(line) if each not in own]
            for each in own:
                _link(data / each, output / part / each)
        for folder, texts in lines.items():
            target = output / part / folder / "metadata.jsonl"
            write_bytes(target, "".join(f"{text}\n" for text in texts).encode())


def _link(file: Path, target: Path) -> None:
    make_folder(target.parent)
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(file.resolve())
    except OSError:  # a file system, or Windows' users, without links
        shutil.copy2(file, target)
