"""Functions of (model, example, draws), the log-likelihood, and augmentation as draws."""

from itertools import product
from math import log, pi

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    ExampleGradientLinearOperator,
    NoisedRegression,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.influence.derivatives import cheapest_grouping
from curvlinops_diffusion.measurements import ExampleFunction, LogLikelihood
from tests.cases import images, noise_levels, plain_regression, seeded, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of


def training_loss(model, example, draws):
    """The training loss again, so that there is something to compare with."""
    losses = []
    for batch in draws.noised_batches():
        output = model(batch.x_t, batch.timestep_B, **batch.condition).sample
        losses.append((output.flatten() - batch.target_BD[0]).square().mean())
    return torch.stack(losses).mean()


def test_a_function_that_is_the_training_loss():
    regression = unet_regression(tiny_unet(), count=2)
    truth = ExampleGradientLinearOperator(regression)
    J = ExampleGradientLinearOperator(regression, measurement=ExampleFunction(training_loss))
    assert_close(J.values(), truth.values(), 1e-12)
    assert_close(J.rows(), truth.rows(), 1e-12)
    V = torch.randn(J.shape[1], 2, generator=torch.Generator().manual_seed(0)).double()
    W = torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).double()
    assert_close(J @ V, truth.rows() @ V, 1e-12)
    assert_close(J.adjoint() @ W, truth.rows().T @ W, 1e-12)


def test_numbers_of_a_function_belong_to_the_example_and_draw():
    model = seeded(nn.Linear(3, 3))
    seen = {}

    def record(model, example, draws):
        for r in range(draws.num_draws):
            seen.setdefault((example.index, r), []).append(draws.normal(r, (4,)))
        return model(example.x0, None).sum()

    for batch_size in (1, 4):
        regression = plain_regression(model, (3,), batch_size=batch_size)
        ExampleGradientLinearOperator(regression, measurement=ExampleFunction(record)).values()
    assert len(seen) == 5 * 3
    assert all(torch.equal(a, b) for a, b in seen.values())
    assert len({float(a[0]) for a, _ in seen.values()}) == 15


def test_bad_functions():
    regression = plain_regression(seeded(nn.Linear(3, 3)), (3,))
    for function, message in (
        (lambda m, e, d: m(e.x0, None), r"for an example, got shape \[1, 3\]"),
        (lambda m, e, d: 1.0, "for an example, got float"),
        (lambda m, e, d: e.x0.sum(), "does not depend on the model's parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            ExampleGradientLinearOperator(regression, measurement=ExampleFunction(function)).rows()
    with pytest.raises(ValueError, match="must be below the number of noise levels, 10, got 10"):
        ExampleGradientLinearOperator(regression, measurement=LogLikelihood(num_steps=10))


class GaussianDenoiser(nn.Module):
    """The best prediction for data ``N(m, C)`` with a full covariance, in closed form."""

    def __init__(self, process, mean, root):
        super().__init__()
        self.process = process
        self.mean, self.root = nn.Parameter(mean), nn.Parameter(root)

    def forward(self, x_t, t):
        level = int(t[0])
        alpha, sigma = (float(s_T[level]) for s_T in (self.process.alphas_T, self.process.sigmas_T))
        C = self.root @ self.root.T
        total = alpha**2 * C + sigma**2 * torch.eye(len(C)).to(C)
        error = torch.linalg.solve(total, (x_t.flatten(1) - alpha * self.mean).T).T
        x0 = self.mean + alpha * error @ C
        eps = sigma * error
        predicted = {
            PredictionType.EPSILON: eps,
            PredictionType.SAMPLE: x0,
            PredictionType.FLOW: eps - x0,
        }[self.process.prediction_type]
        return predicted.reshape(x_t.shape)


def gaussian_problem(prediction_type, num_levels=400):
    u = torch.linspace(0.02, 0.999, num_levels, dtype=torch.float64)
    if prediction_type.value.endswith("flow"):
        alphas, sigmas = 1 - u, u
    else:
        alphas, sigmas = (u * pi / 2).cos(), (u * pi / 2).sin()
    process = NoiseProcess(alphas, sigmas, torch.arange(num_levels), prediction_type)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, generator=generator, dtype=torch.float64)
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64) * 0.6
    model = GaussianDenoiser(process, mean, root)
    x0 = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    return NoisedRegression(DenoisingObjective(model, process), x0, 4), model, x0


def exact_log_likelihood(model, process, x0):
    """Of ``x_t / alpha_t`` at the lowest level."""
    ratio = float(process.sigmas_T[0] / process.alphas_T[0])
    C = model.root @ model.root.T + ratio**2 * torch.eye(3, dtype=torch.float64)
    error = x0 - model.mean
    squares = (torch.linalg.solve(C, error.T).T * error).sum(1)
    return -0.5 * (squares + torch.logdet(C) + 3 * log(2 * pi))


@pytest.mark.parametrize(
    "prediction_type", [PredictionType.EPSILON, PredictionType.SAMPLE, PredictionType.FLOW]
)
def test_log_likelihood_of_gaussian_data(prediction_type):
    """For a Gaussian it is known; the divergence's estimate is averaged over all sign vectors."""
    regression, model, x0 = gaussian_problem(prediction_type)
    process = regression.objective.process
    truth = exact_log_likelihood(model, process, x0)
    measured = LogLikelihood(num_steps=200).bind(regression.objective)
    signs = torch.tensor([[a, b, c] for a in (1, -1) for b in (1, -1) for c in (1, -1)]).double()

    class AllSigns:
        num_draws = 8

        def normal(self, r, shape):
            return signs[r].reshape(shape)

    class One:
        def __init__(self, x):
            self.x0, self.condition = x.unsqueeze(0), {}

    found = [measured.function(model, One(x), AllSigns()) for x in x0]
    # the last level still knows a little of the data
    assert_close(torch.stack(found).detach(), truth.detach(), 2e-3)
    gradients = torch.autograd.grad(found[0], [model.mean, model.root])
    expected = torch.autograd.grad(truth[0], [model.mean, model.root])
    for gradient, e in zip(gradients, expected, strict=True):
        assert_close(gradient, e, 1e-2)


