"""Tell what happens: lines for people on the error stream, lines of JSON in a file."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

_logger = logging.getLogger("curvlinops_diffusion")


class _JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": stamp, "event": record.getMessage(), **fields})


def start_log(path: Path | None) -> None:
    """Append a line to a file for each event.

    Raises:
        ValueError: If the file cannot be written.
    """
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    if path is None:
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
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def first_process() -> bool:
    """Tell whether this process speaks and writes, by the number that ``torchrun`` gives it."""
    return os.environ.get("RANK", "0") == "0"
