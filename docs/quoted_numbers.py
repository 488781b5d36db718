"""Numbers in sentences of the documentation and the README, from the results of the benchmarks.

``|name|`` in a page of the documentation becomes the number of that name. What is said *with* the
numbers (that one method is ahead of another) is no number: ``tests/test_documentation.py`` checks
it.
"""

from __future__ import annotations

import json
from typing import Any

from tables import PROBLEM_NAMES, RESULTS

RECIPE = "EK-FAC, the paper's recipe"
DEFAULT = "K-FAC, regression on loss and squared prediction"
PIXELS = "kernel regression on pixels"
KINDS = ("held-out", "generated")


def result_of(name: str) -> dict[str, Any]:
    """What a program reported, measured on a CPU."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}_cpu.json").read_text())
    return result


def substitutions() -> str:
    """The definitions of all names, for Sphinx."""
    return "\n".join(f".. |{name}| replace:: {number}" for name, number in numbers().items())


def numbers() -> dict[str, str]:
    """Every number by its name."""
    found: dict[str, str] = {}
    for part in (
        _draws(),
        _seeds(),
        _default(),
        _digits(),
        _photograph(),
        _lengths(),
        _removal(),
        _exact_ggn(),
    ):
        assert not found.keys() & part.keys()
        found |= part
    return found


def _draws() -> dict[str, str]:
    """Of the scores, for a correlation; of the factors, time relative to one loss vector."""
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


def _seeds() -> dict[str, str]:
    """The correlation of two trainings on the same half, of the loss."""
    return {
        f"seeds, {problem}, {kind}": f"{agreement[f'loss, {kind}']:.2f}"
        for problem in PROBLEM_NAMES
        for agreement in [result_of(f"lds_{problem}")["agreement_of_seeds"]]
        for kind in KINDS
    }


def _default() -> dict[str, str]:
    """Scores of the regression at its defaults, of the loss."""
    return {
        f"default, {problem}, {kind}": _with_interval(shown[DEFAULT, f"loss, {kind}"])
        for problem in PROBLEM_NAMES
        for shown in [_shown(_rows(problem))]
        for kind in KINDS
    }


def _rows(problem: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found of a data set, by method and column."""
    return {(r["method"], r["cell"]): r for r in result_of(f"lds_{problem}")["methods"]}


