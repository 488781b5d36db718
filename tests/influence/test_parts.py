"""Influence by layer, by band of noise levels, of regions and of conditions: parts that add up."""

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleFunction,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    influence_scores,
    influence_scores_by_band,
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


def test_by_band(problem):
    """Those of a measurement that is the loss in the band, and zero elsewhere."""
    J_query, G_inv, J_train = problem
    T = J_query.regression.objective.process.num_levels
    bands = [(0, T // 3), (T // 3, T // 2), (T // 2, T)]
    parts = influence_scores_by_band(*problem, bands, query_block=4)
    assert parts.shape == (3, Q, N)
    assert_close(parts.sum(0), influence_scores(*problem), 1e-10)
    for part, (low, high) in zip(parts, bands, strict=True):

        def within(batch, f, b, low=low, high=high):
            loss = batch.weight_B[b] * ((f[b] - batch.target_BD[b]) ** 2).sum()
            return loss * float(low <= batch.level_B[b] < high)

        rows_Q = example_gradients(J_query.regression, params_of_(J_query), within)
        expected = rows_Q @ to_dense(G_inv) @ J_train.rows().T / N
        assert_close(part, expected, 1e-9)
    for wrong in ([], [(3, 3)], [(0, T + 1)]):
        with pytest.raises(ValueError, match="Pass pairs"):
            influence_scores_by_band(*problem, wrong)
    function = ExampleFunction(lambda model, example, draws: model.layers[0].weight.sum())
    J = ExampleGradientLinearOperator(J_query.regression, measurement=function)
    with pytest.raises(ValueError, match="is no average over draws"):
        influence_scores_by_band(J, G_inv, J_train, bands)


def test_they_go_on(problem, tmp_path):
    """From a checkpoint in the middle, to the same bits."""

    J_train = problem[2]
    for number, of in enumerate(
        (influence_scores_by_layer, lambda *o, **k: influence_scores_by_band(*o, [(0, 9)], **k))
    ):
        expected = of(*problem)
        passes = PassOptions(tmp_path / str(number), 0.0)
        # after one batch of queries, in the last of three
        with stopped(type(J_train), "rows_of", at=1 + 3) as calls:
            with pytest.raises(StoppedError):
                of(*problem, passes=passes)
            found = of(*problem, passes=passes)
        assert len(calls) == 4 + 1  # the queries' gradients are read
        pairs = [(found, expected)] if number else zip(*(d.values() for d in (found, expected)),
                                                         strict=True)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in pairs)


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
