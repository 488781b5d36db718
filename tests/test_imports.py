"""What importing the package imports: nothing that it does not need, or does not need yet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import curvlinops_diffusion

ROOT = Path(curvlinops_diffusion.__file__)
# all of these are installed where the tests run; none is needed to compute anything
NOT_NEEDED = {
    "PIL",
    "bitsandbytes",  # diffusers imports it wherever it is installed, and it warns
    "diffusers",  # its classes are told by their names
    "jsonargparse",
    "matplotlib",
    "peft",
    "sklearn",
    "torchvision",
    "transformers",
}


def modules_after(statements):
    """The top-level modules that a fresh process has imported after some statements."""
    statements += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    finished = subprocess.run(
        [sys.executable, "-c", statements], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.splitlines()[-1].split())


def test_the_bare_package():
    imported = modules_after("import curvlinops_diffusion")
    assert not imported & {*NOT_NEEDED, "curvlinops", "numpy", "scipy", "torch"}


def test_every_public_name():
    """Needs ``curvlinops``, PyTorch and what these import, and no more."""
    imported = modules_after("from curvlinops_diffusion import *")
    assert {"curvlinops", "torch"} <= imported
    assert not imported & NOT_NEEDED


def listed_imports():
    """The imports that type checkers see, as a table from names to modules."""
    (block,) = [node for node in ast.parse(ROOT.read_text()).body if isinstance(node, ast.If)]
    return {
        alias.name: node.module.removeprefix("curvlinops_diffusion.")
        for node in block.body
        for alias in node.names
    }


def test_the_lists_of_public_names_agree():
    """``__all__``, the table, and the imports for type checkers."""
    table = curvlinops_diffusion._MODULES
    assert curvlinops_diffusion.__all__ == list(table)
    assert listed_imports() == table
    assert set(table) <= set(dir(curvlinops_diffusion))


@pytest.mark.parametrize("name", curvlinops_diffusion.__all__)
def test_public_names(name):
    namespace = {}
    exec(f"from curvlinops_diffusion import {name}", namespace)
    assert namespace[name] is getattr(curvlinops_diffusion, name)


def test_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = curvlinops_diffusion.Nothing
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from curvlinops_diffusion import Nothing  # noqa: F401
