"""One problem and one fit for the tests of the program."""

import pytest

from curvlinops_diffusion.cli.program import run
from tests.cli.cases import arguments, write_problem


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A pipeline, training images and queries."""
    return write_problem(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="package")
def fitted(folder):
    """The operator and the scores, too."""
    assert run(arguments(folder, "fit")) == 0
    assert run(arguments(folder, "score")) == 0
    assert not list(folder.glob("*.checkpoint"))
    return folder
