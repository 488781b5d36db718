"""Influence scores: dense formula, operator form, and the truth of their sign and scale."""

import pytest
import torch
from curvlinops import CGInverseLinearOperator
from torch import nn

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    group_influence_scores,
    influence_scores,
    self_influence_scores,
    top_influences,
)
from tests.cases import images, plain_regression, seeded, two_convolutions
from tests.comparisons import assert_close
from tests.reference import dense_ggn, example_gradients, params_of, scores, to_dense

DAMPING = 1e-2
CONVERGED = {"tolerance": 1e-12, "max_iter": 500, "eps": 1e-30, "stop_updating_after": 1e-14}


@pytest.fixture(scope="module")
def model():
    return two_convolutions()


@pytest.fixture(scope="module")
def train(model):
    return plain_regression(model, (1, 4, 4), count=6, batch_size=4)


@pytest.fixture(scope="module")
def query(train):
    x0 = images(5, size=4)
    return NoisedRegression(train.objective, x0, num_draws=2, seed=1, batch_size=2)


@pytest.mark.parametrize("query_block", [1, 2, 64])
@pytest.mark.parametrize("kind", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_equal_the_dense_formula(model, train, query, kind, query_block):
    K = kind(train)
    J_query = ExampleGradientLinearOperator(query)
    J_train = ExampleGradientLinearOperator(train)
    ours = influence_scores(J_query, K.inverse(DAMPING), J_train, query_block=query_block)
    params = params_of(model)
    truth = scores(
        example_gradients(query, params), to_dense(K), DAMPING, example_gradients(train, params)
    )
    assert_close(ours, truth, 1e-10)


def test_operator_form(train, query):
    """``1/N J_query @ G_inv @ J_trainᵀ``, for single examples and for groups of them."""
    K_inv = DiffusionKFACLinearOperator(train).inverse(DAMPING)
    J_query = ExampleGradientLinearOperator(query)
    J_train = ExampleGradientLinearOperator(train)
    tau = (1 / 6) * (J_query @ K_inv @ J_train.adjoint())
    dense = influence_scores(J_query, K_inv, J_train)
    assert_close(to_dense(tau), dense, 1e-10)
    group = torch.tensor([1.0, 0, 1, 1, 0, 0]).double()
    assert_close(tau @ group, dense[:, [0, 2, 3]].sum(1), 1e-10)


def test_any_inverse_and_any_jacobian_will_do(model, train, query):
    """The exact GGN's damped inverse by conjugate gradients; Jacobians that are only operators."""
    G = DiffusionGGNLinearOperator(train)
    identity = DiffusionKFACLinearOperator(train).power(0.0)
    G_inv = CGInverseLinearOperator(G + DAMPING * identity, **CONVERGED)
    J_query = ExampleGradientLinearOperator(query)
    J_train = ExampleGradientLinearOperator(train)
    params = params_of(model)
    truth = scores(
        example_gradients(query, params),
        dense_ggn(train, params),
        DAMPING,
        example_gradients(train, params),
    )
    assert_close(influence_scores(J_query, G_inv, J_train), truth, 1e-8)
    assert_close(influence_scores(1.0 * J_query, G_inv, 1.0 * J_train), truth, 1e-8)


def test_sign_and_scale_are_those_of_leaving_an_example_out():
    """A linear model's parameters without an example are known exactly: no training, no sampling.

    The first-order prediction is right up to the leverage of the example; with 200 examples the
    largest is about 2 %. A wrong sign, a missing 1/N, or a factor of two would be far off.
    """
    N = 200
    linear = seeded(nn.Linear(2, 2))
    regression = plain_regression(linear, (2,), count=N, num_draws=4, batch_size=50)
    design, targets, weights, owner = [], [], [], []
    for batch in regression.batches():
        design.append(torch.cat([batch.x_t, torch.ones(len(batch.x_t), 1).double()], 1))
        targets.append(batch.target_BD)
        weights.append(batch.weight_B)
        owner += list(batch.indices)
    X, Y, w, owner = torch.cat(design), torch.cat(targets), torch.cat(weights), torch.tensor(owner)

    def optimum(keep):
        Xw = X[keep] * w[keep].unsqueeze(1)
        return torch.linalg.solve(Xw.T @ X[keep], Xw.T @ Y[keep]).T  # [2, 3]

    def put(theta):
        linear.layers[0].weight.data, linear.layers[0].bias.data = theta[:, :2], theta[:, 2]

    query = NoisedRegression(
        regression.objective, images(4, size=1)[:, 0, :, :].expand(4, 1, 2)[:, 0], 3, 1
    )
    put(optimum(torch.ones(len(owner), dtype=bool)))
    G = DiffusionGGNLinearOperator(regression)
    J_query = ExampleGradientLinearOperator(query)
    J_train = ExampleGradientLinearOperator(regression)
    inverse = CGInverseLinearOperator(G, **CONVERGED)
    predicted = influence_scores(J_query, inverse, J_train)

    before = J_query.values()
    actual = []
    for n in range(N):
        put(optimum(owner != n))
        actual.append(J_query.values() - before)
    actual = torch.stack(actual, 1)
    slope = (predicted * actual).sum() / actual.square().sum()
    correlation = torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1]
    assert abs(slope - 1) < 0.04
    assert correlation > 0.995


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def test_different_parameters_are_refused(train, query):
    K_inv = DiffusionKFACLinearOperator(train).inverse(DAMPING)
    some = ["layers.0.weight", "layers.0.bias"]
    with pytest.raises(ValueError, match=r"different parameters \(J_query: 2 .*G_inv: 4"):
        influence_scores(
            ExampleGradientLinearOperator(query, some), K_inv, ExampleGradientLinearOperator(train)
        )


