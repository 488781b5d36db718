"""The linear data-modelling score: against SciPy, of known truth, resampled; and removals."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from curvlinops_diffusion import (
    RetrainingPlan,
    linear_datamodelling_score,
    removal_effects,
)
from curvlinops_diffusion.influence.validation.judgements import agreement_of_seeds
from tests.comparisons import assert_close

N, Q, M = 20, 4, 30


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def plan():
    return RetrainingPlan.random_subsets(N, M, seed=3)


def retrained(plan, noise=1.0, seeds=None):
    """Values of networks that are linear in the data, and the truth of that."""
    truth = draws(Q, N, seed=1)
    shape = (M, Q) if seeds is None else (seeds, M, Q)
    return truth, plan.left_out.double() @ truth.T + noise * draws(*shape, seed=2)


@pytest.mark.parametrize("rounded", [False, True])  # whole numbers have ties
def test_spearmans_correlation(plan, rounded):
    scores, measured = draws(Q, N), draws(M, Q, seed=1)
    if rounded:
        scores, measured = scores.round(), measured.round()
    found = linear_datamodelling_score(scores, plan.left_out, measured)
    predicted = scores @ plan.left_out.double().T
    expected = [spearmanr(p, m).statistic for p, m in zip(predicted, measured.T, strict=True)]
    assert_close(found.per_query, torch.tensor(expected), 1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.agreement is None


def test_the_truth_scores_one_and_its_negative_minus_one(plan):
    truth, measured = retrained(plan, noise=0.0)
    assert linear_datamodelling_score(truth, plan.left_out, measured).mean == pytest.approx(1)
    assert linear_datamodelling_score(-truth, plan.left_out, measured).mean == pytest.approx(-1)


def test_resamples_are_of_parts_and_queries(plan):
    """Each by hand: parts drawn with replacement, ranked anew; and then queries."""
    truth, measured = retrained(plan)
    found = linear_datamodelling_score(truth, plan.left_out, measured, bootstrap=20, seed=4)
    predicted = truth @ plan.left_out.double().T
    drawn = [
        torch.randint(number, (20, number), generator=torch.Generator().manual_seed(seed))
        for number, seed in ((M, 8), (Q, 9))
    ]
    for k in range(20):
        parts, queries = drawn[0][k], drawn[1][k]
        each = [
            np.corrcoef(rankdata(predicted[q, parts]), rankdata(measured[parts, q]))[0, 1]
            for q in queries
        ]
        assert found.resampled[k] == pytest.approx(np.mean(each), abs=1e-10)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """95 % of intervals of other retrained networks hold the score of very many of them."""
    truth = draws(Q, N, seed=1)
    scores = truth + draws(Q, N, seed=2)

    def score(parts, seed, **options):
        plan = RetrainingPlan.random_subsets(N, parts, seed=seed)
        measured = plan.left_out.double() @ truth.T + draws(parts, Q, seed=seed)
        return linear_datamodelling_score(scores, plan.left_out, measured, **options)

    # the queries are the same: the interval, which is of other queries too, is a little wide
    exact = score(4000, 99, bootstrap=1).mean
    inside = [
        low <= exact <= high
        for low, high in (score(M, seed, bootstrap=200).interval for seed in range(200))
    ]
    assert 0.9 < np.mean(inside) <= 1.0


def test_differences_are_paired(plan):
    truth, measured = retrained(plan)
    better, worse = (
        linear_datamodelling_score(truth + noise * draws(Q, N, seed=7), plan.left_out, measured)
        for noise in (0.3, 0.6)
    )
    difference, (low, high) = better.minus(worse)
    assert difference == pytest.approx(better.mean - worse.mean)
    assert low < difference < high
    assert high - low < (better.interval[1] - better.interval[0])
    assert better.minus(better) == (0.0, (0.0, 0.0))
    fewer = linear_datamodelling_score(truth, plan.left_out, measured, bootstrap=10)
    with pytest.raises(ValueError, match="Judge both by the same"):
        better.minus(fewer)


def test_the_ceiling_is_what_the_expectation_scores():
    """Of very many parts, so that a wrong reliability would be seen."""
    plan = RetrainingPlan.random_subsets(N, 3000)
    truth = draws(Q, N, seed=1)
    expected = plan.left_out.double() @ truth.T
    for seeds in (2, 4):
        measured = expected + 3.0 * draws(seeds, 3000, Q, seed=2)
        found = linear_datamodelling_score(truth, plan.left_out, measured, bootstrap=1)
        assert found.agreement == pytest.approx(agreement_of_seeds(measured))
        assert found.ceiling == pytest.approx(found.mean, rel=0.03)


def test_few_parts():
    """Some resamples are of one part alone, over which nothing correlates."""
    left_out = torch.eye(3, dtype=torch.bool)
    found = linear_datamodelling_score(draws(2, 3), left_out, draws(3, 2, seed=1))
    assert 0 < found.resampled.isnan().sum() < 200
    assert torch.tensor(found.interval).isfinite().all()
    with pytest.raises(ValueError, match="2 parts arrived"):
        linear_datamodelling_score(draws(2, 3), left_out[:2], draws(2, 2))


def test_errors(plan):
    scores, measured = draws(Q, N), draws(M, Q)
    for bad in (
        {"scores": scores.T},
        {"measured": measured.T},
        {"left_out": plan.left_out.double()},
        {"left_out": plan.left_out[:-1]},
    ):
        arguments = {"scores": scores, "left_out": plan.left_out, "measured": measured} | bad
        with pytest.raises(ValueError, match=r"Pass scores \[queries, examples\]"):
            linear_datamodelling_score(**arguments)
    scores[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores arrived with 1 entries that are not finite"):
        linear_datamodelling_score(scores, plan.left_out, measured)


def test_removals():
    """Of networks whose loss rises by what was left out."""
    truth = draws(Q, N, seed=1).abs()
    plan = RetrainingPlan.removals(truth, [2, 5], method="K-FAC_influence", num_controls=3)
    assert len(plan.parts) == 1 + 2 * (3 + Q)
    measured = 10.0 + plan.left_out.double() @ truth.T
    effects = removal_effects(plan.parts, torch.stack([measured, measured]), "K-FAC_influence")
    for k, effect in effects.items():
        helpful = truth.topk(k).values.sum(1) / 10
        assert effect.change == pytest.approx(float(helpful.mean()))
        assert effect.error == pytest.approx(float(helpful.std() / Q**0.5))
        random = plan.left_out[[p.startswith("random") and p.endswith(str(k)) for p in plan.parts]]
        assert effect.control == pytest.approx(float((random.double() @ truth.T / 10).mean()))
        assert effect.control < effect.change
    with pytest.raises(ValueError, match="are no removals by 'other'"):
        removal_effects(plan.parts, measured, "other")
    with pytest.raises(ValueError, match="sizes=\\[20\\] arrived"):
        RetrainingPlan.removals(truth, [N])
