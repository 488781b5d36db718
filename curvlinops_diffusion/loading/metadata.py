"""The captions and labels of a folder's images, from the metadata files in it."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any
from unicodedata import normalize

from curvlinops_diffusion.loading.layout import Layout

#: The entries of an item that are images themselves, in columns of their name.
IMAGE_COLUMNS = ("mask_image", "conditioning_image")
# as data sets of images call columns of files
_FILE = "_file_name"
# the files that ``datasets`` looks for beside images, in any folder
_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# byte order marks of UTF-16, and of UTF-32, which begins with one
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")


def is_table(path: Path) -> bool:
    """Tell whether a file has the name of a metadata file."""
    return path.name in _TABLES


def is_of_images(path: Path, layout: Layout) -> bool:
    """Tell whether a file names images as ``datasets`` does; tables of other programs do not.

    An empty file is one of no images.
    """
    raw = path.read_bytes().replace(b"\0", b"")  # whatever the encoding
    return any(name.encode() in raw for name in layout.file_columns) or not raw.strip()


@dataclass(frozen=True)
class Line:
    """A line of a metadata file, its entries by column."""

    file: Path
    number: int  # from 1
    name: str  # of the image, as it stands there
    entries: dict[str, Any]

    def __str__(self) -> str:
        """Its place, for messages."""
        return f"line {self.number} of '{self.file}'"


class Metadata:
    """The lines of a folder's metadata files, by the names of their images.

    Names in a file are relative to the folder that it lies in, as ``datasets`` takes them, and may
    be written as other systems do: with backslashes, if no image has them in its name; and for an
    image that no line names exactly, with letters composed otherwise (macOS) or in another case
    (Windows), if no two images differ in that alone.

    Attributes:
        lines: The line of each image.
        others: The images that lines name beside theirs, and that have no line of their own.
        without_image: The lines whose image is not there.
        alike: The images whose names their lines write in other letters.
    """

    def __init__(self, folder: Path, tables: Sequence[Path], names: Iterable[str], layout: Layout):
        """Read a folder's metadata files; ValueError if an image has several lines."""
        self._folder, self._names, self._layout = folder, set(names), layout
        self._by_letters: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._by_letters.setdefault(folded(name), []).append(name)
        self.lines: dict[str, Line] = {}
        left = self._place(line for table in tables for line in _lines_of(table, layout))
        exact = set(self.lines)
        # a name alike is of an image without a line alone: another image may have been removed
        self.without_image = self._place(left, exact)
        self.alike = sorted(self.lines.keys() - exact)
        found = {name for line in self.lines.values() for name in self.beside(line)}
        self.others = found - self.lines.keys()
        self._keys = {key for line in self.lines.values() for key in line.entries}

    def beside(self, line: Line) -> list[str]:
        """The images that a line names beside its own."""
        return [
            name
            for key, value in line.entries.items()
            if (key in IMAGE_COLUMNS or key.endswith(_FILE)) and isinstance(value, str)
            if (name := self._find(line.file.parent, value, self.lines)) is not None
        ]

    def _place(self, lines: Iterable[Line], taken: Container[str] | None = None) -> list[Line]:
        """Give images their lines, and return the lines whose image is not found."""
        left = []
        for line in lines:
            name = self._find(line.file.parent, line.name, taken)
            if name is None:
                left.append(line)
            elif name in self.lines:
                raise ValueError(
                    f"The image '{name}' stands in {self.lines[name]} and in {line}. Keep one line "
                    "for each image; of several captions, the one that it is to have."
                )
            else:
                self.lines[name] = line
        return left

    def _find(self, inner: Path, written: str, taken: Container[str] | None) -> str | None:
        """The image that a file in a folder names; ``taken`` ones, ``None`` for all, exactly."""
        forms = [self._relative(inner, form) for form in (written, written.replace("\\", "/"))]
        for name in forms:
            if name in self._names:
                return name
        alike = [] if taken is None else self._by_letters.get(folded(forms[-1]), [])
        return alike[0] if taken is not None and len(alike) == 1 and alike[0] not in taken else None

    def _relative(self, inner: Path, written: str) -> str:
        """A name relative to the whole folder, of one relative to a folder in it, or absolute."""
        if posixpath.isabs(written) or PureWindowsPath(written).drive:
            for start in (self._folder.absolute(), self._folder.resolve()):
                if Path(written).is_relative_to(start):
                    return Path(written).relative_to(start).as_posix()
            return written
        here = inner.relative_to(self._folder).as_posix()
        return posixpath.normpath(posixpath.join(here, written))

    def _columns(self) -> dict[str, str]:
        """The columns that are read, with their names here."""
        return self._layout.columns(self._keys, f"the metadata of '{self._folder}'")

    def unread(self) -> list[str]:
        """The columns that nothing here reads."""
        read = {*self._layout.file_columns, *self._columns(), *IMAGE_COLUMNS}
        return sorted(key for key in self._keys - read if not key.endswith(_FILE))

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of some images as they are, ``None`` where an image has no entry."""
        lines = [self.lines[name].entries for name in names]
        keys = dict.fromkeys(key for line in lines for key in line)
        return {key: [line.get(key) for line in lines] for key in keys}

    def conditions(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """The entries of some images, ``None`` where one lacks; ValueError if one has no line."""
        if without := [name for name in names if name not in self.lines]:
            raise ValueError(self._no_line(without, len(names)))
        lines = [self.lines[name] for name in names]
        found = {
            ours: [line.entries.get(theirs) for line in lines]
            for theirs, ours in self._columns().items()
        }
        for entry in IMAGE_COLUMNS:
            files = [line.entries.get(entry + _FILE, line.entries.get(entry)) for line in lines]
            if any(files):
                found[entry] = [
                    self._path(line.file.parent, str(file)) if file else None
                    for line, file in zip(lines, files, strict=True)
                ]
        return found

    def _path(self, inner: Path, written: str) -> Path:
        """The path of a file beside an image, whether it is there or not."""
        found = self._find(inner, written, self.lines)
        return self._folder / (self._relative(inner, written) if found is None else found)

    def _no_line(self, without: Sequence[str], count: int) -> str:
        start = lacking(without, count, self._folder, "line in the metadata")
        some = [*self.without_image, *self.lines.values()][:3]
        if not some:
            return f"{start}, and the metadata are empty. Give each image a line."
        return (
            f"{start}. '{some[0].file}' names, as it stands there, "
            f"{first_of([line.name for line in some])}, …; names are relative to the folder of the "
            "file. Give each image a line, or take it out of the folder."
        )


def lacking(without: Sequence[str], count: int, where: Path, what: str) -> str:
    """Say how many of the images have no such thing, without a full stop."""
    if len(without) == 1:
        return f"The image '{without[0]}' of '{where}' has no {what}"
    many = f"{len(without)} of the {count}" if len(without) < count else f"The {count}"
    return f"{many} images of '{where}' have no {what} ({first_of(without)})"


def first_of(names: Sequence[str]) -> str:
    """The first three of some names, for messages."""
    return ", ".join(f"'{name}'" for name in names[:3]) + ", …" * (len(names) > 3)


def folded(name: str) -> str:
    """A name as other systems may have it: composed otherwise, or in another case."""
    return normalize("NFC", name).casefold()


def _lines_of(path: Path, layout: Layout) -> Iterator[Line]:
    """Yield the lines of a file, each with an image's name."""
    rows = {".csv": _of_csv, ".jsonl": _of_json, ".parquet": _of_parquet}[path.suffix]
    for number, entries in rows(path, layout):
        column = next((key for key in layout.file_columns if key in entries), None)
        name = None if column is None else entries[column]
        if not isinstance(name, str) or not name.strip():
            found = f"{sorted(entries)}" if column is None else f"'{column}': {name!r}"
            wanted = layout.file_columns[0]
            raise _wrong(path, number, f"it has no image's name as '{wanted}', but {found}")
        yield Line(path, number, name, entries)


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, with a byte order mark or without."""
    raw = path.read_bytes()
    if raw.startswith(_WIDE) or b"\0" in raw:
        raise ValueError(f"'{path}' is in UTF-16 or UTF-32. Save it as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"'{path}' is not in UTF-8: line {number} has the byte {raw[error.start]:#04x}. It may "
            "be in Windows-1252 or another encoding; save it as UTF-8."
        ) from error


def _of_json(path: Path, _: Layout) -> Iterator[tuple[int, dict[str, Any]]]:
    # at line feeds alone: separators such as U+2028 belong to the caption that they stand in
    for number, line in enumerate(decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _wrong(path, number, str(error)) from error
        if not isinstance(entries, dict):
            raise _wrong(path, number, f"it is a {type(entries).__name__}")
        yield number, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two values, one would be lost in silence."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(key for key in entries if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"'{twice}' stands in it twice")
    return entries


def _of_csv(path: Path, layout: Layout) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table with commas; empty cells have no entry, and whole labels are numbers."""
    rows = csv.reader(io.StringIO(decoded(path), newline=""), strict=True)
    try:
        columns = next(rows, [])
        if not {*columns} & {*layout.file_columns} or len(set(columns)) != len(columns):
            raise _wrong(path, 1, f"the columns are {columns}, separated by commas")
        for cells in filter(None, rows):
            if len(cells) != len(columns):
                raise _wrong(path, rows.line_num, f"{len(cells)} cells for {len(columns)} columns")
            entries: dict[str, Any] = {k: v for k, v in zip(columns, cells, strict=True) if v != ""}
            if re.fullmatch(r"\s*-?\d+\s*", entries.get("label", "")):
                entries["label"] = int(entries["label"])
            yield rows.line_num, entries
    except csv.Error as error:
        raise _wrong(path, rows.line_num, str(error)) from error


def _of_parquet(path: Path, _: Layout) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table; empty cells have no entry."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"'{path}' needs the package datasets: pip install datasets.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' cannot be read as Parquet ({error}). Save it again, or as metadata.jsonl."
        ) from error
    for number, row in enumerate(rows, 1):
        yield number, {key: value for key, value in row.items() if value is not None}


def _wrong(path: Path, number: int, why: str) -> ValueError:
    like = (
        "The first line must be like file_name,text and each other one like a.png,a cat"
        if path.suffix == ".csv"
        else 'Each line must be like {"file_name": "a.png", "text": "a cat"}'
    )
    return ValueError(f"'{path}' is not understood in line {number}: {why}. {like}.")
