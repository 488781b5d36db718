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
    PassOptions,
    group_influence_scores,
    influence_scores,
    influence_scores_by_layer,
    self_influence_scores,
    split_half_scores,
    top_influences,
)
from curvlinops_diffusion.influence.scores import can_be_halved
from tests.cases import (
    StoppedError,
    images,
    plain_regression,
    seeded,
    stopped,
    two_convolutions,
)
from tests.comparisons import assert_close
from tests.reference import dense_ggn, example_gradients, params_of, scores, to_dense

N, Q, DAMPING = 6, 5, 1e-2
CONVERGED = {"tolerance": 1e-12, "max_iter": 500, "eps": 1e-30, "stop_updating_after": 1e-14}


@pytest.fixture(scope="module")
def model():
    return two_convolutions()


def drawn(like, x0, num_draws, seed, antithetic=False):
    return NoisedRegression(
        like.objective, x0, num_draws, seed, batch_size=4, antithetic=antithetic
    )


@pytest.fixture(scope="module")
def train(model):
    like = plain_regression(model, (1, 4, 4), count=N)
    return drawn(like, images(N, size=4), 4, 0, antithetic=True)


@pytest.fixture(scope="module")
def query(train):
    return drawn(train, images(Q, size=4) / 2, 4, 1, antithetic=True)


@pytest.fixture(scope="module")
def operators(train, query):
    K_inv = DiffusionKFACLinearOperator(train).inverse(DAMPING)
    return ExampleGradientLinearOperator(query), K_inv, ExampleGradientLinearOperator(train)


@pytest.mark.parametrize(
    ("kind", "query_block"), [(DiffusionKFACLinearOperator, 64), (DiffusionEKFACLinearOperator, 2)]
)
def test_equal_the_dense_formula(model, train, query, operators, kind, query_block):
    K, (J_query, _, J_train) = kind(train), operators
    ours = influence_scores(J_query, K.inverse(DAMPING), J_train, query_block=query_block)
    rows = [example_gradients(regression, params_of(model)) for regression in (query, train)]
    assert_close(ours, scores(rows[0], to_dense(K), DAMPING, rows[1]), 1e-10)


def test_operators_of_any_kind(model, train, query, operators):
    """As an operator; the exact GGN's damped inverse; Jacobians that are only operators."""
    J_query, K_inv, J_train = operators
    tau, expected = (1 / N) * (J_query @ K_inv @ J_train.adjoint()), influence_scores(*operators)
    assert_close(to_dense(tau), expected, 1e-10)
    group = torch.tensor([1.0, 0, 1, 1, 0, 0]).double()
    assert_close(tau @ group, expected[:, [0, 2, 3]].sum(1), 1e-10)
    assert_close(influence_scores(1.0 * J_query, K_inv, 1.0 * J_train), expected, 1e-10)

    G = DiffusionGGNLinearOperator(train)
    G_inv = CGInverseLinearOperator(G + DAMPING * K_inv.power(0.0), **CONVERGED)
    params = params_of(model)
    rows = [example_gradients(regression, params) for regression in (query, train)]
    truth = scores(rows[0], dense_ggn(train, params), DAMPING, rows[1])
    assert_close(influence_scores(J_query, G_inv, J_train), truth, 1e-8)


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


def test_bad_input(train, query, operators):
    """Of two layers of one shape the names are compared, since shapes do not tell them apart."""
    _, K_inv, J_train = operators
    some = ExampleGradientLinearOperator(query, ["layers.0.weight", "layers.0.bias"])
    with pytest.raises(ValueError, match=r"different parameters \(J_query: 2 .*G_inv: 4"):
        influence_scores(some, K_inv, J_train)
    twins = plain_regression(seeded(nn.Linear(3, 3), nn.Linear(3, 3)), (3,))
    names = ["layers.0.weight", "layers.1.weight"]
    inverse = DiffusionKFACLinearOperator(twins, names).inverse(DAMPING)
    one, other = (ExampleGradientLinearOperator(twins, order) for order in (names[::-1], names))
    with pytest.raises(ValueError, match="The operators act on different parameters"):
        influence_scores(one, inverse, other)
    with pytest.raises(ValueError, match="query_block"):
        influence_scores(*operators, query_block=0)
    with pytest.raises(ValueError, match="must be another seed than that of J_train's own draws"):
        self_influence_scores(K_inv, J_train, self_seed=train.draws.seed)
    for groups in (torch.zeros(5, dtype=torch.long), torch.zeros(6), torch.zeros(5, 2)):
        with pytest.raises(ValueError, match=r"`groups` must be the number of each example's gr"):
            group_influence_scores(*operators, groups)


