"""Recipes of training: everything is of the loss that they make, and versions go together."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    Encoded,
    ExampleGradientLinearOperator,
    LatentEncoder,
    NoisedRegression,
)
from curvlinops_diffusion.measurements import WeightedLoss
from tests.cases import images, noise_levels, seeded
from tests.comparisons import assert_close
from tests.reference import (
    block_of,
    dense_block,
    dense_ggn,
    empirical_vectors,
    example_gradients,
    kronecker_factors,
    params_of,
    to_dense,
    type2_vectors,
)

N, C, SIZE = 4, 2, 4
WEIGHTS = [1.0, 0.5, 0.0, 2.0]
MASKS = torch.rand(N, SIZE, SIZE, generator=torch.Generator().manual_seed(3)).double() + 0.1
MASKS[1] = MASKS[1].round()
MASKS[2, :2] = 0
RECIPES = {
    "offset": {"noise_offset": 0.3},
    "perturbation": {"input_perturbation": 0.2},
    "weights": {"example_weights": WEIGHTS},
    "all": {"noise_offset": 0.3, "input_perturbation": 0.2, "example_weights": WEIGHTS},
    "mask": {"loss_mask": "mask"},
}


def network():
    return seeded(nn.Conv2d(C, C, 3, padding=1), nn.Tanh(), nn.Conv2d(C, C, 1))


def regression_with(objective=None, mask=MASKS, of=None, **options):
    objective = objective or DenoisingObjective(network(), noise_levels(), **(of or {}))
    data = {"x0": images(N, C, SIZE)} | ({"mask": mask} if "loss_mask" in options else {})
    return NoisedRegression(objective, data, 4, batch_size=3, **options)


def test_batches():
    """``x_t``, target and weight, from the recipe's formula and the draws."""
    recipe = RECIPES["all"]
    plain = {(b.indices[0], b.common_draw): b for b in regression_with().batches()}
    process, draws = regression_with().objective.process, regression_with().draws
    for batch in regression_with(**recipe).batches():
        bare, n, r = plain[batch.indices[0], batch.common_draw], batch.indices, batch.common_draw
        shape = batch.x_t.shape[1:]
        offset = draws.noise_offset(n, r, shape)
        assert offset.shape == (len(n), 2, 1, 1)
        eps = draws.noise(n, r, shape) + recipe.get("noise_offset", 0.0) * offset
        seen = eps + recipe.get("input_perturbation", 0.0) * draws.perturbation(n, r, shape)
        x0 = images(N, C, SIZE)[list(n)]
        assert_close(batch.x_t, process.noised(x0, seen.double(), batch.level_B), 1e-14)
        assert_close(batch.target_BD, eps.double().flatten(1), 1e-14)
        factors = torch.tensor(recipe.get("example_weights", [1.0] * 4)).double()[list(n)]
        assert_close(batch.weight_B, bare.weight_B * factors, 1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_the_masked_entries(reduction):
    regression = regression_with(of={"reduction": reduction}, loss_mask="mask")
    scale = 1 / (C * SIZE**2) if reduction == "mean" else 1.0
    for batch in regression.batches():
        prediction = regression.objective.predict(batch)
        errors = (prediction - batch.target_BD).reshape(-1, C, SIZE, SIZE)
        masks = MASKS[list(batch.indices)].unsqueeze(1)
        expected = scale * (masks * errors**2).sum((1, 2, 3)).detach()
        assert_close(batch.loss(prediction).detach(), expected, 1e-13)
        other = WeightedLoss(lambda t: 3.0 + 0 * t).bind(regression.objective)
        assert_close(other(batch, prediction).detach(), 3 * expected, 1e-13)


@pytest.mark.parametrize("name", ["all", "mask"])
def test_curvature_and_gradients_are_of_that_loss(name):
    regression = regression_with(**RECIPES[name])
    model = regression.objective.model
    params, names = params_of(model), [name for name, _ in model.named_parameters()]
    G = dense_ggn(regression, params)
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
    J, rows = ExampleGradientLinearOperator(regression), example_gradients(regression, params)
    assert_close(J.rows(), rows, 1e-12)
    v = torch.ones(J.shape[1]).double()
    assert_close(J @ v, rows @ v, 1e-12)
    # what curvlinops sees
    loss = sum(float((y - regression.model_func(X)).square().mean(1).sum()) for X, y in regression)
    batches = list(regression.batches())
    truth = sum(float(b.loss(regression.objective.predict(b)).sum()) for b in batches)
    assert_close(torch.tensor(loss), torch.tensor(truth), 1e-12)
    for fisher, vectors in {"type-2": type2_vectors, "empirical": empirical_vectors}.items():
        K = DiffusionKFACLinearOperator(regression, fisher_type=fisher)
        factored = [placed for placed in K.blocks if placed.kind not in ("dense", "diagonal")]
        assert len(factored) == 2
        for placed in factored:
            module = dict(model.named_modules())[placed.params[0].rpartition(".")[0]]
            A, B = kronecker_factors(regression, module, vectors, "expand")
            assert_close(dense_block(placed, model), torch.kron(B, A), 1e-11)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    for placed in EK.blocks:
        exact = block_of(G, model, names, placed.params)
        assert_close(dense_block(placed, model).trace(), exact.trace(), 1e-11)
    if name == "all":  # an example without weight has no influence
        assert J.rows()[2].norm() == 0


def test_draws_of_a_recipe_are_draws_like_others():
    """Independent of batches and of each other; pairs differ in the sign of all of them."""
    options = {"noise_offset": 1.0, "input_perturbation": 1.0}
    objective = regression_with().objective

    def rows(size, **more):
        x0 = torch.zeros(4, 2, 3, 3).double()
        own = NoisedRegression(objective, x0, 4, batch_size=size, **options, **more)
        return {
            (n, batch.common_draw): x / objective.process.sigmas_T[level]
            for batch in own.batches()
            for n, x, level in zip(batch.indices, batch.x_t, batch.level_B, strict=True)
        }

    one, three = rows(1), rows(3)
    assert one.keys() == three.keys()
    assert all(torch.equal(one[key], three[key]) for key in one)
    # three unit normals, of which one is shared by the pixels of a channel
    draws, n = regression_with(**options).draws, range(4000)
    parts = [f(n, 0, (2, 3, 3)) for f in (draws.noise, draws.noise_offset, draws.perturbation)]
    for i, a in enumerate(parts):
        assert abs(float(a.mean())) < 5 / a.numel() ** 0.5
        assert abs(float(a.var()) - 1) < 5 * (2 / a.numel()) ** 0.5
        for b in parts[:i]:
            product = (a * b).mean((1, 2, 3))
            assert abs(float(product.mean())) < 5 * float(product.std()) / 4000**0.5
    pairs = rows(3, antithetic=True)
    assert all(torch.equal(pairs[n, p], -pairs[n, p + 1]) for n in range(4) for p in (0, 2))


def test_files_tell_recipes_apart():
    described = [regression_with(**recipe).description for recipe in ({}, *RECIPES.values())]
    assert "noise_offset" not in described[0]
    assert len({repr(d) for d in described}) == len(RECIPES) + 1
    assert regression_with(noise_offset=0.3).with_draws(8).recipe.noise_offset == 0.3
    one, same, other = (
        regression_with(mask=m, loss_mask="mask") for m in (MASKS, MASKS, -MASKS + 2)
    )
    assert one.identity({}) == same.identity({})
    assert one.data_identity() != other.data_identity()


@pytest.mark.parametrize("form", [MASKS, MASKS.unsqueeze(1), MASKS.unsqueeze(1).repeat(1, C, 1, 1)])
def test_forms_of_masks(form):
    batch = next(regression_with(mask=form, loss_mask="mask").batches())
    expected = MASKS[:3].unsqueeze(1).expand(3, C, SIZE, SIZE).flatten(1)
    assert torch.equal(batch.mask_BD, expected)


def test_masks_of_images_before_an_autoencoder():
    """A latent's weight is the average over its pixels, of the version that was drawn."""

    def encode(x0, condition):
        assert not condition
        return Encoded(avg_pool2d(x0, 2), None, condition)

    objective = DenoisingObjective(network(), noise_levels(), encode=encode)
    regression = regression_with(objective, loss_mask="mask", augment="flip")
    mirrored = 0
    for batch in regression.batches():
        for b, n in enumerate(batch.indices):
            version = int(regression.draws.versions([n], batch.common_draw, 2)[0])
            mirrored += version
            mask = MASKS[n].flip(-1) if version else MASKS[n]
            expected = avg_pool2d(mask[None, None], 2)[0].expand(C, 2, 2)
            assert_close(batch.mask_BD[b].reshape(C, 2, 2), expected, 1e-14)
    assert 0 < mirrored < N * 4


def flipped_rows():
    objective = DenoisingObjective(seeded(nn.Linear(3, 3)), noise_levels())
    return NoisedRegression(objective, torch.zeros(4, 3).double(), 2, augment="flip")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regression_with(noise_offset=-0.1), "noise_offset.* at least 0"),
        (lambda: regression_with(input_perturbation=float("nan")), "input_perturbation.* at least"),
        (lambda: regression_with(example_weights=[1.0, 2.0]), r"of the 4 ex.* got shape \(2,\)"),
        (lambda: regression_with(example_weights=[1.0, -1.0, 1, 1]), "at least 0 .* from -1"),
        (lambda: regression_with(mask=torch.ones(N), loss_mask="mask"), r"got \(3,\)"),
        (lambda: regression_with(mask=["a"] * N, loss_mask="mask"), "got list"),
        (lambda: regression_with(mask=-MASKS, loss_mask="mask"), "must be finite and at least 0"),
        (lambda: regression_with(mask=MASKS / 0 * 0, loss_mask="mask"), "must be finite and at le"),
        (
            lambda: regression_with(mask=torch.ones(N, 3, SIZE, SIZE), loss_mask="mask"),
            r"the shape of what the network predicts, .* got \(3, 4, 4\)",
        ),
        (lambda: regression_with(loss_mask="masks"), r"one of \['mask'\], got 'masks'"),
        (flipped_rows, r"mirrors the last axis of images, got examples of.*3,"),
        (lambda: regression_with(augment="turn"), "`augment` must be None, 'flip' .* got 'turn'"),
    ],
)
def test_bad_recipes(make, message):
    with pytest.raises(ValueError, match=message):
        next(make().batches())


