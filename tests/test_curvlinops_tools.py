"""Every tool of ``curvlinops`` on every operator from here, against the dense matrix."""

import curvlinops
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
)
from tests.cases import OfMatrix, plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import to_dense

DAMPING = 0.05


@pytest.fixture(scope="module")
def regression():
    model = seeded(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.ConstantPad2d((1, 0, 1, 0), 0.0), nn.Conv2d(3, 1, 1)
    )
    return plain_regression(model, (1, 3, 3), count=4, num_draws=2, batch_size=4)


OPERATORS = {
    "GGN": DiffusionGGNLinearOperator,
    "K-FAC": DiffusionKFACLinearOperator,
    "EK-FAC": DiffusionEKFACLinearOperator,
    "inverse": lambda r: DiffusionEKFACLinearOperator(r).inverse(1.0),
}


@pytest.fixture(scope="module", params=OPERATORS)
def operator(request, regression):
    return OPERATORS[request.param](regression)


@pytest.fixture(scope="module")
def dense(operator):
    matrix = to_dense(operator)
    assert_close(matrix, matrix.T, 1e-10)
    return matrix


@pytest.fixture(scope="module")
def damped(operator, regression):
    """The operator plus a multiple of the identity, itself an operator."""
    return operator + DAMPING * DiffusionKFACLinearOperator(regression).power(0.0)


def right_side(operator):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(operator.shape[0], 2, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# Inverses
# ---------------------------------------------------------------------------------------------


def solution(dense, b):
    return torch.linalg.solve(dense + DAMPING * torch.eye(len(dense), dtype=torch.float64), b)


def test_conjugate_gradients(damped, dense):
    b = right_side(damped)
    settings = {"tolerance": 1e-12, "max_iter": 500, "eps": 1e-30, "stop_updating_after": 1e-14}
    inverse = curvlinops.CGInverseLinearOperator(damped, **settings)
    assert_close(inverse @ b, solution(dense, b), 1e-8)


def test_neumann_series(damped, dense):
    b = right_side(damped)
    largest = float(torch.linalg.eigvalsh(dense)[-1]) + DAMPING
    twin = OfMatrix(damped, dense + DAMPING * torch.eye(len(dense)).double())

    def inverse(operator, num_terms):
        return curvlinops.NeumannInverseLinearOperator(operator, num_terms, scale=1 / largest)

    assert_close(inverse(damped, 30) @ b, inverse(twin, 30) @ b, 1e-10)
    converged = inverse(twin, int(25 * largest / DAMPING))
    assert_close(converged @ b, solution(dense, b), 1e-8)


def test_lsmr(damped, dense):
    b = right_side(damped)
    inverse = curvlinops.LSMRInverseLinearOperator(damped, atol=1e-14, btol=1e-14, maxiter=500)
    assert_close(inverse @ b, solution(dense, b), 1e-8)


# ---------------------------------------------------------------------------------------------
# Parts, sums and products
# ---------------------------------------------------------------------------------------------


def test_submatrix(operator, dense):
    rows, columns = [3, 1, 8], [2, 3]
    part = curvlinops.SubmatrixLinearOperator(operator, rows, columns)
    assert_close(to_dense(part), dense[rows][:, columns], 1e-10)


def test_sums_multiples_and_products(operator, dense):
    assert_close(to_dense(2.0 * operator - operator), dense, 1e-10)
    assert_close(to_dense(operator @ operator), dense @ dense, 1e-10)
    assert_close(to_dense(operator.adjoint()), dense, 1e-10)


# ---------------------------------------------------------------------------------------------
# Traces, diagonals and norms
# ---------------------------------------------------------------------------------------------

ESTIMATORS = {
    "hutchinson_trace": 4,
    "hutchpp_trace": 6,
    "xtrace": 6,
    "hutchinson_diag": 4,
    "xdiag": 6,
    "hutchinson_squared_fro": 4,
}


def full_rank(dense):
    """As ``xtrace`` and ``xdiag`` need it."""
    return dense + DAMPING * torch.eye(len(dense), dtype=torch.float64)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(damped, dense, name):
    """With the same random vectors as of the matrix."""
    estimator, num_matvecs = getattr(curvlinops, name), ESTIMATORS[name]
    torch.manual_seed(0)
    direct = estimator(damped, num_matvecs)
    torch.manual_seed(0)
    assert_close(direct, estimator(full_rank(dense), num_matvecs), 1e-8)


# ---------------------------------------------------------------------------------------------
# Spectra
# ---------------------------------------------------------------------------------------------


def test_spectral_density(operator, dense):
    """With the same random vectors as of the matrix."""
    eigenvalues = torch.linalg.eigvalsh(dense)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])

    def estimated(operator):
        torch.manual_seed(0)
        # of few steps, since the directions lost to rounding are others after many
        return curvlinops.lanczos_approximate_spectrum(
            operator, ncv=4, num_points=512, num_repeats=2, kappa=10.0, boundaries=(low, high)
        )

    twin = OfMatrix(operator, dense)
    for direct, expected in zip(estimated(operator), estimated(twin), strict=True):
        assert_close(direct, expected, 1e-8)


def test_largest_eigenvalues_through_scipy(operator, dense):
    ours = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    truth = torch.linalg.eigvalsh(dense)[-3:].numpy()
    np.testing.assert_allclose(np.sort(ours), truth, rtol=1e-8)
