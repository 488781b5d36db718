"""Per-example gradients against plain loops: rows, products, adjoint products, measurements."""

import gc

import pytest
import torch
from torch import nn

from curvlinops_diffusion import ExampleGradientLinearOperator
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cases import plain_regression, seeded, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def regression(unet):
    return unet_regression(unet, count=3, objective={"weighting": MinSNRWeighting()})


@pytest.fixture(scope="module")
def truth(unet, regression):
    return example_gradients(regression, params_of(unet))


def random_like(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_rows(regression, truth):
    """Layers and the rest (GroupNorm, class embedding) take different ways to their gradients."""
    J = ExampleGradientLinearOperator(regression)
    assert J.shape == tuple(truth.shape)
    assert_close(J.rows(), truth, 1e-12)


def test_chosen_rows_in_the_order_asked(regression, truth):
    J = ExampleGradientLinearOperator(regression)
    assert_close(J.rows([2, 0]), truth[[2, 0]], 1e-12)
    assert_close(J.rows([1, 1]), truth[[1, 1]], 1e-12)


def test_only_examples_that_are_asked_for_are_computed(regression):
    calls = []
    handle = regression.objective.model.register_forward_hook(
        lambda module, args, output: calls.append(len(args[0]))
    )
    J = ExampleGradientLinearOperator(regression, ["conv_in.weight"])
    J.rows([2])
    handle.remove()
    assert calls == [2]  # one example, with its two draws at once


def test_products(regression, truth):
    """Of matrices, flat vectors, and lists of tensors shaped like the parameters."""
    J = ExampleGradientLinearOperator(regression, chunk_size=2)
    V, W = random_like(J.shape[1], 3), random_like(J.shape[0], 3)
    assert_close(J @ V, truth @ V, 1e-12)
    assert_close(J.adjoint() @ W, truth.T @ W, 1e-12)
    params, v = params_of(regression.objective.model), random_like(J.shape[1])
    assert_close(J.adjoint().adjoint() @ v, truth @ v, 1e-12)
    pieces = v.split([p.numel() for p in params])
    listed = [piece.reshape(p.shape) for piece, p in zip(pieces, params, strict=True)]
    (product,) = J @ listed
    assert_close(product, truth @ v, 1e-12)
    back = J.adjoint() @ [random_like(3)]
    assert [b.shape for b in back] == [p.shape for p in params]
    assert_close(torch.cat([b.flatten() for b in back]), truth.T @ random_like(3), 1e-12)


def test_some_parameters(unet, regression, truth):
    """In the order in which they are given, whatever the model's own."""
    names = [name for name, _ in unet.named_parameters()]
    chosen = [names[10], names[2], names[31]]
    J = ExampleGradientLinearOperator(regression, chosen)
    assert J.param_names == tuple(chosen)
    expected = example_gradients(regression, params_of(unet, chosen))
    assert_close(J.rows(), expected, 1e-12)
    w = random_like(J.shape[0])
    assert_close(J.adjoint() @ w, expected.T @ w, 1e-12)


def test_nothing_is_left_behind(unet):
    """Memory does not wait for Python to look for circles: as many tensors after each batch."""
    regression = unet_regression(unet, count=12, num_draws=4)
    J = ExampleGradientLinearOperator(regression)
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _, rows in J.row_batches():
            del rows
            tensors = [z for z in gc.get_objects() if isinstance(z, torch.Tensor)]
            alive.append(sum(z.numel() for z in tensors))
            del tensors
    finally:
        gc.enable()
    assert max(alive[1:]) - alive[1] < 2000  # a tiny part of what the layers see


def third_entry(batch, prediction_BD):
    return prediction_BD[:, 3] * batch.weight_B


@pytest.mark.parametrize(
    ("measurement", "transcription"),
    [
        ("squared_norm", lambda batch, f, b: (f[b] ** 2).mean()),
        (third_entry, lambda batch, f, b: f[b, 3] * batch.weight_B[b]),
    ],
)
def test_measurements(unet, regression, measurement, transcription):
    J = ExampleGradientLinearOperator(regression, measurement=measurement)
    truth = example_gradients(regression, params_of(unet), transcription)
    assert_close(J.rows(), truth, 1e-12)
    v, w = random_like(J.shape[1]), random_like(J.shape[0])
    assert_close(J @ v, truth @ v, 1e-12)
    assert_close(J.adjoint() @ w, truth.T @ w, 1e-12)


def test_values_are_averages_over_draws():
    model = seeded(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    regression = plain_regression(model, (3,), batch_size=2)
    expected = torch.zeros(5, dtype=torch.float64)
    for batch in regression.batches():
        for b, n in enumerate(batch.indices):
            error = regression.objective.predict(batch)[b] - batch.target_BD[b]
            expected[n] += (error**2).mean().detach() / 3
    assert_close(ExampleGradientLinearOperator(regression).values(), expected, 1e-12)


def small(**options):
    model = seeded(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    return ExampleGradientLinearOperator(plain_regression(model, (3,)), **options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"Rows \[5, -1\] do not exist. Pass indices from 0 to 4"):
        small().rows([0, 5, -1])
    for options, message in (
        ({"measurement": "log"}, r"measurement='log' is unknown. Pass one of \['elbo', 'log_l"),
        ({"params": ["layers.9.weight"]}, r"names 'layers.9.weight', which the model does not"),
        ({"chunk_size": 0}, "`chunk_size` must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)


@pytest.mark.parametrize(
    "use",
    [lambda J: J.rows(), lambda J: J.values(), lambda J: J.adjoint() @ torch.ones(5).double()],
)
def test_a_measurement_of_the_wrong_shape(use):
    J = small(measurement=lambda batch, f: f)
    with pytest.raises(ValueError, match=r"shape \[B\], got shape \[\d+, 3\] for a batch of"):
        use(J)


def test_gradients_that_are_not_finite_are_named():
    """The example, the parameter, and what to do; a constant loss is no such case."""
    measured = small(measurement=lambda batch, f: (f.sum(1) * 1e200).square())
    with pytest.raises(ValueError, match=r"gradient of 'layers.*examples \[.*NaN or infinite"):
        measured.rows()


def test_a_measurement_that_ignores_the_prediction_is_explained():
    with pytest.raises(ValueError, match="does not depend on the prediction"):
        small(measurement=lambda batch, f: batch.weight_B).rows()