# ---------------------------------------------------------------------------------------------
# Conditions that are images
# ---------------------------------------------------------------------------------------------


class Controlled(nn.Module):
    """A network that sees a control image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2 * C, C, 1)

    def forward(self, x, t, control, extra=None):
        return self.layer(torch.cat([x, control["image"]], 1))


def controlled(**options):
    control = {"image": images(N, C, SIZE).roll(1, 0), "strength": torch.ones(N)}
    data = {"x0": images(N, C, SIZE), "control": control}
    objective = DenoisingObjective(Controlled().double(), noise_levels())
    return NoisedRegression(objective, data, 4, **options), control["image"]


def test_conditions_that_are_images_are_transformed_with_the_image():
    assert len(list(controlled()[0].batches())) == 4  # without augmentation nothing is asked
    with pytest.raises(ValueError, match=r"Pass augmented_conditions=\['control/image'\] if"):
        next(controlled(augment="flip")[0].batches())
    described = []
    for moved in (["control/image"], []):
        regression, control = controlled(augment="flip", augmented_conditions=moved)
        described.append(regression.description)
        for batch in regression.batches():
            versions = regression.draws.versions(batch.indices, batch.common_draw, 2)
            assert 0 < versions.sum() < len(versions) or batch.common_draw
            for b, n in enumerate(batch.indices):
                mirrored = bool(moved) and bool(versions[b])
                expected = control[n].flip(-1) if mirrored else control[n]
                assert torch.equal(batch.condition["control"]["image"][b], expected)
    assert described[0] != described[1]
    for names, message in (
        ("control", "must be a list of names"),
        (["image"], r"must name tensors .* got \['image'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            next(controlled(augment="flip", augmented_conditions=names)[0].batches())


# ---------------------------------------------------------------------------------------------
# Images in another range than networks are trained on are warned of, once
# ---------------------------------------------------------------------------------------------

UNIT = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def of_range(x0, encode=None):
    model = seeded(nn.Linear(128, 128) if x0.ndim == 2 else nn.Conv2d(2, 2, 1))
    return NoisedRegression(DenoisingObjective(model, noise_levels(), encode=encode), x0, 2)


@pytest.mark.parametrize(
    ("x0", "shown"),
    [
        (UNIT, r"from 0\.\d+ to 0\.9\d+, none below 0.* pass 2 \* x - 1"),
        ((255 * UNIT).round(), r"from 0 to 255, .* pass x / 127.5 - 1"),
    ],
)
def test_ranges_from_zero(x0, shown):
    regression = of_range(x0)
    with pytest.warns(UserWarning, match=shown):
        next(regression.batches())
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        next(regression.batches())
        DiffusionKFACLinearOperator(regression.with_draws(4))
    with pytest.warns(UserWarning, match=shown):
        next(of_range(x0, LatentEncoder()).batches())


@pytest.mark.parametrize(
    ("x0", "encode"),
    [
        (2 * UNIT - 1, None),
        (UNIT[:, :, :1, :1], None),  # too few to tell
        (UNIT.flatten(1), None),  # no images
        (torch.zeros(4, 2, 8, 8).double(), None),
        (UNIT, lambda x0, c: Encoded(2 * x0 - 1, None, c)),  # it may take any range
    ],
)
def test_what_is_not_warned_of(x0, encode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(of_range(x0, encode).batches())
