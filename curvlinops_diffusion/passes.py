"""Passes over the data that can be interrupted and go on, and be split over processes.

A pass adds up something over batches. Every so often it writes down what it has, and of which
batches; started again, it goes on from there. Each process takes its share of the batches, and at
the end everyone has the sum.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion._checks import check_non_negative
from curvlinops_diffusion._files import FileKind, make_folder
from curvlinops_diffusion.data import CleanBatch
from curvlinops_diffusion.digests import fingerprint
from curvlinops_diffusion.distributed import Share
from curvlinops_diffusion.identity import differences, identity_of
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.running import Running

_logger = logging.getLogger("curvlinops_diffusion")

CHECKPOINT = FileKind("curvlinops_diffusion.checkpoint", "a checkpoint", "Delete it to start anew.")


class OtherCheckpointError(ValueError):
    """A checkpoint of another model, other data, draws or settings."""


@dataclass(frozen=True)
class PassOptions:
    """How passes over the data are run.

    Attributes:
        checkpoint: A folder in which passes write down how far they have come, and from which they
            go on when the program is started again: after a crash, with the same result to the last
            bit on one process. ``None`` for none. A finished pass leaves its sums there as well, so
            that a program of several passes does none of them again; delete the folder when done.
            Several processes must see the same folder.
        checkpoint_every: Seconds between two checkpoints.
        distributed: Whether the processes of ``torch.distributed`` share the work. The default
            process group must be initialised; every process then has the whole result.
        progressbar: Whether to show progress.
    """

    checkpoint: str | PathLike[str] | None = None
    checkpoint_every: float = 300.0
    distributed: bool = False
    progressbar: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is of no accepted kind.
        """
        check_non_negative("checkpoint_every", self.checkpoint_every)
        Share.of(self.distributed)


#: One process, no checkpoints.
PLAIN = PassOptions()


def run_pass(
    name: str,
    regression: NoisedRegression,
    running: Running,
    step: Callable[[Any], None],
    options: PassOptions,
    settings: Mapping[str, Any],
    prepare: Callable[[CleanBatch], Any] = lambda clean: clean,
) -> None:
    """Run a step on every batch of clean examples, and add up over processes.

    Args:
        name: The pass' name, for progress and files.
        regression: The data.
        running: What the steps accumulate.
        step: Adds a batch to it: what ``prepare`` makes of it.
        options: Checkpoints and processes.
        settings: What else the result depends on, as plain values.
        prepare: What can be computed of a batch while the sums are left alone: if it fails, a
            checkpoint of them is written first.

    Raises:
        ValueError: If a checkpoint is of another model, other data, draws or settings, is damaged,
            or cannot be written; or if another process has failed.
    """
    share = Share.of(options.distributed)
    if share.count > 1:
        share.check_alike("weights", fingerprint(regression.objective.model))
        share.check_alike("data, draws or options", [regression.description, dict(settings)])
    device = regression.objective.device
    done = _Done()
    checkpoint = None
    if options.checkpoint is not None:
        identity = identity_of(regression, settings)
        checkpoint = _Checkpoint(Path(options.checkpoint), name, share, identity, running, device)
        done = checkpoint.restore()
    elsewhere = set() if checkpoint is None else checkpoint.elsewhere
    with tqdm(
        total=regression.num_samples,
        desc=name,
        unit="draws",
        disable=not options.progressbar or share.rank > 0,
    ) as bar:
        bar.update(done.examples * regression.num_draws)
        _tell("pass started", name, done, regression)
        batches = regression.numbered_batches(
            lambda n: share.takes(n) and n not in done.batches and n not in elsewhere
        )
        latest, latest_written = time.monotonic(), len(done.batches)
        for number, clean, prepared in _kept_on_failure(batches, prepare, done, checkpoint):
            step(prepared)
            done.batches.add(number)
            done.examples += len(clean.indices)
            bar.update(len(clean.indices) * regression.num_draws)
            if checkpoint and time.monotonic() - latest >= options.checkpoint_every:
                checkpoint.write(done)
                _tell("checkpoint written", name, done, regression)
                latest, latest_written = time.monotonic(), len(done.batches)
        if checkpoint and latest_written != len(done.batches):
            checkpoint.write(done)
    if share.count > 1:
        running.restore(share.summed(running.tensors(), device))
    _tell("pass finished", name, done, regression)


def _tell(message: str, name: str, done: _Done, regression: NoisedRegression) -> None:
    """A line of the log; ``fields`` are for what writes it for machines."""
    fields = {
        "pass": name,
        "examples": done.examples,
        "of": regression.num_data,
        "draws": regression.num_draws,
    }
    _logger.info(message, extra={"fields": fields})


