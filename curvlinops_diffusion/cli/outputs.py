"""Files that a command writes: whether they can be, and whether they have been already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from curvlinops_diffusion.runtime.files import check_can_be_written, check_same, kind_of


def check_output(
    path: Path,
    suffixes: tuple[str, ...],
    inputs: Iterable[tuple[str, Path]],
    kind: str | None = None,
) -> None:
    """Check, before anything is computed, that a file can be written.

    Args:
        path: The file.
        suffixes: The suffixes that it may have.
        inputs: What the command reads, by the option's name.
        kind: The key of the kind of safetensors file that is written.

    Raises:
        ValueError: If it has another suffix, is a folder, is in none that can be written to, is
            what the command reads, or is a file of weights or of another command.
    """
    try:
        there = path.exists()
        for option, read in inputs:
            if there and read.exists() and path.samefile(read):
                raise ValueError(f"--output {path} is what {option} reads. Pass another file.")
    except OSError as error:  # a name that is too long, say
        raise ValueError(f"--output {path} cannot be written: {error.strerror}.") from error
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder. Pass the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder '{path.parent}' of --output does not exist. Create it first.")
    check_can_be_written(path, "--output")
    if there:
        _check_own(path, kind)


def _check_own(path: Path, kind: str | None) -> None:
    """Check that a file that may be replaced is one of this command's.

    Raises:
        ValueError: If it holds something else, which ``--overwrite`` would destroy.
    """
    if path.suffix != ".safetensors" or kind is None:
        return
    found = kind_of(path)
    if found not in (None, kind):
        what = found.rpartition(".")[2].replace("_", " ") if found else "weights"
        raise ValueError(
            f"--output {path} exists, and is a file of another kind ({what}). Pass another name; "
            "it is not replaced, --overwrite or not."
        )


def check_output_is_new(path: Path, overwrite: bool) -> None:
    """Check that nothing would be replaced that nobody said to replace.

    Raises:
        ValueError: If something would.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"'{path}' exists. Pass --overwrite, or another --output.")


def check_output_is_same(path: Path, there: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that a file that is there has the identity of what would be written.

    Raises:
        ValueError: If it has another.
    """
    check_same(
        there.get("identity", {}),
        identity,
        f"'{path}' exists, and was made with others",
        "Pass --overwrite, or another --output.",
    )
