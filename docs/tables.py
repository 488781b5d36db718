"""Tables of the documentation and of the README, from the results of the benchmarks.

``python docs/tables.py`` writes the README's, between its markers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
README = DOCS.parent / "README.md"
MARKERS = ("<!-- table: docs/tables.py -->\n", "<!-- end of table -->\n")
# of the README; the documentation has all
METHODS = (
    "no curvature",
    "nearest in pixels",
    "D-TRAK",
    "TRAK",
    "EK-FAC, the paper's recipe",
    "EK-FAC",
    "EK-FAC, Shampoo's factors",
    "K-FAC + low rank",
)

Row = Sequence[object]


def write_tables(folder: Path = DOCS / "_tables") -> None:
    """Write a file for each result that was measured on a CPU."""
    folder.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("*_cpu.json")):
        result = json.loads(path.read_text())
        name = path.stem.removesuffix("_cpu")
        for part, (head, *rows) in {"": _cells(result), **_further(result)}.items():
            (folder / f"{name}{part}.rst").write_text(_table(head, rows))


def _cells(result: dict[str, Any]) -> list[Row]:
    """A head and rows, by what the result holds."""
    if "ceilings" in result:
        return lds_cells(result)
    if "by_kind" in result:
        return _of_records(result["by_kind"])
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
    return _of_records(next(value for value in result.values() if isinstance(value, list)))


def _further(result: dict[str, Any]) -> dict[str, list[Row]]:
    """Tables of a result that has several, by what their files' names end with."""
    if "by_kind" not in result:
        return {}
    return {
        "_whole": [("", "relative error"), *result["whole"].items()],
        "_cosines": _of_records(result["cosines"]),
        "_spectra": [
            ("quantile", *next(iter(result["spectra"].values()))),
            *(
                (name, *(f"{value:.2g}" for value in values.values()))
                for name, values in result["spectra"].items()
            ),
        ],
        "_bands": _of_records(result["bands"]),
    }


def _of_records(records: Sequence[dict[str, object]]) -> list[Row]:
    head = tuple(label.replace("_", " ") for label in records[0])
    return [head, *(tuple(record.values()) for record in records)]


def lds_cells(result: dict[str, Any], methods: Sequence[str] | None = None) -> list[Row]:
    """Linear data-modelling scores with intervals: at the default damping, or else the best one.

    Args:
        result: What ``benchmarks.lds.evaluate`` reports.
        methods: Only these, in this order; ``None`` for all but the scans over one number.
    """
    by_method: dict[str, dict[str, Any]] = {}
    for row in result["methods"]:
        by_method.setdefault(row["method"], {})[row["cell"]] = row
    if methods is None:
        methods = [name for name in by_method if not name.startswith(("draws,", "powers"))]
    cells = list(result["ceilings"])
    rows: list[Row] = [("", *(cell.replace("_", " ") for cell in cells))]
    for name in methods:
        entries = by_method[name]
        default = all("default" in entries[cell] for cell in cells)
        label = name if default or entries[cells[0]]["best"]["setting"] == "" else f"{name} (best)"
        shown = [entries[cell]["default" if default else "best"] for cell in cells]
        rows.append((label, *(f"{s['lds']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in shown)))
    rows.append(("*a perfect predictor*", *(f"{result['ceilings'][cell]:.2f}" for cell in cells)))
    return rows


def readme() -> str:
    """The README with its table of linear data-modelling scores of the loss."""
    text = README.read_text()
    start = text.index(MARKERS[0]) + len(MARKERS[0])
    end = text.index(MARKERS[1])
    labels: list[object] = []
    columns: list[list[object]] = []
    for path in sorted(RESULTS.glob("lds_*_cpu.json")):
        head, *rows = lds_cells(json.loads(path.read_text()), METHODS)
        labels = ["", *(row[0] for row in rows)]
        problem = path.stem.split("_")[1]
        for column, cell in enumerate(head):
            if str(cell).startswith("loss, "):
                title = f"{problem}, {str(cell).removeprefix('loss, ')}"
                columns.append([title, *(row[column] for row in rows)])
    head, *rows = zip(labels, *columns, strict=True)
    rule = ["---"] * len(head)
    lines = [f"| {' | '.join(str(entry) for entry in row)} |" for row in (head, rule, *rows)]
    return text[:start] + "\n".join(lines) + "\n" + text[end:]


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {entry}" for i, entry in enumerate(row)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(readme())
