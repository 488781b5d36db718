"""The captions and labels of a folder's images, from the metadata files in it."""

from __future__ import annotations

import posixpath
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any
from unicodedata import normalize

from curvlinops_diffusion.loading.tables import OTHER_TABLES, lines_of

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
class Line:
    """A line of a metadata file.

    Attributes:
        file: The file.
        number: The line, from 1.
        entries: Its entries by column, names of files as they stand in it.
    """

    file: Path
    number: int
    entries: dict[str, Any]

    def __str__(self) -> str:
        """Where it stands."""
        return f"line {self.number} of '{self.file}'"

    def files(self) -> list[str]:
        """The files that it names beside its image."""
        return [
            value
            for key, value in self.entries.items()
            if (key in IMAGE_COLUMNS or key.endswith(_FILE)) and isinstance(value, str)
        ]


class Names:
    """Finds a folder's images by names as other systems write them."""

    def __init__(self, folder: Path, names: Iterable[str]):
        self._folder = folder
        self._names = set(names)
        self._alike: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._alike.setdefault(_folded(name), []).append(name)

    def found(self, inner: Path, written: str, taken: Container[str] | None = None) -> str | None:
        """The image that a metadata file in a folder names; ``None`` for none.

        Backslashes separate folders if no image has them in its name.

        Args:
            inner: The folder of the metadata file.
            written: The name that stands there.
            taken: Images that are named exactly or not at all; ``None`` for all. Other names may
                differ in how letters are composed (macOS) or in case (Windows), if those of no two
                images differ in that alone.
        """
        forms = [self._relative(inner, form) for form in (written, written.replace("\\", "/"))]
        for name in forms:
            if name in self._names:
                return name
        alike = [] if taken is None else self._alike.get(_folded(forms[-1]), [])
        return alike[0] if taken is not None and len(alike) == 1 and alike[0] not in taken else None

    def path(self, inner: Path, written: str, taken: Container[str]) -> Path:
        """The path of a file beside an image, whether it is there or not."""
        found = self.found(inner, written, taken)
        return self._folder / (self._relative(inner, written) if found is None else found)

    def _relative(self, inner: Path, written: str) -> str:
        """A name relative to the whole folder, of one relative to a folder in it, or absolute."""
        if posixpath.isabs(written) or PureWindowsPath(written).drive:
            for start in (self._folder.absolute(), self._folder.resolve()):
                if Path(written).is_relative_to(start):
                    return Path(written).relative_to(start).as_posix()
            return written
        here = inner.relative_to(self._folder).as_posix()
        return posixpath.normpath(posixpath.join(here, written))


def _folded(name: str) -> str:
    return normalize("NFC", name).casefold()


@dataclass(frozen=True)
class Metadata:
    """The lines of all metadata files of a folder, by the names of their images.

    Attributes:
        lines: The line of each image.
        names: What finds images by their names.
        others: The images that lines name beside theirs, and that have no line of their own.
        without_image: The lines whose image is not there.
        alike: The images whose names their lines write in other letters.
    """

    lines: dict[str, Line]
    names: Names
    others: set[str] = field(default_factory=set)
    without_image: list[Line] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, tables: Iterable[Path], names: Sequence[str]) -> Metadata | None:
        """Read metadata files; ``None`` if there is none.

        Names in a file are relative to the folder that it lies in, as ``datasets`` takes them.

        Args:
            folder: The folder of the images.
            tables: The metadata files in it and its subfolders.
            names: The names of the images, relative to it.

        Raises:
            ValueError: If a file is not understood, or an image has several lines.
        """
        tables, result = list(tables), cls({}, Names(folder, names))
        if not tables:
            return None
        for table in tables:
            if table.name in OTHER_TABLES:
                raise ValueError(f"'{table}' is not read. Save it as metadata.jsonl or .csv.")
        lines = [Line(table, *line) for table in tables for line in lines_of(table)]
        lines = result._place(lines, None)
        exact = set(result.lines)
        # a name alike is of an image without a line alone: another image may have been removed
        result.without_image.extend(result._place(lines, exact))
        result.alike.extend(sorted(result.lines.keys() - exact))
        named = [
            (line.file.parent, file) for line in result.lines.values() for file in line.files()
        ]
        beside = {result.names.found(*one, result.lines) for one in named}
        result.others.update(name for name in beside if name is not None)
        result.others.difference_update(result.lines)  # it is an image, too
        return result

    def _place(self, lines: Iterable[Line], taken: Container[str] | None) -> list[Line]:
        """Give images their lines, and return the lines whose image is not found."""
        left = []
        for line in lines:
            name = self.names.found(line.file.parent, line.entries["file_name"], taken)
            if name is None:
                left.append(line)
                continue
            if name in self.lines:
                raise ValueError(
                    f"The image '{name}' stands in {self.lines[name]} and in {line}. Keep one line "
                    "for each image; of several captions, the one that it is to have."
                )
            self.lines[name] = line
        return left

    def unread(self) -> list[str]:
        """The columns that nothing here reads."""
        columns = {key for line in self.lines.values() for key in line.entries}
        read = {"file_name", *COLUMNS, *IMAGE_COLUMNS}
        return sorted(key for key in columns - read if not key.endswith(_FILE))

    def conditions(self, folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
        """The entries of some images, ``None`` where one lacks.

        Raises:
            ValueError: If an image has no line.
        """
        for name in names:
            if name not in self.lines:
                raise ValueError(f"The image '{name}' of '{folder}' {self._where_others_stand()}")
        lines = [self.lines[name] for name in names]
        found = {
            ours: [line.entries.get(theirs) for line in lines]
            for theirs, ours in COLUMNS.items()
            if any(theirs in line.entries for line in lines)
        }
        for entry in IMAGE_COLUMNS:
            files = [line.entries.get(entry + _FILE, line.entries.get(entry)) for line in lines]
            if any(files):
                found[entry] = [
                    self.names.path(line.file.parent, str(file), self.lines) if file else None
                    for line, file in zip(lines, files, strict=True)
                ]
        return found

    def _where_others_stand(self) -> str:
        """End a sentence about an image without a line."""
        some = [*self.without_image, *self.lines.values()][:3]
        if not some:
            return "has no line in the metadata, which is empty. Give each image a line."
        as_written = ", ".join(f"'{line.entries['file_name']}'" for line in some)
        return (
            f"has no line in the metadata. '{some[0].file}' names, as it stands there, "
            f"{as_written}, …; names are relative to the folder of the file. Give each image a "
            "line, or take it out of the folder."
        )
