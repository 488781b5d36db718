"""The files of a folder of images, captions beside them, and their classes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from os.path import splitext
from pathlib import Path

from PIL import Image

from curvlinops_diffusion.loading.dataset_config import SUFFIXES as CONFIGS
from curvlinops_diffusion.loading.labels import Classes
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.metadata import Metadata, decoded, folded, is_of_images, is_table
from curvlinops_diffusion.runtime.files import files_below, make_folder, write_bytes

# the forms that images are given in
ACCEPTED = (
    "Pass a folder of images (subfolders are classes; metadata.jsonl, .csv or .parquet may give "
    "'text' or 'label' for each 'file_name', or files beside images captions), one image, a data "
    "set of datasets (save_to_disk, .parquet, or .tar of WebDataset), an .npz file with 'images' "
    "(and 'labels'), or the dataset.toml of kohya's scripts"
)
SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
# the ends of files that the library datasets reads, and its name for them
TABLES = {".parquet": "parquet", ".tar": "webdataset"}
# made by systems (macOS, Synology, Windows) beside what people put there, and what ai-toolkit keeps
# images that a network is shown in
_MADE = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__pycache__"}
_MADE |= {"_controls"}
# folders of these names are parts of a data set, not classes; as datasets knows them
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# what OneTrainer takes for masks and images beside those of its training
BESIDE = ("-masklabel", "-condlabel")
# the ends of captions' names, as trainers write them
_CAPTIONS = (".caption", ".txt")
# kohya's folders: how often an epoch has their images, and the prompt of those without a caption
_REPEATED = re.compile(r"0*([1-9]\d*)_(.*)")
_KOHYA = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}


def files_in(folder: Path, layout: Layout) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Find the images by name, the metadata files and the names of all others, each in order.

    In subfolders and through links, too. Hidden files and folders (``.ipynb_checkpoints``,
    ``._a.png``) are made by programs; as images or classes they would shift the numbers of all
    others. So would OneTrainer's masks (``a-masklabel.png``).
    """
    Image.init()
    readable = {end for end in SUFFIXES if Image.EXTENSION.get(end) in Image.OPEN}
    images, tables, left_out = {}, [], []
    for path in sorted(files_below(folder)):
        name = path.relative_to(folder).as_posix()
        hidden = is_hidden(name)
        if not hidden and path.suffix.lower() in readable and not path.stem.endswith(BESIDE):
            images[name] = path
        elif not hidden and is_table(path) and is_of_images(path, layout):
            tables.append(path)
        else:
            left_out.append(name)
    return images, tables, left_out


def check_images(path: Path) -> None:
    """Check that a path may hold images, by names alone, before anything is loaded.

    Raises:
        ValueError: If it does not exist, cannot be read, or is of something else.
    """
    if not path.exists():
        raise ValueError(f"'{path}' does not exist. {ACCEPTED}.")
    if path.is_file():
        if path.suffix.lower() not in (*SUFFIXES, *TABLES, *CONFIGS, ".npz"):
            raise ValueError(f"'{path}' is in no known form. {ACCEPTED}.")
        if path.stat().st_size == 0:
            raise ValueError(f"'{path}' is empty. {ACCEPTED}.")
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
    elif (path / "model_index.json").is_file():
        raise ValueError(f"'{path}' is a pipeline, not images. {ACCEPTED}.")
    elif kind_of_data(path) is None:
        raise ValueError(f"'{path}' holds no images. {ACCEPTED}.")


def kind_of_data(path: Path) -> str | None:
    """Tell what a file or folder holds by names alone.

    ``'saved'`` is a data set of ``save_to_disk``, or several splits; ``'images'``; where there are
    none, the name that ``datasets`` has for the other files; else ``None``.
    """
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "saved"
    ends = set()
    for file in files_below(path) if path.is_dir() else [path]:
        ends |= set() if is_hidden(file.name) or is_table(file) else {file.suffix.lower()}
        if ends & SUFFIXES:
            return "images"
    return next((kind for end, kind in TABLES.items() if end in ends), None)


def captions_beside(
    names: Sequence[str], others: Iterable[str], end: str | None = None
) -> dict[str, dict[str, str]]:
    """Find files that may hold captions, by the ends of their names and the names of their images.

    For an image that has none of its very name, one is found whose name is composed otherwise
    (macOS) or in another case (Windows), if there is only one. ``end`` is another end of captions.
    """
    by_letters: dict[str, list[str]] = {}
    for file in (others := set(others)):
        by_letters.setdefault(folded(file), []).append(file)
    found = {}
    for suffix in dict.fromkeys((*([] if end is None else [end]), *_CAPTIONS)):
        wanted = {name: f"{splitext(name)[0]}{suffix}" for name in names}
        exact = {name: file for name, file in wanted.items() if file in others}
        own = {*exact.values()}
        alike = {name: by_letters.get(folded(file), []) for name, file in wanted.items()}
        found[suffix] = exact | {
            name: files[0]
            for name, files in alike.items()
            if name not in exact and len(files) == 1 and files[0] not in own
        }
    return {suffix: files for suffix, files in found.items() if files}


