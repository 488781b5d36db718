"""Numbers in sentences of the documentation and the README, from the results of the benchmarks.

``|name|`` in a page becomes the number of that name. Orders (one method ahead of another) are
checked by ``tests/test_documentation.py``.
"""

from __future__ import annotations

import json
from typing import Any

from tables import LATENTS, PIXELS, PROBLEM_NAMES, REGRESSION, RESULTS

KINDS = ("held-out", "generated")
#: Methods whose scores are quoted, by problem and by what sentences call them.
QUOTED = {
    "digits": {
        **{"influence": "EK-FAC", "regression": REGRESSION, "pixels": PIXELS, "DAS": "DAS"},
        **{"reduce": "EK-FAC, reduce", "reduce, K-FAC": "K-FAC, reduce"},
    },
    "textures": {"regression": REGRESSION, "pixels": PIXELS, "DAS": "DAS"},
    "textures_32": {"regression": REGRESSION, "pixels": PIXELS, "influence": "EK-FAC"},
    "styles": {
        **{"influence": "EK-FAC", "regression": REGRESSION, "pixels": PIXELS},
        **{"latents": LATENTS, "words": "same words"},
    },
    "dreambooth": {"influence": "EK-FAC", "regression": REGRESSION, "latents": LATENTS},
}
#: Methods whose differences to EK-FAC are quoted as a range over problems and kinds of pictures.
RANGES = {"recipe": "EK-FAC, the paper's recipe"}


def result_of(name: str) -> dict[str, Any]:
    """A program's report, measured on a CPU."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}_cpu.json").read_text())
    return result


def substitutions() -> str:
    """Define all names, for Sphinx."""
    return "\n".join(f".. |{name}| replace:: {number}" for name, number in numbers().items())


def numbers() -> dict[str, str]:
    """Every number by its name."""
    return _draws() | _retraining() | _sizes() | _exact_ggn()


def _draws() -> dict[str, str]:
    """Draws of scores for a correlation; time of two loss vectors relative to one."""
    needed = result_of("score_draws")["needed"]
    schemes = ("uniform", "stratified", "stratified, antithetic")
    found = {
        f"draws for {correlation}, {scheme}": f"{needed[scheme][correlation]:.0f}"
        for correlation in ("0.9", "0.95")
        for scheme in schemes
    }
    ratio = needed["uniform"]["0.9"] / needed["stratified, antithetic"]["0.9"]
    found["uniform draws for an antithetic one"] = f"{ratio:.1f}"
    cost = {
        (row["draws"], row["mc_samples"]): row["squared_error_B_times_seconds"]
        for row in result_of("draws")["settings"]
        if (row["timesteps"], row["probe_type"]) == ("stratified", "rademacher")
    }
    for draws in (1, 4):
        found[f"two loss vectors, draws {draws}"] = f"{cost[draws, 2] / cost[draws, 1]:.2f}"
    return found


def _retraining() -> dict[str, str]:
    """Linear data-modelling scores of the loss, and the change by removal in per cent."""
    results = {problem: result_of(f"lds_{problem}") for problem in (*PROBLEM_NAMES, "textures_32")}
    rows = {
        (problem, row["method"], row["cell"]): row
        for problem, result in results.items()
        for row in result["methods"]
    }
    found = {
        label if problem == "digits" else f"{label} on {problem}": " / ".join(
            f"{rows[problem, method, f'loss, {kind}']['lds']:.2f}" for kind in KINDS
        )
        for problem, methods in QUOTED.items()
        for label, method in methods.items()
    }
    cells = [(problem, f"loss, {kind}") for problem in PROBLEM_NAMES for kind in KINDS]
    ranges = {
        label: [
            abs(rows[p, method, cell]["minus_ekfac"]["difference"])
            for p, cell in cells
            if (p, method, cell) in rows
        ]
        for label, method in RANGES.items()
    }
    ranges["two seeds"] = [results[p]["agreement_of_seeds"][cell] for p, cell in cells]
    for label, values in ranges.items():
        found |= {f"least {label}": f"{min(values):.2f}", f"most {label}": f"{max(values):.2f}"}
    of_seeds = results["textures_32"]["agreement_of_seeds"]
    found["two seeds on textures_32"] = " / ".join(f"{of_seeds[f'loss, {k}']:.2f}" for k in KINDS)
    for kind, distance in results["textures"]["nearest_training_image"].items():
        found[f"nearest {kind} on textures"] = f"{distance:.2f}"
    for row in result_of("removed_digits")["removals"]:
        if row["removed"] == 100 and row["method"] in ("EK-FAC", "TRAK", "D-TRAK"):
            found[f"removed, {row['method']}"] = f"{100 * row['change_of_loss']:.0f}"
    return found


def _sizes() -> dict[str, str]:
    """Slopes of measured on predicted changes, and what intervals fitted elsewhere hold."""
    result = result_of("sizes")
    slopes = [row["slope"] for row in result["sizes"]]
    shares = [100 * row["coverage"] for row in result["coverage"]]
    found = {"least slope": f"{min(slopes):.1f}", "most slope": f"{max(slopes):.1f}"}
    return found | {"least coverage": f"{min(shares):.0f}", "most coverage": f"{max(shares):.0f}"}


def _exact_ggn() -> dict[str, str]:
    result = result_of("exact_ggn")
    whole = result["whole"]
    between = whole["between blocks, left out"]
    found = {"parameters of the exact GGN": f"{result['parameters']:,}"}
    found["between blocks"] = f"{between:.2f}"
    for name in ("EK-FAC", "K-FAC"):
        found[f"added by {name}"] = f"{whole[f'{name}, in all'] - between:.2f}"
    (convolutions,) = (row for row in result["by_kind"] if row["blocks"] == "convolutions")
    for name in ("K-FAC", "EK-FAC"):
        found[f"convolutions, {name}"] = f"{convolutions[name]:.2f}"
    found["cosine of exact blocks"] = f"{result['cosines'][0]['exact blocks']:.2f}"
    return found
