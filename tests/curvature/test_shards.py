"""Blocks shared among processes, on gloo: as one process', saved and opened by others, killed."""

import os
import shutil
import signal

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    KernelOptions,
    PassOptions,
    influence_scores,
    kernel_regression_scores,
    load_operator,
    regression_scores,
)
from curvlinops_diffusion.curvature.division import shard_owners
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import covered_parameters
from tests.cases import small_unet, unet_regression
from tests.runtime.test_processes import assert_all_close, processes

COUNT = 5


def shared(checkpoint=None, by="layers"):
    """A limit of memory keeps processes from passing over the data together."""
    most = 2**40 if by == "layers" else None
    return PassOptions(
        checkpoint, checkpoint_every=0, distributed=True, sharded=True, max_memory=most
    )


def problem():
    return unet_regression(small_unet(), count=COUNT)


def made_of(EK):
    """Everything that is made of an operator alone, as tensors by name."""
    columns = torch.randn(EK.shape[0], 3, generator=torch.Generator().manual_seed(0)).double()
    inverse = EK.inverse(1e-3)
    return {
        "product": EK @ columns,
        "inverse": inverse @ columns,
        "tensors": torch.cat([z.flatten() for z in EK @ _as_list(EK, columns[:, 0])]),
        # twice, since the root of an eigenvalue that rounding has left is the root of rounding
        "power": EK.power(0.5) @ (EK.power(0.5) @ columns),
        # on both sides, since of a block without gradients there is only rounding to be inverted
        "relative": EK @ (EK.inverse(0.1, relative=True) @ (EK @ columns)),
        "truncated": EK.inverse(rtol=1e-3) @ columns,
        "twice": inverse.power(2.0) @ columns,
        "float32": (EK.to(torch.float32) @ columns.float()).double(),
        "trace": EK.trace(),
        "logdet": EK.inverse(1e-3).logdet(),
        "norm": EK.frobenius_norm(),
        "eigenvalues": EK.eigenvalues(),
    }


def scored(EK, passes):
    """Scores of all kinds."""
    inverse = EK.inverse(1e-3)
    J = ExampleGradientLinearOperator(problem())
    # more examples than the kernel matrix is formed for
    options = KernelOptions(largest_gram=3)
    return {
        "scores": influence_scores(J, inverse, J, query_block=2, passes=passes),
        "regression": regression_scores(J, inverse, J, passes=passes),
        "iterated": kernel_regression_scores(J, inverse, J, options=options, passes=passes),
    }


def _as_list(EK, column):
    shapes = EK.space.shapes.values()
    pieces = column.split([torch.Size(shape).numel() for shape in shapes])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def fitted(rank, sharded):
    EK = DiffusionEKFACLinearOperator(problem(), passes=shared(by=sharded))
    scores = scored(EK, PassOptions(distributed=True))
    return {**made_of(EK), **scores, "bytes": torch.tensor(EK.nbytes)}


@pytest.fixture(scope="module")
def expected(whole):
    return made_of(whole)


@pytest.fixture(scope="module")
def expected_scores(whole):
    return scored(whole, PassOptions())


@pytest.fixture(scope="module")
def whole():
    return DiffusionEKFACLinearOperator(problem())


@pytest.mark.parametrize(
    ("count", "sharded"),
    [pytest.param(1, "data", marks=pytest.mark.slow), (3, "data"), (2, "layers")],
)
def test_as_one_process(tmp_path, expected, expected_scores, whole, count, sharded):
    """Five examples in batches of two: a part of each for every process, or for all."""
    results = processes(count, tmp_path / "run", fitted, sharded)
    held = [int(found.pop("bytes")) for found in results]
    for found in results:
        assert found.pop("float32") == pytest.approx(expected["float32"], rel=1e-3, abs=1e-5)
        same(found, expected | expected_scores)
    assert sum(held) == whole.nbytes
    largest = max(placed.num_bytes for placed in whole.blocks)
    assert max(held) <= whole.nbytes / count + 2 * largest  # a layer's blocks stay together


def saved(rank, path):
    DiffusionEKFACLinearOperator(problem(), passes=shared()).save(path)


def opened(rank, path):
    EK = load_operator(path, small_unet(), passes=shared())
    assert len(EK.blocks) < len(load_operator(path, small_unet()).blocks)
    return made_of(EK)


def same(found, expected):
    """All but what is rounded to float32."""
    assert_all_close(found, {k: z for k, z in expected.items() if k != "float32"})


