"""Digests tell apart what is not the same, and are alike in every process."""

import copy
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from curvlinops_diffusion import DiffusionKFACLinearOperator, PassOptions
from curvlinops_diffusion.influence.measurements.losses import (
    ELBO,
    SimplifiedELBO,
    WeightedLoss,
    loss,
)
from curvlinops_diffusion.runtime import digests
from curvlinops_diffusion.runtime.digests import Named, digest_of, fingerprint, name_of
from tests.cases import unet_regression


def scaled(factor):
    def measured(batch, prediction_BD):
        return factor * prediction_BD.sum(1)

    return measured


@dataclass(frozen=True)
class Measured:
    function: Any


class Callable:
    """An object of somebody's own, with a memory that is no setting."""

    def __init__(self, setting):
        self._setting, self.memory = setting, {}

    def __call__(self, batch, prediction_BD):
        self.memory[len(self.memory)] = batch
        return prediction_BD.sum(1)


def recursive():
    def inner(n):
        return inner(n - 1) if n else 0

    return inner


DIFFERENT = {
    "enclosed values": (scaled(1.0), scaled(2.0)),
    "enclosed tensors": (scaled(torch.zeros(2)), scaled(torch.ones(2))),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "names": (lambda x: x.sin(), lambda x: x.cos()),
    "defaults": (lambda x, a=1: x, lambda x, a=2: x),
    "partial": (partial(scaled, 1), partial(scaled, 2)),
    "weighting": (WeightedLoss(torch.zeros(2000)), WeightedLoss(torch.arange(2000) == 1000)),
    "fields": (ELBO("small"), ELBO("large")),
    "types": (SimplifiedELBO(), ELBO()),
    "dtype": (torch.zeros(2), torch.zeros(2).double()),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "module": (nn.Linear(1, 1), nn.Linear(1, 1)),
    "nested": ({"a": [1, {"b": scaled(1)}]}, {"a": [1, {"b": scaled(2)}]}),
    "sets": (lambda x: x in {1, 2}, lambda x: x in {1, 3}),
    "objects' numbers": (Callable(1.0), Callable(2.0)),
    "objects' tensors": (Callable(torch.zeros(2)), Callable(torch.ones(2))),
    "objects' networks": (Callable(nn.Linear(1, 1)), Callable(nn.Linear(1, 1))),
    "methods": (Callable(1.0).__call__, Callable(2.0).__call__),
    "functions in dataclasses": (Measured(scaled(1)), Measured(scaled(2))),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different(kind):
    one, other = DIFFERENT[kind]
    assert digest_of(one) == digest_of(one)
    assert digest_of(one) != digest_of(other)
    assert name_of(one) != name_of(other)


def test_alike():
    assert name_of(scaled(1.0)) == name_of(scaled(1.0))
    assert name_of(recursive()) == name_of(recursive())  # a function that encloses itself
    assert name_of("loss") == "loss"
    one, other = Callable(1.0), Callable(1.0)
    one(torch.zeros(2), torch.zeros(2, 2))
    assert name_of(one) == name_of(other)
    assert digest_of("ab", "c") != digest_of("a", "bc")


def test_in_another_process():
    program = (
        "from tests.runtime.test_digests import scaled, loss, name_of;"
        "print(name_of(scaled(1.0)), name_of(loss))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert found.split() == [name_of(scaled(1.0)), name_of(loss)]


def count_readings(monkeypatch):
    read = []
    digests_of = digests._digests
    monkeypatch.setattr(digests, "_digests", lambda state: read.append(1) or digests_of(state))
    return read


def changed_outside_autograd(p):
    p.data[0, 0] += 1


def reordered(p):
    p.data.copy_(p.data.clone().flipud())


CHANGES = {
    "in place": lambda p: p.detach().mul_(2),
    "by .data": changed_outside_autograd,
    "order of rows": reordered,
    "order of columns": lambda p: p.data.copy_(p.data.clone().fliplr()),
    "other memory": lambda p: setattr(p, "data", p.data + 1),
    "last entry": lambda p: p.data.view(-1)[-1].neg_(),
    "sign of a zero": lambda p: p.data.view(-1)[7].neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(2050, 1024), (3, 5)])
def test_weights_are_read_until_they_change(shape, change, monkeypatch):
    """Twice after a change, however it was made, and as if never read before."""
    read = count_readings(monkeypatch)
    network = nn.Sequential(nn.Linear(*shape), nn.BatchNorm1d(2))
    network[0].weight.data.view(-1)[7] = 0
    one = fingerprint(network)
    assert fingerprint(network) == one
    assert len(read) == 1
    one["weights"] = "overwritten by a caller"
    assert fingerprint(network) != one
    CHANGES[change](network[0].weight)
    other = fingerprint(network)
    assert len(read) == 2
    assert other != one
    assert other == fingerprint(copy.deepcopy(network))
    network.half()
    assert fingerprint(network) != other


def test_weights_of_any_kind_are_marked():
    network = nn.Module()
    odd = torch.zeros(4099, dtype=torch.uint8)
    network.register_buffer("bytes", odd[3:])  # words that begin in the middle of others
    network.register_buffer("flags", torch.zeros(9, dtype=torch.bool))
    network.register_buffer("complex", torch.zeros(3, dtype=torch.complex64))
    network.register_buffer("none", torch.zeros(0))
    network.register_buffer("scalar", torch.zeros(()))
    network.register_buffer("strided", torch.zeros(1100, 1100).t())
    with torch.inference_mode():
        network.register_buffer("inference", torch.zeros(3))
    before = fingerprint(network)
    odd[-1] = 1
    assert fingerprint(network)["weights"] != before["weights"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_weights_are_read_beside_other_work(monkeypatch, tmp_path, checkpointed):
    """In a thread, once for a fit with checkpoints, which wait for it, scores and a file."""
    threads = []
    digests_of = digests._digests

    def noted(state):
        threads.append(threading.current_thread().name)
        time.sleep(0.2)
        return digests_of(state)

    monkeypatch.setattr(digests, "_digests", noted)
    regression = unet_regression(count=2, num_draws=1)
    passes = PassOptions(tmp_path if checkpointed else None)
    K = DiffusionKFACLinearOperator(regression, ["conv_out.weight"], passes=passes)
    assert threads == ["beside_0"]
    assert K.info["fingerprint"] == fingerprint(regression.objective.model)
    assert len(threads) == 1


def test_a_network_that_is_moved(monkeypatch):
    """Offloaded and brought back, in other memory: the same values are not read again."""
    read = count_readings(monkeypatch)
    network = nn.Linear(3, 5)
    one = fingerprint(network)
    network.weight.data = network.weight.data.clone()
    network.bias = nn.Parameter(network.bias.detach().clone())
    assert fingerprint(network) == one
    assert len(read) == 1


def counting():
    calls, seen = 0, []

    def measured(batch):
        nonlocal calls
        calls += 1
        seen.append(batch)

    return measured


class Counting:
    def __init__(self):
        self.calls, self.table = 0, None

    def __call__(self, batch):
        self.calls += 1
        self.table = torch.ones(self.calls)


@pytest.mark.parametrize("make", [counting, Counting])
def test_names_of_functions_that_remember(make):
    function = make()
    name = Named(function)
    assert str(name) == name_of(function)
    before = str(name)
    function(0)
    assert str(name) == before == str(Named(make()))
    assert name_of(function) != before


def test_names_follow_the_networks_within():
    """In place, as by another of the same weights; whatever it is that holds them."""
    network = nn.Linear(2, 2)
    holders = [Callable(network), partial(scaled, network), scaled(network), network.forward]
    names = [Named(holder) for holder in holders]
    before = [str(name) for name in names]
    assert before == [str(Named(holder)) for holder in holders]
    network.weight.data.mul_(2)
    after = [str(name) for name in names]
    assert not set(before) & set(after)
    assert after == [str(Named(holder)) for holder in holders]
