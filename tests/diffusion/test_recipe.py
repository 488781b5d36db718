"""Recipes of training: everything is of the loss that they make."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from tests.cases import images, noise_levels, seeded
from tests.comparisons import assert_close
from tests.reference import (
    block_of,
    dense_block,
    dense_ggn,
    example_gradients,
    params_of,
    to_dense,
)

WEIGHTS = [1.0, 0.5, 0.0, 2.0]
RECIPES = {
    "offset": {"noise_offset": 0.3},
    "perturbation": {"input_perturbation": 0.2},
    "weights": {"example_weights": WEIGHTS},
    "all": {"noise_offset": 0.3, "input_perturbation": 0.2, "example_weights": WEIGHTS},
}


def regression_with(**options):
    model = seeded(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1))
    objective = DenoisingObjective(model, noise_levels())
    return NoisedRegression(objective, images(4, 2, 3), 4, batch_size=3, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_batches(name):
    """``x_t``, target and weight, from the recipe's formula and the draws."""
    recipe = RECIPES[name]
    plain = {(b.indices[0], b.common_draw): b for b in regression_with().batches()}
    process, draws = regression_with().objective.process, regression_with().draws
    for batch in regression_with(**recipe).batches():
        bare, n, r = plain[batch.indices[0], batch.common_draw], batch.indices, batch.common_draw
        shape = batch.x_t.shape[1:]
        offset = draws.noise_offset(n, r, shape)
        assert offset.shape == (len(n), 2, 1, 1)
        eps = draws.noise(n, r, shape) + recipe.get("noise_offset", 0.0) * offset
        seen = eps + recipe.get("input_perturbation", 0.0) * draws.perturbation(n, r, shape)
        x0 = images(4, 2, 3)[list(n)]
        assert_close(batch.x_t, process.noised(x0, seen.double(), batch.level_B), 1e-14)
        assert_close(batch.target_BD, eps.double().flatten(1), 1e-14)
        factors = torch.tensor(recipe.get("example_weights", [1.0] * 4)).double()[list(n)]
        assert_close(batch.weight_B, bare.weight_B * factors, 1e-14)


@pytest.mark.parametrize("name", RECIPES)
def test_curvature_and_gradients_are_of_that_loss(name):
    regression = regression_with(**RECIPES[name])
    model = regression.objective.model
    params = list(model.parameters())
    G = dense_ggn(regression, params)
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
    rows = ExampleGradientLinearOperator(regression).rows()
    assert_close(rows, example_gradients(regression, params), 1e-12)
    for X, y in regression:  # what curvlinops sees
        assert torch.isfinite(y - regression.model_func(X)).all()
    loss = sum(float((y - regression.model_func(X)).square().mean(1).sum()) for X, y in regression)
    batches = list(regression.batches())
    truth = sum(float(b.loss(regression.objective.predict(b)).sum()) for b in batches)
    assert_close(torch.tensor(loss), torch.tensor(truth), 1e-12)
    names = [name for name, _ in model.named_parameters()]
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    for placed in EK.blocks:
        exact = block_of(G, model, names, placed.params)
        assert_close(dense_block(placed, model).trace(), exact.trace(), 1e-11)


def test_draws_of_a_recipe_are_draws_like_others():
    """Independent of batches and of each other; pairs differ in the sign of all of them."""
    options = {"noise_offset": 1.0, "input_perturbation": 1.0}

    def rows(size, **more):
        objective = regression_with().objective
        own = NoisedRegression(
            objective, torch.zeros(4, 2, 3, 3).double(), 4, batch_size=size, **options, **more
        )
        return {
            (n, b.common_draw): x
            for b in own.batches()
            for n, x in zip(
                b.indices,
                b.x_t / objective.process.sigmas_T[b.level_B][:, None, None, None],
                strict=True,
            )
        }

    one, three = rows(1), rows(3)
    assert one.keys() == three.keys()
    assert all(torch.equal(one[key], three[key]) for key in one)
    # three unit normals, of which one is shared by the pixels of a channel
    draws = NoisedRegression(
        regression_with().objective, torch.zeros(4000, 2, 3, 3).double(), 1, **options
    ).draws
    n = range(4000)
    parts = [f(n, 0, (2, 3, 3)) for f in (draws.noise, draws.noise_offset, draws.perturbation)]
    for i, a in enumerate(parts):
        assert abs(float(a.mean())) < 5 / a.numel() ** 0.5
        assert abs(float(a.var()) - 1) < 5 * (2 / a.numel()) ** 0.5
        for b in parts[:i]:
            product = (a * b).mean((1, 2, 3))
            assert abs(float(product.mean())) < 5 * float(product.std()) / 4000**0.5
    pairs = rows(3, antithetic=True)
    for n in range(4):
        for p in (0, 2):
            assert torch.equal(pairs[n, p], -pairs[n, p + 1])


def test_files_tell_recipes_apart():
    described = [regression_with(**recipe).description for recipe in RECIPES.values()]
    plain = regression_with().description
    assert "noise_offset" not in plain
    assert len({repr(d) for d in (*described, plain)}) == len(RECIPES) + 1
    assert regression_with(noise_offset=0.3).with_draws(8).recipe.noise_offset == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_offset": -0.1}, "`noise_offset` must be a finite number of at least 0, got -0.1"),
        (
            {"input_perturbation": float("nan")},
            "`input_perturbation` must be a finite number of at least 0, got nan",
        ),
        ({"example_weights": [1.0, 2.0]}, r"shape \(2,\). Pass a finite number .* of the 4 ex"),
        ({"example_weights": [1.0, -1.0, 1, 1]}, r"number of at least 0 for each"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        regression_with(**options)


def test_an_example_without_weight_has_no_influence():
    regression = regression_with(example_weights=WEIGHTS)
    rows = ExampleGradientLinearOperator(regression).rows()
    assert rows[2].norm() == 0
    K = DiffusionKFACLinearOperator(regression, fisher_type="empirical")
    kept = params_of(regression.objective.model, K.param_names)
    assert sum(p.numel() for p in kept) == K.shape[0]


def test_flips_of_what_is_no_image():
    objective = DenoisingObjective(seeded(nn.Linear(3, 3)), noise_levels())
    data = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mirrors the last axis of images, got examples of.*3,"):
        next(NoisedRegression(objective, data, 2, augment="flip").batches())
