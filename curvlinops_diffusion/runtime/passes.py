"""Passes over the data that can be interrupted and resumed, and divided among processes.

A pass adds up something over batches. Every so often it writes a checkpoint of the sums, and of
which batches they are; started again, it resumes from there. Each process takes some of the
batches, and at the end all have the sum.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion.runtime.checkpoints import Checkpoint, Done, path_of, read, try_to_write
from curvlinops_diffusion.runtime.checks import check_count, check_non_negative
from curvlinops_diffusion.runtime.devices import warn_if_busy
from curvlinops_diffusion.runtime.division import Divisible, Division, Unit
from curvlinops_diffusion.runtime.processes import ALONE, Processes
from curvlinops_diffusion.runtime.sums import Running

_logger = logging.getLogger("curvlinops_diffusion")


class _PassData(Protocol):
    """Examples in numbered batches, each drawn several times: see ``NoisedRegression``."""

    @property
    def num_data(self) -> int: ...

    @property
    def num_draws(self) -> int: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def num_batches(self) -> int | None: ...

    @property
    def in_step(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def description(self) -> dict[str, Any]: ...

    def fingerprint(self) -> dict[str, str]: ...

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]: ...

    def numbered_batches(
        self, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Divisible]]: ...


@dataclass(frozen=True)
class PassOptions:
    """Options of passes over the data.

    Attributes:
        checkpoint: A folder of checkpoints, from which passes resume when the program is started
            again: after a crash, with the same result to the last bit on one process. ``None`` for
            none. A finished pass leaves its sums there as well, so that a program of several passes
            does none of them again; delete the folder when done. Several processes must see the
            same folder.
        checkpoint_every: Seconds between two checkpoints.
        distributed: Whether the processes of ``torch.distributed`` share the work. The default
            process group must be initialised; every process then has the whole result.
        sharded: Whether each of these processes keeps its share of K-FAC's or EK-FAC's blocks only,
            those of some layers: each runs the network on its part of every batch, and sends what
            layers see to those that have them. (With ``max_memory``, or parameters in no layer,
            each passes over all data for its own.) All processes must then call everything of such
            an operator together, at the same place of their programs.
        max_memory: Bytes that factors, and what is made of them, may take beside the network and a
            training pass. Where they are more, layers are fitted in groups, each by passes of its
            own over all data; finished blocks are kept in the host's memory, and multiplied from
            there if they do not fit either. ``None`` for no limit.
        progressbar: Whether to show progress.
    """

    checkpoint: str | PathLike[str] | None = None
    checkpoint_every: float = 300.0
    distributed: bool = False
    sharded: bool = False
    max_memory: int | None = None
    progressbar: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_non_negative("checkpoint_every", self.checkpoint_every)
        Processes.of(self.distributed)
        if self.max_memory is not None:
            check_count("max_memory", self.max_memory)
        if self.sharded and not self.distributed:
            raise ValueError(
                "`sharded` must be False without `distributed`, got True. Pass both, in a program "
                "that torchrun has started, or neither."
            )

    @property
    def holders(self) -> Processes:
        """The processes that an operator's blocks are sharded over; one alone if they are not."""
        return Processes.of(self.distributed) if self.sharded else ALONE


#: One process, no checkpoints.
PLAIN = PassOptions()


