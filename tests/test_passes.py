"""Passes that are interrupted and go on: equal to the last bit, or refused with the reason."""

import multiprocessing
import os
import random
import signal
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    PassOptions,
    group_and_self_influence,
    influence_scores,
    top_influences,
)
from curvlinops_diffusion._files import FileKind
from tests.cases import tiny_unet, unet_regression

COUNT = 7


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
    return unet_regression(tiny_unet(), count=COUNT)


OPTIONS = {
    "expand": {},
    "reduce": {"kfac_approx": "reduce"},
    "joint": {"separate_weight_and_bias": False},
    "type-2 dense": {"fisher_type": "empirical", "max_dense": 10_000},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("forward_passes", [5, 9, 14])
def test_a_fit_that_fails_and_goes_on(tmp_path, regression, options, forward_passes):
    options = OPTIONS[options]
    expected = blocks_of(DiffusionEKFACLinearOperator(regression, **options))
    settings = PassOptions(tmp_path, checkpoint_every=0)
    hook = regression.objective.model.register_forward_pre_hook(failing_after(forward_passes))
    with pytest.raises(InterruptedTestError):
        DiffusionEKFACLinearOperator(regression, **options, passes=settings)
    hook.remove()
    counted = []
    hook = regression.objective.model.register_forward_pre_hook(lambda *a: counted.append(1))
    found = blocks_of(DiffusionEKFACLinearOperator(regression, **options, passes=settings))
    hook.remove()
    assert_identical(found, expected)
    # two passes of four batches of two draws, and two for the check of what hooks see
    assert len(counted) < 18


def test_a_finished_fit_is_not_done_again(tmp_path, regression):
    settings = PassOptions(tmp_path)
    expected = blocks_of(DiffusionEKFACLinearOperator(regression, passes=settings))
    counted = []
    hook = regression.objective.model.register_forward_pre_hook(lambda *a: counted.append(1))
    found = blocks_of(DiffusionEKFACLinearOperator(regression, passes=settings))
    hook.remove()
    assert_identical(found, expected)
    assert len(counted) == 2  # the check of what hooks see


def test_scores_that_fail_and_go_on(tmp_path, regression):
    K_inv = DiffusionKFACLinearOperator(regression).inverse(1e-3)
    J = ExampleGradientLinearOperator(regression)
    scores = influence_scores(J, K_inv, J)
    top = top_influences(J, K_inv, J, k=2)
    groups = torch.arange(COUNT) % 2
    sums = group_and_self_influence(J, K_inv, J, groups)
    for run, expected in [
        (lambda p: [influence_scores(J, K_inv, J, passes=p)], [scores]),
        (
            lambda p: vars(top_influences(J, K_inv, J, k=2, passes=p).negative).values(),
            vars(top.negative).values(),
        ),
        (lambda p: group_and_self_influence(J, K_inv, J, groups, passes=p), sums),
    ]:
        settings = PassOptions(tmp_path, checkpoint_every=0)
        for attempt in range(1, 30):
            hook = regression.objective.model.register_forward_pre_hook(failing_after(5 + attempt))
            try:
                found = run(settings)
                break
            except InterruptedTestError:
                continue
            finally:
                hook.remove()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------


def fit(folder, result):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regression = unet_regression(tiny_unet(), count=24, batch_size=2)
        operator = DiffusionEKFACLinearOperator(
            regression, passes=PassOptions(folder, checkpoint_every=0)
        )
    operator.save(result)


def test_killed_at_random_moments(tmp_path):
    """SIGKILL twenty times, at random moments; what comes out is the same to the last bit."""
    context = multiprocessing.get_context("fork")
    start = time.monotonic()
    process = context.Process(target=fit, args=(tmp_path / "whole", tmp_path / "whole.safetensors"))
    process.start()
    process.join()
    seconds = time.monotonic() - start
    moments = random.Random(5)
    kills = finished = 0
    while kills < 20:
        folder, result = tmp_path / f"killed{finished}", tmp_path / f"killed{finished}.safetensors"
        process = context.Process(target=fit, args=(folder, result))
        process.start()
        process.join(moments.uniform(0, 0.7 * seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        for file in folder.glob("*.safetensors") if folder.exists() else []:
            load_file(file)  # whole, at every moment
        finished += result.exists()
    process = context.Process(target=fit, args=(folder, result))
    process.start()
    process.join()
    finished = [tmp_path / f"killed{i}.safetensors" for i in range(finished + 1)]
    expected = load_file(tmp_path / "whole.safetensors")
    for path in finished:
        if path.exists():
            assert_identical(load_file(path), expected)
    assert any(path.exists() for path in finished)


# ---------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------


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
    other = tiny_unet()
    other.conv_in.weight.data[0, 0, 0, 0] += 1e-9
    refused("model.weights", unet_regression(other, COUNT))
    # batches of another size are other partial sums, but the same data: they are refused as well
    refused(r"data.batch_size \(2 there, 3 here\)", unet_regression(unet, COUNT, batch_size=3))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_checkpoint(tmp_path, regression, damage):
    settings = PassOptions(tmp_path)
    DiffusionKFACLinearOperator(regression, passes=settings)
    (path,) = tmp_path.glob("*.safetensors")
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "foreign": b"x" * 100}[damage])
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


def test_an_error_in_the_data_keeps_what_was_computed(tmp_path, regression):
    """An image that vanishes in the middle of a pass."""

    class Images(torch.utils.data.Dataset):
        broken = False

        def __len__(self):
            return COUNT

        def __getitem__(self, n):
            if self.broken and n >= 4:
                raise ValueError("The image 'cat.png' has vanished.")
            return torch.full((1, 8, 8), float(n), dtype=torch.float64)

    data = Images()
    unet = tiny_unet(num_class_embeds=None)
    own = passes_regression(unet, data)
    expected = blocks_of(DiffusionKFACLinearOperator(own))
    settings = PassOptions(tmp_path, checkpoint_every=1e9)
    own.once("data", lambda regression: "seen")  # looked at all images before one vanished
    data.broken = True
    with pytest.raises(ValueError, match=r"'cat.png' has vanished"):
        DiffusionKFACLinearOperator(own, passes=settings)
    assert list(tmp_path.glob("kronecker_factors.*"))
    data.broken = False
    assert_identical(blocks_of(DiffusionKFACLinearOperator(own, passes=settings)), expected)


def passes_regression(unet, data):
    from diffusers import DDPMScheduler

    from curvlinops_diffusion import DenoisingObjective, NoisedRegression

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


def test_a_folder_that_cannot_be_made(tmp_path, regression):
    (tmp_path / "file").write_text("")
    settings = PassOptions(tmp_path / "file" / "checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint' cannot be made: .*Not a directory"):
        DiffusionKFACLinearOperator(regression, passes=settings)


def test_bad_options():
    with pytest.raises(ValueError, match="checkpoint_every=-1 arrived"):
        PassOptions(checkpoint_every=-1)
    with pytest.raises(ValueError, match="distributed=True arrived without a process group"):
        PassOptions(distributed=True)
