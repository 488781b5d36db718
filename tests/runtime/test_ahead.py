"""What is made ahead is what would be made in line, in order, and one at a time."""

import threading
import time

import pytest
import torch

from curvlinops_diffusion import DiffusionKFACLinearOperator
from curvlinops_diffusion.diffusion import regression as regression_module
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.runtime.ahead import one_ahead
from tests.cases import tiny_unet, unet_regression


def test_one_is_made_while_another_is_used():
    made, threads = [], set()

    def square(x):
        made.append(x)
        threads.add(threading.current_thread().name)
        return x**2

    found = one_ahead(square, range(5))
    for expected in range(5):
        assert next(found) == expected**2
        time.sleep(0.05)
        assert made == list(range(min(expected + 2, 5)))
    assert next(found, None) is None
    assert threads == {"one-ahead_0"}
    assert not list(one_ahead(square, []))


def test_errors_come_at_their_place():
    found = one_ahead(lambda x: 1 / x, [1, 0, 2])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_nothing_goes_on_when_it_is_closed():
    found = one_ahead(lambda x: x, range(100))
    next(found)
    found.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("one-ahead")]


def test_noise_is_the_same(monkeypatch):
    """And is drawn beside the network, but for a batch's first."""
    drawn = []
    noise = Draws.noise

    def noted(*args):
        drawn.append(threading.current_thread() is threading.main_thread())
        return noise(*args)

    monkeypatch.setattr(Draws, "noise", noted)
    products = []
    for worth_it in (2**40, 0):
        monkeypatch.setattr(regression_module, "_WORTH_A_THREAD", worth_it)
        drawn.clear()
        K = DiffusionKFACLinearOperator(unet_regression(tiny_unet(), count=3, num_draws=4))
        products.append(K @ torch.ones(K.shape[1], dtype=torch.float64))
        assert set(drawn) == {worth_it > 0}
    assert torch.equal(*products)