def run_pass(
    name: str,
    data: _PassData,
    running: Running,
    step: Callable[[Any], None],
    options: PassOptions,
    settings: Mapping[str, Any],
    prepare: Callable[[Any], Any] = lambda clean: clean,
    *,
    begin: Callable[[], None] = lambda: None,
    summed: bool = True,
    together: Processes = ALONE,
    on_batch: Callable[[bool], None] = lambda new: None,
    streams: int = 1,
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
        prepare: Computes what does not touch the sums: if it fails, a checkpoint of them is written
            first.
        begin: Makes what the steps need; called on all processes together, before the first batch,
            unless the pass was finished before.
        summed: Whether to sum over processes, or leave each process with its own sums.
        together: Processes that go over all batches together, each with sums of its own. After a
            crash some may be further, who then repeat what the others lack.
        on_batch: Called before each step with whether the batch is new for this process.
        streams: Times that each draw of the data stands for one, halves of the draws say.

    Raises:
        ValueError: If a checkpoint is of another model, other data, draws or settings, is damaged,
            or cannot be written; or if another process has failed.
    """
    processes = Processes.of(options.distributed)
    check_same_pass(processes, data, settings)
    warn_if_busy(data.device)
    done, elsewhere, checkpoint = Done(), set[Unit](), None
    if options.checkpoint is not None:
        folder, identity = Path(options.checkpoint), data.identity(settings)
        checkpoint = Checkpoint(folder, name, processes, identity, running, data.device)
        done, elsewhere = checkpoint.restore(), checkpoint.elsewhere
    known = set.intersection(*together.all_gather(done.batches | elsewhere))
    division = Division(processes, data.num_batches, known, data.in_step)
    before = sum(processes.all_gather(done.examples))
    if before < data.num_data:
        begin()

    def log(message: str) -> None:  # with fields for machines
        counts = {"examples": done.examples, "of": data.num_data, "draws": data.num_draws}
        _logger.info(message, extra={"fields": {"pass": name, **counts}})

    draws, shown = data.num_draws * streams, options.progressbar and processes.rank == 0
    with DrawsBar(data.num_data * draws, name, shown, done.examples * draws) as bar:
        if not bar.disable and checkpoint and checkpoint.written and 0 < before < data.num_data:
            at = time.strftime("%H:%M", time.localtime(checkpoint.written))
            part = 100 * before // data.num_data
            bar.write(f"{name}: going on from {part} %, stopped at {at}", file=sys.stderr)
        log("pass started")
        batches = division.own(data.numbered_batches(division.wants))
        latest, latest_written = time.monotonic(), len(done.batches)
        for units, clean, prepared in _checkpointed_on_failure(batches, prepare, done, checkpoint):
            new = not done.batches.issuperset(units)
            on_batch(new)
            step(prepared)
            del prepared  # not to be held while the next one is made
            if new:
                done.batches.update(units)
                done.examples += len(clean.indices)
            bar.batch_done(len(clean.indices) * draws)
            if checkpoint and time.monotonic() - latest >= options.checkpoint_every:
                checkpoint.write(done)
                log("checkpoint written")
                latest, latest_written = time.monotonic(), len(done.batches)
        if checkpoint and latest_written != len(done.batches):
            checkpoint.write(done)
    if processes.count > 1 and summed:
        running.restore(processes.all_reduce(running.tensors(), data.device))
    if processes.count > 1 and data.in_step:
        # after the sum, so that what all add is in it once
        for clean in division.rest(data.numbered_batches(division.wants)):
            prepared = prepare(clean)
            if summed or processes.rank == 0:
                step(prepared)
            del prepared
    log("pass finished")


def check_same_pass(processes: Processes, data: _PassData, settings: Mapping[str, Any]) -> None:
    """Check that all processes go over the same data with the same model and settings."""
    if processes.count > 1:
        processes.check_alike("weights", data.fingerprint())
        processes.check_alike("data, draws or options", [data.description, dict(settings)])


class DrawsBar(tqdm):
    """A progress bar over draws of examples, which moves within a batch as well.

    With every draw that is noised: a batch may take minutes. At its end the count is made exact.
    """

    _shown: ClassVar[list[DrawsBar]] = []

    def __init__(self, total: int, description: str, shown: bool, before: int = 0):
        self._done = before
        super().__init__(
            total=total, initial=before, desc=description, unit="draws", disable=not shown
        )

    def __enter__(self) -> DrawsBar:
        """Move with draws from now on."""
        if not self.disable:
            self._shown.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        if not self.disable:
            self._shown.remove(self)
        super().__exit__(*error)

    def batch_done(self, draws: int) -> None:
        """Count the draws of a batch that is done."""
        self._done += draws
        self.update(self._done - self.n)

    @classmethod
    def draw_done(cls, examples: int) -> None:
        """Count a draw of some examples on the innermost bar that is shown."""
        for bar in cls._shown[-1:]:
            bar.update(min(examples, (bar.total or 0) - bar.n))


def computed_once(
    name: str,
    data: _PassData,
    compute: Callable[[], dict[str, Tensor]],
    options: PassOptions,
    settings: Mapping[str, Any],
    draws: int = 0,
) -> dict[str, Tensor]:
    """Compute tensors once, on every process alike, and read them from a checkpoint afterwards.

    Args as of :func:`run_pass`; ``draws`` of examples are for a bar, 0 for none.
    """
    processes = Processes.of(options.distributed)
    shown = draws > 0 and options.progressbar and processes.rank == 0

    def computed() -> dict[str, Tensor]:
        with DrawsBar(draws, name.partition(" ")[0], shown):
            return compute()

    if options.checkpoint is None:
        return computed()
    identity = data.identity(settings)
    path = path_of(Path(options.checkpoint), name, 0)
    existing = path.is_file()
    processes.check_alike(f"what they see in '{path.parent}'", existing)
    if existing:
        return read(path, identity, data.device)[0]
    tensors = computed()
    if processes.rank == 0:
        try_to_write(path, tensors, identity, Done())
    processes.barrier()
    return tensors


def _checkpointed_on_failure(
    batches: Iterator[tuple[list[Unit], Divisible]],
    prepare: Callable[[Any], Any],
    done: Done,
    checkpoint: Checkpoint | None,
) -> Iterator[tuple[list[Unit], Divisible, Any]]:
    """Load and prepare batches; write a checkpoint before passing on an error, with whole sums."""
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
