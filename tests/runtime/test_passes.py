"""Passes that are interrupted and go on: equal to the last bit, or refused with the reason."""

import multiprocessing
import os
import random
import re
import signal
import time
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from curvlinops_diffusion import (
    CGRefinedInverseLinearOperator,
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    group_influence_scores,
    influence_scores,
    self_influence_scores,
    split_half_scores,
    top_influences,
)
from curvlinops_diffusion.measurements import TrajectoryRegression
from curvlinops_diffusion.runtime.checkpoints import CHECKPOINT
from curvlinops_diffusion.runtime.files import FileKind
from curvlinops_diffusion.runtime.passes import DrawsBar, run_pass
from curvlinops_diffusion.runtime.sums import Sums
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cases import images, small_unet, tiny_unet, unet_regression

COUNT = 7
LAYERS = ["conv_in.weight", "conv_out.weight"]
# forward passes of a trial after the fourth batch of a pass: two examples at two levels twice, each
# of these alone, and the gradients of autograd and of hooks
RETRIAL = 2 + 4 + 2


def blocks_of(operator):
    return {
        f"{placed.name}.{role}": tensor
        for placed in operator.blocks
        for role, tensor in placed.block.tensors().items()
    }


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class InterruptedTestError(Exception):
    pass


def failing_after(count):
    """A model hook that fails in a forward pass."""
    seen = []

    def hook(*args):
        seen.append(1)
        if len(seen) > count:
            raise InterruptedTestError

    return hook


@pytest.fixture(scope="module")
def regression():
    return unet_regression(small_unet(), count=COUNT)


@contextmanager
def hooked(regression, hook):
    handle = regression.objective.model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def forward_passes(regression, run):
    """What a run returns, and how often it calls the network."""
    counted = []
    with hooked(regression, lambda *args: counted.append(1)):
        found = run()
    return found, len(counted)


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (3, {"kfac_approx": "reduce", "separate_weight_and_bias": False}),
        (12, {}),
        (12, {"fisher_type": "empirical", "max_dense": 10_000}),
    ],
)
def test_a_fit_that_fails_and_goes_on(tmp_path, regression, number, options):
    expected = blocks_of(DiffusionEKFACLinearOperator(regression, **options))
    settings = PassOptions(tmp_path, checkpoint_every=0)

    def fit():
        return DiffusionEKFACLinearOperator(regression, **options, passes=settings)

    with pytest.raises(InterruptedTestError), hooked(regression, failing_after(number)):
        fit()
    found, count = forward_passes(regression, fit)
    assert_identical(blocks_of(found), expected)
    assert count < 16 + 2 * RETRIAL  # two passes of four batches of two draws
    again, count = forward_passes(regression, fit)
    assert_identical(blocks_of(again), expected)
    assert count == 0  # nothing of a finished one is done again


def test_what_goes_on_says_from_where(tmp_path, regression, capsys):
    """All but the last batch was done when it stopped; of a pass that is finished nothing."""
    settings = PassOptions(tmp_path, checkpoint_every=0, progressbar=True)

    def fit():
        return DiffusionKFACLinearOperator(regression, passes=settings)

    DiffusionKFACLinearOperator(regression)  # tries the network out, which is not repeated
    calls = forward_passes(regression, lambda: DiffusionKFACLinearOperator(regression))[1]
    with pytest.raises(InterruptedTestError), hooked(regression, failing_after(calls - 1)):
        fit()
    assert "going on" not in capsys.readouterr().err
    fit()
    at = r"\d\d:\d\d"
    done = 100 * (COUNT - 1) // COUNT  # a batch of one is the last
    said = rf"Kronecker factors: going on from {done} %, stopped at {at}"
    assert re.search(said, capsys.readouterr().err)
    fit()
    assert "going on" not in capsys.readouterr().err


