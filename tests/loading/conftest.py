"""Pipelines on disk, each written once."""

import pytest

from tests.diffusion import test_pipelines as pipelines


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Pipelines by their makers, each written once."""
    made = {}

    def of(make):
        if make not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            made[make] = (folder, pipelines.made(make, folder))
        return made[make]

    return of
