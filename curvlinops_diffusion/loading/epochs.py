"""Adapters that one training saved on its way, by the names that trainers give them."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path

from safetensors import safe_open

from curvlinops_diffusion.loading.saved_networks import check_whole, weights_in

# by what is counted: the names of kohya's epochs and steps, ai-toolkit's and OneTrainer's steps
_FILES = (
    ("epochs", re.compile(r"(.+)-(\d{6})")),
    ("steps", re.compile(r"(.+)-step(\d{8})")),
    ("steps", re.compile(r"(.+)_(\d{9})")),
    ("steps", re.compile(r"(.*?)(?:\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)?-save-(\d+)-\d+-\d+")),
)
_SAVED = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)-save-")  # when OneTrainer did
_FOLDER = re.compile(r"checkpoint-(\d+)")  # of diffusers' scripts and SimpleTuner


def adapters_by_step(folder: Path, last: int | None = 1) -> list[Path]:
    """Find the adapters that one training saved, in its order, the final one last.

    Args:
        folder: The folder that it wrote; or one adapter, of any form.
        last: How many adapters of a folder that holds several of one training are taken, counted
            from its end. Scores are of the final one; with more than 1 they are averaged over
            these, for as many times the work.

    Raises:
        ValueError: If the folder holds adapters of several trainings, or a damaged one, or their
            order is unknown.
    """
    found = _by_step(folder) if folder.is_dir() else [folder]
    if len(found) > 1 and _digest(found[-1]) == _digest(found[-2]):  # of the last step
        del found[-2]
    return found if last is None else found[-last:]


def _by_step(folder: Path) -> list[Path]:
    there = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    numbers = {path: int(match[1]) for path in there if (match := _FOLDER.fullmatch(path.name))}
    if folders := [path for path in numbers if weights_in(path)]:
        return sorted(folders, key=numbers.__getitem__) + [folder] * bool(weights_in(folder))
    files = [path for path in there if path.suffix == ".safetensors" and path.is_file()]
    steps: dict[Path, tuple[str, str, int]] = {}
    for path in files:
        for counted, form in _FILES:
            if match := form.fullmatch(path.stem):
                steps[path] = counted, match[1], int(match[2])
    if not steps:
        return [folder]
    final = [path for path in files if path not in steps]
    names = {*(name for _, name, _ in steps.values()), *(path.stem for path in final)}
    if len(names) > 1:
        some = ", ".join(f"'{name}'" for name in sorted(names)[:3])
        raise ValueError(
            f"'{folder}' holds adapters of several trainings ({some}). Pass the file of one as "
            "--lora, and earlier ones of the same training as --checkpoints."
        )
    order = {path: number for path, (_, _, number) in steps.items()}
    if len({counted for counted, _, _ in steps.values()}) > 1:
        told = {path: _entry(path, "ss_steps") for path in steps}  # by kohya's scripts
        order = {path: int(text) for path, text in told.items() if text.isdecimal()}
        if len(order) < len(steps):
            raise ValueError(
                f"The adapters in '{folder}' are numbered by epochs and by steps, and do not say "
                "(ss_steps) how these follow each other. Pass the last as --lora, and earlier ones "
                "in their order as --checkpoints."
            )
    found = sorted(steps, key=order.__getitem__) + final
    # of a run that went on from another later steps are later; of one that replaced some files not
    times = [(when, path) for path in found if (when := _when(path))]
    for (one, before), (other, after) in pairwise(times):
        if other < one:
            raise ValueError(
                f"'{folder}' holds adapters of several trainings: '{after.name}' is of a later "
                f"step than '{before.name}', and of an earlier run. Pass the file of one as "
                "--lora, and earlier ones of the same training as --checkpoints."
            )
    return found


def _when(path: Path) -> float | None:
    """The time when OneTrainer saved a file, or kohya's run of it began; ``None`` if unknown."""
    if saved := _SAVED.search(path.stem):
        return float(re.sub(r"\D", "", saved[1]))
    try:
        return float(_entry(path, "ss_training_started_at"))
    except ValueError:
        return None


def _digest(path: Path) -> bytes:
    """The digest of a file behind its header, which names it otherwise at the end of training."""
    file = path if path.is_file() else weights_in(path)
    assert file is not None
    check_whole(file)
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        return hashlib.file_digest(opened, "sha256").digest()


def _entry(path: Path, name: str) -> str:
    check_whole(path)
    with safe_open(path, "np") as file:
        return str((file.metadata() or {}).get(name, ""))