def test_bars_move_within_a_batch(regression, capsys):
    """With every draw; of halves, which stream side by side, the count is of both."""
    some = regression.with_draws(4)
    clean = next(some.clean_batches())
    size = len(clean.indices)
    with DrawsBar(some.num_samples, "Draws", True, before=1) as bar:
        assert [bar.n for _ in some.noised_batches(clean)] == [1 + size * r for r in range(4)]
        bar.batch_done(4 * size)
        assert bar.n == 1 + 4 * size
    capsys.readouterr()
    K_inv = DiffusionKFACLinearOperator(regression, LAYERS).inverse(1e-3)
    J = ExampleGradientLinearOperator(some, LAYERS)
    split_half_scores(J, K_inv, J, passes=PassOptions(progressbar=True))
    assert f"100%|██████████| {4 * COUNT}/{4 * COUNT} " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["scores", "top", "groups"])
def test_scores_that_fail_and_go_on(tmp_path, regression, kind):
    """Again and again, a little later each time; no attempt has the time for the whole."""
    K_inv = DiffusionKFACLinearOperator(regression, LAYERS).inverse(1e-3)
    J = ExampleGradientLinearOperator(regression, LAYERS)

    def run(passes=None):
        options = {} if passes is None else {"passes": passes}
        if kind == "scores":
            return [influence_scores(J, K_inv, J, **options)]
        if kind == "top":
            return list(vars(top_influences(J, K_inv, J, k=2, **options).negative).values())
        groups = group_influence_scores(J, K_inv, J, torch.arange(COUNT) % 2, **options)
        return groups, self_influence_scores(K_inv, J, **options)

    expected, whole = forward_passes(regression, run)
    settings = PassOptions(tmp_path, checkpoint_every=0)
    interruptions = 0
    for allowed in range(5, whole):
        try:
            with hooked(regression, failing_after(allowed)):
                found = run(settings)
            break
        except InterruptedTestError:
            interruptions += 1
    else:
        pytest.fail("it never went on from what it had")
    assert interruptions > 1
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def fit(folder, result):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regression = unet_regression(small_unet(), count=12, batch_size=2)
        operator = DiffusionEKFACLinearOperator(
            regression, passes=PassOptions(folder, checkpoint_every=0)
        )
    operator.save(result)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """SIGKILL at random moments; what comes out is the same to the last bit."""
    context = multiprocessing.get_context("fork")

    def started(name):
        folder, result = tmp_path / name, tmp_path / f"{name}.safetensors"
        process = context.Process(target=fit, args=(folder, result))
        process.start()
        return process, folder, result

    start = time.monotonic()
    process, _, whole = started("whole")
    process.join()
    seconds = time.monotonic() - start
    moments = random.Random(5)
    killed = in_the_middle = 0
    finished = []
    while killed < kills or not finished:
        process, folder, result = started(f"killed{len(finished)}")
        process.join(moments.uniform(0, 0.7 * seconds) if killed < kills else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            in_the_middle += any(folder.glob("*.safetensors")) and not result.exists()
        for file in folder.glob("*.safetensors"):
            load_file(file)  # whole, at every moment
        if result.exists():
            finished.append(result)
    assert in_the_middle > kills // 6  # or nothing was interrupted that had begun
    for path in finished:
        assert_identical(load_file(path), load_file(whole))


def test_what_is_of_something_else_is_refused(tmp_path, regression):
    settings = PassOptions(tmp_path)
    DiffusionKFACLinearOperator(regression, passes=settings)
    unet = regression.objective.model

    def refused(message, other=regression, **options):
        with pytest.raises(ValueError, match=f"is of something else: .*{message}.*Delete"):
            DiffusionKFACLinearOperator(other, passes=settings, **options)

    refused(r"regression.num_draws \(2 there, 4 here\)", regression.with_draws(4))
    refused(r"regression.seed \(0 there, 3 here\)", unet_regression(unet, COUNT, seed=3))
    refused(r"options.mc_samples \(1 there, 2 here\)", mc_samples=2)
    refused("params", params=["conv_in.weight"])
    refused("data.digest", unet_regression(unet, COUNT - 1))
    other = small_unet()
    other.conv_in.weight.data[0, 0, 0, 0] += 1e-9
    refused("model.weights", unet_regression(other, COUNT))
    # batches of another size are other partial sums, but the same data: they are refused as well
    refused(r"data.batch_size \(2 there, 3 here\)", unet_regression(unet, COUNT, batch_size=3))


@pytest.fixture(scope="module")
def curvature(regression):
    return DiffusionKFACLinearOperator(regression, LAYERS).inverse(1e-3)


def scores_of(folder, regression, *, curvature, query=None, measurement="loss"):
    query = unet_regression(regression.objective.model, 2, seed=1) if query is None else query
    J_query = ExampleGradientLinearOperator(query, LAYERS, measurement=measurement)
    J_train = ExampleGradientLinearOperator(regression, LAYERS)
    return influence_scores(J_query, curvature, J_train, passes=PassOptions(folder))


def test_scores_of_something_else_are_refused(tmp_path, regression, curvature):
    """What differs in the objective, the curvature, the queries or the measurement alone."""
    unet = regression.objective.model
    measured = {factor: (lambda batch, f_BD, k=factor: k * f_BD.sum(1)) for factor in (1, 2)}

    def refined(damping):
        G = DiffusionGGNLinearOperator(unet_regression(unet, 2, 1), LAYERS)
        return CGRefinedInverseLinearOperator(G, damping, max_iter=2)

    def with_schedule(name):
        scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule=name)
        return unet_regression(unet, COUNT, scheduler=scheduler)

    def weighted(gamma):
        return unet_regression(unet, COUNT, objective={"weighting": MinSNRWeighting(gamma)})

    def fitted(kind=DiffusionKFACLinearOperator, count=COUNT):
        return kind(unet_regression(unet, count, seed=5), LAYERS).inverse(1e-3)

    def half():
        other = {"x0": images(COUNT).flip(0), "class_labels": torch.arange(COUNT) % 3}
        return DiffusionKFACLinearOperator(
            NoisedRegression(regression.objective, other, 2, 5), LAYERS
        ).inverse(1e-3)

    pairs = {
        "regression.process": [
            {"regression": with_schedule(n)} for n in ("linear", "squaredcos_cap_v2")
        ],
        "regression.weighting": [{"regression": weighted(g)} for g in (1.0, 2.0)],
        "curvature.product": [{"curvature": refined(d)} for d in (1e-1, 1e-2)],
        "curvature.kind": [
            {"curvature": fitted(k)}
            for k in (DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator)
        ],
        "curvature.data.digest": [{"curvature": fitted()}, {"curvature": half()}],
        "query.measurement": [{"measurement": measured[k]} for k in (1, 2)],
    }
    for number, (difference, (first, second)) in enumerate(pairs.items()):
        folder = tmp_path / str(number)
        given = {"regression": regression, "curvature": curvature}
        scores_of(folder, **(given | first))
        with pytest.raises(ValueError, match=f"is of something else: .*{difference}"):
            scores_of(folder, **(given | second))


