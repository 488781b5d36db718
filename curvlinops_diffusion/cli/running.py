"""The processes of a run, and what they say: lines for people, lines of JSON in a file."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

_logger = logging.getLogger("curvlinops_diffusion")


class _JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": stamp, "event": record.getMessage(), **fields})


def start_log(path: Path | None) -> None:
    """Append a line to a file for each event of the first process.

    Raises:
        ValueError: If the file cannot be written.
    """
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    if path is None or not is_first():
        return
    try:
        if path.is_file():
            with path.open("rb") as there:
                if there.read(1) not in (b"", b"{"):  # an operator that would be damaged, say
                    raise ValueError(
                        f"The log '{path}' exists, and holds no lines of JSON. Pass another file."
                    )
        handler = logging.FileHandler(path)
    except OSError as error:
        raise ValueError(f"The log '{path}' cannot be written: {error}.") from error
    handler.setFormatter(_JSONLines())
    _logger.addHandler(handler)


def event(name: str, **fields: Any) -> None:
    """Note an event in the log."""
    _logger.info(name, extra={"fields": fields})


def say(text: str) -> None:
    """A line for people, of the first process."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this process speaks and writes, by the number that ``torchrun`` gives it."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(options: Namespace, timeout: float = 1800.0) -> Iterator[None]:
    """Join the other processes of ``torchrun`` or ``accelerate launch``, if there are any.

    Each has a GPU of its own, if there are any, which becomes the current one.

    Args:
        options: Those of the command.
        timeout: Seconds that a process of torchrun waits for the others.
    """
    import torch
    from torch import distributed

    if options.device is None and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif (options.device or "cpu") == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _choose_threads()
    if num_processes() == 1:
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _choose_threads() -> None:
    """Take fewer threads where other programs use the cores, and say so."""
    import torch

    from curvlinops_diffusion.runtime.devices import machine_load, threads_for

    (load, cores), threads = machine_load(), torch.get_num_threads()
    chosen = threads_for(load, cores, threads)
    if chosen < threads:
        torch.set_num_threads(chosen)
        say(
            f"The machine is busy (a load of {load:.1f} on {cores} cores): {chosen} of {threads} "
            "threads are used. OMP_NUM_THREADS=N says otherwise."
        )
