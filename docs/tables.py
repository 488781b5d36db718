"""Tables of the documentation, from the results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"

Row = Sequence[object]


def write_tables(folder: Path = DOCS / "_tables") -> None:
    """Write a file for each result that was measured on a CPU."""
    folder.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("*_cpu.json")):
        head, *rows = _cells(json.loads(path.read_text()))
        name = path.stem.removesuffix("_cpu")
        (folder / f"{name}.rst").write_text(_table(head, rows))


def _cells(result: dict[str, Any]) -> list[Row]:
    """A head and rows, by what the result holds."""
    if "training_passes" in result:
        return [
            ("", "seconds", "training passes"),
            *(
                (label, f"{result['seconds'][label]:.2f}", f"{ratio:.2f}")
                for label, ratio in result["training_passes"].items()
            ),
        ]
    if "peak_mebibytes" in result:
        return [
            ("", "peak, MiB", "beyond a training pass, MiB"),
            *(
                (label, f"{peak:,}", f"{result['beyond_a_training_pass'][label]:,}")
                for label, peak in result["peak_mebibytes"].items()
            ),
        ]
    records = next(value for value in result.values() if isinstance(value, list))
    head = tuple(label.replace("_", " ") for label in records[0])
    return [head, *(tuple(record.values()) for record in records)]


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {entry}" for i, entry in enumerate(row)]
    return "\n".join(lines) + "\n"