def test_other_groups_and_other_steps_are_refused(tmp_path, regression, curvature):
    """Groups of the same sizes; trajectories at other levels."""
    J = ExampleGradientLinearOperator(regression, LAYERS)
    groups = torch.arange(COUNT) % 2
    options = PassOptions(tmp_path / "groups")
    group_influence_scores(J, curvature, J, groups, passes=options)
    with pytest.raises(ValueError, match=r"is of something else: groups"):
        group_influence_scores(J, curvature, J, groups.flip(0).roll(2), passes=options)
    states = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def score(levels):
        condition = {"class_labels": torch.tensor([0, 1])}
        query = TrajectoryRegression(regression.objective, states, levels, condition=condition)
        given = {"query": query, "measurement": query.log_probability, "curvature": curvature}
        scores_of(tmp_path / "steps", regression, **given)

    score([50, 10])
    with pytest.raises(ValueError, match=r"is of something else: .*steps"):
        score([60, 10])


def test_a_damaged_checkpoint(tmp_path, regression):
    settings = PassOptions(tmp_path)
    DiffusionKFACLinearOperator(regression, passes=settings)
    (path,) = tmp_path.glob("*.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*Delete it to start anew"):
        DiffusionKFACLinearOperator(regression, passes=settings)


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_pass(
    tmp_path, regression, monkeypatch
):
    def full(*args):
        raise ValueError("'x' could not be written: No space left on device.")

    expected = blocks_of(DiffusionKFACLinearOperator(regression))
    monkeypatch.setattr(FileKind, "write", full)
    with pytest.warns(UserWarning, match="not written, and the pass goes on: .*No space left"):
        operator = DiffusionKFACLinearOperator(
            regression, passes=PassOptions(tmp_path, checkpoint_every=0)
        )
    assert_identical(blocks_of(operator), expected)