def captions_alone(names: Sequence[str], others: Sequence[str], end: str | None) -> list[str]:
    """The files with the end of captions, of several the first, that no image is of."""
    for suffix in _CAPTIONS if not end else (end,):
        own = captions_beside(names, others, suffix).get(suffix, {}).values()
        ending = [name for name in others if name.endswith(suffix) and not is_hidden(name)]
        if alone := [name for name in ending if name not in own]:
            return alone
    return []


def read_caption(path: Path, layout: Layout) -> tuple[str, bool]:
    """Read a caption and whether other lines follow: the first line, as kohya's scripts, or all.

    Raises:
        ValueError: If the file is empty or not in UTF-8.
    """
    first, *more = re.split(r"\r\n|\r|\n", decoded(path))
    if layout.caption_lines == "all":
        return "\n".join([first, *more]), False
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
        if match is None or "/" in match[2] or Path(name).suffix.lower() not in _KOHYA:
            known = next(match[0].partition("/")[0] for match in found if match)
            raise ValueError(
                f"'{folder}' has folders as kohya's sd-scripts name them ('{known}'), which train "
                "on the images (.png, .jpg, .webp, .bmp, .avif) directly in these, and "
                f"'{name}' is none. Take it out; or if another program trained on it, rename these "
                "folders."
            )
    return [(int(match[1]), match[2]) for match in found if match]


def repeats_below(names: Sequence[str]) -> str | None:
    """The first folder, if there are folders of kohya's in it and not around it."""
    inner = (Path(name).parent for name in names)
    found = (i.parent for i in inner if len(i.parts) > 1 and _REPEATED.fullmatch(i.name))
    return next((folder.as_posix() for folder in found), None)


def tables_left_out(names: Iterable[str], layout: Layout) -> list[str]:
    """Unread tables, among the names of files that were left out."""
    visible = (name for name in names if not is_hidden(name))
    wanted = layout.file_columns[0]
    return [f"{name}, without '{wanted}'" for name in visible if is_table(Path(name))]


def is_hidden(name: str) -> bool:
    """Tell whether programs made a file or a folder of its relative path, and not people."""
    return any(part.startswith(".") or part in _MADE for part in name.split("/"))


def _first_folders(names: Sequence[str]) -> list[str | None]:
    """The first folder of each name; ``None`` where there is none."""
    parts = [Path(name).parts for name in names]
    return [own[0] if len(own) > 1 else None for own in parts]


def parts_of(names: Sequence[str]) -> list[str]:
    """The first folders if they are parts of a data set, training and test say; else nothing."""
    found = sorted({str(one) for one in _first_folders(names)})
    return found if len(found) > 1 and all(name.lower() in _PARTS for name in found) else []


def folders_of_split(folder: Path, names: Sequence[str], split: str) -> list[str]:
    """The first folders of a split's images, by its name or another one for it.

    Raises:
        ValueError: If there are none.
    """
    first = sorted({one for one in _first_folders(names) if one is not None})
    asked = _PARTS.get(split.lower(), split)
    found = [one for one in first if split == one or _PARTS.get(one.lower()) == asked]
    if not found:
        raise ValueError(
            f"`split` must be a folder of '{folder}', got {split!r}. There are "
            f"{', '.join(first[:8]) or 'none'}: pass one of them, or leave it out."
        )
    return found


def classes_of(folder: Path, names: Sequence[str]) -> Classes | None:
    """The first folder of each image as its class, numbered alphabetically; ``None`` if none."""
    classes = _first_folders(names)
    known = sorted({one for one in classes if one is not None})
    if not known:
        return None
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    empty = [name for name in there if name not in known]
    doubt, parts = "", parts_of(names)
    if parts:
        doubt = (
            f"'{folder}' holds parts of a data set: {', '.join(parts)}. Pass --split "
            f"{parts[-1]}, say"
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


def write_part_folders(
    data: Path, layout: Layout, parts: Mapping[str, Collection[str]], output: Path
) -> None:
    """Write a folder for each part of a folder's images, with the folders within it.

    Images, and what lies beside them under the same name (captions, masks), are links, or copies
    where there are no links. Lines of metadata become a ``metadata.jsonl``, which every trainer
    reads that reads one of the other forms. ``parts`` are the names of the images of each part.

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
        beside.setdefault(splitext(name)[0], []).append(name)
    for part, names in parts.items():
        lines: dict[Path, list[str]] = {}
        for name in names:
            own = [name, *beside.get(splitext(name)[0], [])]
            if metadata is not None and name in metadata.lines:
                line = metadata.lines[name]
                folder = line.file.parent.relative_to(data)
                lines.setdefault(folder, []).append(json.dumps(line.entries, ensure_ascii=False))
                own += [each for each in metadata.beside(line) if each not in own]
            for each in own:
                target = output / part / each
                make_folder(target.parent)
                target.unlink(missing_ok=True)
                try:
                    target.symlink_to((data / each).resolve())
                except OSError:  # a file system, or Windows' users, without links
                    shutil.copy2(data / each, target)
        for folder, texts in lines.items():
            target = output / part / folder / "metadata.jsonl"
            write_bytes(target, "".join(f"{text}\n" for text in texts).encode())