def _shown(rows: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """At the defaults, or else at the best setting."""
    return {place: row.get("default", row["best"]) for place, row in rows.items()}


def _digits() -> dict[str, str]:
    """Scores of the digits' loss."""
    rows = _rows("digits")
    shown = _shown(rows)
    found = {}
    for kind in KINDS:
        cell = f"loss, {kind}"
        found[f"recipe, 250 draws, {kind}"] = f"{shown[f'{RECIPE}, 250 draws', cell]['lds']:.2f}"
        for what, (one, other) in {
            "squaring": (DEFAULT, "K-FAC, regression on loss and prediction"),
            "squaring pixels": (f"{PIXELS}, squared", PIXELS),
        }.items():
            difference = shown[one, cell]["lds"] - shown[other, cell]["lds"]
            found[f"gain by {what}, {kind}"] = f"{difference:.2f}"
        gain = shown["K-FAC, regression on the prediction", cell]["minus_ekfac"]
        found[f"gain by the prediction, {kind}"] = (
            f"{gain['difference']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
        )
    for what in ("loss", "prediction"):
        ridges = rows[f"K-FAC, regression on the {what}", "loss, held-out"]["lds"]
        found[f"regression on the {what}, ridge 1"] = f"{ridges['1e-08']:.2f}"
        found[f"regression on the {what}, ridge 30"] = f"{ridges['ridge 30.0']:.2f}"
    for curvature in ("EK-FAC", "K-FAC"):
        own = shown[f"{curvature}, reduce", "loss, held-out"]
        found[f"reduce, {curvature}"] = f"{own['lds']:.2f}"
    refined = shown["conjugate gradients from EK-FAC", "loss, generated"]
    found["gain by conjugate gradients"] = f"{refined['minus_ekfac']['difference']:.2f}"
    found["before conjugate gradients"] = f"{shown['EK-FAC', 'loss, generated']['lds']:.2f}"
    found["after conjugate gradients"] = f"{refined['lds']:.2f}"
    return found


def _photograph() -> dict[str, str]:
    """Differences of scores of the loss, on patches of a photograph."""
    shown = _shown(_rows("photographs"))
    found = {}
    for kind in KINDS:
        cell = f"loss, {kind}"
        for what, one, other in (
            ("behind the default, photographs", DEFAULT, "EK-FAC"),
            (
                "behind without the loss, photographs",
                DEFAULT,
                "K-FAC, regression on the prediction, squared",
            ),
            ("gain by late checkpoints", "EK-FAC, late checkpoints", "EK-FAC"),
        ):
            found[f"{what}, {kind}"] = f"{shown[one, cell]['lds'] - shown[other, cell]['lds']:.2f}"
    return found


def _with_interval(score: dict[str, Any]) -> str:
    return f"{score['lds']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def _lengths() -> dict[str, str]:
    """Against the training's length: what methods have of each part of a loss' change."""
    rows = result_of("training_length")["lengths"]

    def of(row: dict[str, Any], method: str, part: str) -> float:
        return float(row["methods"][method][part]["lds"])

    prediction = "K-FAC, regression on the prediction, squared"
    linear = [of(row, "EK-FAC", "linear") for row in rows[1:]]
    agreement = [row["agreement"]["loss"] for row in rows]
    (middle,) = (row for row in rows if row["passes"] == 320)
    numbers = {
        "least linear, EK-FAC": min(linear),
        "most linear, EK-FAC": max(linear),
        "loss of 320 passes, EK-FAC": of(middle, "EK-FAC", "loss"),
        "squared at last, prediction": of(rows[-1], prediction, "squared"),
        "squared at last, EK-FAC": of(rows[-1], "EK-FAC", "squared"),
        "loss at last, prediction": of(rows[-1], prediction, "loss"),
        "loss at last, EK-FAC": of(rows[-1], "EK-FAC", "loss"),
        "least agreement at lengths": min(agreement),
        "most agreement at lengths": max(agreement),
    }
    return {name: f"{value:.2f}".replace("-", "−") for name, value in numbers.items()}


def _removal() -> dict[str, str]:
    """The rise of the loss without the 100 most helpful digits, in per cent."""
    rows = {r["method"]: r for r in result_of("removed_digits")["removals"] if r["removed"] == 100}
    methods = ("EK-FAC", "TRAK", "D-TRAK", "kernel regression on pixels")
    found = {f"removed, {name}": f"{100 * rows[name]['change_of_loss']:.0f}" for name in methods}
    for number, text in enumerate(rows["EK-FAC"]["by_query"], start=1):
        found[f"removed, EK-FAC, sample {number}"] = f"{100 * float(text.split()[0]):.0f}"
    return found


def _exact_ggn() -> dict[str, str]:
    result = result_of("exact_ggn")
    whole, spectra = result["whole"], result["spectra"]
    between = whole["between blocks, left out"]
    found = {"parameters of the exact GGN": f"{result['parameters']:,}"}
    found["between blocks"] = f"{between:.2f}"
    for name in ("EK-FAC", "K-FAC"):
        found[f"added by {name}"] = f"{whole[f'{name}, in all'] - between:.2f}"
    for name in ("K-FAC", "K-FAC, reduce"):
        found[f"within blocks, {name}"] = f"{whole[f'{name}, within blocks']:.2f}"
    found["largest eigenvalue"] = f"{spectra['exact']['1']:.0f}"
    found["largest eigenvalue of blocks"] = f"{spectra['exact blocks']['1']:.1f}"
    (convolutions,) = (row for row in result["by_kind"] if row["blocks"] == "convolutions")
    for factors in ("", ", Shampoo's factors"):
        for name in (f"K-FAC{factors}", f"EK-FAC{factors}"):
            found[f"convolutions, {name}"] = f"{convolutions[name]:.2f}"
    default = result["cosines"][0]
    found["cosine of exact blocks"] = f"{default['exact blocks']:.2f}"
    found["cosine of reduce"] = f"{default['K-FAC, reduce']:.3f}"
    for row in result["cosines_by_kind"]:
        if row["damping"] == default["damping"] and row["blocks"] in ("convolutions", "attention"):
            for name in ("K-FAC", "EK-FAC", "EK-FAC, Shampoo's factors"):
                found[f"cosine in {row['blocks']}, {name}"] = f"{row[name]:.2f}"
    shares = result["share_of_eigenvalues_above_1_and_10_percent_of_the_largest"]
    for name, (one, ten) in shares.items():
        found[f"above 1 per cent, {name}"] = f"{100 * one:.1f} %"
        found[f"above 10 per cent, {name}"] = f"{100 * ten:.2f} %"
    more = [100 * (row["K-FAC"] / row["exact"] - 1) for row in result["bands"]]
    found["least K-FAC has more by band"] = f"{min(more):.0f}"
    found["most K-FAC has more by band"] = f"{max(more):.0f}"
    return found
