"""Noised inputs, targets, conditions and weights of each trainer's own step, for every image."""

import pytest
import torch
from diffusers import DiffusionPipeline

from curvlinops_diffusion import Attributor
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.comparisons import relative_error
from tests.trainers import folders
from tests.trainers.steps import steps

DRAWS = 12


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return folders.write_base(tmp_path_factory.mktemp("trainers"))


@pytest.fixture(scope="session")
def pipeline(base):
    return DiffusionPipeline.from_pretrained(base)


def attributor_of(pipeline, trained, **more):
    """From the folders, with the recipe given by hand."""
    options = trained.recipe.options()
    if trained.recipe.gamma is not None:
        options["weighting"] = MinSNRWeighting(trained.recipe.gamma)
    options |= {"params": ["conv_out.*"], "timesteps": "uniform", "progressbar": False, **more}
    return Attributor.from_pipeline(pipeline, trained.data, **options)


def assert_steps_are_the_trainers(trained, pipeline, attributor, draws=DRAWS):
    """Each sample is one of those that training may have made, and each of these is made."""
    regression, names = attributor.regression.with_draws(draws), attributor.images.names
    assert set(names) == set(trained.captions)
    met = {name: set() for name in names}
    for batch in regression.batches():
        for b, (n, r) in enumerate(zip(batch.indices, batch.draw_numbers, strict=True)):
            t, states = int(batch.timestep_B[b]), batch.condition["encoder_hidden_states"][b]
            same = [
                step
                for step in steps(trained, pipeline, names[n], regression.draws, n, r, t)
                if batch.x_t[b].shape == step.x_t.shape
                and relative_error(batch.x_t[b], step.x_t) < 1e-5
                and relative_error(states, step.states) < 1e-5
            ]
            assert len(same) == 1, (names[n], r)
            (step,) = same
            met[names[n]].add(step.choice)
            assert relative_error(batch.target_BD[b], step.target.flatten()) < 1e-6
            weight = float(batch.weight_B[b]) * step.target.numel()
            assert weight == pytest.approx(step.weight, rel=1e-5)
    for name, choices in met.items():
        mirrored, captions = map(set, zip(*choices, strict=True))
        assert mirrored == {False, trained.recipe.flips}
        assert captions == set(trained.shown(name))


@pytest.mark.parametrize("make", folders.PLAIN, ids=lambda make: make.__name__)
def test_steps_are_the_trainers(make, base, pipeline, tmp_path):
    trained = make(tmp_path, base, folders.PLAIN[make])
    assert_steps_are_the_trainers(trained, pipeline, attributor_of(pipeline, trained))


def test_other_recipes_are_told_apart(base, pipeline, tmp_path):
    """What the comparison would miss it could not confirm."""
    trained = folders.kohya(tmp_path, base, folders.PLAIN[folders.kohya])
    for other in (
        {"training_arguments": {}},
        {"noise_offset": 0.06},
        {"weighting": MinSNRWeighting(4.0)},
        {"augment": None},
        {"condition_dropout": 0.0},
        {"training_arguments": {"clip_skip": 1, "sample_latents": False}},
        {"example_weights": [1.0, 1.0, 1.0]},
    ):
        with pytest.raises(AssertionError):
            assert_steps_are_the_trainers(
                trained, pipeline, attributor_of(pipeline, trained, **other)
            )


def test_adapters_load(base, tmp_path):
    """The four files hold the same matrices and scale, under the names of each trainer."""
    found = []
    for make, recipe in folders.PLAIN.items():
        trained = make(tmp_path / make.__name__, base, recipe)
        options = {"pipeline": base, "lora": [str(trained.lora)], "quiet": True}
        network = load_network(options_of("fit", **options))
        model, params = network.objective.model, network.params
        found.append([model.get_parameter(name) for name in params])
    assert found[0]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
