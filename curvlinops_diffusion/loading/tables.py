"""The lines of a metadata file, read as what they say or refused by file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The files that ``datasets`` looks for beside images, in any folder.
TABLES = ("metadata.jsonl", "metadata.csv")
#: What it would read, too, and is refused here.
OTHER_TABLES = ("metadata.parquet",)

# byte order marks of UTF-16, and of UTF-32, which begins with one
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")


def is_table(path: Path) -> bool:
    """Whether a file has the name of a metadata file."""
    return path.name in (*TABLES, *OTHER_TABLES)


def is_of_images(path: Path) -> bool:
    """Whether a file names images as ``datasets`` does; tables of other programs do not.

    An empty file is one of no images.
    """
    raw = path.read_bytes().replace(b"\0", b"")  # whatever the encoding
    return b"file_name" in raw or not raw.strip()


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line, from 1, and its entries by column.

    A line of ``.jsonl`` ends at a line feed and nowhere else: separators such as U+2028 belong to
    the caption that they stand in.

    Raises:
        ValueError: If the file is not in UTF-8, or a line is no object or has no image's name.
    """
    text = _decoded(path)
    for number, entries in (_of_csv if path.suffix == ".csv" else _of_json)(path, text):
        name = entries.get("file_name")
        if not isinstance(name, str) or not name.strip():
            found = f"'file_name': {name!r}" if "file_name" in entries else f"{sorted(entries)}"
            raise _wrong(path, number, f"it has no image's name as 'file_name', but {found}")
        yield number, entries


def _decoded(path: Path) -> str:
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


def _of_json(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _wrong(path, number, str(error)) from error
        if not isinstance(entries, dict):
            raise _wrong(path, number, f"it is a {type(entries).__name__}")
        yield number, entries


def _of_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table with commas; empty cells have no entry, and whole labels are numbers."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(rows, [])
        if "file_name" not in columns or len(set(columns)) != len(columns):
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two values, one would be lost in silence."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(key for key in entries if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"'{twice}' stands in it twice")
    return entries


def _wrong(path: Path, number: int, why: str) -> ValueError:
    like = (
        "The first line must be like file_name,text and each other one like a.png,a cat"
        if path.suffix == ".csv"
        else 'Each line must be like {"file_name": "a.png", "text": "a cat"}'
    )
    return ValueError(f"'{path}' is not understood in line {number}: {why}. {like}.")
