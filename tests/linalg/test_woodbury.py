"""Curvature plus outer products of gradients, against a dense inverse."""

import warnings

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    WoodburyInverseLinearOperator,
    influence_scores,
)
from tests.cases import plain_regression, two_convolutions
from tests.comparisons import assert_close
from tests.reference import to_dense

DAMPING = 1e-3


@pytest.fixture(scope="module")
def regression():
    model = two_convolutions()
    return plain_regression(model, (1, 4, 4), count=6, batch_size=4)


@pytest.fixture(scope="module")
def EK(regression):
    return DiffusionEKFACLinearOperator(regression)


@pytest.mark.parametrize("weight", [None, 0.0, 3.0])
def test_against_the_dense_inverse(regression, EK, weight):
    J = ExampleGradientLinearOperator(regression)
    rows = J.rows()
    c = 1 / len(rows) if weight is None else weight
    identity = torch.eye(EK.shape[0]).double()
    dense = to_dense(EK) + DAMPING * identity + c * rows.T @ rows
    for gradients in (J, rows):
        inverse = WoodburyInverseLinearOperator(EK.inverse(DAMPING), gradients, weight)
        assert_close(to_dense(inverse), torch.linalg.inv(dense), 1e-8)


def test_scores_and_formats(regression, EK):
    J = ExampleGradientLinearOperator(regression)
    rows = J.rows()
    inverse = WoodburyInverseLinearOperator(EK.inverse(DAMPING), J)
    expected = rows @ (inverse @ rows.T) / len(rows)
    assert_close(influence_scores(J, inverse, J), expected, 1e-9)
    listed = inverse @ [p.detach() for p in regression.objective.model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in regression.objective.model.parameters()])
    assert_close(torch.cat([x.flatten() for x in listed]), inverse @ flat, 1e-12)


def test_scores_from_scores(regression, EK):
    """``S (I + S_train)⁻¹``, as the documentation says."""
    J = ExampleGradientLinearOperator(regression)
    plain = influence_scores(J, EK.inverse(DAMPING), J)
    expected = influence_scores(J, WoodburyInverseLinearOperator(EK.inverse(DAMPING), J), J)
    assert_close(plain @ torch.linalg.inv(torch.eye(len(plain)) + plain), expected, 1e-8)


def test_much_weight_is_kernel_regression(regression, EK):
    """Scores of the training examples on themselves: the identity over ``N c``, for large ``c``."""
    rows = ExampleGradientLinearOperator(regression).rows()
    c = 1e6
    inverse = WoodburyInverseLinearOperator(EK.inverse(DAMPING), rows, c)
    assert_close(c * rows @ (inverse @ rows.T), torch.eye(len(rows)).double(), 1e-3)


def test_cancellation_is_told(EK):
    """Where it warns, float32 products are wrong, and the scores from scores still right."""
    regression = plain_regression(
        two_convolutions().float(),
        (1, 4, 4),
        count=3,
        num_draws=1,
        dtype=torch.float32,
    )
    M = DiffusionEKFACLinearOperator(regression).inverse(DAMPING)
    rows = ExampleGradientLinearOperator(regression).rows()
    for scale, warns in ((1.0, False), (1e4, True)):
        J = scale * rows
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            products = J @ (WoodburyInverseLinearOperator(M, J) @ J.T) / 3
        assert [w.category for w in told] == [UserWarning] * warns
        S = J @ (M @ J.T) / 3
        double = J.double() @ (M @ J.T).double() / 3
        expected = torch.linalg.solve(torch.eye(3).double() + double, double)
        from_scores = torch.linalg.solve(torch.eye(3) + S, S)
        assert_close(from_scores.double(), expected, 1e-3)
        error = float((products - expected).norm() / expected.norm())
        assert (error > 0.1) == warns, error


def test_errors(EK):
    with pytest.raises(ValueError, match=r"Gradients of shape \(2, 3\) arrived with an inverse"):
        WoodburyInverseLinearOperator(EK.inverse(DAMPING), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="weight=-1"):
        WoodburyInverseLinearOperator(EK.inverse(DAMPING), torch.zeros(2, EK.shape[0]), -1)
