"""Several processes, on gloo: the same operators and scores, and what happens when one dies."""

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
from functools import cache, partial
from itertools import count

import pytest
import torch
from torch import distributed

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    KernelOptions,
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
# of each kind of block one
LAYERS = ["conv_in.weight", "class_embedding.weight", "mid_block.attentions.0.to_q.weight"]
LAYERS += ["up_blocks.0.resnets.1.norm1.bias", "conv_out.weight"]


def everything(regression, passes):
    """All that processes share, as tensors by name."""
    EK = DiffusionEKFACLinearOperator(regression, LAYERS, passes=passes)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    inverse = EK.inverse(1e-3)
    found = {"scores": influence_scores(J, inverse, J, query_block=5, passes=passes)}
    top = top_influences(J, inverse, J, k=3, passes=passes)
    found |= {"top": top.positive.scores, "top index": top.positive.indices}
    groups = group_influence_scores(J, inverse, J, torch.arange(COUNT) % 2, passes=passes)
    own = self_influence_scores(inverse, J, passes=passes)
    options = KernelOptions(gradient_bytes=100_000)
    found["regression"] = kernel_regression_scores(J, inverse, J, passes=passes, options=options)
    # eigenbases of close eigenvalues may turn: what they make together must not
    identity = torch.eye(EK.shape[0], 40, dtype=torch.float64)
    return {**found, "groups": groups, "self": own, "operator": EK @ identity}


def start(rank, number, folder, work, arguments):
    """What each process runs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=number,
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


def processes(number, folder, work, *arguments, meanwhile=lambda running: None):
    """What each process returns; ``None`` of one that died."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=start, args=(rank, number, folder, work, arguments))
        for rank in range(number)
    ]
    for process in running:
        process.start()
    meanwhile(running)
    for process in running:
        process.join()
    return [
        torch.load(folder / f"result{rank}.pt") if (folder / f"result{rank}.pt").exists() else None
        for rank in range(number)
    ]


def hooked(hook):
    """A problem of whose network a process calls ``hook`` before each forward pass, by number."""
    regression = unet_regression(small_unet(), count=COUNT)
    calls = count()
    regression.objective.model.register_forward_pre_hook(lambda *args: hook(next(calls)))
    return regression


def compute(rank, checkpoint=None, hook=lambda rank, number: None):
    """All of it; by default nothing disturbs it."""
    options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    return everything(hooked(partial(hook, rank)), options)


@pytest.fixture(scope="module")
def expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return everything(unet_regression(small_unet(), count=COUNT), PassOptions())


