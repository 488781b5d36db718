"""Several processes, on gloo: the same operators and scores, and what happens when one dies."""

import functools
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    PassOptions,
    group_and_self_influence,
    influence_scores,
    kernel_regression_scores,
    top_influences,
)
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError
from curvlinops_diffusion.runtime.processes import Share
from tests.cases import tiny_unet, unet_regression
from tests.comparisons import assert_close

# nine examples in five batches: neither three processes nor two divide them
COUNT = 9


def everything(regression, passes):
    """All that processes share, as tensors by name."""
    EK = DiffusionEKFACLinearOperator(regression, passes=passes)
    J = ExampleGradientLinearOperator(regression)
    inverse = EK.inverse(1e-3)
    found = {"scores": influence_scores(J, inverse, J, query_block=5, passes=passes)}
    top = top_influences(J, inverse, J, k=3, passes=passes)
    found |= {"top": top.positive.scores, "top index": top.positive.indices}
    groups, own = group_and_self_influence(J, inverse, J, torch.arange(COUNT) % 2, passes=passes)
    for largest in (COUNT, COUNT - 1):
        options = {"largest_gram": largest, "gradient_bytes": 100_000, "tolerance": 1e-12}
        found[f"regression {largest}"] = kernel_regression_scores(
            J, inverse, J, passes=passes, **options
        )
    # eigenbases of close eigenvalues may turn: what they make together must not
    identity = torch.eye(EK.shape[0], 40, dtype=torch.float64)
    return {**found, "groups": groups, "self": own, "operator": EK @ identity}


def start(rank, count, folder, work, arguments):
    """What each process runs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = work(rank, *arguments)
        except ValueError as error:
            result = str(error)
    torch.save(result, f"{folder}/result{rank}.pt")
    distributed.destroy_process_group()


def processes(count, folder, work, *arguments):
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=start, args=(rank, count, folder, work, arguments))
        for rank in range(count)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return [
        torch.load(folder / f"result{rank}.pt") if (folder / f"result{rank}.pt").exists() else None
        for rank in range(count)
    ]


def compute(rank, checkpoint=None):
    regression = unet_regression(tiny_unet(), count=COUNT)
    options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    return everything(regression, options)


@pytest.fixture(scope="module")
def expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return everything(unet_regression(tiny_unet(), count=COUNT), PassOptions())


def assert_all_close(found, expected):
    for name, tensor in expected.items():
        assert_close(found[name].double(), tensor.double(), 1e-10)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_one_process(tmp_path, expected, count):
    for found in processes(count, tmp_path / "run", compute):
        assert_all_close(found, expected)


def die(rank, checkpoint):
    """The second process is killed in the middle of the second pass."""
    regression = unet_regression(tiny_unet(), count=COUNT)
    calls = []

    def kill(*args):
        calls.append(1)
        if rank == 1 and len(calls) > 21:  # after the trial, in the second pass
            os.kill(os.getpid(), signal.SIGKILL)

    regression.objective.model.register_forward_pre_hook(kill)
    options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    return everything(regression, options)


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """The checkpoint of so many processes of which one has died."""

    @functools.cache
    def left_behind(count):
        folder = tmp_path_factory.mktemp("died")
        began = time.monotonic()
        stopped = processes(count, folder / "run", die, folder / "checkpoint")
        assert time.monotonic() - began < 60
        assert stopped[1] is None
        for rank in set(range(count)) - {1}:
            assert "Another process has stopped, or does not answer" in stopped[rank]
        assert list((folder / "checkpoint").glob("eigenvalues.*"))
        return folder / "checkpoint"

    return left_behind


@pytest.mark.parametrize(("first", "second"), [(2, 2), (3, 2), (2, 3), (2, 1)])
def test_a_process_that_dies(tmp_path, expected, left_behind, first, second):
    """The others stop in bounded time, and the run goes on with as many processes or others."""
    shutil.copytree(left_behind(first), tmp_path / "checkpoint")
    for found in processes(second, tmp_path / "second", compute, tmp_path / "checkpoint"):
        assert_all_close(found, expected)


def differ(rank):
    unet = tiny_unet()
    unet.conv_in.weight.data += rank
    DiffusionEKFACLinearOperator(
        unet_regression(unet, count=COUNT), passes=PassOptions(distributed=True)
    )


def test_processes_with_different_weights(tmp_path):
    for message in processes(2, tmp_path / "run", differ):
        assert message == (
            "Process 0 and process 1 differ in weights. Give every process the same."
        )


def fail(rank):
    def work():
        if rank == 1:
            raise OtherCheckpointError("It is of something else.")
        return rank

    try:
        Share.of(True).all_or_none(work)
    except OtherCheckpointError as error:
        return f"as its own kind: {error}"


def test_where_one_fails_all_do(tmp_path):
    told = "as its own kind: Process 1 has stopped: It is of something else."
    own = "as its own kind: It is of something else."
    assert processes(3, tmp_path / "run", fail) == [told, own, told]
    assert Share().all_or_none(lambda: 3) == 3


def test_costs_are_shared_out():
    owners = Share(0, 3).owners([5, 1, 1, 9, 4, 3])
    loads = [
        sum(c for c, o in zip([5, 1, 1, 9, 4, 3], owners, strict=True) if o == r) for r in range(3)
    ]
    assert sorted(loads) == [7, 7, 9]
    assert Share(0, 1).owners([1, 2]) == [0, 0]
