"""Each trainer's own step for every image, and one command without any option to be read."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline

from curvlinops_diffusion import Attributor, StoredScores
from curvlinops_diffusion.cli import attribute
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.loading.adapters import load_adapters, networks_of
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


# each alone, and kohya's with shuffled tags and buckets
RECIPES = [*folders.PLAIN.items(), (folders.kohya, folders.FULL[folders.kohya])]


@pytest.mark.parametrize(("make", "recipe"), RECIPES)
def test_steps_are_the_trainers(make, recipe, base, pipeline, tmp_path):
    trained = make(tmp_path, base, recipe)
    draws = 16 if recipe.buckets is True else DRAWS
    assert_steps_are_the_trainers(trained, pipeline, attributor_of(pipeline, trained), draws)


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


def test_adapters_load(base, pipeline, tmp_path):
    """The four files hold the same matrices and scale, under the names of each trainer."""
    found = []
    for make, recipe in folders.PLAIN.items():
        trained, own = make(tmp_path / make.__name__, base, recipe), copy.deepcopy(pipeline)
        names = load_adapters([str(trained.lora)], networks_of(own), own)["unet"]
        found.append([own.unet.get_parameter(name) for name in names])
    assert found[0]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# what no file says, and decides nothing of the loss
DRAWN = ["--fit-draws", "1", "--num-draws", "4", "--damping", "1e-3", "--curvature", "kfac"]
DRAWN += ["--params", "down_blocks*attn1.to_q.lora*"]


def words_of(trained, output, options=None):
    """The command; options of the library as flags of the program."""
    words = ["attribute", "--pipeline", trained.base, "--lora", trained.lora, "--quiet", *DRAWN]
    words += ["--data", trained.data, "--queries", trained.data.parent / "queries"]
    for name, value in (options or {}).items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            words += [f"{key}={str(each).lower()}" for key, each in value.items()]
        elif value is not True:
            words.append(value)
    return [str(word) for word in [*words, "--output", output]]


def made(make, base, folder):
    recipe = folders.FULL[make]
    folders.write_queries(folder / "queries", recipe.resolution)
    return make(folder, base, recipe)


@pytest.mark.parametrize("make", folders.FULL, ids=lambda make: make.__name__)
def test_what_is_read_is_what_is_given_by_hand(make, base, tmp_path, capsys, monkeypatch):
    """The same options, which decide all that is computed, and each told with its entry."""
    seen, trained = [], made(make, base, tmp_path)
    monkeypatch.setattr(attribute, "attribute", lambda options: seen.append(vars(options)))
    assert run(words_of(trained, tmp_path / "out")) == 0
    told = capsys.readouterr().err
    assert [entry for entry in trained.read if entry not in told] == []
    own = trained.recipe.options() if trained.read else {}
    if trained.recipe.gamma is not None:
        own |= {"weighting": "min-snr", "snr_gamma": trained.recipe.gamma}
    assert run(words_of(trained, tmp_path / "out", own)) == 0
    assert seen[0] == seen[1]


@pytest.mark.slow  # the options above decide all of it
def test_one_command(base, tmp_path):
    trained = made(folders.kohya, base, tmp_path)
    assert run(words_of(trained, tmp_path / "out")) == 0
    scores = StoredScores.open(tmp_path / "out" / "scores.safetensors").whole()
    assert scores.shape == (1, 3)
    assert scores.isfinite().all()