def assert_all_close(found, expected):
    for name, tensor in expected.items():
        assert_close(found[name].double(), tensor.double(), 1e-10)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The results of two processes that nothing disturbs."""
    return processes(2, tmp_path_factory.mktemp("two") / "run", compute)


def delay(rank, number):
    """The second process is stopped for a while."""
    if rank == 1 and number % 10 == 4:
        time.sleep(0.5)


def test_as_one_process(tmp_path, expected, of_two):
    """Two, and three of which one is slow, with a checkpoint after every batch."""
    of_three = processes(3, tmp_path / "run", compute, tmp_path / "checkpoint", delay)
    for found in (*of_two, *of_three):
        assert_all_close(found, expected)


def iterated(rank):
    """Of too many examples for their kernel matrix: by conjugate gradients."""
    passes = PassOptions(distributed=rank is not None)
    regression = unet_regression(small_unet(), count=COUNT)
    inverse = DiffusionEKFACLinearOperator(regression, LAYERS, passes=passes).inverse(1e-3)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    options = KernelOptions(largest_gram=COUNT - 1, gradient_bytes=2_000, tolerance=1e-12)
    return {"scores": kernel_regression_scores(J, inverse, J, passes=passes, options=options)}


def test_an_iterated_regression(tmp_path):
    expected = iterated(None)
    for found in processes(2, tmp_path / "run", iterated):
        assert_all_close(found, expected)


def die(rank, number):
    """The second process is killed in the middle of the second pass."""
    if rank == 1 and number > 20:  # after the trial, in the second pass
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """The checkpoint of so many processes of which one has died."""

    @cache
    def left_behind(number):
        folder = tmp_path_factory.mktemp("died")
        began = time.monotonic()
        stopped = processes(number, folder / "run", compute, folder / "checkpoint", die)
        assert time.monotonic() - began < 60
        assert stopped[1] is None
        for rank in set(range(number)) - {1}:
            assert "Another process has stopped, or does not answer" in stopped[rank]
        assert list((folder / "checkpoint").glob("eigenvalues.*"))
        return folder / "checkpoint"

    return left_behind


@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 1)])
def test_a_process_that_dies(tmp_path, expected, left_behind, first, second):
    """The others stop in bounded time, and the run goes on with as many processes or others."""
    shutil.copytree(left_behind(first), tmp_path / "checkpoint")
    for found in processes(second, tmp_path / "second", compute, tmp_path / "checkpoint"):
        assert_all_close(found, expected)


def test_the_same_bits_on_the_same_number(tmp_path, left_behind, of_two):
    shutil.copytree(left_behind(2), tmp_path / "checkpoint")
    for found, whole in zip(
        processes(2, tmp_path / "on", compute, tmp_path / "checkpoint"), of_two, strict=True
    ):
        for name, tensor in whole.items():
            assert torch.equal(found[name], tensor), name


def exhaust(rank, number):
    """The second process gets no more memory in the middle of the second pass."""
    if rank == 1 and number > 20:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
        torch.ones(2**28)


def test_a_process_without_memory(tmp_path, capfd):
    """It says so itself, and the others stop."""
    began = time.monotonic()
    stopped = processes(2, tmp_path / "run", compute, tmp_path / "checkpoint", exhaust)
    assert time.monotonic() - began < 60
    assert "can't allocate memory" in capfd.readouterr().err
    assert stopped[1] is None
    assert "Another process has stopped, or does not answer" in stopped[0]
    assert list((tmp_path / "checkpoint").glob("eigenvalues.*"))


def all_of_it(rank, folder, ready):
    """Factors, eigenvalues and scores, with a checkpoint after every batch."""
    (ready / str(rank)).touch()
    regression = unet_regression(small_unet(), count=COUNT)
    sharded = PassOptions(folder / "fit", checkpoint_every=0, distributed=True, sharded=True)
    EK = DiffusionEKFACLinearOperator(regression, LAYERS, passes=sharded)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    passes = PassOptions(folder / "scores", checkpoint_every=0, distributed=True)
    stored = StoredScores.create(
        folder / "scores.safetensors", J, EK.inverse(1e-3), J, query_block=5, passes=passes
    )
    return {"scores": stored.whole(), "trace": EK.trace()}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """One of two to four processes; the others stop, and other numbers go on."""
    chance = random.Random(3)
    runs = count()

    def run(number, folder, victim=0, moment=None):
        """Start so many processes, and kill one after a moment; what each returns."""
        name = f"run{next(runs)}"
        ready = tmp_path / f"{name} ready"
        ready.mkdir()
        folder.mkdir(exist_ok=True)

        def kill_one(running):
            while len(list(ready.iterdir())) < number:
                time.sleep(0.005)
            running[victim].join(moment)
            if running[victim].is_alive():
                os.kill(running[victim].pid, signal.SIGKILL)

        return processes(number, tmp_path / name, all_of_it, folder, ready, meanwhile=kill_one)

    began = time.monotonic()
    (expected,) = run(1, tmp_path / "whole")
    seconds = time.monotonic() - began
    killed = in_the_middle = finished = 0
    folder = tmp_path / "0"
    while killed < kills:
        number = chance.choice([2, 3, 4])
        moment, victim = chance.uniform(0, 0.6 * seconds), chance.randrange(number)
        began = time.monotonic()
        results = run(number, folder, victim, moment)
        assert time.monotonic() - began < 60 + 10 * seconds
        if results[victim] is None:
            killed += 1
            in_the_middle += any(folder.rglob("*.safetensors"))
        for found in results:
            if isinstance(found, dict):
                assert_all_close(found, expected)
            elif found is not None:
                assert re.search("Another process has stopped|Process . has stopped", found)
        if (folder / "scores.safetensors").exists():
            finished += 1
            folder = tmp_path / str(finished)
    assert kills < 6 or in_the_middle > kills // 6  # of few, the moments may all be early
    for found in run(2, folder):
        assert_all_close(found, expected)


def fail(rank):
    """In work of its own; and, where weights differ, together."""
    unet = small_unet()
    unet.conv_in.weight.data += rank
    regression = unet_regression(unet, count=COUNT)
    with pytest.raises(ValueError, match=r"Process 0 and process 1 differ in weights\. Give"):
        DiffusionEKFACLinearOperator(regression, passes=PassOptions(distributed=True))

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
