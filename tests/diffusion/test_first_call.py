"""Networks whose arguments have other names: called right, or told what they were given."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from tests.cases import images, noise_levels


class Named(nn.Module):
    """Three parameters that image, time and label go through."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 0.1, 0.2], dtype=torch.float64))

    def of(self, x, t, y):
        a, b, c = self.scale
        return a * x + (b * t.to(x) + c * y.to(x)).reshape(-1, 1, 1, 1)


class Usual(Named):
    def forward(self, x, t, y):
        return self.of(x, t, y)


class Hidden(Named):
    def forward(self, hidden_states, y=None, timestep=None):
        return self.of(hidden_states, timestep, y)


class TimeFirst(Named):
    def forward(self, time, sample, y):
        return self.of(sample, time, y)


class Sigma(Named):
    def forward(self, x, sigma, *, y):
        return self.of(x, sigma, y)


class OnlyNames(Named):
    def forward(self, *, sample, timestep, y):
        return self.of(sample, timestep, y)


class Positional(Named):
    def forward(self, x, t, /, y):
        return self.of(x, t, y)


class Anything(Named):
    def forward(self, *args, **kwargs):
        return self.of(*args, **kwargs)


class ByPlace(Named):
    def forward(self, *args, y=None):
        return self.of(*args, y)


class Tuple(Named):
    def forward(self, x, t, y):
        return self.of(x, t, y), None


class Object(Named):
    def forward(self, x, t, y):
        return type("Output", (), {"sample": self.of(x, t, y)})()


DATA = {"x0": images(3), "y": torch.arange(3)}


def gradients(model, data=DATA):
    objective = DenoisingObjective(model, noise_levels())
    J = ExampleGradientLinearOperator(NoisedRegression(objective, data, 2))
    return torch.cat([J @ z for z in torch.eye(3, dtype=torch.float64)])


@pytest.mark.parametrize(
    "network",
    [Hidden, TimeFirst, Sigma, OnlyNames, Positional, Anything, ByPlace, Tuple, Object],
)
def test_names_of_arguments(network):
    assert torch.equal(gradients(network()), gradients(Usual()))


class OtherNames(Named):
    def forward(self, *, noisy, step, y):
        return self.of(noisy, step, y)


class OnlyKeywords(Named):
    def forward(self, **kwargs):
        return self.of(kwargs["x"], kwargs["t"], kwargs["y"])


class Labels(Named):
    def forward(self, x, t, labels):
        return self.of(x, t, labels)


class Table(Named):
    def forward(self, x, t, y):
        return self.of(x, t, nn.functional.embedding(y, torch.eye(2).to(x))[:, 0])


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (OtherNames, "OtherNames.forward(*, noisy, step, y), and was given x_t [6, 1, 8, 8] of"),
        (OnlyKeywords, "OnlyKeywords.forward(**kwargs), and was given x_t"),
        (Labels, "TypeError: Labels.forward() got an unexpected keyword argument 'y'"),
        (Table, "(IndexError: index out of range in self). It is Table.forward(x, t, y), and was"),
    ],
)
def test_what_a_network_does_not_take(network, told):
    with pytest.raises(ValueError, match="The network cannot be called with the data") as error:
        gradients(network())
    assert told in str(error.value)
    assert error.value.__cause__ is not None


def test_a_name_that_is_meant():
    with pytest.raises(ValueError, match="Did you mean 'labels' by 'label'"):
        gradients(Labels(), {"x0": images(3), "label": torch.arange(3)})


@pytest.mark.parametrize("key", ["pixel_values", "images", "image", "input", "sample"])
def test_data_of_other_keys(key):
    """Named, with what is wanted."""
    with pytest.raises(ValueError, match=rf"keys \['{key}', 'y'\]. Each batch .* with key 'x0'"):
        gradients(Usual(), {key: images(3), "y": torch.arange(3)})


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            lambda z: [z],
            "The model must return a tensor, a tuple that starts with one, or an object",
        ),
        (lambda z: {"sample": z}, ".sample, got dict"),
        (lambda z: None, ".sample, got NoneType"),
        (lambda z: z.flatten(1), "The model must return the shape of its input"),
    ],
)
def test_outputs_of_other_forms(output, told):
    class Other(Named):
        def forward(self, x, t, y):
            return output(self.of(x, t, y))

    with pytest.raises(ValueError, match=told):
        gradients(Other())
