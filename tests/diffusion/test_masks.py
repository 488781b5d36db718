"""Masks of pixels: everything is of the masked loss, and a mask goes where its image goes."""

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
    to_dense,
    type2_vectors,
)

N, C, SIZE = 4, 2, 4
MASKS = torch.rand(N, SIZE, SIZE, generator=torch.Generator().manual_seed(3)).double() + 0.1
MASKS[1] = MASKS[1].round()
MASKS[2, :2] = 0


def network():
    return seeded(nn.Conv2d(C, C, 3, padding=1), nn.Tanh(), nn.Conv2d(C, C, 1))


def regression_with(mask=MASKS, data=(), objective=None, **options):
    objective = objective or DenoisingObjective(network(), noise_levels(), **options.pop("of", {}))
    data = {"x0": images(N, C, SIZE), "mask": mask, **dict(data)}
    return NoisedRegression(objective, data, 4, batch_size=3, loss_mask="mask", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_the_masked_entries(reduction):
    regression = regression_with(of={"reduction": reduction})
    scale = 1 / (C * SIZE**2) if reduction == "mean" else 1.0
    for batch in regression.batches():
        prediction = regression.objective.predict(batch)
        errors = (prediction - batch.target_BD).reshape(-1, C, SIZE, SIZE)
        weights = regression.objective.weights_T[batch.level_B]
        masks = MASKS[list(batch.indices)].unsqueeze(1)
        expected = (weights * scale * (masks * errors**2).sum((1, 2, 3))).detach()
        assert_close(batch.loss(prediction).detach(), expected, 1e-13)
        other = WeightedLoss(lambda t: 3.0 + 0 * t).bind(regression.objective)
        assert_close(other(batch, prediction).detach(), 3 * expected / weights, 1e-13)


@pytest.mark.parametrize("form", [MASKS, MASKS.unsqueeze(1), MASKS.unsqueeze(1).repeat(1, C, 1, 1)])
def test_forms_of_masks(form):
    (first, *_), (other, *_) = regression_with().batches(), regression_with(form).batches()
    assert torch.equal(first.mask_BD, other.mask_BD)


def test_curvature_and_gradients_are_of_that_loss():
    regression = regression_with()
    model = regression.objective.model
    params, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    G = dense_ggn(regression, params)
    unmasked = NoisedRegression(regression.objective, images(N, C, SIZE), 4)
    assert (dense_ggn(unmasked, params) - G).norm() > 0.1 * G.norm()
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
    J = ExampleGradientLinearOperator(regression)
    rows = example_gradients(regression, params)
    assert_close(J.rows(), rows, 1e-12)
    v = torch.ones(J.shape[1]).double()
    assert_close(J @ v, rows @ v, 1e-12)
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


def test_masks_of_images_before_an_autoencoder():
    """A latent's weight is the average over its pixels, of the version that was drawn."""

    def encode(x0, condition):
        assert not condition
        return Encoded(avg_pool2d(x0, 2), None, condition)

    objective = DenoisingObjective(network(), noise_levels(), encode=encode)
    regression = regression_with(objective=objective, augment="flip")
    mirrored = 0
    for batch in regression.batches():
        for b, n in enumerate(batch.indices):
            version = int(regression.draws.versions([n], batch.common_draw, 2)[0])
            mirrored += version
            mask = MASKS[n].flip(-1) if version else MASKS[n]
            expected = avg_pool2d(mask[None, None], 2)[0].expand(C, 2, 2)
            assert_close(batch.mask_BD[b].reshape(C, 2, 2), expected, 1e-14)
    assert 0 < mirrored < N * 4


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(N), "arrived as"),
        (["a"] * N, "arrived as list"),
        (-MASKS, "must be finite and at least 0"),
        (MASKS * float("nan"), "must be finite and at least 0"),
        (torch.ones(N, 3, SIZE, SIZE), r"has shape \(3, 4, 4\), and what the network predicts"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        next(regression_with(mask).batches())


def test_a_mask_that_is_not_there():
    objective = DenoisingObjective(network(), noise_levels())
    regression = NoisedRegression(
        objective, {"x0": images(N, C, SIZE), "masks": MASKS}, loss_mask="mask"
    )
    with pytest.raises(ValueError, match=r"loss_mask='mask' arrived, .* are \['masks'\]"):
        next(regression.batches())


def test_files_tell_masks_apart():
    one, other = regression_with(), regression_with(MASKS.flip(0))
    assert one.identity({}) == regression_with().identity({})
    assert one.data_identity() != other.data_identity()
    plain = NoisedRegression(one.objective, images(N, C, SIZE), 4, batch_size=3)
    assert one.description != plain.description


class Controlled(nn.Module):
    """A network that sees a control image."""

    def __init__(self):
        super().__init__()
        self.layer = seeded(nn.Conv2d(2 * C, C, 1))

    def forward(self, x, t, control, extra=None):
        return self.layer(torch.cat([x, control["image"]], 1))


def controlled(**options):
    control = {"image": images(N, C, SIZE).roll(1, 0), "strength": torch.ones(N)}
    data = {"x0": images(N, C, SIZE), "control": control}
    objective = DenoisingObjective(Controlled().double(), noise_levels())
    return NoisedRegression(objective, data, 4, augment="flip", **options), control["image"]


def test_conditions_that_are_images_are_transformed_with_the_image():
    with pytest.raises(ValueError, match=r"Pass augmented_conditions=\['control/image'\] if"):
        next(controlled()[0].batches())
    for moved in (["control/image"], []):
        regression, control = controlled(augmented_conditions=moved)
        for batch in regression.batches():
            versions = regression.draws.versions(batch.indices, batch.common_draw, 2)
            assert 0 < versions.sum() < len(versions) or batch.common_draw
            for b, n in enumerate(batch.indices):
                mirrored = bool(moved) and bool(versions[b])
                expected = control[n].flip(-1) if mirrored else control[n]
                assert torch.equal(batch.condition["control"]["image"][b], expected)
    told, not_told = (controlled(augmented_conditions=m)[0] for m in (["control/image"], []))
    assert told.description != not_told.description


@pytest.mark.parametrize(
    ("names", "message"),
    [("control", "Pass a list of names"), (["image"], r"names \['image'\], and the tensors")],
)
def test_bad_names_of_augmented_conditions(names, message):
    with pytest.raises(ValueError, match=message):
        next(controlled(augmented_conditions=names)[0].batches())


def test_without_augmentation_nothing_is_asked():
    objective = DenoisingObjective(Controlled().double(), noise_levels())
    data = {"x0": images(N, C, SIZE), "control": {"image": images(N, C, SIZE)}}
    assert len(list(NoisedRegression(objective, data, 2).batches())) == 2
