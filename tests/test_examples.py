"""The gallery's programs end in asserts. Those of seconds are run here, all by `make test-slow`."""

import runpy
import sys
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
OF_SECONDS = ("damping_sensitivity", "own_layer")
ARGUMENTS = {"influence_digits": ["--steps", "700", "--draws", "16"]}


@pytest.mark.parametrize(
    "name",
    [
        path.stem if path.stem in OF_SECONDS else pytest.param(path.stem, marks=pytest.mark.slow)
        for path in sorted(EXAMPLES.glob("*.py"))
    ],
)
def test_example(name, monkeypatch, tmp_path):
    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
