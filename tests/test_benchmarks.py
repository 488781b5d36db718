"""Every benchmark program runs; no times are checked."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    draws,
    eigenvalue_groups,
    exact_ggn,
    peak_memory,
    refinement,
    stored_gradients,
)

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "cost_model": ["cost_model"],
    "coverage": ["coverage"],
    "draws": ["draws"],
    "eigenvalue_groups": ["eigenvalue_groups"],
    "factor_pass --upstream": ["factor_pass_unet", "factor_pass_cifar", "factor_pass_dit"],
    "factor_pass --upstream --problem dit": [],
    "factor_pass --problem cifar --upstream --not-decomposed": [],
    "exact_ggn": ["exact_ggn"],
    "ggn_product": ["ggn_product"],
    "inverse_products": ["inverse_products"],
    "peak_memory": ["peak_memory"],
    "refinement": ["refinement"],
    "scaling": ["scaling"],
    "score_draws": ["score_draws"],
    "scoring": ["scoring"],
    "stored_gradients": ["stored_gradients"],
}
PARTS = ("minus_recipe", "minus_ekfac", "scans")
RESULTS = [name for names in PROGRAMS.values() for name in names]


def test_every_program_is_tested():
    helpers = {"__init__", "accuracy", "kronfluence_passes", "measure", "models", "problems"}
    helpers |= {"upstream"}
    programs = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert programs == {call.split()[0] for call in PROGRAMS}


def in_this_process(command, **options):
    """What ``benchmarks.peak_memory`` runs in processes of their own."""
    peak = peak_memory.peak_mebibytes(command[command.index("--only") + 1], True, "cpu")
    return SimpleNamespace(stdout=json.dumps(peak))


# what is left of programs whose quick form takes long; whole by `make test-slow`
CUT = {
    "draws": {"SETTINGS": draws.SETTINGS[:2]},
    "eigenvalue_groups": {"SETTINGS": eigenvalue_groups.SETTINGS[4:6]},
    "exact_ggn": {
        "APPROXIMATIONS": {k: exact_ggn.APPROXIMATIONS[k] for k in ("K-FAC", "EK-FAC")},
        "BANDS": 1,
    },
    "peak_memory": {"subprocess": SimpleNamespace(run=in_this_process)},
    "refinement": {"DAMPINGS": refinement.DAMPINGS[:1]},
    "stored_gradients": {"forms": lambda *sizes: stored_forms(*sizes)[::4]},
}
stored_forms = stored_gradients.forms
WHOLE_APPROXIMATIONS = frozenset(exact_ggn.APPROXIMATIONS)


def result_of(call, folder, monkeypatch):
    """Run a program in this process, since imports would take the longest."""
    name, *arguments = call.split()
    options = ["--quick", "--device", "cpu", "--repeats", "1", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [name, *options, *arguments])
    with torch.random.fork_rng():
        importlib.import_module(f"benchmarks.{name}").main()
    (path,) = folder.glob("*.json")
    return path.stem.removesuffix("_cpu"), json.loads(path.read_text())


def assert_of_the_form_of_the_kept_one(name, result, left_out=frozenset()):
    """With its entries, of which the tables are made; and every number is one."""
    assert result.keys() >= kept(name).keys()
    for key, value in kept(name).items():
        if isinstance(value, list):
            assert keys_of_rows(result[key]) == keys_of_rows(value) - left_out
    # JSON has no others, but Python writes them
    assert not re.search(r"\b(NaN|Infinity)\b", json.dumps(result))


def keys_of_rows(rows):
    """Without the sizes in their names, which are smaller in quick forms."""
    return {re.sub(r"\d+", "#", key) for row in rows for key in row}


@pytest.mark.parametrize("call", PROGRAMS)
def test_the_program_runs(call, tmp_path, monkeypatch):
    program = call.split()[0]
    for key, value in CUT.get(program, {}).items():
        monkeypatch.setattr(f"benchmarks.{program}.{key}", value)
    name, result = result_of(call, tmp_path, monkeypatch)
    assert name in (PROGRAMS[call] or RESULTS)
    left_out = WHOLE_APPROXIMATIONS - {*exact_ggn.APPROXIMATIONS}
    assert_of_the_form_of_the_kept_one(name, result, left_out)


@pytest.mark.slow
@pytest.mark.parametrize("call", CUT)
def test_the_whole_program_runs(call, tmp_path, monkeypatch):
    assert_of_the_form_of_the_kept_one(*result_of(call, tmp_path, monkeypatch))


def kept(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_kept(name):
    assert {"machine", "question"} <= kept(name).keys()


def test_tables_of_the_documentation_hold_the_results(monkeypatch, tmp_path):
    """Every result is in a table that the documentation includes, with its numbers."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables

    tables.write_tables(tmp_path)
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.rst"))
    further = [f"exact_ggn_{part}" for part in ("whole", "cosines", "cosines_by_kind", "spectra")]
    further += [f"lds_{problem}_{part}" for problem in ("digits", "photographs") for part in PARTS]
    for name in (*RESULTS, *further, "exact_ggn_bands", "removed_digits"):
        assert (tmp_path / f"{name}.rst").exists()
        assert f".. include:: _tables/{name}.rst" in pages
    for name in RESULTS:
        cells = (tmp_path / f"{name}.rst").read_text()
        result = kept(name)
        numbers = [f"{value:.2f}" for value in result.get("training_passes", {}).values()]
        numbers += [f"{value:,}" for value in result.get("peak_mebibytes", {}).values()]
        for row in next((value for value in result.values() if isinstance(value, list)), []):
            numbers += [str(value) for value in row.values()]
        assert numbers
        assert all(f"- {number}\n" in cells for number in numbers)


