"""The house: how much stands in the hall, and where the border to curvlinops is.

Which folder may import which stands in ``pyproject.toml``; ``make lint`` checks it.
"""

import ast
from pathlib import Path

import curvlinops_diffusion

ROOT = Path(curvlinops_diffusion.__file__).parent


def test_the_root_holds_few_entries():
    entries = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 21, sorted(entries)


def test_tests_mirror_the_folders():
    """Each folder of the package has one of tests; what spans the chain is a file or trainers'."""
    tests = Path(__file__).parent
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    there = {path.name for path in tests.iterdir() if (path / "__init__.py").exists()}
    assert there == folders | {"trainers"}
    for folder in folders:
        assert list((tests / folder).glob("test_*.py")), f"{folder}/ has no tests"


# names of curvlinops' operators that are not public
INSIDES = {"_in_shape", "_out_shape", "_in_shape_flat", "_matmat", "_adjoint", "SELF_ADJOINT"}


def test_the_border_to_curvlinops_is_one_file():
    """Its next version changes its insides; only ``linalg/upstream.py`` may know them."""
    for path in set(ROOT.rglob("*.py")) - {ROOT / "linalg" / "upstream.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, key, None) for key in ("attr", "name", "id")}
            assert not names & INSIDES, f"{path} touches {names & INSIDES}"
