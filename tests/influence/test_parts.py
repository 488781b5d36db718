"""Influence by layer, of regions and of conditions: parts that add up."""

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    influence_scores,
    influence_scores_by_layer,
)
from tests.cases import (
    StoppedError,
    images,
    plain_regression,
    stopped,
    tiny_unet,
    two_convolutions,
    unet_regression,
)
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of, to_dense

N, Q, DAMPING = 7, 3, 1e-2


@pytest.fixture(scope="module")
def problem():
    model = two_convolutions()
    train = plain_regression(model, (1, 4, 4), count=N, batch_size=3)
    query = NoisedRegression(train.objective, images(Q, size=4), num_draws=6, seed=1)
    J = [ExampleGradientLinearOperator(r) for r in (query, train)]
    return J[0], DiffusionKFACLinearOperator(train).inverse(DAMPING), J[1]


@pytest.mark.parametrize("query_block", [2, 64])
def test_by_layer(problem, query_block):
    """Each part by dense algebra on its coordinates; a choice of parts of one's own."""
    J_query, G_inv, J_train = problem
    parts = influence_scores_by_layer(*problem, query_block=query_block)
    dense = to_dense(G_inv)
    rows = [example_gradients(J.regression, params_of_(J)) for J in (J_query, J_train)]
    start = 0
    for layer in ("layers.0", "layers.2"):
        size = sum(p.numel() for n, p in named(J_train) if n.startswith(layer))
        own = slice(start, start + size)
        expected = rows[0][:, own] @ dense[own, own] @ rows[1][:, own].T / N
        assert_close(parts[layer], expected, 1e-9)
        start += size
    assert list(parts) == ["layers.0", "layers.2"]
    assert_close(sum(parts.values()), influence_scores(*problem), 1e-10)
    names = J_train.param_names
    chosen = {"biases": [n for n in names if "bias" in n], "w": [n for n in names if "weight" in n]}
    two = influence_scores_by_layer(*problem, chosen)
    assert_close(two["biases"] + two["w"], influence_scores(*problem), 1e-10)
    with pytest.raises(ValueError, match=r"do not hold each of the 4 parameters once: .*bias"):
        influence_scores_by_layer(*problem, {"w": chosen["w"]})
    with pytest.raises(ValueError, match=r"once: .*weight"):
        influence_scores_by_layer(*problem, {**chosen, "again": chosen["w"]})


def named(J):
    return list(J.regression.objective.model.named_parameters())


def params_of_(J):
    return params_of(J.regression.objective.model)


def test_they_go_on(problem, tmp_path):
    """From a checkpoint in the middle, to the same bits."""
    expected = influence_scores_by_layer(*problem)
    passes = PassOptions(tmp_path / "checkpoint", 0.0)
    # after one batch of queries, in the last of three
    with stopped(type(problem[2]), "rows_of", at=1 + 3) as calls:
        with pytest.raises(StoppedError):
            influence_scores_by_layer(*problem, passes=passes)
        found = influence_scores_by_layer(*problem, passes=passes)
    assert len(calls) == 4 + 1  # the queries' gradients are read
    assert all(torch.equal(part, expected[layer]) for layer, part in found.items())


def test_a_concept():
    """The difference between two conditions at the same draws: an operator's difference."""
    train = unet_regression(tiny_unet(), count=5)
    x0 = images(2)
    queries = [
        NoisedRegression(
            train.objective, {"x0": x0, "class_labels": torch.full((2,), label)}, 4, seed=1
        )
        for label in (0, 2)
    ]
    J_of, J_other = (ExampleGradientLinearOperator(r) for r in queries)
    J_train = ExampleGradientLinearOperator(train)
    K_inv = DiffusionKFACLinearOperator(train).inverse(1e-3)
    scores = influence_scores(J_of - J_other, K_inv, J_train)
    rows = J_of.rows() - J_other.rows()
    assert rows.norm() > 1e-3 * J_of.rows().norm()
    assert_close(scores, rows @ (K_inv @ J_train.rows().T) / 5, 1e-8)


def test_a_region(problem):
    """A query measured within a mask: regions that cover the image add up."""
    J_query, G_inv, J_train = problem
    objective = J_query.regression.objective
    mask = torch.zeros(Q, 1, 4, 4).double()
    mask[..., :2] = 1

    def of(weights):
        data = {"x0": images(Q, size=4), "region": weights}
        query = NoisedRegression(objective, data, num_draws=6, seed=1, loss_mask="region")
        return influence_scores(ExampleGradientLinearOperator(query), G_inv, J_train)

    assert_close(of(mask) + of(1 - mask), influence_scores(*problem), 1e-10)