class Images(torch.utils.data.Dataset):
    """Of which some have vanished while ``broken``."""

    broken = False

    def __len__(self):
        return COUNT

    def __getitem__(self, n):
        if self.broken and n >= 4:
            raise ValueError("The image 'cat.png' has vanished.")
        return torch.full((1, 8, 8), float(n), dtype=torch.float64)


@pytest.mark.parametrize("where", ["data", "prepare"])
def test_an_error_keeps_what_was_computed(tmp_path, where):
    """In the middle of a pass, whether an image vanishes or a gradient is not finite."""
    data = Images()
    own = passes_regression(tiny_unet(num_class_embeds=None), data)
    own.data_identity()  # looked at all images before one vanished
    steps = []

    def run(broken):
        data.broken = broken and where == "data"
        sums = Sums()

        def prepare(clean):
            if broken and clean.indices[0] >= 4:
                raise ValueError("The image 'cat.png' has vanished.")
            return clean

        def step(clean):
            steps.append(clean.indices[0])
            sums.add("x0", clean.x0.sum(0))

        run_pass("A pass", own, sums, step, PassOptions(tmp_path, 1e9), {}, prepare)
        return sums.tensors()["x0"]

    with pytest.raises(ValueError, match=r"'cat.png' has vanished"):
        run(broken=True)
    (path,) = tmp_path.iterdir()
    assert CHECKPOINT.read_header(path)["examples"] == 4
    assert run(broken=False).unique().tolist() == [sum(range(COUNT))]
    assert steps == [0, 2, 4, 6]


def passes_regression(unet, data):
    objective = DenoisingObjective(unet, DDPMScheduler(num_train_timesteps=100))
    return NoisedRegression(objective, data, num_draws=2, batch_size=2)


class NamedImages(torch.utils.data.Dataset):
    names = ["a.png", "b.png", "c.png"]  # noqa: RUF012 - a list, as that of the command line

    def __len__(self):
        return 3

    def __getitem__(self, n):
        return torch.full((1, 8, 8), 1e150 if n == 2 else 0.5, dtype=torch.float64)


def squared(unet):
    """A network whose output overflows for what is large."""
    return unet.register_forward_hook(
        lambda module, args, output: type(output)(sample=output.sample + args[0] ** 3)
    )


def test_an_image_for_which_the_network_overflows_is_named():
    unet = tiny_unet(num_class_embeds=None)
    squared(unet)
    with pytest.raises(ValueError, match=r"for 1 example.* 2 \('c.png'\) at noise level \d+\."):
        DiffusionKFACLinearOperator(passes_regression(unet, NamedImages()))
    J = ExampleGradientLinearOperator(passes_regression(unet, NamedImages()), ["conv_out.bias"])
    with pytest.raises(ValueError, match=r"'conv_out.bias' for examples \[2 \('c.png'\)"):
        J.rows()


def test_a_batch_is_dropped_before_the_next_one_is_made(regression):
    """Gradients of a batch are large: there are never those of two."""
    made = []

    class Prepared:
        pass

    def prepare(clean):
        assert all(former() is None for former in made)
        prepared = Prepared()
        made.append(weakref.ref(prepared))
        return prepared

    def step(prepared):
        assert isinstance(prepared, Prepared)

    run_pass("A pass", regression, Sums(), step, PassOptions(), {}, prepare)
    assert len(made) > 2


def test_a_folder_that_cannot_be_made(tmp_path, regression):
    (tmp_path / "file").write_text("")
    settings = PassOptions(tmp_path / "file" / "checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint' cannot be made: .*Not a directory"):
        DiffusionKFACLinearOperator(regression, passes=settings)


def test_bad_options():
    with pytest.raises(ValueError, match="`checkpoint_every` must be a finite number"):
        PassOptions(checkpoint_every=-1)
    with pytest.raises(ValueError, match="`distributed` must be False without a process group"):
        PassOptions(distributed=True)
