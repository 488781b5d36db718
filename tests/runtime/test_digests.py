"""Digests tell apart what is not the same, and are alike in every process."""

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from curvlinops_diffusion.influence.measurements.bounds import ELBO, SimplifiedELBO
from curvlinops_diffusion.influence.measurements.losses import WeightedLoss, loss
from curvlinops_diffusion.runtime.digests import digest_of, name_of


def scaled(factor):
    def measured(batch, prediction_BD):
        return factor * prediction_BD.sum(1)

    return measured


@dataclass(frozen=True)
class Measured:
    function: Any


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
