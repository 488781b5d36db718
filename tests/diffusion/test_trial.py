"""What a network is tried out for: that its output is a function of each example alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.diffusion.trial import Trial
from tests.cases import images, noise_levels, plain_regression, seeded

OPERATORS = {
    "K-FAC": DiffusionKFACLinearOperator,
    "GGN": lambda r: (
        DiffusionGGNLinearOperator(r)
        @ torch.ones(sum(p.numel() for p in r.objective.model.parameters())).double()
    ),
    "rows": lambda r: ExampleGradientLinearOperator(r).rows(),
    "values": lambda r: ExampleGradientLinearOperator(r).values(),
}


class Changed(nn.Module):
    """A network whose output is changed by a function of (output, x_t, t)."""

    def __init__(self, change):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1).double()
        self._change = change

    def forward(self, x_t, t):
        return self._change(self.layer(x_t), x_t, t)


def dropping_seldom(y, x, t):
    keep = torch.rand(len(y)) > 1e-3
    return y * keep.reshape(-1, 1, 1, 1)


RANDOM = {
    "functional dropout": lambda y, x, t: nn.functional.dropout(y, 0.5),
    "a seldom event": dropping_seldom,
    "noise": lambda y, x, t: y + 0.1 * torch.randn_like(y),
    "numpy": lambda y, x, t: y * float(np.random.rand()),  # noqa: NPY002
    "python": lambda y, x, t: y * (1 + (random.random() > 0.9)),
}
COUPLED = {
    "the batch's mean": lambda y, x, t: y - 0.1 * y.mean(0),
    "the first timestep": lambda y, x, t: y if t[0] > 5 else 2 * y,
    "the highest timestep": lambda y, x, t: y * (1 + t.max()),
    "the batch's size": lambda y, x, t: y * len(y),
    "neighbours": lambda y, x, t: y + 0.1 * y.flip(0),
    "attention over the batch": lambda y, x, t: (
        torch.softmax(y.flatten(1) @ y.flatten(1).T, 1) @ y.flatten(1)
    ).reshape(y.shape),
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("change", RANDOM.values(), ids=RANDOM)
def test_random_networks_are_refused(change, make):
    regression = plain_regression(Changed(change).eval(), (1, 4, 4))
    with pytest.raises(ValueError, match=r"draws random numbers.*Every module is in eval mode"):
        make(regression)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("change", COUPLED.values(), ids=COUPLED)
def test_networks_that_couple_examples_are_refused(change, make):
    regression = plain_regression(Changed(change).train(), (1, 4, 4), num_draws=2, timesteps=[2, 7])
    with pytest.raises(ValueError, match=r"depends on the rest of its.*'Changed'.*model.eval\(\)"):
        make(regression)


def test_the_mode_of_the_network_may_change():
    """What was tried out in one mode is tried out again in another."""
    model = seeded(nn.Conv2d(1, 1, 3, padding=1), nn.AlphaDropout(0.5)).eval()
    regression = plain_regression(model, (1, 4, 4))
    J = ExampleGradientLinearOperator(regression)
    J.rows()
    model.layers[1].train()
    with pytest.raises(ValueError, match=r"AlphaDropout|draws random numbers"):
        J.rows()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_two_examples_are_found_whatever_the_batches(size):
    """With one example in each batch, nothing would be told apart within one."""
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    data = DataLoader(TensorDataset(images(3)), batch_size=size)
    regression = NoisedRegression(
        DenoisingObjective(model, noise_levels()), data, timesteps=[7, 2, 5]
    )
    trial = Trial.of(regression)
    assert list(trial.low.indices) == list(trial.high.indices) == [0, 1]
    assert set(trial.low.level_B.tolist()) == {2}
    assert set(trial.high.level_B.tolist()) == {7}
    assert trial.mixed.indices == [0, 0, 1, 1]
    noised = {b.draw: b for b in regression.batches() if 1 in b.indices}
    for batch in (trial.low, trial.high):
        whole = noised[batch.draw]
        assert torch.equal(batch.x_t[1], whole.x_t[list(whole.indices).index(1)])


@pytest.mark.parametrize(("count", "draws", "samples"), [(1, 1, 1), (1, 4, 2), (3, 1, 2)])
def test_small_problems(count, draws, samples):
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    regression = plain_regression(model, (1, 4, 4), count=count, num_draws=draws)
    assert len(Trial.of(regression).mixed.indices) == samples
    DiffusionKFACLinearOperator(regression)


def test_images_of_several_sizes():
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    data = [images(1, size=4), images(1, size=6)]
    regression = NoisedRegression(DenoisingObjective(model, noise_levels()), data, 2)
    assert list(Trial.of(regression).low.indices) == [0]
    DiffusionKFACLinearOperator(regression)