@pytest.mark.parametrize(("first", "second"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 3)])
def test_saved_and_opened_by_others(tmp_path, expected, whole, first, second):
    path = tmp_path / "ekfac.safetensors"
    if first == 1:
        whole.save(path)
    else:
        processes(first, tmp_path / "first", saved, path)
        assert len(list(tmp_path.glob("ekfac.*of*.safetensors"))) == first
    for found in processes(second, tmp_path / "second", opened, path):
        same(found, expected)
    if first == 2:
        EK = load_operator(path, small_unet())
        assert type(EK) is DiffusionEKFACLinearOperator
        same(made_of(EK), expected)
        next(tmp_path.glob("ekfac.*.1of2.safetensors")).unlink()
        with pytest.raises(ValueError, match=r"There is no file '.*1of2.safetensors'"):
            load_operator(path, small_unet())


def kfac(rank, sharded):
    passes = shared(by=sharded)
    K = DiffusionKFACLinearOperator(problem(), kfac_approx="shampoo", passes=passes)
    columns = torch.eye(K.shape[0], 4).double()
    return {"product": K @ columns, "inverse": K.inverse(1e-3) @ columns}


def test_kfac(tmp_path):
    K = DiffusionKFACLinearOperator(problem(), kfac_approx="shampoo")
    columns = torch.eye(K.shape[0], 4).double()
    expected = {"product": K @ columns, "inverse": K.inverse(1e-3) @ columns}
    for found in processes(2, tmp_path / "run", kfac, "data"):
        assert_all_close(found, expected)


def die(rank, checkpoint, sharded):
    """The second process is killed in its second pass."""
    regression = problem()

    def kill(*args):
        if rank == 1 and list(checkpoint.glob("shard1of2/eigenvalues*")):
            os.kill(os.getpid(), signal.SIGKILL)

    regression.objective.model.register_forward_pre_hook(kill)
    DiffusionEKFACLinearOperator(regression, passes=shared(checkpoint, sharded))


def resumed(rank, checkpoint, sharded):
    regression = problem()
    calls = []
    regression.objective.model.register_forward_pre_hook(lambda *args: calls.append(1))
    EK = DiffusionEKFACLinearOperator(regression, passes=shared(checkpoint, sharded))
    return {**made_of(EK), "calls": len(calls)}


@pytest.fixture(scope="module", params=["layers", "data"])
def left_behind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("died")
    stopped = processes(2, folder / "run", die, folder / "checkpoint", request.param)
    assert stopped[1] is None
    assert "Another process has stopped, or does not answer" in stopped[0]
    assert list((folder / "checkpoint" / "shard1of2").glob("eigenvalues*"))
    return folder / "checkpoint", request.param


@pytest.mark.parametrize("behind", [False, True])
def test_a_process_that_dies(tmp_path, expected, left_behind, behind):
    """It goes on with more, of which one has nothing to do; what one lacks is done again."""
    folder, sharded = left_behind
    shutil.copytree(folder, tmp_path / "checkpoint")
    if behind and sharded == "layers":
        pytest.skip("each goes on for itself")
    if behind:
        for file in (tmp_path / "checkpoint" / "shard1of2").glob("eigenvalues*"):
            file.unlink()
    count = 2 if behind else 3
    for found in processes(count, tmp_path / "run", resumed, tmp_path / "checkpoint", sharded):
        assert found.pop("calls") > 0
        same(found, expected)


def singular(rank):
    DiffusionEKFACLinearOperator(problem(), passes=shared()).inverse(0.0)


def test_errors(tmp_path):
    """Of one process, all have it."""
    assert all("zero eigenvalues" in text for text in processes(2, tmp_path / "run", singular))
    with pytest.raises(ValueError, match="`sharded` must be False without `distributed`, got True"):
        PassOptions(sharded=True)


@pytest.mark.parametrize("number", [2, 7])
def test_shards_are_balanced(number):
    regression = problem()
    options = KFACOptions()
    coverage = covered_parameters(regression.objective.model, None)
    plan = BlockPlan.of(coverage, options)
    owners = shard_owners(plan, number)
    assert owners.keys() == coverage.params.keys()
    for layer in coverage.layers:
        assert len({owners[name] for name in layer.params}) == 1
    entries = [
        plan.restricted([n for n, o in owners.items() if o == shard]).num_entries
        for shard in range(number)
    ]
    assert sum(entries) == plan.num_entries
    largest = max(plan.restricted(layer.params).num_entries for layer in coverage.layers)
    assert max(entries) <= plan.num_entries / number + largest
