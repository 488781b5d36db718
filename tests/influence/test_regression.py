"""The best predictor of retraining: what it is made of, and what its squares are."""

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    kernel_regression_scores,
    regression_scores,
)
from tests.cases import images, plain_regression, two_convolutions
from tests.comparisons import assert_close
from tests.influence.test_kernel_regression import DAMPING, dense, dense_rows, sign
from tests.reference import to_dense


@pytest.fixture(scope="module")
def problem():
    train = plain_regression(two_convolutions(), (1, 4, 4), count=8, batch_size=4)
    query = NoisedRegression(train.objective, images(3, size=4), num_draws=2, seed=1)
    return query, DiffusionKFACLinearOperator(train).inverse(DAMPING), train


@pytest.mark.parametrize("options", [{}, {"ridge": 0.7, "seed": 3}])
def test_equals_the_dense_formula(problem, options):
    query, K_inv, train = problem
    J_query, J_train = (ExampleGradientLinearOperator(r) for r in (query, train))
    ours = regression_scores(J_query, K_inv, J_train, **options)
    inverse, ridge = to_dense(K_inv), options.get("ridge", 5.0)
    of_loss = dense([dense_rows(query)], inverse, [dense_rows(train)], ridge)
    signs = [[dense_rows(r, sign(options.get("seed", 0)))] for r in (query, train)]
    squares = dense(signs[0], inverse, signs[1], ridge) ** 2
    z_loss, z_squares = (z / z.std(1, keepdim=True) for z in (of_loss, squares))
    assert_close(ours, (z_loss + 2 * z_squares) / 3, 1e-9)


def test_squares_are_rises_of_a_posterior_variance(problem):
    """Of a Gaussian process with the kernel: variance at the query, with and without an example.

    They are the squared weights over the diagonal of the regularised kernel's inverse, which a
    ridge makes nearly constant.
    """
    query, K_inv, train = problem
    J_query, J_train = (ExampleGradientLinearOperator(r) for r in (query, train))
    ridge, inverse = 5.0, to_dense(K_inv)
    q_QP, n_NP = J_query.rows(), J_train.rows()
    gram, cross = n_NP @ inverse @ n_NP.T, q_QP @ inverse @ n_NP.T
    regularised = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)

    def explained(kept):
        solved = torch.linalg.solve(regularised[kept][:, kept], cross[:, kept].T)
        return (cross[:, kept].T * solved).sum(0)

    everyone = torch.arange(len(gram))
    rises = [explained(everyone) - explained(everyone[everyone != n]) for n in everyone]
    squares = kernel_regression_scores(J_query, K_inv, J_train, ridge=ridge, squared=True)
    diagonal = torch.linalg.inv(regularised).diagonal()
    assert_close(squares / diagonal, torch.stack(rises, 1), 1e-9)
    assert diagonal.max() < (1 + (gram.diagonal().max() / gram.diagonal().mean()) / ridge) * min(
        diagonal
    )
