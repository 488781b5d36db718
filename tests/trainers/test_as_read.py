"""One command without any option that could have been read: the run that all options would make."""

import pytest
import torch
import yaml

from curvlinops_diffusion import StoredScores
from curvlinops_diffusion.cli.program import run
from tests.trainers import folders
from tests.trainers.test_steps import assert_steps_are_the_trainers, attributor_of, base, pipeline

__all__ = ["base", "pipeline"]  # fixtures

# what no file says, and decides nothing of the loss
DRAWS = ["--fit-draws", "1", "--num-draws", "4", "--damping", "1e-3", "--curvature", "kfac"]
DRAWS += ["--params", "down_blocks*attn1.to_q.lora*"]


def words_of(options):
    """Options of the library as flags of the program."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            words += [f"{key}={str(each).lower()}" for key, each in value.items()]
        elif value is not True:
            words.append(str(value))
    return words


@pytest.fixture(params=folders.FULL, ids=lambda make: make.__name__)
def trained(request, base, tmp_path):
    recipe = folders.FULL[request.param]
    folders.write_queries(tmp_path / "queries", recipe.resolution)
    return request.param(tmp_path, base, recipe)


def run_of(trained, output, *more):
    """The options of a run as written beside its result, and its scores."""
    words = ["--pipeline", trained.base, "--lora", trained.lora, "--data", trained.data]
    words += ["--queries", trained.data.parent / "queries", "--output", output, "--quiet"]
    assert run(["attribute", *map(str, words), *DRAWS, *more]) == 0
    options = yaml.safe_load((output / "run.yaml").read_text())
    return options, StoredScores.open(output / "scores.safetensors").whole()


def test_what_is_read_is_what_is_given_by_hand(trained, tmp_path, capsys):
    options, scores = run_of(trained, tmp_path / "read")
    told = capsys.readouterr().err
    assert [entry for entry in trained.read if entry not in told] == []
    if not trained.read:  # the script leaves nothing to read, and this training nothing to say
        return
    own = trained.recipe.options()
    if trained.recipe.gamma is not None:
        own |= {"weighting": "min-snr", "snr_gamma": trained.recipe.gamma}
    by_hand, expected = run_of(trained, tmp_path / "given", *words_of(own))
    assert options == by_hand
    assert torch.equal(scores, expected)


def test_steps_with_shuffled_tags_and_buckets(base, pipeline, tmp_path):
    trained = folders.kohya(tmp_path, base, folders.FULL[folders.kohya])
    attributor = attributor_of(pipeline, trained)
    assert_steps_are_the_trainers(trained, pipeline, attributor, draws=16)
