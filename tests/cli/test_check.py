"""``validate check``, by the program."""

import json

import pytest

from curvlinops_diffusion.cli.program import run


@pytest.fixture
def given(fitted):
    words = ["validate", "check", "--operator", fitted / "ekfac.safetensors", "--quiet"]
    return [str(word) for word in [*words, "--num-queries", 3, "--num-draws", 4]]


def test_a_check(given, tmp_path, capsys):
    """A table for people, and the numbers; what the operator was made with is taken from it."""
    output = tmp_path / "check.json"
    assert run([*given, "--damping", "1e-3", "--output", str(output)]) == 0
    told = capsys.readouterr()
    found = json.loads(output.read_text())
    assert (found["num_draws"], found["damping"], len(found["asked"])) == (4, 1e-3, 3)
    names = [row["name"] for row in found["checks"]]
    assert names == [
        *("itself", "mirrored", "recompressed", "halves", "shuffled weights", "pixels alone"),
    ]
    assert all(row["sentence"] in told.out for row in found["checks"])
    assert found["summary"] in told.out
    assert "128 samples forward and backward for scores, 14 for a curvature" in told.err
    assert run([*given, "--output", str(output)]) == 2
    assert "exists. Pass --overwrite" in capsys.readouterr().err


def test_what_it_costs(given, tmp_path, capsys):
    """Without shuffled weights half as much, and no second curvature."""
    output = tmp_path / "check.html"
    words = [*given, "--output", str(output), "--dry-run"]
    assert run([*words, "--no-shuffle-weights"]) == 0
    assert "64 samples forward and backward for scores, 0 for" in capsys.readouterr().out
    assert not output.exists()
    assert run(["validate"]) == 0
    assert "validate check" in capsys.readouterr().out
