"""Scores of two halves of the draws: what they are, and what their agreement says."""

import pytest
import torch
from scipy.stats import spearmanr

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    influence_scores,
    split_half_scores,
)
from curvlinops_diffusion.influence.split_half import (
    can_be_halved,
    rank_correlation,
    standard_error,
    top_shared,
)
from tests.cases import StoppedError, images, plain_regression, stopped, two_convolutions
from tests.comparisons import assert_close

DAMPING = 1e-2


@pytest.fixture(scope="module")
def train():
    model = two_convolutions()
    regression = plain_regression(model, (1, 4, 4), count=12, batch_size=5)
    return redrawn(regression, images(12, size=4), 8, 0)


def redrawn(regression, x0, num_draws, seed, antithetic=True):
    return NoisedRegression(
        regression.objective, x0, num_draws, seed, batch_size=5, antithetic=antithetic
    )


@pytest.fixture(scope="module")
def parts(train):
    J_train = ExampleGradientLinearOperator(train)
    query = redrawn(train, images(3, size=4), 8, 1)
    J_query = ExampleGradientLinearOperator(query)
    return J_query, DiffusionEKFACLinearOperator(train).inverse(DAMPING), J_train


def halves_of(J):
    return [ExampleGradientLinearOperator(J.regression.divided(k, 2)) for k in range(2)]


@pytest.mark.parametrize("query_block", [2, 64])
def test_all_draws_and_either_half(parts, query_block):
    J_query, G_inv, J_train = parts
    found = split_half_scores(*parts, query_block=query_block)
    assert_close(found.scores, influence_scores(*parts), 1e-10)
    queries, train = halves_of(J_query), halves_of(J_train)
    for half, q, t in zip((found.first, found.second), queries, train, strict=True):
        assert_close(half, influence_scores(q, G_inv, t), 1e-10)
    assert found.rank_correlation().shape == (3,)


def test_agreement():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 50, generator=generator).double()
    second = first + torch.randn(4, 50, generator=generator).double()
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert_close(rank_correlation(first, second), torch.tensor(expected), 1e-12)
    by_hand = [
        len(set(a.topk(10).indices.tolist()) & set(b.topk(10).indices.tolist())) / 10
        for a, b in zip(first, second, strict=True)
    ]
    assert top_shared(first, second, 10).tolist() == pytest.approx(by_hand)
    assert top_shared(first, first, 99).tolist() == [1.0] * 4


def test_standard_error_is_that_of_the_mean_of_halves():
    """Of numbers of known spread: a 5 % wrong scale would be seen."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 20_000, generator=generator).double()
    first, second = (
        truth + 0.3 * torch.randn(1, 20_000, generator=generator).double() for _ in range(2)
    )
    error = ((first + second) / 2 - truth).square().mean().sqrt()
    assert_close(standard_error(first, second)[0], error, 0.02)


def test_halves_agree_as_two_seeds_do(train):
    """Interleaved halves share a problem's timesteps; what they say of its noise is not less."""
    G_inv = DiffusionEKFACLinearOperator(train).inverse(DAMPING)
    x0, queries = images(12, size=4), images(3, size=4)
    of_halves, of_seeds = [], []
    for seed in range(0, 80, 4):
        J = [
            ExampleGradientLinearOperator(redrawn(train, x, draws, seed + k, antithetic=False))
            for x, draws, k in ((queries, 8, 0), (x0, 8, 1))
        ]
        found = split_half_scores(J[0], G_inv, J[1])
        of_halves.append(found.standard_error())
        own = [
            influence_scores(
                ExampleGradientLinearOperator(redrawn(train, queries, 4, 1000 + seed + k, False)),
                G_inv,
                ExampleGradientLinearOperator(redrawn(train, x0, 4, 2000 + seed + k, False)),
            )
            for k in range(2)
        ]
        of_seeds.append(standard_error(*own))
    halves, seeds = (torch.stack(z).square().mean().sqrt() for z in (of_halves, of_seeds))
    assert 0.8 < halves / seeds < 1.25


def test_an_odd_number_of_pairs_cannot_be_halved(train):
    x0 = images(3, size=4)
    for num_draws, antithetic, can in ((4, True, True), (6, True, False), (3, False, False)):
        J = ExampleGradientLinearOperator(redrawn(train, x0, num_draws, 0, antithetic))
        assert can_be_halved(J.regression) == can
    with pytest.raises(ValueError, match=r"to be divided into 2 parts, got"):
        split_half_scores(J, DiffusionEKFACLinearOperator(train).inverse(DAMPING), J)


def test_it_goes_on(parts, tmp_path):
    """From a checkpoint in the middle, to the same bits."""
    expected = split_half_scores(*parts)
    passes = PassOptions(tmp_path / "checkpoint", 0.0)
    with stopped(ExampleGradientLinearOperator, "rows_of", at=7), pytest.raises(StoppedError):
        split_half_scores(*parts, passes=passes)
    found = split_half_scores(*parts, passes=passes)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.second, expected.second)
