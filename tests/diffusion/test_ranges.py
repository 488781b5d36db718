"""Images in another range than networks are trained on are warned of, once."""

import warnings

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionKFACLinearOperator,
    Encoded,
    LatentEncoder,
    NoisedRegression,
)
from tests.cases import noise_levels, seeded

UNIT = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def regression_of(x0, encode=None):
    model = seeded(nn.Conv2d(2, 2, 1))
    return NoisedRegression(DenoisingObjective(model, noise_levels(), encode=encode), x0, 2)


@pytest.mark.parametrize(
    ("x0", "shown"),
    [
        (UNIT, r"from 0\.\d+ to 0\.9\d+, none below 0.* pass 2 \* x - 1"),
        ((255 * UNIT).round(), r"from 0 to 255, .* pass x / 127.5 - 1"),
    ],
)
def test_ranges_from_zero(x0, shown):
    regression = regression_of(x0)
    with pytest.warns(UserWarning, match=shown):
        next(regression.batches())
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        next(regression.batches())
        DiffusionKFACLinearOperator(regression.with_draws(4))
    with pytest.warns(UserWarning, match=shown):
        next(regression_of(x0, LatentEncoder()).batches())


@pytest.mark.parametrize(
    "x0",
    [
        2 * UNIT - 1,
        UNIT[:, :, :1, :1],  # too few to tell
        UNIT.flatten(1),  # no images
        torch.zeros(4, 2, 8, 8).double(),
    ],
)
def test_what_is_not_told(x0):
    model = seeded(nn.Linear(128, 128) if x0.ndim == 2 else nn.Conv2d(2, 2, 1))
    regression = NoisedRegression(DenoisingObjective(model, noise_levels()), x0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(regression.batches())


def test_a_function_of_ones_own_may_take_any_range():
    def encode(x0, condition):
        return Encoded(2 * x0 - 1, None, condition)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(regression_of(UNIT, encode).batches())
