"""The folder in which a command writes down how far it has come."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import distributed

from curvlinops_diffusion.cli.events import say
from curvlinops_diffusion.cli.processes import is_first
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError

T = TypeVar("T")


def checkpoint_of(output: Path) -> Path:
    """The folder of a command's output."""
    return output.with_name(f"{output.name}.checkpoint")


def remove(checkpoint: Path) -> None:
    """Delete the folder, if there is one: the output is written."""
    if is_first():
        shutil.rmtree(checkpoint, ignore_errors=True)


def nothing_to_do(path: Path) -> None:
    """Say so; what a run that was killed at its very end has left is removed."""
    remove(checkpoint_of(path))
    if is_first():
        say(f"'{path}' was made with the same options; nothing to do")


def going_on(run: Callable[[], T], checkpoint: Path, overwrite: bool) -> T:
    """Run what goes on from a checkpoint; to overwrite, one of something else is no obstacle.

    What is of the same run is used in either case, so that a run that replaces an output can be
    interrupted, too.

    Args:
        run: Computes the output; refuses a checkpoint of something else.
        checkpoint: The folder.
        overwrite: Whether to delete it then, and start anew.

    Raises:
        ValueError: As ``run``.
    """
    try:
        return run()
    except OtherCheckpointError:
        if not overwrite:
            raise
        if is_first():
            say(f"'{checkpoint}' was of something else, and is replaced")
    remove(checkpoint)
    if distributed.is_initialized():
        distributed.barrier()  # all have refused it, and none begins before it is gone
    return run()