def assert_rows_are_derivatives(J, params, tolerance, step=1e-5):
    """Of the values, along a direction."""
    rows = J.rows()
    direction = torch.randn(J.shape[1], generator=torch.Generator().manual_seed(3)).double()
    before = [p.detach().clone() for p in params]
    values = []
    for sign in (1, -1):
        pieces = direction.split([p.numel() for p in before])
        for p, start, piece in zip(params, before, pieces, strict=True):
            p.data = start + sign * step * piece.reshape(p.shape)
        values.append(J.values())
    assert (rows.norm(dim=1) > 0).all()
    assert_close((values[0] - values[1]) / (2 * step), rows @ direction, tolerance)


def test_log_likelihood_is_a_measurement_by_name():
    """Values are the mean over draws' sign vectors; gradients those of the values."""
    regression, model, _ = gaussian_problem(PredictionType.EPSILON, num_levels=40)
    J = ExampleGradientLinearOperator(regression, measurement="log_likelihood")
    assert_rows_are_derivatives(J, list(model.parameters()), 1e-7)


def test_log_likelihood_of_a_network_with_attention():
    unet = tiny_unet()
    regression = unet_regression(unet, count=2)
    J = ExampleGradientLinearOperator(regression, measurement=LogLikelihood(num_steps=2))
    assert_rows_are_derivatives(J, list(unet.parameters()), 1e-6)


def flip_regression(**options):
    return NoisedRegression(
        DenoisingObjective(seeded(nn.Conv2d(1, 1, 3, padding=1)), noise_levels()),
        images(40, size=4),
        num_draws=10,
        **({"augment": "flip"} | options),
    )


def test_flips_are_draws():
    """Each draw sees the image or its mirror image, half of them each, whatever the batch size."""
    regression, x0 = flip_regression(), images(40, size=4)
    process, mirrored = regression.objective.process, {}
    for batch in regression.batches():
        eps = regression.draws.noise(batch.indices, batch.common_draw, (1, 4, 4)).double()
        for b, n in enumerate(batch.indices):
            level = batch.level_B[b]
            clean = (batch.x_t[b] - process.sigmas_T[level] * eps[b]) / process.alphas_T[level]
            distances = [(clean - version).norm() for version in (x0[n], x0[n].flip(-1))]
            assert min(distances) < 1e-12
            mirrored[n, batch.common_draw] = bool(distances[1] < distances[0])
    share = sum(mirrored.values()) / len(mirrored)
    assert abs(share - 0.5) < 0.1  # four standard deviations

    again = {}
    for batch in flip_regression(batch_size=7).batches():
        for b, n in enumerate(batch.indices):
            again[n, batch.common_draw] = batch.x_t[b]
    for batch in regression.batches():
        for b, n in enumerate(batch.indices):
            assert torch.equal(batch.x_t[b], again[n, batch.common_draw])


def test_own_versions():
    """A third version is drawn a third of the time."""
    x0 = torch.zeros(50, 1, 2, 2, dtype=torch.float64)
    regression = NoisedRegression(
        DenoisingObjective(seeded(nn.Conv2d(1, 1, 1)), noise_levels()),
        x0,
        num_draws=12,
        augment=[lambda x: x, lambda x: x + 100, lambda x: x + 200],
    )
    counts = torch.zeros(3)
    for batch in regression.batches():
        alpha_B = regression.objective.process.alphas_T[batch.level_B]
        version = (batch.x_t.flatten(1).mean(1) / alpha_B / 100).round().clamp(0, 2).long()
        counts += torch.bincount(version, minlength=3)
    assert_close(counts / 600, torch.full((3,), 1 / 3), 0.15)
    assert len(regression.description["augmentations"]) == 3

    for augment in ([], [3], 5):
        with pytest.raises(ValueError, match=r"`augment` must be None, 'flip'"):
            flip_regression(augment=augment)


@pytest.mark.parametrize(("num_draws", "batch_size"), [(1, 3), (7, 4)])
def test_gradients_whatever_the_grouping(num_draws, batch_size):
    regression = unet_regression(tiny_unet(), 5, num_draws, batch_size=batch_size)
    J = ExampleGradientLinearOperator(regression)
    truth = example_gradients(regression, params_of(regression.objective.model))
    assert_close(J.rows(), truth, 1e-12)


def test_cheapest_grouping():
    assert cheapest_grouping(32, 1, 32) == (32, 1)
    assert cheapest_grouping(32, 8, 32) == (4, 8)
    assert cheapest_grouping(2, 250, 32) == (1, 32)
    assert cheapest_grouping(20, 25, 20) == (1, 13)  # even rounds
    for num_examples, num_draws in product(range(1, 20), range(1, 30)):
        for at_once in (num_examples, 32):
            examples, draws = cheapest_grouping(num_examples, num_draws, at_once)
            assert 1 <= draws <= num_draws
            assert 1 <= examples <= num_examples
            assert examples * draws <= at_once
