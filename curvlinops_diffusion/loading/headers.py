"""Finds the images that cannot be read or are no squares, from both ends of their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import SEEK_END
from pathlib import Path
from typing import IO, Any
from warnings import catch_warnings, simplefilter

from PIL import Image

from curvlinops_diffusion.loading.metadata import first_of
from curvlinops_diffusion.loading.named_images import counted
from curvlinops_diffusion.loading.preprocessing import Form

#: A file, or a function that opens what is stored elsewhere.
Stored = Path | Callable[[], IO[bytes]]
# how files begin, and what is among their last bytes
_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8": b"\xff\xd9", b"GIF8": b";"}


def readable(
    stored: Sequence[Stored],
    names: Sequence[str],
    form: Form,
    skip: bool,
    why: Callable[[int], object],
) -> tuple[list[int], list[str]]:
    """Find the numbers of the images that can be read, and notes on them.

    Without their pixels, unless others are to be skipped: these are decoded, to be sure. ``why``
    loads an image, to raise its error.

    Raises:
        ValueError: If one cannot be read and is not skipped, or all are.
    """
    sizes = [_size(file, skip) for file in stored]
    kept = [n for n, size in enumerate(sizes) if size is not None]
    broken = [names[n] for n, size in enumerate(sizes) if size is None]
    if broken and not (skip and kept):
        try:
            why(names.index(broken[0]))
            told = (
                f"The image '{broken[0]}' cannot be read. Repair it, or remove it and start anew."
            )
        except ValueError as error:
            told = str(error)
        others = ", ".join(f"'{name}'" for name in broken[1:])
        told += f" {len(broken) - 1} more cannot be read: {others}." if others else ""
        raise ValueError(f"{told} --skip-unreadable leaves out those that cannot be read.")
    notes = cut_to_squares([size for size in sizes if size is not None], form)
    if broken:
        left_out = counted(len(broken), "image")
        notes.insert(0, f"{left_out} left out, unreadable: {first_of(broken)}")
    return kept, notes


def cut_to_squares(sizes: Sequence[tuple[int, int]], form: Form) -> list[str]:
    """Notes on images that are cut to squares or differ from the network's size."""
    resized, side = form.resolution is not None or bool(form.buckets), form.made_for
    if not resized and side is not None:
        others = sum(size != (side, side) for size in sizes)
        told = f"{others:,} of {counted(len(sizes), 'image')} of another size than {side}×{side}"
        return [f"{told}, which the network was made for (--resolution {side})"] if others else []
    cut = sum(width != height for width, height in sizes)
    if not cut or form.resolution is None or form.buckets:
        return []
    return [
        f"{cut:,} of {counted(len(sizes), 'image')} {'is' if cut == 1 else 'are'} not square, "
        "cut to a square from the middle (--buckets if training did not)"
    ]


def _size(stored: Stored, decode: bool) -> tuple[int, int] | None:
    """Width and height of an image; ``None`` if it cannot be read."""
    try:
        source: Any = stored if isinstance(stored, Path) else stored()
        with catch_warnings(), source.open("rb") if isinstance(source, Path) else source as file:
            simplefilter("ignore", Image.DecompressionBombWarning)
            # where its end is missing, as after a copy that was interrupted
            decode = decode or not _is_whole(file)
            with Image.open(file) as image:
                if decode:
                    image.load()
                return image.size
    except Exception:  # of a damaged file, which may be any
        return None


def _is_whole(file: IO[bytes]) -> bool:
    """Tell whether a file ends as files that begin like it do."""
    start = file.read(8)
    file.seek(0, SEEK_END)
    length = file.tell()
    file.seek(max(0, length - 32))
    end = file.read()
    file.seek(0)
    if start.startswith(b"RIFF"):  # WebP says how long it is
        return int.from_bytes(start[4:], "little") + 8 <= length
    return all(mark in end for first, mark in _ENDS.items() if start.startswith(first))
