"""A busy machine is told of where it makes passes slow."""

import os
import warnings

import pytest
import torch
from torch import nn

from curvlinops_diffusion import DiffusionKFACLinearOperator
from tests.cases import plain_regression, seeded


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def fit():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        DiffusionKFACLinearOperator(plain_regression(seeded(nn.Linear(3, 3)), (3,), count=2))
    return [str(one.message) for one in told if "busy" in str(one.message)]


def test_it_is_said(two_threads, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0 * cores, 0, 0))
    (told,) = fit()
    assert f"a load of {4.0 * cores:.1f} on {cores} cores, and PyTorch uses 2 threads" in told
    assert "OMP_NUM_THREADS=1" in told
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0 * cores, 0, 0))
    assert fit() == []


def test_one_thread_does_not_wait(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fit() == []
    finally:
        torch.set_num_threads(before)
