"""Layers fitted in groups, each by passes of its own: the same blocks, in less memory."""

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    PassOptions,
    load_operator,
)
from curvlinops_diffusion.curvature.division import divided_units, needed_memory, num_groups
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.runtime.devices import peak_bytes
from tests.cases import tiny_unet, unet_regression
from tests.runtime.test_passes import (
    InterruptedTestError,
    assert_identical,
    blocks_of,
    failing_after,
    forward_passes,
    hooked,
)
from tests.runtime.test_processes import processes

COUNT, ITEMSIZE = 5, 8


@pytest.fixture(scope="module")
def regression():
    return unet_regression(tiny_unet(), count=COUNT)


@pytest.fixture(scope="module")
def plan():
    return BlockPlan.of(covered_parameters(tiny_unet(), None), KFACOptions())


@pytest.fixture(scope="module")
def expected(regression):
    return blocks_of(DiffusionEKFACLinearOperator(regression))


def third(plan):
    return needed_memory(plan.units, ITEMSIZE) // 3


def test_each_group_fits(plan):
    most = third(plan)
    number = num_groups(plan, most, ITEMSIZE)
    assert number >= 3

    def largest(number):
        return max(needed_memory(units, ITEMSIZE) for units in divided_units(plan, number))

    assert largest(number) <= most < largest(number - 1)
    assert num_groups(plan, needed_memory(plan.units, ITEMSIZE), ITEMSIZE) == 1


@pytest.mark.parametrize(
    ("kind", "width"), [(DiffusionKFACLinearOperator, 16), (DiffusionEKFACLinearOperator, 8)]
)
def test_the_estimate_is_what_a_fit_takes(kind, width):
    """Of tensors, beside a training pass; what decompositions take for themselves comes to it."""
    unet = tiny_unet(block_out_channels=(width, 2 * width))
    regression = unet_regression(unet, count=4, num_draws=1, batch_size=2)
    plan = BlockPlan.of(covered_parameters(unet, None), KFACOptions())
    kept = []

    def train():
        for batch in regression.batches():
            loss = batch.loss(regression.objective.predict(batch)).sum()
            torch.autograd.grad(loss, list(unet.parameters()))

    trained, fitted = (
        peak_bytes(run, unet.device) for run in (train, lambda: kept.append(kind(regression)))
    )
    needed = needed_memory(plan.units, ITEMSIZE)
    assert 0.5 * needed < fitted - trained < needed


def test_no_layer_fits(plan, regression):
    with pytest.raises(ValueError, match=r"made of them, [\d,]+ bytes; got 100\.") as raised:
        DiffusionKFACLinearOperator(regression, passes=PassOptions(max_memory=100))
    least = int(str(raised.value).split("made of them, ")[1].split()[0].replace(",", ""))
    assert num_groups(plan, least, ITEMSIZE) > 1
    with pytest.raises(ValueError, match="max_memory"):
        PassOptions(max_memory=0)


def test_the_same_to_the_last_bit(plan, regression):
    cls = DiffusionEKFACLinearOperator
    whole, once = forward_passes(regression, lambda: cls(regression))
    passes = PassOptions(max_memory=third(plan))
    found, several = forward_passes(regression, lambda: cls(regression, passes=passes))
    assert_identical(blocks_of(found), blocks_of(whole))
    assert [placed.name for placed in found.blocks] == [placed.name for placed in whole.blocks]
    assert once < several <= num_groups(plan, third(plan), ITEMSIZE) * once
    assert found.nbytes == whole.nbytes  # weights and biases share bases


def test_interrupted_and_gone_on_with(plan, regression, expected, tmp_path):
    """Another limit changes nothing of what was begun."""
    options = [
        PassOptions(tmp_path, checkpoint_every=0, max_memory=most)
        for most in (third(plan), needed_memory(plan.units, ITEMSIZE) // 2)
    ]
    count = 2 * len(list(regression.batches())) * num_groups(plan, third(plan), ITEMSIZE)
    with pytest.raises(InterruptedTestError), hooked(regression, failing_after(count * 2 // 3)):
        DiffusionEKFACLinearOperator(regression, passes=options[0])
    found, rest = forward_passes(
        regression, lambda: DiffusionEKFACLinearOperator(regression, passes=options[1])
    )
    assert_identical(blocks_of(found), expected)
    assert rest < count * 2 // 3
    names = {path.name for path in tmp_path.iterdir()}
    number = num_groups(plan, third(plan), ITEMSIZE)
    assert names == {f"group{part}of{number}" for part in range(number)}


def sharded(rank, most):
    passes = PassOptions(distributed=True, sharded=True, max_memory=most)
    regression = unet_regression(tiny_unet(), count=COUNT)
    return blocks_of(DiffusionEKFACLinearOperator(regression, passes=passes))


def test_of_shards(plan, expected, tmp_path):
    first, second = processes(2, tmp_path / "run", sharded, third(plan))
    assert not first.keys() & second.keys()
    assert_identical({**first, **second}, expected)


def test_a_file_that_does_not_fit(regression, tmp_path):
    EK = DiffusionEKFACLinearOperator(regression)
    EK.save(tmp_path / "ekfac.safetensors")
    found = load_operator(
        tmp_path / "ekfac.safetensors", tiny_unet(), passes=PassOptions(max_memory=1)
    )
    column = torch.ones(EK.shape[0]).double()
    assert torch.equal(found.inverse(1e-3) @ column, EK.inverse(1e-3) @ column)
