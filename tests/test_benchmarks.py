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
    "factor_pass": ["--upstream"],
    "eigenvalue_groups": [],
    "ggn_product": [],
    "peak_memory": [],
    "draws": [],
}


def test_every_program_is_tested():
    helpers = {"__init__", "measure", "problems"}
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - helpers == PROGRAMS.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_runs(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device", "cpu"]
    result = subprocess.run(
        [*command, *PROGRAMS[name], "--output", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.json")
    assert {"machine", "question"} <= json.loads(path.read_text()).keys()
