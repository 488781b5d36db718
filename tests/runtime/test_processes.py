"""Several processes, on gloo: the same operators and scores, and what happens when one dies."""

import functools
import multiprocessing
import os
import random
import re
import resource
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
    StoredScores,
    group_influence_scores,
    influence_scores,
    kernel_regression_scores,
    self_influence_scores,
    top_influences,
)
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError
from curvlinops_diffusion.runtime.processes import Processes
from tests.cases import small_unet, unet_regression
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
    groups = group_influence_scores(J, inverse, J, torch.arange(COUNT) % 2, passes=passes)
    own = self_influence_scores(inverse, J, passes=passes)
    options = {"gradient_bytes": 100_000}
    found["regression"] = kernel_regression_scores(J, inverse, J, passes=passes, **options)
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


def processes(count, folder, work, *arguments, meanwhile=lambda running: None):
    """What each process returns; ``None`` of one that died."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=start, args=(rank, count, folder, work, arguments))
        for rank in range(count)
    ]
    for process in running:
        process.start()
    meanwhile(running)
    for process in running:
        process.join()
    return [
        torch.load(folder / f"result{rank}.pt") if (folder / f"result{rank}.pt").exists() else None
        for rank in range(count)
    ]


def compute(rank, checkpoint=None):
    regression = unet_regression(small_unet(), count=COUNT)
    options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    return everything(regression, options)


@pytest.fixture(scope="module")
def expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return everything(unet_regression(small_unet(), count=COUNT), PassOptions())


def assert_all_close(found, expected):
    for name, tensor in expected.items():
        assert_close(found[name].double(), tensor.double(), 1e-10)


@pytest.mark.parametrize("count", [2, 3])
def test_as_one_process(tmp_path, expected, count):
    for found in processes(count, tmp_path / "run", compute):
        assert_all_close(found, expected)


def iterated(rank):
    """Of too many examples for their kernel matrix: by conjugate gradients."""
    passes = PassOptions(distributed=rank is not None)
    regression = unet_regression(small_unet(), count=COUNT)
    names = ["conv_in.weight", "conv_out.weight"]
    inverse = DiffusionEKFACLinearOperator(regression, names, passes=passes).inverse(1e-3)
    J = ExampleGradientLinearOperator(regression, names)
    options = {"largest_gram": COUNT - 1, "gradient_bytes": 2_000, "tolerance": 1e-12}
    return {"scores": kernel_regression_scores(J, inverse, J, passes=passes, **options)}


def test_an_iterated_regression(tmp_path):
    expected = iterated(None)
    for found in processes(2, tmp_path / "run", iterated):
        assert_all_close(found, expected)


def die(rank, checkpoint):
    """The second process is killed in the middle of the second pass."""
    regression = unet_regression(small_unet(), count=COUNT)
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


def test_the_same_bits_on_the_same_number(tmp_path, left_behind):
    shutil.copytree(left_behind(2), tmp_path / "checkpoint")
    gone_on = processes(2, tmp_path / "on", compute, tmp_path / "checkpoint")
    for found, whole in zip(gone_on, processes(2, tmp_path / "whole", compute), strict=True):
        for name, tensor in whole.items():
            assert torch.equal(found[name], tensor), name


def delay(rank, checkpoint):
    """The second process is stopped for a while, with a checkpoint after every batch."""
    regression = unet_regression(small_unet(), count=COUNT)
    calls = []

    def wait(*args):
        calls.append(1)
        if rank == 1 and len(calls) % 10 == 5:
            time.sleep(0.5)

    regression.objective.model.register_forward_pre_hook(wait)
    options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    return everything(regression, options)


def test_a_slow_process(tmp_path, expected):
    for found in processes(2, tmp_path / "run", delay, tmp_path / "checkpoint"):
        assert_all_close(found, expected)


def exhaust(rank, checkpoint):
    """The second process gets no more memory in the middle of the second pass."""
    regression = unet_regression(small_unet(), count=COUNT)
    calls, held = [], []

    def allocate(*args):
        calls.append(1)
        if rank == 1 and len(calls) > 21:  # after the trial, in the second pass
            resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
            held.append(torch.ones(2**28))

    regression.objective.model.register_forward_pre_hook(allocate)
    options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    return everything(regression, options)


def test_a_process_without_memory(tmp_path, expected, capfd):
    """It says so itself; the others stop, and the run goes on."""
    began = time.monotonic()
    stopped = processes(2, tmp_path / "run", exhaust, tmp_path / "checkpoint")
    assert time.monotonic() - began < 60
    assert "can't allocate memory" in capfd.readouterr().err
    assert stopped[1] is None
    assert "Another process has stopped, or does not answer" in stopped[0]
    for found in processes(2, tmp_path / "second", compute, tmp_path / "checkpoint"):
        assert_all_close(found, expected)


def all_of_it(rank, folder, ready):
    """Factors, eigenvalues and scores, with a checkpoint after every batch."""
    (ready / str(rank)).touch()
    regression = unet_regression(small_unet(), count=COUNT)
    sharded = PassOptions(folder / "fit", checkpoint_every=0, distributed=True, sharded=True)
    names = ["conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight"]
    EK = DiffusionEKFACLinearOperator(regression, names, passes=sharded)
    J = ExampleGradientLinearOperator(regression, names)
    passes = PassOptions(folder / "scores", checkpoint_every=0, distributed=True)
    stored = StoredScores.create(
        folder / "scores.safetensors", J, EK.inverse(1e-3), J, query_block=5, passes=passes
    )
    return {"scores": stored.whole(), "trace": EK.trace()}


def test_killed_at_random_moments(tmp_path):
    """Twenty times, one of two to four processes; the others stop, and other numbers go on."""
    chance = random.Random(3)
    finished, kills, in_the_middle = [], 0, 0
    fresh = tmp_path / "whole"
    fresh.mkdir()
    began = time.monotonic()
    ready = tmp_path / "ready whole"
    ready.mkdir()
    (expected,) = processes(1, tmp_path / "run whole", all_of_it, fresh, ready)
    seconds = time.monotonic() - began
    folder = tmp_path / "0"
    for attempt in range(100):
        folder.mkdir(exist_ok=True)
        count = chance.choice([2, 3, 4])
        ready = tmp_path / f"ready{attempt}"
        ready.mkdir()
        moment, victim = chance.uniform(0, 0.6 * seconds), chance.randrange(count)

        def kill_one(running, ready=ready, count=count, moment=moment, victim=victim):
            while len(list(ready.iterdir())) < count:
                time.sleep(0.005)
            running[victim].join(moment)
            if running[victim].is_alive():
                os.kill(running[victim].pid, signal.SIGKILL)

        began = time.monotonic()
        run = tmp_path / f"run{attempt}"
        results = processes(count, run, all_of_it, folder, ready, meanwhile=kill_one)
        assert time.monotonic() - began < 60 + 10 * seconds
        if results[victim] is None:
            kills += 1
            in_the_middle += any(folder.rglob("*.safetensors"))
        for found in results:
            if isinstance(found, dict):
                finished.append(found)
            elif found is not None:
                assert re.search("Another process has stopped|Process . has stopped", found)
        if (folder / "scores.safetensors").exists():
            folder = tmp_path / str(attempt + 1)
        if kills == 20:
            break
    assert kills == 20
    assert in_the_middle > 3
    folder.mkdir(exist_ok=True)
    ready = tmp_path / "ready last"
    ready.mkdir()
    finished += processes(2, tmp_path / "last", all_of_it, folder, ready)
    for found in finished:
        assert_all_close(found, expected)


def differ(rank):
    unet = small_unet()
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
        Processes.of(True).all_or_none(work)
    except OtherCheckpointError as error:
        return f"as its own kind: {error}"


def test_where_one_fails_all_do(tmp_path):
    told = "as its own kind: Process 1 has stopped: It is of something else."
    own = "as its own kind: It is of something else."
    assert processes(3, tmp_path / "run", fail) == [told, own, told]
    assert Processes().all_or_none(lambda: 3) == 3


def test_costs_are_shared_out():
    owners = Processes(0, 3).owners([5, 1, 1, 9, 4, 3])
    loads = [
        sum(c for c, o in zip([5, 1, 1, 9, 4, 3], owners, strict=True) if o == r) for r in range(3)
    ]
    assert sorted(loads) == [7, 7, 9]
    assert Processes(0, 1).owners([1, 2]) == [0, 0]