def test_the_same_shapes_in_another_order_are_refused(train, query):
    """Shapes alone would not tell two layers of one shape apart."""
    twins = seeded(nn.Linear(3, 3), nn.Linear(3, 3))
    regression = plain_regression(twins, (3,))
    first, second = ["layers.0.weight", "layers.1.weight"], ["layers.1.weight", "layers.0.weight"]
    K_inv = DiffusionKFACLinearOperator(regression, first).inverse(DAMPING)
    with pytest.raises(ValueError, match="The operators act on different parameters"):
        influence_scores(
            ExampleGradientLinearOperator(regression, second),
            K_inv,
            ExampleGradientLinearOperator(regression, first),
        )


def test_bad_block(train, query):
    J = ExampleGradientLinearOperator(train)
    with pytest.raises(
        ValueError, match="`query_block` must be a whole number of at least 1, got 0"
    ):
        influence_scores(J, DiffusionKFACLinearOperator(train).inverse(1.0), J, query_block=0)


# ---------------------------------------------------------------------------------------------
# Without all pairs
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operators(train, query):
    K_inv = DiffusionKFACLinearOperator(train).inverse(DAMPING)
    return ExampleGradientLinearOperator(query), K_inv, ExampleGradientLinearOperator(train)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_influences(operators, k):
    scores_QN = influence_scores(*operators)
    top = top_influences(*operators, k=k, query_block=2)
    order = {
        "positive": scores_QN.argsort(1, descending=True),
        "negative": scores_QN.argsort(1),
        "neutral": scores_QN.abs().argsort(1),
    }
    for name, expected in order.items():
        found = getattr(top, name)
        assert torch.equal(found.indices, expected[:, :k])
        assert_close(found.scores, scores_QN.gather(1, expected[:, :k]), 1e-12)


def test_groups_and_self(model, train, operators):
    J_query, K_inv, J_train = operators
    params = params_of(model)
    rows = example_gradients(train, params)
    labels = torch.tensor([0, 2, -1, 2, 0, 0])
    groups = group_influence_scores(J_query, K_inv, J_train, labels)
    own = self_influence_scores(K_inv, J_train)
    scores_QN = influence_scores(J_query, K_inv, J_train)
    expected = torch.stack([scores_QN[:, labels == k].sum(1) for k in range(3)], 1)
    assert_close(groups, expected, 1e-10)
    assert_close(own, (rows * (K_inv @ rows.T).T).sum(1) / 6, 1e-10)

    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    groups = group_influence_scores(J_query, K_inv, J_train, weights)
    assert_close(groups, scores_QN @ weights.double(), 1e-10)


def test_self_influence_of_other_draws(model, train, operators):
    """Without bias: on average what mean gradients give; those of the same draws give more."""
    _, K_inv, J_train = operators
    own = self_influence_scores(K_inv, J_train, self_seed=9)
    params = params_of(model)
    rows, again = (example_gradients(r, params) for r in (train, train.with_seed(9)))
    assert_close(own, (rows * (K_inv @ again.T).T).sum(1) / 6, 1e-10)

    many = train.with_seed(12345).with_draws(1024)  # biased by 0.002 of the truth
    mean = ExampleGradientLinearOperator(many).rows()
    truth = (mean * (K_inv @ mean.T).T).sum() / 6

    def over_seeds(count, several, other):
        """Self-influence, of the same draws or of other ones."""
        found = []
        for seed in range(0, 2 * count, 2):
            J = ExampleGradientLinearOperator(several.with_seed(seed))
            self_seed = seed + 1 if other else None
            found.append(self_influence_scores(K_inv, J, self_seed=self_seed).sum())
        return torch.stack(found)

    independent = over_seeds(40, train.with_draws(16), other=True)
    error = independent.std() / len(independent) ** 0.5
    assert abs(independent.mean() - truth) < 3 * error < 0.03 * truth
    assert over_seeds(20, train, other=False).mean() - truth > 0.3 * truth


def test_the_same_seed_twice(operators, train):
    with pytest.raises(ValueError, match=r"self_seed=0 is the seed of J_train's own draws"):
        self_influence_scores(*operators[1:], self_seed=train.draws.seed)


def test_bad_groups(operators):
    for groups in (torch.zeros(5, dtype=torch.long), torch.zeros(6), torch.zeros(5, 2)):
        with pytest.raises(ValueError, match=r"groups arrived with shape .* Pass the number"):
            group_influence_scores(*operators, groups)
