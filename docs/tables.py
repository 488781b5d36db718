"""Tables of the documentation, from the results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refusals import page

from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
# of several settings that are of interest: in a table of their own
SCANS = (
    *("draws,", "powers", "bands of levels", "conjugate gradients"),
    "settings of the regression",
)

# of which results are kept, and which the package has no more
GONE = (
    *("EK-FAC, 16 draws", "EK-FAC, forward only, 16 draws"),
    *("EK-FAC, nearest Kronecker product", "K-FAC, nearest Kronecker product"),
    *("EK-FAC + low rank", "K-FAC + low rank", "EK-FAC, Shampoo's factors + low rank"),
    *("EK-FAC + 10 times low rank", "EK-FAC + a tenth of low rank", "K-FAC + sampled GGN"),
    "K-FAC + low rank, late checkpoints",
)

# of cosines by kind of block, which are many
SHOWN_DAMPINGS = (1e-8, 1e-4, 1.0)

Row = Sequence[object]


def write_tables(folder: Path = DOCS / "_tables") -> None:
    """Write a file for each result that was measured on a CPU."""
    folder.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("*_cpu.json")):
        result = json.loads(path.read_text())
        name = path.stem.removesuffix("_cpu")
        for part, (head, *rows) in {"": _cells(result), **_further(result)}.items():
            (folder / f"{name}{part}.rst").write_text(_table(head, rows))
    (folder / "measurements.rst").write_text(measurements())
    (folder / "refused.rst").write_text(page())


def measurements() -> str:
    """The measurements that have a name, from their registry."""
    rows = [
        (f"``{name}``", entry.summary, entry.better.value) for name, entry in MEASUREMENTS.items()
    ]
    return _table(("", "what it is", "scores"), rows)


def _cells(result: dict[str, Any]) -> list[Row]:
    """A head and rows, by what the result holds."""
    if "ceilings" in result:
        return lds_cells(result)
    if "removals" in result:
        return removals(result)
    if "lengths" in result:
        return lengths(result)
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
    if "ceilings" in result:
        return {
            "_minus_recipe": lds_differences(result, "minus_reference"),
            "_minus_ekfac": lds_differences(result, "minus_ekfac"),
            "_scans": lds_scans(result),
        }
    if "lengths" in result:
        return {"_parts": parts_at_lengths(result)}
    if "counted" in result:
        return {f"_{part}": _of_records(result[part]) for part in ("counted", "sent")}
    if "by_kind" not in result:
        return {}
    return {
        "_whole": [("", "relative error"), *result["whole"].items()],
        "_cosines": _of_records(result["cosines"]),
        "_cosines_by_kind": _of_records(
            [row for row in result["cosines_by_kind"] if row["damping"] in SHOWN_DAMPINGS]
        ),
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


#: What the retrained problems are called.
PROBLEM_NAMES = {
    "digits": "digits",
    "fashion": "Fashion-MNIST",
    "photographs": "photograph",
}


def lds_cells(result: dict[str, Any], methods: Sequence[str] | None = None) -> list[Row]:
    """Linear data-modelling scores with intervals: at the default damping, or else the best one.

    Args:
        result: What ``benchmarks.lds.evaluate`` reports.
        methods: Only these, in this order; ``None`` for all but the scans over settings, with the
            standard errors over queries.
    """

    def shown(s: dict[str, Any]) -> str:
        error = f" ± {s['error_over_queries']:.2f}" if methods is None else ""
        return f"{s['lds']:.2f}{error} [{s['low']:.2f}, {s['high']:.2f}]"

    rows = _lds_rows(result, methods, shown)
    last = {"two seeds": "agreement_of_seeds", "a perfect predictor": "ceilings"}
    return rows + [
        (f"*{label}*", *(f"{value:.2f}" for value in result[key].values()))
        for label, key in last.items()
    ]


def lengths(result: dict[str, Any]) -> list[Row]:
    """Linear data-modelling scores of the loss with intervals, against the training's length.

    Args:
        result: What ``benchmarks.lds.against_length`` reports.
    """
    rows: list[Row] = [("passes over the images", *(row["passes"] for row in result["lengths"]))]
    for method, parts in result["lengths"][0]["methods"].items():
        found = [row["methods"][method]["loss"] for row in result["lengths"]]
        label = method if parts["loss"]["setting"] == "1e-08" else f"{method} (best)"
        rows.append((label, *(f"{s['lds']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in found)))
    return rows


def parts_at_lengths(result: dict[str, Any]) -> list[Row]:
    """What a loss changes by, part by part, against the training's length.

    Args:
        result: What ``benchmarks.lds.against_length`` reports.
    """
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "passes over the images": lambda row: row["passes"],
        "loss of the training images": lambda row: f"{row['training_loss']:.3f}",
        "of held-out ones": lambda row: f"{row['held_out_loss']:.3f}",
        "of held-out ones, networks of halves": lambda row: f"{row['held_out_loss_of_halves']:.3f}",
    }
    for part in ("linear", "squared"):
        columns[f"correlation of loss and {part} part"] = partial(_entry, "correlation", part)
    for part in ("loss", "linear", "squared"):
        columns[f"agreement of seeds, {part}"] = partial(_entry, "agreement", part)
    for method in ("EK-FAC", "K-FAC, regression on the prediction, squared"):
        for part in ("linear", "squared"):
            columns[f"score of the {part} part, {method}"] = partial(_score, method, part)
    rows = result["lengths"]
    return [(label, *(column(row) for row in rows)) for label, column in columns.items()]


def _entry(key: str, part: str, row: dict[str, Any]) -> str:
    return f"{row[key][part]:.2f}"


def _score(method: str, part: str, row: dict[str, Any]) -> str:
    found = row["methods"][method][part]
    return f"{found['lds']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def lds_differences(result: dict[str, Any], other: str) -> list[Row]:
    """The same, as differences to another method on the same resamples.

    Args:
        result: What ``benchmarks.lds.evaluate`` reports.
        other: ``"minus_reference"`` or ``"minus_ekfac"``.
    """

    def shown(summary: dict[str, Any]) -> str:
        if other not in summary:
            return "–"
        s = summary[other]
        return f"{s['difference']:+.2f} [{s['low']:+.2f}, {s['high']:+.2f}]"

    head, *rows = _lds_rows(result, None, shown)
    return [head, *(row for row in rows if set(row[1:]) != {"–"})]


def lds_scans(result: dict[str, Any]) -> list[Row]:
    """Scores at every setting: draws, powers, bands of levels and iterations."""
    cells = list(result["ceilings"])
    by_method = _by_method(result)
    rows: list[Row] = [("", "", *(cell.replace("_", " ") for cell in cells))]
    for name, entries in by_method.items():
        if name.startswith(SCANS):
            rows += [
                (
                    name,
                    setting,
                    *(
                        f"{entries[cell]['lds'][setting]:.3f}" if cell in entries else "–"
                        for cell in cells
                    ),
                )
                for setting in sorted(next(iter(entries.values()))["lds"], key=_number)
            ]
    return rows


def _number(setting: str) -> tuple[float, str]:
    """For sorting: a number's value, and words behind numbers."""
    try:
        return float(setting), ""
    except ValueError:
        return float("inf"), setting