@pytest.mark.parametrize("k", [3, 50])
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
    _, K_inv, J_train = operators
    scores_QN = influence_scores(*operators)
    labels = torch.tensor([0, 2, -1, 2, 0, 0])
    expected = torch.stack([scores_QN[:, labels == k].sum(1) for k in range(3)], 1)
    assert_close(group_influence_scores(*operators, labels), expected, 1e-10)
    weights = torch.rand(N, 2, generator=torch.Generator().manual_seed(0))
    groups = group_influence_scores(*operators, weights)
    assert_close(groups, scores_QN @ weights.double(), 1e-10)
    rows = example_gradients(train, params_of(model))
    own = self_influence_scores(K_inv, J_train)
    assert_close(own, (rows * (K_inv @ rows.T).T).sum(1) / N, 1e-10)


def test_self_influence_of_other_draws(model, train, operators):
    """The products of gradients of two sets of draws."""
    _, K_inv, J_train = operators
    own = self_influence_scores(K_inv, J_train, self_seed=9)
    params = params_of(model)
    rows, again = (example_gradients(r, params) for r in (train, train.with_seed(9)))
    assert_close(own, (rows * (K_inv @ again.T).T).sum(1) / N, 1e-10)


def test_by_layer(model, operators):
    """Each part by dense algebra on its coordinates; a choice of parts of one's own."""
    J_query, G_inv, J_train = operators
    parts = influence_scores_by_layer(*operators, query_block=2)
    assert list(parts) == ["layers.0", "layers.2"]
    dense, start = to_dense(G_inv), 0
    rows = [example_gradients(J.regression, params_of(model)) for J in (J_query, J_train)]
    for layer, found in parts.items():
        size = sum(p.numel() for name, p in model.named_parameters() if name.startswith(layer))
        own = slice(start, start + size)
        expected = rows[0][:, own] @ dense[own, own] @ rows[1][:, own].T / N
        assert_close(found, expected, 1e-9)
        start += size
    total, names = influence_scores(*operators), J_train.param_names
    assert_close(sum(parts.values()), total, 1e-10)
    chosen = {kind: [n for n in names if n.endswith(kind)] for kind in ("bias", "weight")}
    found = influence_scores_by_layer(*operators, {"nothing": [], **chosen})
    assert not found.pop("nothing").any()
    assert_close(sum(found.values()), total, 1e-10)
    for wrong, named in (
        ({"w": chosen["weight"]}, "bias"),
        ({**chosen, "again": chosen["weight"]}, "weight"),
    ):
        with pytest.raises(ValueError, match=rf"hold each of the 4 parameters once, .*{named}"):
            influence_scores_by_layer(*operators, wrong)


def test_all_draws_and_either_half(operators):
    J_query, G_inv, J_train = operators
    found = split_half_scores(*operators, query_block=2)
    assert_close(found.scores, influence_scores(*operators), 1e-10)
    for number, half in enumerate((found.first, found.second)):
        own = [J.on(J.regression.divided(number, 2)) for J in (J_query, J_train)]
        assert_close(half, influence_scores(own[0], G_inv, own[1]), 1e-10)


def test_an_odd_number_of_pairs_cannot_be_halved(train, operators):
    for num_draws, antithetic, can in ((4, True, True), (6, True, False), (3, False, False)):
        J = ExampleGradientLinearOperator(drawn(train, images(3, size=4), num_draws, 0, antithetic))
        assert can_be_halved(J.regression) == can
    with pytest.raises(ValueError, match="must be a multiple of 2 to be divided into 2"):
        split_half_scores(J, operators[1], J)


@pytest.mark.parametrize("score", [influence_scores_by_layer, split_half_scores])
def test_it_goes_on(operators, tmp_path, score):
    """From a checkpoint in the middle, to the same bits, without the queries' gradients again."""
    expected = score(*operators)
    passes = PassOptions(tmp_path / "checkpoint", 0.0)
    # after two batches of queries, in the second and last of the training examples
    halves = 2 if score is split_half_scores else 1
    with stopped(type(operators[2]), "rows_of", at=halves * (2 + 1) + 1) as calls:
        with pytest.raises(StoppedError):
            score(*operators, passes=passes)
        found = score(*operators, passes=passes)
    assert len(calls) == halves * (2 + 2) + 1
    found, expected = (z if isinstance(z, dict) else vars(z) for z in (found, expected))
    assert all(torch.equal(part, expected[name]) for name, part in found.items())
