"""Tables of the documentation, from the results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refusals import page

from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
# of figures and README, from the bottom up
REGRESSION = "K-FAC, regression"
PIXELS = "kernel regression on pixels, squared"
LATENTS = "kernel regression on latents, squared"
METHODS = ("TRAK", "D-TRAK", "DAS", "EK-FAC, the paper's recipe", "EK-FAC", REGRESSION, PIXELS)
#: The retrained problems' names.
PROBLEM_NAMES = {
    "digits": "digits",
    "fashion": "Fashion-MNIST",
    "photographs": "photograph",
    "textures": "textures",
    "styles": "adapter, four styles",
    "dreambooth": "adapter, one thing",
}

# of predicted and measured changes
SLOPES = (
    *("problem", "queries", "measured", "slope", "error", "same_sign_about_the_mean"),
    *("predicted_improvements", "measured_improvements"),
    *("mean_predicted_change", "mean_measured_change"),
)

Row = Sequence[object]


def write_tables(folder: Path = DOCS / "_tables") -> None:
    """Write the tables of each result that was measured on a CPU."""
    folder.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("*_cpu.json")):
        result = json.loads(path.read_text())
        name = path.stem.removesuffix("_cpu")
        for part, (head, *rows) in {"": _cells(result), **_further(result)}.items():
            (folder / f"{name}{part}.rst").write_text(_table(head, rows))
    (folder / "measurements.rst").write_text(measurements())
    (folder / "refused.rst").write_text(page())


def measurements() -> str:
    """The named measurements, from their registry."""
    rows = [
        (f"``{name}``", entry.summary, entry.better.value) for name, entry in MEASUREMENTS.items()
    ]
    return _table(("", "quantity", "scores"), rows)


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
    if "slopes" in result:
        return _of_ekfac(result["slopes"], SLOPES)
    if "unlearned" in result:
        return unlearned(result)
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
    """Further tables of a result, by the ending of their files' names."""
    if "ceilings" in result:
        return {"_minus_ekfac": lds_differences(result)}
    if "counted" in result:
        return {f"_{part}": _of_records(result[part]) for part in ("counted", "sent")}
    if "sizes" in result:
        return {"_coverage": _of_records(result["coverage"])}
    if "slopes" in result:
        measured = ("loss", "simplified_elbo")
        found = {f"_by_scores_{m}": crossed(result, m) for m in measured}
        found["_spread"] = _of_records(result["spread"])
        if result["coverage"]:  # of several problems
            found["_coverage"] = _of_ekfac(result["coverage"], ())
        return found
    if "by_kind" not in result:
        return {}
    whole: list[Row] = [("", "relative error"), *result["whole"].items()]
    return {"_whole": whole, "_cosines": _of_records(result["cosines"])}


def _of_records(records: Sequence[dict[str, object]]) -> list[Row]:
    head = tuple(label.replace("_", " ") for label in records[0])
    return [head, *(tuple(record.values()) for record in records)]


def lds_cells(result: dict[str, Any], methods: Sequence[str] | None = None) -> list[Row]:
    """Linear data-modelling scores with intervals.

    Args:
        result: The report of ``benchmarks.lds.evaluate``.
        methods: Only these, in this order; ``None`` for all.
    """
    last = {"two seeds": "agreement_of_seeds", "a perfect predictor": "ceilings"}
    return _lds_rows(result, methods, with_interval) + [
        (f"*{label}*", *(f"{value:.2f}" for value in result[key].values()))
        for label, key in last.items()
    ]


def lds_differences(result: dict[str, Any]) -> list[Row]:
    """Differences of linear data-modelling scores to EK-FAC's."""
    head, *rows = _lds_rows(result, None, lambda row: with_interval(row["minus_ekfac"], "+"))
    return [head, *(row for row in rows if row[0] != "EK-FAC")]


def _lds_rows(
    result: dict[str, Any],
    methods: Sequence[str] | None,
    shown: Callable[[dict[str, Any]], str],
) -> list[Row]:
    """A head, and a row for each method with an entry for each cell."""
    by_method: dict[str, dict[str, Any]] = {}
    for row in result["methods"]:
        by_method.setdefault(row["method"], {})[row["cell"]] = row
    rows: list[Row] = [("", *(cell.replace("_", " ") for cell in result["ceilings"]))]
    for name in by_method if methods is None else methods:
        entries = by_method.get(name, {})  # the costly ones were not evaluated everywhere
        chosen = any(entry["chosen_by_result"] for entry in entries.values())
        texts = (shown(entries[cell]) if cell in entries else "–" for cell in result["ceilings"])
        rows.append((f"{name} (best)" if chosen else name, *texts))
    return rows


def with_interval(score: dict[str, Any], sign: str = "") -> str:
    """A score or difference, and its 95 % interval."""
    value = score.get("lds", score.get("difference"))
    return f"{value:{sign}.2f} [{score['low']:{sign}.2f}, {score['high']:{sign}.2f}]"


def lengths(result: dict[str, Any]) -> list[Row]:
    """Linear data-modelling scores of the loss with intervals, against the training's length."""
    rows: list[Row] = [("passes over the images", *(row["passes"] for row in result["lengths"]))]
    for method, parts in result["lengths"][0]["methods"].items():
        found = [row["methods"][method]["loss"] for row in result["lengths"]]
        label = method if parts["loss"]["setting"] == "1e-08" else f"{method} (best)"
        rows.append((label, *map(with_interval, found)))
    return rows


def _of_ekfac(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[Row]:
    """Columns of the records of EK-FAC, those that say where and the given; all if none are."""
    chosen = [
        {k: v for k, v in record.items() if k != "method" and (not columns or k in columns)}
        for record in records
        if record["method"] == "EK-FAC"
    ]
    return _of_records(chosen)


def crossed(result: dict[str, Any], measured: str) -> list[Row]:
    """Linear data-modelling scores of one measured value, by what the scores are of."""
    cells: dict[str, dict[str, str]] = {}
    for row in result["crossed"]:
        place = f"{row['problem']}, {row['queries']}"
        cells.setdefault(row["scores_of"], {})[place] = with_interval(row[measured])
    head: Row = ("scores of", *next(iter(cells.values())))
    return [head, *((of.replace("_", " "), *own.values()) for of, own in cells.items())]


def unlearned(result: dict[str, Any]) -> list[Row]:
    """Linear data-modelling scores of unlearning, with intervals, and seconds for a query."""
    kinds = ("held-out", "generated")
    head: Row = ("", *kinds, "loss of the query", "seconds for a query")
    return [head] + [
        (
            row["method"],
            *(with_interval(row[kind]) for kind in kinds),
            *(f"{row[key]:.2g}" if key in row else "–" for key in ("loss", "seconds")),
        )
        for row in result["unlearned"]
    ]


def removals(result: dict[str, Any]) -> list[Row]:
    """Relative changes of the queries' loss in per cent, a row for each method."""
    by_method: dict[str, dict[int, str]] = {}
    for row in result["removals"]:
        change, error = 100 * row["change_of_loss"], 100 * row["its_error"]
        by_method.setdefault(row["method"], {})[row["removed"]] = f"{change:+.1f} ± {error:.1f} %"
    sizes = list(next(iter(by_method.values())))
    head: Row = ("", *(f"{size} removed" for size in sizes))
    return [head, *((name, *(own[size] for size in sizes)) for name, own in by_method.items())]


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {entry}" for i, entry in enumerate(row)]
    return "\n".join(lines) + "\n"