def kept(
    name: str,
    regression: NoisedRegression,
    compute: Callable[[], dict[str, Tensor]],
    options: PassOptions,
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Tensors that are computed once, and read from the checkpoint's folder afterwards.

    Args:
        name: The name of what is computed.
        regression: The data.
        compute: Computes it, on every process alike.
        options: Checkpoints and processes.
        settings: What else the result depends on, as plain values.

    Raises:
        ValueError: As :func:`run_pass`.
    """
    if options.checkpoint is None:
        return compute()
    share = Share.of(options.distributed)
    identity = identity_of(regression, settings)
    path = _path(Path(options.checkpoint), name, 0)
    existing = path.is_file()
    share.check_alike(f"what they see in '{path.parent}'", existing)
    if existing:
        return _read(path, identity, regression.objective.device)[0]
    tensors = compute()
    if share.rank == 0:
        _try_to_write(path, tensors, identity, _Done())
    share.barrier()
    return tensors


def _kept_on_failure(
    batches: Iterator[tuple[int, CleanBatch]],
    prepare: Callable[[CleanBatch], Any],
    done: _Done,
    checkpoint: _Checkpoint | None,
) -> Iterator[tuple[int, CleanBatch, Any]]:
    """Load and prepare batches; write a checkpoint before an error in that goes on.

    The sums are whole then.
    """
    while True:
        try:
            number, clean = next(batches)
            prepared = prepare(clean)
        except StopIteration:
            return
        except BaseException:  # an interrupt from the keyboard as well
            if checkpoint:
                checkpoint.write(done)
            raise
        yield number, clean, prepared


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@dataclass
class _Done:
    """The batches that sums hold.

    Attributes:
        batches: Their numbers.
        examples: How many examples are in them.
    """

    batches: set[int] = field(default_factory=set)
    examples: int = 0


class _Checkpoint:
    """A pass' files: one for each process, which may have been more or fewer the last time.

    A file holds sums, and the batches that they are of. What was written by more processes than
    there are now is merged; a file whose batches are all in another one is left over from that.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        share: Share,
        identity: dict[str, Any],
        running: Running,
        device: torch.device,
    ):
        self._folder, self._name = folder, name
        self._share, self._identity = share, identity
        self._running, self._device = running, device
        self.elsewhere: set[int] = set()  # batches that other processes hold
        self._merged: list[Path] = []

    def restore(self) -> _Done:
        """Go on from the files of this process.

        Raises:
            ValueError: If a file is damaged, or of something else.
        """
        make_folder(self._folder)
        found = sorted(self._folder.glob(f"{_slug(self._name)}.*.safetensors"))
        seen = [[path.name, path.stat().st_size] for path in found]
        self._share.check_alike(f"what they see in '{self._folder}'", seen)
        batches = {path: _read_done(path, self._identity).batches for path in found}
        current = [
            path
            for i, path in enumerate(found)
            if not any(
                batches[path] < batches[other] or (batches[path] == batches[other] and i > j)
                for j, other in enumerate(found)
                if i != j
            )
        ]
        self._share.barrier()  # before any of them is replaced
        done = _Done()
        tensors: dict[str, Tensor] = {}
        for i, path in enumerate(current):
            if i % self._share.count != self._share.rank:
                self.elsewhere |= batches[path]
                continue
            read, own = _read(path, self._identity, self._device)
            done.batches |= own.batches
            done.examples += own.examples
            for key, tensor in read.items():
                tensors[key] = tensors[key] + tensor if key in tensors else tensor
            self._merged.append(path)
        if done.batches:
            self._running.restore(tensors)
        return done

    def write(self, done: _Done) -> None:
        """Write the sums down; a failure is told, but does not stop the pass."""
        if not done.batches:
            return
        path = _path(self._folder, self._name, self._share.rank)
        if not _try_to_write(path, self._running.tensors(), self._identity, done):
            return
        for other in self._merged:
            if other != path:
                other.unlink(missing_ok=True)
        self._merged = []


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def _path(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{_slug(name)}.{rank}.safetensors"


def _try_to_write(
    path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any], done: _Done
) -> bool:
    """Write a checkpoint, or tell why not: the pass can go on without."""
    try:
        _write(path, tensors, identity, done)
    except ValueError as error:
        warn(f"The checkpoint was not written, and the pass goes on: {error}", stacklevel=4)
        return False
    return True


def _write(
    path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any], done: _Done
) -> None:
    header = {
        "identity": identity,
        "batches": sorted(done.batches),
        "examples": done.examples,
    }
    make_folder(path.parent)
    CHECKPOINT.write(path, tensors, header)


def _read_done(path: Path, identity: Mapping[str, Any]) -> _Done:
    return _checked(path, CHECKPOINT.read_header(path), identity)


def _read(
    path: Path, identity: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], _Done]:
    header, tensors = CHECKPOINT.read(path)
    done = _checked(path, header, identity)
    # copied, since products of tensors that are not aligned in memory round differently
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, done


def _checked(path: Path, header: Any, identity: Mapping[str, Any]) -> _Done:
    """The batches that a file holds, if it is of the same."""
    try:
        done = _Done(set(header["batches"]), int(header["examples"]))
        different = differences(header["identity"], identity)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CHECKPOINT.damaged(path, f"{type(error).__name__}: {error}") from error
    if different:
        raise OtherCheckpointError(
            f"The checkpoint '{path}' is of something else: {'; '.join(different[:5])}. Delete the "
            "folder to start anew, or pass another one."
        )
    return done
