"""Checkpoints of passes over the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.division import Unit
from curvlinops_diffusion.runtime.files import FileKind, check_same, make_folder
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.runtime.sums import Running

# the version is of the names of sums, too: what a pass does not know, it would leave out
CHECKPOINT = FileKind(
    "curvlinops_diffusion.checkpoint", "a checkpoint", "Delete it to start anew.", version=2
)


class OtherCheckpointError(ValueError):
    """A checkpoint of another model, other data, draws or settings."""


@dataclass
class Done:
    """The batches that sums hold, and pieces of others.

    Attributes:
        batches: Their numbers, and what pieces they are.
        examples: How many examples are in them.
    """

    batches: set[Unit] = field(default_factory=set)
    examples: int = 0


class Checkpoint:
    """A pass' files: one for each process, which may have been more or fewer the last time.

    A file holds sums, and the batches that they are of. What was written by more processes than
    there are now is merged; a file whose batches are all in another one is left over from that.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        processes: Processes,
        identity: dict[str, Any],
        running: Running,
        device: torch.device,
    ):
        self._folder, self._name = folder, name
        self._processes, self._identity = processes, identity
        self._running, self._device = running, device
        self.elsewhere: set[Unit] = set()  # what other processes hold
        self.written: float | None = None  # when the newest file was, in seconds since the epoch
        self._merged: list[Path] = []

    def restore(self) -> Done:
        """Resume from the files of this process.

        Raises:
            ValueError: If a file is damaged, or of something else.
        """
        make_folder(self._folder)
        found = _files(self._folder, self._name)
        seen = [[path.name, path.stat().st_size] for path in found]
        self._processes.check_alike(f"what they see in '{self._folder}'", seen)
        self.written = max((path.stat().st_mtime for path in found), default=None)
        batches = {
            path: _checked(path, CHECKPOINT.read_header(path), self._identity).batches
            for path in found
        }
        current: list[Path] = []
        for path in sorted(found, key=lambda path: -len(batches[path])):
            if not any(batches[path] <= batches[other] for other in current):
                current.append(path)
        self._processes.barrier()  # before any of them is replaced
        done = Done()
        tensors: dict[str, Tensor] = {}
        for i, path in enumerate(sorted(current)):
            if not self._processes.takes(i):
                self.elsewhere |= batches[path]
                continue
            sums, own = read(path, self._identity, self._device)
            done.batches |= own.batches
            done.examples += own.examples
            for key, tensor in sums.items():
                tensors[key] = tensors[key] + tensor if key in tensors else tensor
            self._merged.append(path)
        if done.batches:
            self._running.restore(tensors)
        return done

    def write(self, done: Done) -> None:
        """Write the sums; if that fails, warn and go on."""
        path = path_of(self._folder, self._name, self._processes.rank)
        tensors = self._running.tensors()
        if done.batches and try_to_write(path, tensors, self._identity, done):
            for other in {*self._merged} - {path}:
                other.unlink(missing_ok=True)
            self._merged = []


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(path_of(folder, name, "*").name))


def path_of(folder: Path, name: str, rank: int | str) -> Path:
    """Return the file of a process."""
    return folder / f"{name.lower().replace(' ', '_')}.{rank}.safetensors"


def forget(folder: str | PathLike[str] | None, name: str, processes: Processes) -> None:
    """Delete the checkpoints of a pass, if there are any."""
    if folder is None:
        return
    processes.barrier()  # or another process would not find it
    if processes.rank == 0:
        for path in _files(Path(folder), name):
            path.unlink(missing_ok=True)


def try_to_write(
    path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any], done: Done
) -> bool:
    """Write a checkpoint, or warn why not: the pass can go on without."""
    units = sorted(done.batches, key=lambda unit: (unit,) if isinstance(unit, int) else unit)
    header = {"identity": identity, "batches": units, "examples": done.examples}
    try:
        make_folder(path.parent)
        CHECKPOINT.write(path, tensors, header)
    except ValueError as error:
        warn(f"The checkpoint was not written, and the pass goes on: {error}", stacklevel=4)
        return False
    return True


def read(
    path: Path, identity: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], Done]:
    """Read the sums of a file, and the batches that they are of."""
    header, tensors = CHECKPOINT.read(path)
    done = _checked(path, header, identity)
    # copied, since products of tensors that are not aligned in memory round differently
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, done


def _checked(path: Path, header: Any, identity: Mapping[str, Any]) -> Done:
    """Return the batches that a file holds, if it is of the same pass."""
    try:
        units: set[Unit] = set()
        for unit in header["batches"]:
            if isinstance(unit, int):
                units.add(unit)
            else:
                number, start, stop = map(int, unit)
                units.add((number, start, stop))
        done = Done(units, int(header["examples"]))
        there = dict(header["identity"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CHECKPOINT.damaged(path, f"{type(error).__name__}: {error}") from error
    check_same(
        there,
        identity,
        f"The checkpoint '{path}' is of something else",
        "Delete the folder to start anew, or pass another one.",
        OtherCheckpointError,
    )
    return done
