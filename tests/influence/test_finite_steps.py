"""Scores by a finite step: the derivative in the limit, and the network as it was."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    forward_only_scores,
    influence_scores,
)
from tests.cases import StoppedError, images, plain_regression, seeded, stopped, two_convolutions
from tests.comparisons import assert_close

N, Q = 6, 3


@pytest.fixture(scope="module")
def problem():
    model = two_convolutions()
    train = plain_regression(model, (1, 4, 4), count=N, batch_size=4)
    query = NoisedRegression(train.objective, images(Q, size=4), num_draws=2, seed=1)
    J = [ExampleGradientLinearOperator(r) for r in (query, train)]
    return J[0], DiffusionKFACLinearOperator(train).inverse(1e-2), J[1]


def test_the_limit_is_influence(problem):
    """To second order in the step; without a gradient of a training example."""
    exact = influence_scores(*problem)
    J_query, _, J_train = problem
    before = {n: p.clone() for n, p in J_train.regression.objective.model.named_parameters()}
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        rows_of = type(J_train).rows_of

        def refused(self, clean):
            assert self is J_query
            return rows_of(self, clean)

        patch.setattr(type(J_train), "rows_of", refused)
        for step in (4e-2, 2e-2, 1e-2):
            found = forward_only_scores(*problem, step=step, query_block=2)
            errors.append(float((found - exact).norm() / exact.norm()))
        assert_close(forward_only_scores(*problem, step=1e-5), exact, 1e-7)
    assert errors[0] > errors[1] > errors[2] > 0
    assert 3.5 < errors[1] / errors[2] < 4.5
    for name, p in J_train.regression.objective.model.named_parameters():
        assert torch.equal(p, before[name])


def test_some_parameters(problem):
    J_query, _, J_train = problem
    names = ["layers.2.weight", "layers.0.bias"]
    J = [ExampleGradientLinearOperator(J.regression, names) for J in (J_query, J_train)]
    G_inv = DiffusionKFACLinearOperator(J_train.regression, names).inverse(1e-2)
    exact = influence_scores(J[0], G_inv, J[1])
    assert_close(forward_only_scores(J[0], G_inv, J[1], step=1e-5), exact, 1e-6)


def test_it_goes_on(problem, tmp_path):
    """Queries that are done are not done again; and the network is as it was after an error."""
    expected = forward_only_scores(*problem)
    J_train = problem[2]
    passes = PassOptions(tmp_path / "checkpoint")
    model = J_train.regression.objective.model
    before = [p.clone() for p in model.parameters()]
    with stopped(type(J_train), "values", at=4) as calls:
        with pytest.raises(StoppedError):
            forward_only_scores(*problem, passes=passes)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        found = forward_only_scores(*problem, passes=passes)
    assert len(calls) == 4 + 4
    assert torch.equal(found, expected)


def test_errors(problem):
    with pytest.raises(ValueError, match="step=0 arrived"):
        forward_only_scores(*problem, step=0)
    coarse = seeded(nn.Conv2d(1, 1, 3, padding=1)).to(torch.bfloat16)
    train = plain_regression(coarse, (1, 4, 4), dtype=torch.float32)
    J, G_inv = ExampleGradientLinearOperator(train), DiffusionKFACLinearOperator(train).inverse(1.0)
    with pytest.raises(ValueError, match=r"are torch.bfloat16, which would round the step away"):
        forward_only_scores(J, G_inv, J)
