"""What is prefetched is what would be made in line; copies do not synchronise; busy machines."""

import os
import threading
import time
import warnings
from argparse import Namespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops_diffusion import DenoisingObjective, DiffusionKFACLinearOperator, NoisedRegression
from curvlinops_diffusion.cli.running import process_group
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.passes import loss_vectors
from curvlinops_diffusion.diffusion import recipe
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.runtime import devices
from curvlinops_diffusion.runtime.devices import pinned, prefetched, to_device
from tests.cases import images, plain_regression, seeded, tiny_unet, unet_regression


def test_one_is_made_while_another_is_used():
    made, threads = [], set()

    def square(x):
        made.append(x)
        threads.add(threading.current_thread().name)
        return x**2

    found = prefetched(square, range(5))
    for expected in range(5):
        assert next(found) == expected**2
        time.sleep(0.05)
        assert made == list(range(min(expected + 2, 5)))
    assert next(found, None) is None
    assert threads == {"prefetch_0"}
    assert not list(prefetched(square, []))


def test_errors_come_at_their_place_and_no_thread_is_left():
    found = prefetched(lambda x: 1 / x, [1, 0, 2])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
    found = prefetched(lambda x: x, range(100))
    next(found)
    found.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetched_noise_is_the_same(monkeypatch):
    """In the same order, and drawn by a thread where it is worth one."""
    drawn = []
    noise = Draws.noise

    def noted(self, indices, r, shape):
        drawn.append((list(indices), r, threading.current_thread().name.partition("_")[0]))
        return noise(self, indices, r, shape)

    monkeypatch.setattr(Draws, "noise", noted)
    found = []
    for worth_it, thread in ((2**40, "MainThread"), (0, "prefetch")):
        monkeypatch.setattr(recipe, "_WORTH_A_THREAD", worth_it)
        drawn.clear()
        regression = unet_regression(tiny_unet(), count=3, num_draws=4, batch_size=2)
        found.append([batch.x_t for batch in regression.batches()])
        assert drawn == [(indices, r, thread) for indices in ([0, 1], [2]) for r in range(4)]
    assert all(map(torch.equal, *found))


class Copies(TorchDispatchMode):
    """Whether copies from the host to the device synchronise, one by one."""

    def __init__(self):
        super().__init__()
        self.synchronise = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
        if copies and str(kwargs.get("device")) == "meta":
            self.synchronise.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batches(dropout):
    """Nor what is pulled back; and what all draws share is copied once: on a device of shapes."""
    text = {"text": torch.zeros(2)} if dropout else None
    x0 = images(4, dtype=torch.float32)
    data = {"x0": x0, "text": torch.ones(4, 2), "mask": torch.ones_like(x0)}
    options = {"input_perturbation": 0.1, "example_weights": torch.ones(4), "loss_mask": "mask"}
    options |= {"augment": "flip", "batch_size": 4}
    counts = []
    for num_draws in (1, 2, 3):
        network = seeded(nn.Conv2d(3, 3, 1), dtype=torch.float32)
        objective = DenoisingObjective(
            network, DDPMScheduler(), condition_dropout=dropout, null_condition=text
        )
        regression = NoisedRegression(objective, data, num_draws, **options)
        (clean,) = regression.clean_batches()
        network.to("meta")
        with Copies() as copies:
            for batch in regression.noised_batches(clean):
                prediction_BD = torch.empty_like(batch.target_BD)
                list(loss_vectors(batch, prediction_BD, regression.draws, KFACOptions()))
        assert not any(copies.synchronise)
        counts.append(len(copies.synchronise))
    assert counts[0] > 8
    shared = 2 * 3  # two versions of image, text and mask
    assert counts[2] - counts[1] == counts[1] - counts[0] == counts[0] - shared


def test_copies_from_a_device_are_blocking():
    """What comes from one would be read before it is there."""
    asked = []

    class Seen:
        def to(self, device, dtype, non_blocking):
            asked.append(non_blocking)

    for device in ("cpu", "meta"):
        to_device(Seen(), torch.device(device))
    assert asked == [False, True]


def test_pinned_memory(monkeypatch):
    """Of the host, for a GPU; what is there already, or stays here, is as it is."""
    copied = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda z: copied.append(z) or z.clone())
    z = torch.ones(2)
    assert pinned(z, torch.device("cpu")) is z
    assert pinned(z.to("meta"), torch.device("cuda")).is_meta
    assert not copied
    pinned(z, torch.device("cuda"))
    assert len(copied) == 1


@pytest.mark.parametrize(("threads", "load", "warned"), [(2, 4.0, 1), (2, 1.0, 0), (1, 100.0, 0)])
def test_a_busy_machine(monkeypatch, threads, load, warned):
    """Whoever uses one thread does not wait for others."""
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    monkeypatch.setattr(os, "getloadavg", lambda: (load * cores, 0, 0))
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            DiffusionKFACLinearOperator(plain_regression(seeded(nn.Linear(3, 3)), (3,), count=2))
    finally:
        torch.set_num_threads(before)
    busy = [str(one.message) for one in caught if "busy" in str(one.message)]
    assert len(busy) == warned
    for message in busy:
        assert f"a load of {load * cores:.1f} on {cores} cores, and PyTorch uses 2" in message
        assert "OMP_NUM_THREADS=1" in message


@pytest.mark.parametrize(
    ("load", "cores", "threads", "expected"),
    [(0.2, 8, 8, 8), (3.0, 8, 8, 5), (7.6, 2, 2, 1), (3.0, 8, 2, 2), (20.0, 8, 8, 1)],
)
def test_the_program_takes_threads_for_which_there_are_cores(
    monkeypatch, capsys, load, cores, threads, expected
):
    chosen = [threads]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "machine_load", lambda: (load, cores))
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with process_group(Namespace(device="cpu")):
        assert chosen[-1] == expected
    said = capsys.readouterr().err
    assert ("The machine is busy" in said) == (expected < threads)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    with process_group(Namespace(device="cpu")):
        assert len(chosen) == 1 + (expected < threads)  # the user's own number stays
