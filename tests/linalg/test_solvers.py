"""Iterative refinement against dense inverses."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    CGRefinedInverseLinearOperator,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
)
from tests.cases import OfMatrix, plain_regression, seeded, two_convolutions
from tests.comparisons import assert_close
from tests.reference import dense_ggn, params_of

DAMPING = 1e-2


@pytest.fixture(scope="module")
def model():
    return two_convolutions()


@pytest.fixture(scope="module")
def regression(model):
    return plain_regression(model, (1, 4, 4), count=6, batch_size=4)


@pytest.fixture(scope="module")
def exact(regression):
    """The operator itself."""
    return DiffusionGGNLinearOperator(regression)


@pytest.fixture(scope="module")
def G(exact, dense):
    """The same as a matrix."""
    return OfMatrix(exact, damped(dense, -DAMPING))


@pytest.fixture(scope="module")
def dense(model, regression):
    return damped(dense_ggn(regression, params_of(model)), DAMPING)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix)).to(matrix)


def right_sides(size, columns=3):
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** -torch.arange(columns)  # each column has its own coefficients
    return torch.randn(size, columns, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients(regression, exact, dense, preconditioned):
    M = DiffusionEKFACLinearOperator(regression).inverse(DAMPING) if preconditioned else None
    inverse = CGRefinedInverseLinearOperator(exact, DAMPING, M, tolerance=1e-12, max_iter=200)
    B = right_sides(len(dense), columns=4)
    B[:, 1] = 0
    truth = torch.linalg.solve(dense, B)
    assert_close(inverse @ B, truth, 1e-9)
    assert inverse.refinement.converged.all()
    assert_close(inverse @ B[:, 0], truth[:, 0], 1e-9)
    assert_close(inverse.adjoint() @ B, truth, 1e-9)


def test_a_preconditioner_that_is_exact_needs_one_iteration(G, dense):
    class Exact:
        _in_shape, shape = G._in_shape, G.shape

        def __matmul__(self, X):
            return torch.linalg.solve(dense, X)

    inverse = CGRefinedInverseLinearOperator(G, DAMPING, Exact(), tolerance=1e-10)
    inverse @ right_sides(len(dense))
    assert inverse.refinement.num_iterations == 1


def test_residual_history(G, dense):
    """The residuals are true ones; a run that is cut short says so, another stops at tolerance."""
    B = right_sides(len(dense))
    inverse = CGRefinedInverseLinearOperator(G, DAMPING, max_iter=4, tolerance=1e-12)
    X = inverse @ B
    refinement = inverse.refinement
    assert refinement.num_iterations == 4
    assert not refinement.converged.any()
    assert_close(refinement.residuals[0], torch.ones(3).double(), 1e-12)
    assert_close(refinement.residuals[-1], (B - dense @ X).norm(dim=0) / B.norm(dim=0), 1e-9)
    inverse = CGRefinedInverseLinearOperator(G, DAMPING, tolerance=0.1)
    X = inverse @ B
    assert ((B - dense @ X).norm(dim=0) <= 0.1 * B.norm(dim=0)).all()
    assert 0 < inverse.refinement.num_iterations < 60
    assert (inverse.refinement.residuals[-2] > 0.1).any()


@pytest.mark.parametrize(("tolerance", "spread"), [(1e-3, 4.0), (1e-6, 1.0), (0.0, 4.0)])
def test_residuals_in_float32_are_those_of_the_solution(tolerance, spread):
    """What rounding adds is not carried along unseen, and no smaller residual is waited for."""
    generator = torch.Generator().manual_seed(0)
    model = seeded(nn.Conv2d(1, 1, 9, padding=4), dtype=torch.float32)
    like = DiffusionGGNLinearOperator(plain_regression(model, (1, 4, 4)))
    n = like.shape[0]
    U = torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q
    matrix = U @ torch.diag(torch.logspace(-spread, 0, n).double()) @ U.T
    G32 = OfMatrix(like, matrix.float())
    B = torch.randn(n, 3, generator=generator)
    B[:, 1] = 0
    inverse = CGRefinedInverseLinearOperator(G32, 0.0, tolerance=tolerance, max_iter=3000)
    X = inverse @ B
    norms = B.double().norm(dim=0) + (B == 0).all(0)
    true = (B.double() - matrix.float().double() @ X.double()).norm(dim=0) / norms
    reported = inverse.refinement.residuals[-1].double()
    assert (true < 1.3 * reported + 3e-7).all()
    assert (reported < 1.3 * true + 3e-7).all()
    assert inverse.refinement.num_iterations < 1500
    if tolerance:
        assert inverse.refinement.converged.all()
    if tolerance == 0:
        assert true.max() < 3e-6 * 10**spread / 10


def test_callback_sees_the_iterates(G, dense):
    """Each is what a run of as many iterations returns."""
    kind = CGRefinedInverseLinearOperator
    B = right_sides(len(dense))
    iterates = []
    kind(G, DAMPING, max_iter=3, tolerance=0.0, callback=iterates.append) @ B
    assert len(iterates) == 3
    for number, X in enumerate(iterates, start=1):
        assert_close(X, kind(G, DAMPING, max_iter=number, tolerance=0.0) @ B, 1e-12)


def test_bad_options(regression, G, model):
    with pytest.raises(ValueError, match=r"damping.*-1"):
        CGRefinedInverseLinearOperator(G, -1)
    part = DiffusionKFACLinearOperator(regression, ["layers.0.weight"]).inverse(1.0)
    with pytest.raises(ValueError, match=r"the preconditioner: 1 parameters, 18 entries, G: 4"):
        CGRefinedInverseLinearOperator(G, 1.0, part)
    wild = CGRefinedInverseLinearOperator(OfMatrix(G, torch.full(G.shape, torch.inf).double()), 1.0)
    with pytest.raises(ValueError, match=r"does not converge.*Pass a larger damping"):
        wild @ right_sides(G.shape[1])


def test_parameters_of_one_shape_in_another_order_are_refused():
    """Wherever two operators meet: shapes alone would not tell them apart."""
    twins = seeded(nn.Linear(3, 3), nn.Linear(3, 3))
    regression = plain_regression(twins, (3,))
    names = ["layers.0.weight", "layers.1.weight"]
    G = DiffusionGGNLinearOperator(regression, names)
    K = DiffusionKFACLinearOperator(regression, names[::-1])
    message = r"in another order: where .* has 'layers.\d.weight', .* has 'layers.\d.weight'. Pass"
    with pytest.raises(ValueError, match=message):
        CGRefinedInverseLinearOperator(G, 1.0, K.inverse(1.0))
    assert G.param_names == tuple(names)
