"""What is made ahead is what would be made in line, in order, and one at a time."""

import copy
import threading
import time

import pytest
import torch

from curvlinops_diffusion import DiffusionKFACLinearOperator
from curvlinops_diffusion.diffusion import noises
from curvlinops_diffusion.diffusion.draws import Draws
from curvlinops_diffusion.runtime.devices import Foreseen, prefetched
from tests.cases import tiny_unet, unet_regression


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
    assert threads == {"one-ahead_0"}
    assert not list(prefetched(square, []))


def test_errors_come_at_their_place():
    found = prefetched(lambda x: 1 / x, [1, 0, 2])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_nothing_goes_on_when_it_is_closed():
    found = prefetched(lambda x: x, range(100))
    next(found)
    found.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("one-ahead")]


def test_what_was_foreseen_is_not_made_again():
    made = []

    def square(x):
        made.append((x, threading.current_thread() is threading.main_thread()))
        return x**2

    foreseen = Foreseen(square)
    assert foreseen(2) == 4
    foreseen.expect(3)
    assert foreseen(3) == 9
    assert made == [(2, True), (3, False)]
    assert foreseen(3) == 9  # once
    foreseen.expect(5)
    assert foreseen(4) == 16
    assert foreseen(5) == 25
    assert copy.deepcopy(foreseen)(6) == 36


@pytest.mark.parametrize("num_draws", [1, 4])
def test_noise_is_the_same(monkeypatch, num_draws):
    """And is drawn beside the network; also a batch's first, but for that of the first one."""
    drawn = []
    noise = Draws.noise

    def noted(self, indices, r, shape):
        drawn.append((list(indices), r, threading.current_thread().name))
        return noise(self, indices, r, shape)

    monkeypatch.setattr(Draws, "noise", noted)
    found = []
    for worth_it in (2**40, 0):
        monkeypatch.setattr(noises, "_WORTH_A_THREAD", worth_it)
        drawn.clear()
        regression = unet_regression(tiny_unet(), count=5, num_draws=num_draws, batch_size=2)
        found.append([batch.x_t for batch in regression.batches()])
        every = [([0, 1], r) for r in range(num_draws)]
        every += [([2, 3], r) for r in range(num_draws)] + [([4], r) for r in range(num_draws)]
        assert [(indices, r) for indices, r, _ in drawn] == every
    assert all(map(torch.equal, *found))
    threads = {(indices[0], r): name for indices, r, name in drawn}
    assert threads[2, 0] == threads[4, 0] == "foreseen_0"
    assert threads[0, 0] == "one-ahead_0"
    other = regression.with_draws(2)  # sees its own draws, not what was foreseen here
    next(regression.batches())
    assert torch.equal(next(other.batches()).x_t, next(regression.with_draws(2).batches()).x_t)


def test_factors_are_the_same(monkeypatch):
    products = []
    for worth_it in (2**40, 0):
        monkeypatch.setattr(noises, "_WORTH_A_THREAD", worth_it)
        K = DiffusionKFACLinearOperator(unet_regression(tiny_unet(), count=3, num_draws=4))
        products.append(K @ torch.ones(K.shape[1], dtype=torch.float64))
    assert torch.equal(*products)


@pytest.mark.parametrize("wanted", [lambda n: n % 2 == 1, lambda n: n > 1])
def test_what_comes_next_for_one_of_several_processes(wanted, monkeypatch):
    """Batches in steps of two are foreseen from the second on."""
    monkeypatch.setattr(noises, "_WORTH_A_THREAD", 0)
    regression = unet_regression(tiny_unet(), count=12, num_draws=1, batch_size=2)
    expected = {batch.indices[0]: batch.x_t for batch in regression.batches()}
    threads = []
    noise = Draws.noise

    def noted(self, *args):
        threads.append(threading.current_thread().name)
        return noise(self, *args)

    monkeypatch.setattr(Draws, "noise", noted)
    regression = unet_regression(tiny_unet(), count=12, num_draws=1, batch_size=2)
    for _, clean in regression.numbered_batches(wanted):
        (batch,) = regression.noised_batches(clean)
        assert torch.equal(batch.x_t, expected[batch.indices[0]])
    assert threads.count("foreseen_0") >= 1
