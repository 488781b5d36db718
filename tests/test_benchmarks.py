"""Every benchmark program runs; no times are checked."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import draws, eigenvalue_draws, exact_ggn, gpu

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "cost_model": ["cost_model"],
    "coverage": ["coverage"],
    "draws": ["draws"],
    "eigenvalue_draws": ["eigenvalue_draws"],
    "factor_pass --upstream": ["factor_pass_unet", "factor_pass_cifar", "factor_pass_dit"],
    "factor_pass --upstream --problem dit": [],
    "factor_pass --problem cifar --upstream --not-decomposed": [],
    "exact_ggn": ["exact_ggn"],
    "ggn_product": ["ggn_product"],
    "inverse_products": ["inverse_products"],
    "peak_memory": ["peak_memory"],
    "positions": ["positions"],
    "precision": ["precision"],
    "refinement": ["refinement"],
    "report_page": ["report_page"],
    "score_draws": ["score_draws"],
    "scoring": ["scoring"],
    "shards": ["shards"],
    "stored_gradients": ["stored_gradients"],
}
RESULTS = [name for names in PROGRAMS.values() for name in names]


def test_every_program_is_tested():
    helpers = {"__init__", "accuracy", "kronfluence_passes", "measure", "models", "problems"}
    helpers |= {"upstream", "gpu"}  # of which no result is kept; tested below
    programs = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert programs == {call.split()[0] for call in PROGRAMS}


# what is left of programs whose quick form takes long; whole by `make test-slow`
CUT = {
    "draws": {"SETTINGS": draws.SETTINGS[:2]},
    "eigenvalue_draws": {"SETTINGS": eigenvalue_draws.SETTINGS[:2]},
    "exact_ggn": {"APPROXIMATIONS": {k: exact_ggn.APPROXIMATIONS[k] for k in ("K-FAC", "EK-FAC")}},
}
# run by `make test-slow` alone; that the names are there that they use, mypy knows
LONG = {
    "peak_memory",
    "positions",
    "precision",
    "refinement",
    "score_draws",
    "shards",
    "stored_gradients",
}
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


@pytest.mark.parametrize("call", [call for call in PROGRAMS if call not in LONG])
def test_the_program_runs(call, tmp_path, monkeypatch):
    program = call.split()[0]
    for key, value in CUT.get(program, {}).items():
        monkeypatch.setattr(f"benchmarks.{program}.{key}", value)
    name, result = result_of(call, tmp_path, monkeypatch)
    assert name in (PROGRAMS[call] or RESULTS)
    left_out = WHOLE_APPROXIMATIONS - {*exact_ggn.APPROXIMATIONS}
    assert_of_the_form_of_the_kept_one(name, result, left_out)


@pytest.mark.slow
@pytest.mark.parametrize("call", sorted({*CUT, *LONG}))
def test_the_whole_program_runs(call, tmp_path, monkeypatch):
    assert_of_the_form_of_the_kept_one(*result_of(call, tmp_path, monkeypatch))


def kept(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_kept(name):
    assert {"machine", "question"} <= kept(name).keys()


def test_what_is_measured_on_a_gpu(tmp_path, monkeypatch):
    """Written after each measurement; what fails is noted, and the rest goes on."""
    monkeypatch.setattr(gpu, "CASES", [gpu.CASES[0], gpu.CASES[5]])
    written = []
    report = gpu.report
    monkeypatch.setattr(
        gpu, "report", lambda *args: written.append(len(args[-1]["passes"])) or report(*args)
    )

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate all of it.")

    monkeypatch.setattr(gpu, "eigenvalue_moments", fail)
    name, result = result_of("gpu", tmp_path, monkeypatch)
    assert name == "gpu"
    assert written == sorted(written)
    assert len(set(written)) == len(result["passes"]) - 1  # those of scores are written together
    rows = {(row["network"], row["pass"]): row for row in result["passes"]}
    for case in gpu.CASES:
        assert rows[case.name, "training pass"]["training_passes"] == 1
        assert rows[case.name, "K-FAC factors"]["training_passes"] > 0
        assert rows[case.name, "EK-FAC eigenvalues"]["failed"].startswith("CUDA out of memory")
    assert rows[gpu.CASES[0].name, "curvlinops K-FAC factors"]["seconds"] > 0
    assert rows[gpu.CASES[1].name, "EK-FAC"]["seconds"] > 0
    assert not (tmp_path / ".gpu_cpu.json").exists()