def test_what_the_documentation_says_of_the_results():
    """Numbers in the text of the README and the documentation, against the files."""
    passes = kept("factor_pass_unet")["training_passes"]
    assert passes["K-FAC factors"] < 1.7
    assert passes["curvlinops K-FAC factors"] / passes["K-FAC factors"] > 3
    needed = kept("score_draws")["needed"]
    schemes = ("uniform", "stratified", "stratified, antithetic")
    assert [round(needed[t]["0.9"]) for t in schemes] == [121, 98, 48]
    assert [round(needed[t]["0.95"]) for t in schemes] == [235, 214, 110]
    forms = {row["form"]: row for row in kept("stored_gradients")["forms"]}
    assert forms["nf4"]["error_of_scores"] < 0.011
    assert forms["float32"]["bytes_for_each_example"] > 7 * forms["nf4"]["bytes_for_each_example"]
    best: dict[float, dict[str, float]] = {}
    for row in kept("refinement")["preconditioners"]:
        best.setdefault(row["damping"], {})[row["preconditioner"]] = row["error_after_60"]
    for errors in best.values():
        others = [e for name, e in errors.items() if not name.startswith("Nyström")]
        assert errors["Nyström, rank 64"] <= min(others)
    cost = {
        tuple(row[key] for key in ("timesteps", "draws", "probe_type", "mc_samples")): row[
            "squared_error_B_times_seconds"
        ]
        for row in kept("draws")["settings"]
    }
    for count, ratio in ((1, 0.65), (4, 0.93)):
        one, two = (cost["stratified", count, "rademacher", number] for number in (1, 2))
        assert round(two / one, 2) == ratio
    assert cost["stratified", 1, "rademacher", 1] < cost["stratified", 1, "gaussian", 1]
    assert cost["uniform", 1, "rademacher", 1] >= cost["uniform", 1, "gaussian", 1]
    memory = kept("peak_memory")["beyond_a_training_pass"]
    assert memory["curvlinops K-FAC factors"] / memory["K-FAC factors"] > 4


def test_what_the_documentation_says_of_the_exact_ggn():
    result = kept("exact_ggn")
    whole = result["whole"]
    assert round(whole["between blocks, left out"], 2) == 0.94
    for kind, more in (("EK-FAC", 0.01), ("K-FAC", 0.05)):
        added = whole[f"{kind}, in all"] - whole["between blocks, left out"]
        assert round(added, 2) == more
    kinds = {row["blocks"]: row for row in result["by_kind"]}
    convolutions = {
        "K-FAC": 0.99,
        "EK-FAC": 0.42,
        "K-FAC, Shampoo's factors": 0.33,
        "K-FAC, nearest": 0.27,
        "EK-FAC, Shampoo's factors": 0.27,
        "EK-FAC, nearest": 0.25,
    }
    for name, error in convolutions.items():
        assert round(kinds["convolutions"][name], 2) == error
    largest = {name: values["1"] for name, values in result["spectra"].items()}
    assert round(largest.pop("exact")) == 133
    assert [name for name, value in largest.items() if round(value, 1) != 23.5] == ["K-FAC, reduce"]
    shares = result["share_of_eigenvalues_above_1_and_10_percent_of_the_largest"]
    assert [round(100 * share, 1) for share in (shares["dense"][0], shares["Lanczos"][0])] == [
        0.7,
        6.6,
    ]
    assert [round(100 * share, 2) for share in (shares["dense"][1], shares["Lanczos"][1])] == [
        0.1,
        0.11,
    ]
    assert round(whole["K-FAC, reduce, within blocks"], 2) == 0.15
    assert round(whole["K-FAC, within blocks"], 2) == 0.32
    assert round(result["cosines"][0]["K-FAC, reduce"], 3) == 0.002
    assert result["parameters"] == 4877
    default = result["cosines"][0]
    assert default["damping"] == 1e-8
    order = sorted(
        (name for name in default if "FAC" in name), key=default.__getitem__, reverse=True
    )
    assert order[:2] == ["EK-FAC, Shampoo's factors", "EK-FAC, nearest"]
    assert order[-2:] == ["K-FAC, nearest", "K-FAC, reduce"]
    assert round(default["exact blocks"], 2) == 0.28
    blocks = {row["blocks"]: row for row in result["cosines_by_kind"] if row["damping"] == 1e-8}
    names = ("K-FAC", "EK-FAC", "EK-FAC, Shampoo's factors")
    for kind, expected in (("convolutions", [0.54, 0.58, 0.66]), ("attention", [0.55, 0.68, 0.74])):
        assert [round(blocks[kind][name], 2) for name in names] == expected
    traces = [row["exact"] for row in result["bands"]]
    assert traces == sorted(traces, reverse=True)
    more = [row["K-FAC"] / row["exact"] - 1 for row in result["bands"]]
    assert (round(min(more), 2), round(max(more), 2)) == (0.09, 0.19)
    assert all(row["EK-FAC"] == pytest.approx(row["exact"], rel=1e-5) for row in result["bands"])
