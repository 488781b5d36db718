"""Kernel regression: against dense algebra, in blocks, by iteration, interrupted and resumed."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    KernelOptions,
    NoisedRegression,
    PassOptions,
    averaged_scores,
    influence_scores,
    kernel_regression_scores,
    regression_scores,
)
from curvlinops_diffusion.influence.regression import (
    SHRINKAGE,
    SQUARE,
    influence_and_regression_scores,
)
from curvlinops_diffusion.measurements import SignedPrediction
from tests.cases import StoppedError, images, plain_regression, seeded, stopped, two_convolutions
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of, to_dense

N, Q, DAMPING = 9, 3, 1e-2


@pytest.fixture(scope="module")
def train():
    model = two_convolutions()
    return plain_regression(model, (1, 4, 4), count=N, batch_size=4)


@pytest.fixture(scope="module")
def query(train):
    x0 = images(Q, size=4)
    return NoisedRegression(train.objective, x0, num_draws=2, seed=1, batch_size=2)


@pytest.fixture(scope="module")
def K_inv(train):
    return DiffusionKFACLinearOperator(train).inverse(DAMPING)


@pytest.fixture(scope="module")
def operators(train, query):
    return [ExampleGradientLinearOperator(regression) for regression in (query, train)]


def dense_rows(regression, measured=None):
    """By autograd, example by example; of a function of (batch, predictions, b), or the loss."""
    params = params_of(regression.objective.model)
    return example_gradients(regression, params, *([] if measured is None else [measured]))


def dense(rows_Q, inverse, rows_N, ridge):
    """By a sum of kernels."""
    kernels = zip(rows_Q, rows_N, strict=True)
    parts = [(q @ inverse @ n.T, n @ inverse @ n.T) for q, n in kernels]
    cross, gram = (sum(z) for z in zip(*parts, strict=True))
    kappa = gram.diagonal().mean()
    return cross @ torch.linalg.inv(gram + ridge * kappa * torch.eye(len(gram)).double())


def sign(seed):
    """The same as the measurement, written out."""

    def value(batch, f, b):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (f.shape[1],), generator=generator) * 2 - 1
        return (signs * f[b]).sum()

    return value


@pytest.mark.parametrize(
    ("ridge", "gradient_bytes"),
    [(0.1, 2**31), (1.0, 2000)],  # all, some
)
def test_equal_the_dense_formula(operators, query, K_inv, train, ridge, gradient_bytes):
    J_query, J_train = operators
    options = KernelOptions(gradient_bytes=gradient_bytes)
    ours = kernel_regression_scores(J_query, K_inv, J_train, ridge=ridge, options=options)
    truth = dense([dense_rows(query)], to_dense(K_inv), [dense_rows(train)], ridge)
    assert_close(ours, truth, 1e-9)


@pytest.mark.parametrize(
    ("options", "solved"),
    [
        ({}, {}),
        ({"ridge": 0.7, "seed": 3, "gap": 0.25}, {"gradient_bytes": 3000}),
        ({}, {"largest_gram": 1, "tolerance": 1e-9}),
    ],
)
def test_the_best_predictor_of_retraining(operators, query, K_inv, train, options, solved):
    """Of the loss and of the prediction's variance: by the dense formula."""
    J_query, J_train = operators
    ours = regression_scores(J_query, K_inv, J_train, **options, options=KernelOptions(**solved))
    inverse, ridge = to_dense(K_inv), options.get("ridge", 5.0)

    def solve(function):
        q, n = (dense_rows(r, *function) for r in (query, train))
        gram, cross = n @ inverse @ n.T, q @ inverse @ n.T
        damping = ridge * gram.diagonal().mean()
        M = torch.linalg.inv(gram + damping * torch.eye(N).double())
        return cross @ M, (gram @ M).diagonal().mean(), M.diagonal(), damping

    w, mean, *_ = solve([])
    w_f, _, diagonal, damping = solve([sign(options.get("seed", 0))])
    if "largest_gram" in solved:  # estimated from one column of signs
        signs = torch.randint(2, (1, N), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        estimates = []
        for function in ([], [sign(0)]):
            n = dense_rows(train, *function)
            gram = n @ inverse @ n.T
            kappa = gram.diagonal().mean()
            M = torch.linalg.inv(gram + ridge * kappa * torch.eye(N).double())
            estimates.append((signs.double() @ M @ signs.double().T / N, ridge * kappa))
        (of_loss, of_all), (diagonal, damping) = estimates
        mean = 1 - of_loss * of_all
    own = (1 / diagonal).mean() - damping
    singles = train.single_draws(64)  # of nine images
    assert [r.num_samples for r in singles] == [N] * 8
    assert len({float(next(iter(r.batches())).level_B[0]) for r in singles}) == 8
    ones = [dense_rows(r, sign(options.get("seed", 0))) for r in singles]
    lengths = [((one @ inverse) * one).sum(1).mean() for one in ones]
    longer = sum(lengths) / 8 / (damping / ridge)
    expected = SHRINKAGE * (w / mean + SQUARE * longer * w_f**2 / diagonal / own)
    assert_close(ours, options.get("gap", 1.0) * expected, 1e-6 if solved else 1e-9)


def test_halves_out_of_one_pass_are_those_of_their_draws(operators, K_inv):
    """With all draws together; the network runs as often as for these alone."""
    J_query, J_train = (J.on(J.regression.with_draws(4)) for J in operators)
    parts = [[J.on(J.regression.divided(half, 2)) for J in (J_query, J_train)] for half in range(2)]
    expected = [
        (influence_scores(query, K_inv, train), regression_scores(query, K_inv, train))
        for query, train in [(J_query, J_train), *parts]
    ]
    for options in (KernelOptions(), KernelOptions(gradient_bytes=5000)):
        found = influence_and_regression_scores(J_query, K_inv, J_train, options=options)
        for own, truth in zip(zip(*found, strict=True), expected, strict=True):
            for one, other in zip(own, truth, strict=True):
                assert_close(one, other, 1e-9)


def test_squares_are_rises_of_a_posterior_variance(operators, K_inv):
    """Of a Gaussian process with the kernel: variance at the query, with and without an example.

    They are the squared weights over the diagonal of the regularised kernel's inverse, which a
    ridge makes nearly constant.
    """
    J_query, J_train = operators
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
    largest = gram.diagonal().max() / gram.diagonal().mean()
    assert diagonal.max() < (1 + largest / ridge) * diagonal.min()


def test_several_functions(train, query, K_inv):
    """The loss, and the prediction along two signs whose kernels are added; each in its units."""
    J = []
    for regression in (query, train):
        of_loss = ExampleGradientLinearOperator(regression)
        J.append([of_loss, [of_loss.measuring(SignedPrediction(seed)) for seed in range(2)]])
    inverse = to_dense(K_inv)
    of_loss = dense([dense_rows(query)], inverse, [dense_rows(train)], 0.5)
    signs = [[dense_rows(r, sign(seed)) for seed in range(2)] for r in (query, train)]
    of_prediction = dense(signs[0], inverse, signs[1], 0.5)
    for options, scores, weights in (
        ({}, (of_loss, of_prediction), (1, 1)),
        ({"squared": [False, True], "weights": (3, 1)}, (of_loss, of_prediction**2), (3, 1)),
    ):
        ours = kernel_regression_scores(J[0], K_inv, J[1], ridge=0.5, **options)
        parts = [w * z / z.std(1, keepdim=True) for w, z in zip(weights, scores, strict=True)]
        assert_close(ours, sum(parts) / sum(weights), 1e-9)


def test_iterated_where_the_matrix_is_too_large(train, query, K_inv):
    """The same, and the error within what the docstring says."""
    J = [
        [ExampleGradientLinearOperator(r, measurement=m) for m in (SignedPrediction(), "loss")]
        for r in (query, train)
    ]

    def solved(**options):
        return kernel_regression_scores(
            [J[0]], K_inv, [J[1]], ridge=0.3, options=KernelOptions(**options)
        )

    direct, below = solved(), {"largest_gram": N - 1}
    assert_close(solved(tolerance=1e-12, **below), direct, 1e-9)
    inverse = to_dense(K_inv)
    rows = [[J.rows() for J in some] for some in J]
    cross = sum(q @ inverse @ n.T for q, n in zip(*rows, strict=True))
    kappa = sum((n @ inverse @ n.T).diagonal().mean() for n in rows[1])
    for tolerance in (0.3, 0.01):
        error = (solved(tolerance=tolerance, **below) - direct).norm(dim=1)
        assert (error <= tolerance * cross.norm(dim=1) / (0.3 * kappa)).all()
        assert error.max() > 1e-9 * direct.norm()
    with pytest.warns(UserWarning, match=r"ended at a relative residual of .* after 1 iterations"):
        solved(max_iter=1, **below)


def test_a_large_ridge_is_influence(operators, K_inv):
    J_query, J_train = operators
    rows = J_train.rows()
    kappa = (rows @ to_dense(K_inv) @ rows.T).diagonal().mean()
    scores = kernel_regression_scores(J_query, K_inv, J_train, ridge=1e6)
    assert_close(scores * 1e6 * kappa / N, influence_scores(J_query, K_inv, J_train), 1e-4)


@pytest.mark.parametrize("largest_gram", [N, 2])
def test_it_goes_on(operators, train, K_inv, tmp_path, largest_gram):
    """From wherever it was stopped, to the same bits."""
    J_query, J_train = operators
    options = {"options": KernelOptions(largest_gram, gradient_bytes=2000, tolerance=1e-6)}
    expected = kernel_regression_scores(J_query, K_inv, J_train, **options)
    passes = PassOptions(tmp_path / "checkpoint", 0.0)
    with stopped(type(J_train), "rows_of", at=7, every=True) as seen:
        for _ in range(100):
            with suppress(StoppedError):
                found = kernel_regression_scores(J_query, K_inv, J_train, passes=passes, **options)
                break
    assert len(seen) > 7
    assert torch.equal(found, expected)
    # what was computed for one measurement is not taken for another's
    other = ExampleGradientLinearOperator(train, measurement=SignedPrediction(0))
    again = ExampleGradientLinearOperator(train, measurement=SignedPrediction(1))
    kernel_regression_scores(J_query, K_inv, other, passes=PassOptions(tmp_path / "of_0"))
    with pytest.raises(ValueError, match="of something else"):
        kernel_regression_scores(J_query, K_inv, again, passes=PassOptions(tmp_path / "of_0"))


def test_scores_in_units_of_their_spread():
    one = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    other = torch.tensor([[30.0, 20.0, 10.0], [0.0, 0.0, 5.0]])
    found = averaged_scores([one, other])
    assert_close(found[0], (one[0] + other[0] / 10) / 2, 1e-6)
    assert_close(found[1], other[1] / other[1].std() / 2, 1e-6)
    with pytest.raises(ValueError, match="must all have one shape"):
        averaged_scores([one, other[:1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_count_as_zero(dtype):
    """Though their standard deviation is a rounding error, and they may differ by one as well."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 10_001):
        other = torch.randn(2, count, generator=generator, dtype=dtype)
        for constant in (0.0, 0.1, -3e7, 1e-20):
            equal = torch.full((2, count), constant, dtype=dtype)
            assert (averaged_scores([equal]) == 0).all()
            equal[:, ::3] *= 1 + torch.finfo(dtype).eps
            assert (averaged_scores([equal]) == 0).all()
            if count > 1:
                alone = other / other.std(1, keepdim=True)
                assert torch.equal(averaged_scores([equal, other]), alone / 2)
    small = 1 + 1e-4 * torch.tensor([[1.0, -1.0, 0.5]], dtype=dtype)  # what differs by more
    assert torch.equal(averaged_scores([small]), small / small.std(1, keepdim=True))
    undefined = torch.tensor([[torch.nan, 1.0, 2.0]], dtype=dtype)
    assert averaged_scores([undefined]).isnan().all()


def test_errors(operators, K_inv):
    J = {"G_inv": K_inv} | dict(zip(("J_query", "J_train"), operators, strict=True))
    for options, message in (
        ({"ridge": 0.0}, "`ridge` must be .*got 0.0"),
        ({"squared": [True, False]}, "`squared` must have an entry for each of the 1 functions"),
        ({"weights": [1, 2]}, "`weights` must have an entry for each of the 1 functions, got 2"),
        ({"J_query": [], "J_train": []}, "must be one each, or the same lists"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_regression_scores(**(J | options))
    with pytest.raises(ValueError, match=r"functions of \[\[3\], \[9\]\] queries"):
        kernel_regression_scores(operators, K_inv, [operators[1]] * 2)
    with pytest.raises(ValueError, match="largest_gram"):
        KernelOptions(largest_gram=0)


def test_a_kernel_that_rounding_makes_indefinite(train, query):
    """Twice the same examples, in float32, and next to no ridge."""
    model = seeded(nn.Conv2d(1, 1, 3, padding=1)).float()
    x0 = images(200, size=4, dtype=torch.float32)
    regression = NoisedRegression(type(train.objective)(model, train.objective.process), x0, 2)
    J = ExampleGradientLinearOperator(regression)
    K_inv = DiffusionKFACLinearOperator(regression).inverse(1e-6)
    with pytest.raises(ValueError, match=r"not positive definite with a ridge of 1e-12"):
        kernel_regression_scores(J, K_inv, J, ridge=1e-12)
    assert kernel_regression_scores(J, K_inv, J).isfinite().all()
