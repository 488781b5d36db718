"""Passes over the data that can be interrupted and go on, and be split over processes.

A pass adds up something over batches. Every so often it writes down what it has, and of which
batches; started again, it goes on from there. Each process takes its share of the batches, and at
the end everyone has the sum.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checkpoints import Checkpoint, Done, path_of, read, try_to_write
from curvlinops_diffusion.runtime.checks import check_count, check_non_negative
from curvlinops_diffusion.runtime.division import Division, Unit
from curvlinops_diffusion.runtime.processes import ALONE, Share
from curvlinops_diffusion.runtime.progress import draws_bar
from curvlinops_diffusion.runtime.sums import Running
from curvlinops_diffusion.runtime.threads import warn_if_busy

_logger = logging.getLogger("curvlinops_diffusion")


class NumberedExamples(Protocol):
    """A batch of examples.

    Attributes:
        indices: The numbers of its examples.
    """

    @property
    def indices(self) -> Sequence[int]:
        """The numbers of its examples."""

    def select(self, positions: Sequence[int], /) -> NumberedExamples:
        """The examples at some positions of the batch."""


class PassData(Protocol):
    """Data that a pass can go over: examples in numbered batches, each drawn several times."""

    @property
    def num_data(self) -> int:
        """The number of examples."""

    @property
    def num_draws(self) -> int:
        """The number of draws for each example."""

    @property
    def num_samples(self) -> int:
        """The number of examples times draws."""

    @property
    def num_batches(self) -> int | None:
        """The number of batches; ``None`` if it is not known before a pass over them."""

    @property
    def in_step(self) -> bool:
        """Whether all processes must do the same at the same time: they share a network."""

    @property
    def device(self) -> torch.device:
        """The device of the sums."""

    @property
    def description(self) -> dict[str, Any]:
        """Describe what determines the draws and the loss, as plain values."""

    def fingerprint(self) -> dict[str, str]:
        """A digest of the network's weights."""

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Weights, data, draws and settings, as plain values."""

    def numbered_batches(
        self, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, NumberedExamples]]:
        """Yield the batches whose numbers are wanted."""


@dataclass(frozen=True)
class PassOptions:
    """The way passes over the data are run.

    Attributes:
        checkpoint: A folder in which passes write down how far they have come, and from which they
            go on when the program is started again: after a crash, with the same result to the last
            bit on one process. ``None`` for none. A finished pass leaves its sums there as well, so
            that a program of several passes does none of them again; delete the folder when done.
            Several processes must see the same folder.
        checkpoint_every: Seconds between two checkpoints.
        distributed: Whether the processes of ``torch.distributed`` share the work. The default
            process group must be initialised; every process then has the whole result.
        sharded: Whether each of these processes keeps its share of K-FAC's or EK-FAC's blocks only,
            those of some layers. Either it passes over all data for them (``"layers"``), or each
            runs the network on its part of every batch, and sends what layers see to those that
            have them (``"data"``); ``True`` chooses by counted cost. Everything of such an operator
            is then done by all processes together, at the same place of their programs.
        max_memory: Bytes that factors, and what is made of them, may take beside the network and a
            training pass. Where they are more, layers are fitted in groups, each by passes of its
            own over all data; finished blocks wait in the host's memory, and are multiplied from
            there if they do not fit either. ``None`` for no limit.
        progressbar: Whether to show progress.
    """

    checkpoint: str | PathLike[str] | None = None
    checkpoint_every: float = 300.0
    distributed: bool = False
    sharded: bool | Literal["layers", "data"] = False
    max_memory: int | None = None
    progressbar: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is of no accepted kind.
        """
        check_non_negative("checkpoint_every", self.checkpoint_every)
        Share.of(self.distributed)
        if self.max_memory is not None:
            check_count("max_memory", self.max_memory)
        if self.sharded not in (False, True, "layers", "data"):
            raise ValueError(
                f"sharded={self.sharded!r} arrived. Pass True, or 'layers' or 'data' to say how."
            )
        if self.sharded and not self.distributed:
            raise ValueError(
                "sharded=True arrived without distributed=True. Pass both, in a program that "
                "torchrun has started, or neither."
            )

    @property
    def holders(self) -> Share:
        """The processes that hold an operator's blocks: all of them, or each the whole."""
        return Share.of(self.distributed) if self.sharded else ALONE


#: One process, no checkpoints.
PLAIN = PassOptions()


