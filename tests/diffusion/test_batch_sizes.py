"""``batch_size="auto"``: as many examples as fit, whatever else."""

import gc
import logging

import pytest
import torch
from torch.utils.data import TensorDataset

from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.diffusion import batch_sizes
from curvlinops_diffusion.runtime.devices import peak_bytes
from tests.cases import images, tiny_unet, unet_regression

CPU = torch.device("cpu")


def objective():
    return unet_regression(tiny_unet(num_class_embeds=None)).objective


def found(monkeypatch, free, count=5, **options):
    monkeypatch.setattr(batch_sizes, "free_bytes", lambda device: free)
    return NoisedRegression(objective(), images(count), 2, batch_size="auto", **options)


def test_twice_the_memory_for_twice_the_batch(monkeypatch, caplog):
    """And what was found fits into half of it, and twice as many would not."""
    with caplog.at_level(logging.INFO):
        one = found(monkeypatch, 2 * 10**7)
    (record,) = [r for r in caplog.records if r.getMessage() == "batch size"]
    assert record.fields["examples"] == one.batch_size
    assert found(monkeypatch, 4 * 10**7 + 2 * 10**6).batch_size == 2 * one.batch_size
    assert one.batch_size > 4

    def run(count):
        x0 = images(1).repeat(count, 1, 1, 1)
        (batch,) = NoisedRegression(one.objective, x0, 1, batch_size=count).batches()
        x_t = batch.x_t.requires_grad_()
        torch.autograd.grad(batch.loss(one.objective.predict(batch)).sum(), x_t)

    assert peak_bytes(lambda: run(one.batch_size), CPU) < 10**7
    assert peak_bytes(lambda: run(2 * one.batch_size), CPU) > 10**7


def test_limits(monkeypatch):
    assert found(monkeypatch, 0).batch_size == 1
    assert found(monkeypatch, 10**15, count=1).batch_size == 1024
    data = TensorDataset(images(3))
    assert NoisedRegression(objective(), data, 1, batch_size="auto").batch_size > 1


def test_the_result_is_that_of_this_batch_size(monkeypatch):
    auto = found(monkeypatch, 7 * 10**5)
    given = NoisedRegression(auto.objective, images(5), 2, batch_size=auto.batch_size)
    assert auto.batch_size < 5
    assert auto.data_identity() == given.data_identity()
    for one, other in zip(auto.batches(), given.batches(), strict=True):
        assert torch.equal(one.x_t, other.x_t)


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="left out for data that comes in batches, got 'auto'"):
        NoisedRegression(objective(), [images(3)], 1, batch_size="auto")
    with pytest.raises(ValueError, match=r"batch_size.*whole number of at least 1"):
        NoisedRegression(objective(), images(3), 1, batch_size="most")


def test_peak_bytes():
    """Of what is made, while it is held; not of what was there, and not twice of views."""
    there = torch.zeros(1000)

    def run():
        a = there + 1  # 4,000
        b = a.view(10, 100)
        there.add_(1)
        del a
        c = b * 2  # 8,000
        del b
        gc.collect()
        d = c[:5] + 1  # 6,000
        return d

    assert peak_bytes(run, CPU) == 8000

    def differentiated():
        x = there.clone().requires_grad_()
        return torch.autograd.grad(x.exp().exp().sum(), x)

    # the copy, two exponentials, and in the backward pass another gradient
    assert 4 * 4000 <= peak_bytes(differentiated, CPU) <= 5 * 4000 + 8
