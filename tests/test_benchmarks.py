"""Every benchmark program runs; no times are checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "draws": [],
    "eigenvalue_groups": [],
    "factor_pass": ["--upstream"],
    "ggn_product": [],
    "peak_memory": [],
}


def test_every_program_is_tested():
    helpers = {"__init__", "kronfluence_passes", "measure", "problems"}
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - helpers == PROGRAMS.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_runs(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device", "cpu"]
    command += ["--repeats", "1", "--output", str(tmp_path)]
    result = subprocess.run(
        [*command, *PROGRAMS[name]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.json")
    assert {"machine", "question"} <= json.loads(path.read_text()).keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_are_kept(name):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())
    assert {"machine", "question"} <= result.keys()