def removals(result: dict[str, Any]) -> list[Row]:
    """Relative changes of the queries' loss in per cent, a row for each method.

    Args:
        result: What ``benchmarks.lds.remove`` reports.
    """
    by_method: dict[str, dict[int, str]] = {}
    for row in result["removals"]:
        change, error = 100 * row["change_of_loss"], 100 * row["its_error"]
        by_method.setdefault(row["method"], {})[row["removed"]] = f"{change:+.1f} ± {error:.1f} %"
    sizes = list(next(iter(by_method.values())))
    head: Row = ("", *(f"{size} removed" for size in sizes))
    return [head, *((name, *(own[size] for size in sizes)) for name, own in by_method.items())]


def _by_method(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    by_method: dict[str, dict[str, Any]] = {}
    for row in result["methods"]:
        if row["method"] not in GONE:
            by_method.setdefault(row["method"], {})[row["cell"]] = row
    return by_method


def _lds_rows(
    result: dict[str, Any],
    methods: Sequence[str] | None,
    shown: Callable[[dict[str, Any]], str],
) -> list[Row]:
    """A head, and a row for each method with what is shown of each cell."""
    by_method, cells = _by_method(result), list(result["ceilings"])
    if methods is None:
        methods = [name for name in by_method if not name.startswith(SCANS)]
    rows: list[Row] = [("", *(cell.replace("_", " ") for cell in cells))]
    for name in methods:
        entries = by_method[name]
        default = all("default" in entry for entry in entries.values())
        searched = not default and any(e["best"]["setting"] != "" for e in entries.values())
        which = "default" if default else "best"
        cell_texts = (shown(entries[cell][which]) if cell in entries else "–" for cell in cells)
        rows.append((f"{name} (best)" if searched else name, *cell_texts))
    return rows


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {entry}" for i, entry in enumerate(row)]
    return "\n".join(lines) + "\n"
