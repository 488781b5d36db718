"""Files that a command writes: whether they can be, and whether they have been already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvlinops_diffusion.cli.checkpoints import checkpoint_of, remove
from curvlinops_diffusion.cli.events import say
from curvlinops_diffusion.cli.processes import is_first
from curvlinops_diffusion.runtime.files import check_same


def check_output(path: Path, suffixes: tuple[str, ...], inputs: Mapping[str, Path | None]) -> None:
    """Check, before anything is computed, that a file can be written.

    Args:
        path: The file.
        suffixes: The suffixes that it may have.
        inputs: What the command reads, by the option's name.

    Raises:
        ValueError: If it has another suffix, is a folder, is in none that can be written to, or is
            what the command reads.
    """
    for option, read in inputs.items():
        if read is not None and read.exists() and path.exists() and path.samefile(read):
            raise ValueError(f"--output {path} is what {option} reads. Pass another file.")
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder. Pass the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder '{path.parent}' of --output does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"The folder '{path.parent}' of --output cannot be written to.")


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


def nothing_to_do(path: Path) -> None:
    """Say so; what a run that was killed at its very end has left is removed."""
    remove(checkpoint_of(path))
    if is_first():
        say(f"'{path}' was made with the same options; nothing to do")
