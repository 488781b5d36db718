"""The files of a folder of images, captions beside them, and their classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from curvlinops_diffusion.loading.dataset_config import SUFFIXES as CONFIGS
from curvlinops_diffusion.loading.labels import Classes
from curvlinops_diffusion.loading.metadata import decoded, is_of_images, is_table
from curvlinops_diffusion.runtime.files import files_below

# the forms that images are given in
ACCEPTED = (
    "Pass a folder of images (subfolders are classes; metadata.jsonl or metadata.csv may give "
    "'text' or 'label' for each 'file_name', or files beside images captions), one image, a data "
    "set saved by datasets' save_to_disk, an .npz file with 'images' (and 'labels'), or the "
    "dataset.toml of kohya's scripts"
)
SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
# made by systems (macOS, Synology, Windows) beside what people put there
_MADE = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__pycache__"}
# folders of these names are parts of a data set, not classes
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
# the ends of captions' names, as trainers write them
_CAPTIONS = (".caption", ".txt")
# kohya's folders: how often an epoch has their images, and the prompt of those without a caption
_REPEATED = re.compile(r"([1-9]\d*)_(.*)")


def files_in(folder: Path) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Find the images in a folder and its subfolders; linked ones too, hidden ones never.

    Hidden files and folders (``.ipynb_checkpoints``, ``._a.png``) are made by programs beside what
    people put there; as images or classes they would shift the numbers of all others.

    Returns:
        The images by name, the metadata files, and the names of all other files, each in order.
    """
    Image.init()
    readable = {end for end in SUFFIXES if Image.EXTENSION.get(end) in Image.OPEN}
    images, tables, left_out = {}, [], []
    for path in sorted(files_below(folder)):
        relative = path.relative_to(folder)
        hidden = any(map(_is_hidden, relative.parts))
        if not hidden and path.suffix.lower() in readable:
            images[relative.as_posix()] = path
        elif not hidden and is_table(path) and is_of_images(path):
            tables.append(path)
        else:
            left_out.append(relative.as_posix())
    return images, tables, left_out


def check_images(path: Path) -> None:
    """Check that a path may hold images, by names alone, before anything is loaded.

    Raises:
        ValueError: If it does not exist, cannot be read, or is of something else.
    """
    if not path.exists():
        raise ValueError(f"'{path}' does not exist. {ACCEPTED}.")
    if path.is_file():
        if path.suffix.lower() not in (*SUFFIXES, *CONFIGS, ".npz"):
            raise ValueError(f"'{path}' is in no known form. {ACCEPTED}.")
        if path.stat().st_size == 0:
            raise ValueError(f"'{path}' is empty. {ACCEPTED}.")
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
    elif (path / "model_index.json").is_file():
        raise ValueError(f"'{path}' is a pipeline, not images. {ACCEPTED}.")
    elif not is_saved_dataset(path) and not any(
        file.suffix.lower() in SUFFIXES and not _is_hidden(file.name) for file in files_below(path)
    ):
        raise ValueError(f"'{path}' holds no images. {ACCEPTED}.")


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder holds a data set of ``save_to_disk``, or several splits."""
    return any((path / n).is_file() for n in ("dataset_info.json", "dataset_dict.json"))


def captions_beside(
    names: Sequence[str], others: Iterable[str], end: str | None = None
) -> dict[str, dict[str, str]]:
    """Find files that may hold captions, by the ends of their names and the names of their images.

    Args:
        names: The names of the images.
        others: The names of other files.
        end: Another end that the names of captions may have.
    """
    others, found = set(others), {}
    for suffix in dict.fromkeys((*([] if end is None else [end]), *_CAPTIONS)):
        files = {name: f"{Path(name).with_suffix('')}{suffix}" for name in names}
        found[suffix] = {name: file for name, file in files.items() if file in others}
    return {suffix: files for suffix, files in found.items() if files}


def read_caption(path: Path) -> tuple[str, bool]:
    """Read a caption, as kohya's ``sd-scripts`` do: the first line of its file.

    Returns:
        The caption, and whether other lines follow.

    Raises:
        ValueError: If the file is empty or not in UTF-8.
    """
    first, *more = re.split(r"\r\n|\r|\n", decoded(path))
    if not first and not more:
        raise ValueError(f"The caption '{path}' is empty. Write it, or remove the file.")
    return first.strip(), any(line.strip() for line in more)


def repeats_of(folder: Path, names: Sequence[str]) -> list[tuple[int, str]] | None:
    """Read repeats and prompts off the names of kohya's folders (``30_shs dog``), for each image.

    Raises:
        ValueError: If some images lie in such folders and others do not: training saw the images
            directly in such folders, and no others.
    """
    found = [_REPEATED.fullmatch(Path(name).parent.as_posix()) for name in names]
    if not any(found):
        return None
    for name, match in zip(names, found, strict=True):
        if match is None or "/" in match[2]:
            known = next(match[0].partition("/")[0] for match in found if match)
            raise ValueError(
                f"'{folder}' has folders as kohya's sd-scripts name them ('{known}'), which train "
                f"on the images directly in these, and '{name}' is none. Take it out; or if "
                "another program trained on it, rename these folders."
            )
    return [(int(match[1]), match[2]) for match in found if match]


def tables_left_out(names: Iterable[str]) -> list[str]:
    """Unread tables, among the names of files that were left out."""
    visible = (name for name in names if not any(map(_is_hidden, Path(name).parts)))
    return [f"{name}, without 'file_name'" for name in visible if is_table(Path(name))]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _MADE


def _first_folders(names: Sequence[str]) -> list[str | None]:
    """The first folder of each name; ``None`` where there is none."""
    parts = [Path(name).parts for name in names]
    return [own[0] if len(own) > 1 else None for own in parts]


def parts_of(names: Sequence[str]) -> list[str]:
    """The first folders if they are parts of a data set, training and test say; else nothing."""
    found = sorted({str(one) for one in _first_folders(names)})
    return found if len(found) > 1 and all(name.lower() in _PARTS for name in found) else []


def classes_of(folder: Path, names: Sequence[str]) -> Classes | None:
    """The first folder of each image as its class, numbered alphabetically; ``None`` if none."""
    classes = _first_folders(names)
    known = sorted({one for one in classes if one is not None})
    if not known:
        return None
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() and not _is_hidden(p.name))
    empty = [name for name in there if name not in known]
    doubt, parts = "", parts_of(names)
    if parts:
        doubt = (
            f"'{folder}' holds parts of a data set: {', '.join(parts)}. Pass the folder of one, "
            f"for instance '{folder / parts[-1]}'"
        )
    elif empty:
        doubt = (
            f"The folder '{empty[0]}' of '{folder}' holds no images, and it is not known whether "
            "training counted it as a class. Take it out of the folder"
        )
    elif len(known) == 1:
        doubt = (
            f"All images of '{folder}' are in its folder '{known[0]}', and each would have the "
            f"label 0. Pass '{folder / known[0]}' if the classes are the folders in it"
        )
    return Classes(known, classes, doubt)
