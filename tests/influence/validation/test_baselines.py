"""Baselines against the formulas of their papers, dense and in float64."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    ExampleGradientLinearOperator,
    NoisedRegression,
    RandomProjection,
)
from curvlinops_diffusion.baselines import JourneyRegression, d_trak_scores, das_scores, trak_scores
from curvlinops_diffusion.measurements import record_trajectories
from tests.cases import images, plain_regression, seeded, two_convolutions
from tests.comparisons import assert_close
from tests.reference import example_gradients, flat_gradient, params_of

N, Q = 9, 3
# of a query's draws
SHARED = {"antithetic": True, "timesteps": [3]}


@pytest.fixture(scope="module")
def problem():
    model = two_convolutions()
    train = plain_regression(model, (1, 4, 4), count=N, batch_size=4)
    query = NoisedRegression(train.objective, images(Q, size=4), num_draws=2, seed=1)
    J = [ExampleGradientLinearOperator(r) for r in (query, train)]
    return query, train, *J


def primal(query_QP, train_NP, ridge):
    """``φ_qᵀ (ΦᵀΦ + λ)⁻¹ Φᵀ``, as it is published."""
    matrix = train_NP.T @ train_NP
    damping = ridge * matrix.trace() / len(train_NP)
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix)).double())
    return query_QP @ inverse @ train_NP.T


@pytest.mark.parametrize("size", [None, 8])
def test_trak_and_d_trak(problem, size):
    query, train, J_query, J_train = problem
    params = params_of(train.objective.model)

    def mean_square(batch, f, b):
        return (f[b] ** 2).mean()

    for method, value in ((trak_scores, None), (d_trak_scores, mean_square)):
        rows = [example_gradients(r, params, value) for r in (query, train)]
        if size is not None:
            rows = [RandomProjection(size, seed=5)(z) for z in rows]
        ours = method(J_query, J_train, ridge=0.1, size=size, seed=5)
        assert_close(ours, primal(*rows, 0.1), 1e-9)


def test_das(problem):
    """As published, in the primal form: gradients of the mean, residuals and leverages apart."""
    query, train, J_query, J_train = problem
    params = params_of(train.objective.model)
    query_QP, train_NP = (
        example_gradients(r, params, lambda batch, f, b: f[b].mean()) for r in (query, train)
    )
    hat_NN = primal(train_NP, train_NP, 0.1)
    squares_N = torch.zeros(N).double()
    for batch in train.batches():
        residual_B = (train.objective.predict(batch) - batch.target_BD).square().mean(1)
        squares_N.index_add_(0, torch.tensor(batch.indices), residual_B.detach().double())
    residual_N = (squares_N / train.num_draws).sqrt()
    expected = (primal(query_QP, train_NP, 0.1) * residual_N / (1 - hat_NN.diagonal())) ** 2
    assert_close(das_scores(J_query, J_train, ridge=0.1), expected, 1e-9)


def test_journeys():
    """The noise that leads from each state to the sample, through every parametrisation."""
    levels = [9, 6, 3, 1]
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        model = seeded(nn.Conv2d(1, 1, 3, padding=1))
        scheduler = DDPMScheduler(num_train_timesteps=10, prediction_type=prediction_type)

        objective = DenoisingObjective(model, scheduler)
        states = record_trajectories(objective, (Q, 1, 4, 4), levels, seed=2).double()
        journey = JourneyRegression(objective, states, levels)
        J = ExampleGradientLinearOperator(journey)
        alphas = scheduler.alphas_cumprod.double()
        for q in range(Q):
            total = 0.0
            for s, level in enumerate(levels):
                alpha, sigma = alphas[level].sqrt(), (1 - alphas[level]).sqrt()
                x_t, sample = states[q, s], states[q, -1]
                noise = (x_t - alpha * sample) / sigma
                target = {
                    "epsilon": noise,
                    "v_prediction": alpha * noise - sigma * sample,
                    "sample": sample,
                }[prediction_type]
                total += (model(x_t.unsqueeze(0), level)[0] - target).square().mean() / len(levels)
            expected = flat_gradient(total, params_of(objective.model))
            assert_close(J.rows([q])[0], expected.double(), 1e-6)
    train = NoisedRegression(objective, images(N, size=4), 2)
    scores = trak_scores(J, ExampleGradientLinearOperator(train), ridge=0.1)
    assert scores.shape == (Q, N)
    with pytest.raises(ValueError, match=r"with 3 levels"):
        JourneyRegression(objective, states, levels[:3])


def test_random_projections():
    """On average the same inner products, with the variance that is said."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, generator=generator).double()
    y = 0.5 * x + y
    k = 16
    projected = torch.stack(
        [RandomProjection(k, seed)(torch.stack([x, y])) for seed in range(4000)]
    )
    products = (projected[:, 0] * projected[:, 1]).sum(1)
    variance = (x.square().sum() * y.square().sum() + (x @ y) ** 2 - 2 * (x * y).square().sum()) / k
    assert abs(products.mean() - x @ y) < 4 * (variance / 4000).sqrt()
    assert abs(products.var() / variance - 1) < 0.1
    assert torch.equal(RandomProjection(k, 3)(x.unsqueeze(0)), RandomProjection(k, 3)(x[None]))
    with pytest.raises(ValueError, match="`size` must be a whole number of at least 1, got 0"):
        RandomProjection(0)


def test_errors(problem):
    for method in (trak_scores, d_trak_scores, das_scores):
        with pytest.raises(ValueError, match="`ridge` must be positive and finite, got 0"):
            method(*problem[2:], ridge=0)