def run_pass(
    name: str,
    data: PassData,
    running: Running,
    step: Callable[[Any], None],
    options: PassOptions,
    settings: Mapping[str, Any],
    prepare: Callable[[Any], Any] = lambda clean: clean,
    *,
    begin: Callable[[], None] = lambda: None,
    summed: bool = True,
    together: Share = ALONE,
    tell: Callable[[bool], None] = lambda new: None,
) -> None:
    """Run a step on every batch of clean examples, and add up over processes.

    Batches go to processes in turn; where the last round has fewer than processes, each process
    takes a piece of every one of them. Processes that share a network all take equal pieces of
    every batch, and do what is left of it together.

    Args:
        name: The pass' name, for progress and files.
        data: What the pass goes over.
        running: What the steps accumulate.
        step: Adds a batch to it: what ``prepare`` makes of it.
        options: Checkpoints and processes.
        settings: What else the result depends on, as plain values.
        prepare: What can be computed of a batch while the sums are left alone: if it fails, a
            checkpoint of them is written first.
        begin: Makes what the steps need; called on all processes together, before the first batch,
            unless the pass was finished before.
        summed: Whether to add up over processes, or leave each process with what it has seen.
        together: Processes that go over all batches together, each with sums of its own. After an
            end some may have come further, who then do again what the others lack.
        tell: Called before each step with whether the batch is new for this process.

    Raises:
        ValueError: If a checkpoint is of another model, other data, draws or settings, is damaged,
            or cannot be written; or if another process has failed.
    """
    share = Share.of(options.distributed)
    check_same_pass(share, data, settings)
    device = data.device
    warn_if_busy(device)
    done = Done()
    checkpoint = None
    if options.checkpoint is not None:
        identity = data.identity(settings)
        checkpoint = Checkpoint(Path(options.checkpoint), name, share, identity, running, device)
        done = checkpoint.restore()
    elsewhere: set[Unit] = set() if checkpoint is None else checkpoint.elsewhere
    known = set.intersection(*together.gathered(done.batches | elsewhere))
    division = Division(share, data.num_batches, known, data.in_step)
    if sum(share.gathered(done.examples)) < data.num_data:
        begin()
    with draws_bar(data.num_samples, name, options.progressbar and share.rank == 0) as bar:
        bar.update(done.examples * data.num_draws)
        _tell("pass started", name, done, data)
        batches = division.own(data.numbered_batches(division.wants))
        latest, latest_written = time.monotonic(), len(done.batches)
        for units, clean, prepared in _checkpointed_on_failure(batches, prepare, done, checkpoint):
            new = not done.batches.issuperset(units)
            tell(new)
            step(prepared)
            del prepared  # not to be held while the next one is made
            if new:
                done.batches.update(units)
                done.examples += len(clean.indices)
            bar.update(len(clean.indices) * data.num_draws)
            if checkpoint and time.monotonic() - latest >= options.checkpoint_every:
                checkpoint.write(done)
                _tell("checkpoint written", name, done, data)
                latest, latest_written = time.monotonic(), len(done.batches)
        if checkpoint and latest_written != len(done.batches):
            checkpoint.write(done)
    if share.count > 1 and summed:
        running.restore(share.summed(running.tensors(), device))
    if share.count > 1 and data.in_step:
        # after the sum, so that what all add is in it once
        for clean in division.rest(data.numbered_batches(division.wants)):
            prepared = prepare(clean)
            if summed or share.rank == 0:
                step(prepared)
            del prepared
    _tell("pass finished", name, done, data)


def check_same_pass(share: Share, data: PassData, settings: Mapping[str, Any]) -> None:
    """Check that all processes go over the same data with the same model and settings.

    Raises:
        ValueError: If they do not.
    """
    if share.count > 1:
        share.check_alike("weights", data.fingerprint())
        share.check_alike("data, draws or options", [data.description, dict(settings)])


def _tell(message: str, name: str, done: Done, data: PassData) -> None:
    """A line of the log; ``fields`` are for what writes it for machines."""
    fields = {
        "pass": name,
        "examples": done.examples,
        "of": data.num_data,
        "draws": data.num_draws,
    }
    _logger.info(message, extra={"fields": fields})


def computed_once(
    name: str,
    data: PassData,
    compute: Callable[[], dict[str, Tensor]],
    options: PassOptions,
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Tensors that are computed once, and read from the checkpoint's folder afterwards.

    Args:
        name: The name of what is computed.
        data: What the pass goes over.
        compute: Computes it, on every process alike.
        options: Checkpoints and processes.
        settings: What else the result depends on, as plain values.

    Raises:
        ValueError: As :func:`run_pass`.
    """
    if options.checkpoint is None:
        return compute()
    share = Share.of(options.distributed)
    identity = data.identity(settings)
    path = path_of(Path(options.checkpoint), name, 0)
    existing = path.is_file()
    share.check_alike(f"what they see in '{path.parent}'", existing)
    if existing:
        return read(path, identity, data.device)[0]
    tensors = compute()
    if share.rank == 0:
        try_to_write(path, tensors, identity, Done())
    share.barrier()
    return tensors


def _checkpointed_on_failure(
    batches: Iterator[tuple[list[Unit], NumberedExamples]],
    prepare: Callable[[Any], Any],
    done: Done,
    checkpoint: Checkpoint | None,
) -> Iterator[tuple[list[Unit], NumberedExamples, Any]]:
    """Load and prepare batches; write a checkpoint before an error in that goes on.

    The sums are whole then.
    """
    while True:
        try:
            units, clean = next(batches)
            prepared = prepare(clean)
        except StopIteration:
            return
        except BaseException:  # an interrupt from the keyboard as well
            if checkpoint:
                checkpoint.write(done)
            raise
        yield units, clean, prepared
        del prepared
