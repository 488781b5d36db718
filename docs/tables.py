"""Tables of the documentation, from the results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def write_tables() -> None:
    """Write a file for each table into ``docs/_tables``."""
    folder = DOCS / "_tables"
    folder.mkdir(exist_ok=True)
    for name in ("factor_pass", "ggn_product"):
        result = _result(name)
        rows = [
            (label, f"{result['seconds'][label]:.2f}", f"{ratio:.2f}")
            for label, ratio in result["training_passes"].items()
        ]
        table = _table(("", "seconds", "training passes"), rows)
        (folder / f"{name}.rst").write_text(table)
    memory = _result("peak_memory")
    rows = [
        (label, f"{memory['peak_mebibytes'][label]:,}", f"{beyond:,}")
        for label, beyond in memory["beyond_a_training_pass"].items()
    ]
    head = ("", "peak, MiB", "beyond a training pass, MiB")
    (folder / "peak_memory.rst").write_text(_table(head, rows))
    for name, key in (("eigenvalue_groups", "groups"), ("draws", "settings")):
        records = _result(name)[key]
        head = tuple(label.replace("_", " ") for label in records[0])
        rows = [tuple(str(value) for value in record.values()) for record in records]
        (folder / f"{name}.rst").write_text(_table(head, rows))


def _result(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}_cpu.json").read_text())
    return result


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {entry}" for i, entry in enumerate(row)]
    return "\n".join(lines) + "\n"
