"""The linear data-modelling score: against SciPy, of known truth, resampled; and removals."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from scipy.stats import t as student

from curvlinops_diffusion.influence.validation.judgements import agreement_of_seeds
from curvlinops_diffusion.validation import (
    RetrainingPlan,
    linear_datamodelling_score,
    removal_effects,
)
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


def pseudovalues(predicted, measured):
    """By SciPy, with each part taken out in turn, ``[M, Q]``."""

    def rho(x, y):
        return spearmanr(x, y).statistic

    return np.array(
        [
            [
                M * rho(x, y) - (M - 1) * rho(np.delete(x, m), np.delete(y, m))
                for x, y in zip(predicted.numpy(), measured.numpy(), strict=True)
            ]
            for m in range(M)
        ]
    )


def variance_of_crossed_mean(table):
    """Of the two-way analysis of variance, written out."""
    rows, columns = table.mean(1), table.mean(0)
    rest = table - rows[:, None] - columns + table.mean()
    of_rows, of_columns = rows.var(ddof=1) / len(rows), columns.var(ddof=1) / len(columns)
    of_cells = (rest**2).sum() / (len(rows) - 1) / (len(columns) - 1) / rest.size
    return of_rows + of_columns - min(of_cells, max(of_rows, of_columns))


@pytest.mark.parametrize("rounded", [False, True])
def test_the_interval_has_the_variance_of_parts_and_queries(plan, rounded):
    """Of SciPy's correlations without each part, the noise of cells counted once."""
    truth, measured = retrained(plan)
    if rounded:  # ties
        truth, measured = truth.round(), measured.round()
    predicted = truth @ plan.left_out.double().T
    found = linear_datamodelling_score(truth, plan.left_out, measured, bootstrap=4000)
    table = pseudovalues(predicted, measured.T)
    assert float(found.resampled.mean()) == pytest.approx(table.mean(), abs=0.01)
    # four queries: Student's distribution has at least three degrees of freedom
    spread, least = float(found.resampled.std()), variance_of_crossed_mean(table) ** 0.5
    assert 0.98 * least < spread < 1.02 * least * student.ppf(0.975, 3) / 1.96
    low, high = found.interval
    assert low <= found.mean <= high <= 1
    again = linear_datamodelling_score(truth, plan.left_out, measured, bootstrap=4000)
    assert again.interval == found.interval


def simulated(queries, parts, seed, shared=0.0, seeds=1):
    """Two methods' scores, and values, of new queries and parts; and the parts.

    Queries share effects of examples, and of networks, of which there are several for each part.
    """
    of_all = torch.Generator().manual_seed(5)
    common, misled = torch.randn(2, 50, generator=of_all).double()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    truth = normal(queries, 50) + shared * common
    wrong = normal(queries, 50) + shared * misled
    left_out = RetrainingPlan.random_subsets(50, parts, seed=seed).left_out
    noise = normal(seeds, parts, queries) + shared * normal(seeds, parts, 1)
    values = left_out.double() @ truth.T + (50 / 4) ** 0.5 * noise
    return (truth + wrong, truth + 1.3 * wrong), left_out, values


def coverage(queries, parts, repeats, **how):
    """How often intervals of score and difference hold those of very many parts and queries.

    The shares; and the mean widths, in units of what would hold 95 % of estimates.
    """
    exact = []
    for number in range(4):
        both, left_out, values = simulated(300, 1000, 10**6 + number, **how)
        found = [linear_datamodelling_score(z, left_out, values) for z in both]
        exact.append([found[0].mean, found[0].mean - found[1].mean])
    exact = np.mean(exact, 0)
    estimates, ends = [], []
    for seed in range(repeats):
        both, left_out, values = simulated(queries, parts, seed, **how)
        one, other = (linear_datamodelling_score(z, left_out, values, bootstrap=400) for z in both)
        difference, interval = one.minus(other)
        estimates.append([one.mean, difference])
        ends.append([one.interval, interval])
    low, high = np.moveaxis(np.array(ends), -1, 0)
    widths = (high - low).mean(0) / (2 * 1.96 * np.std(estimates, 0))
    return ((low <= exact) & (exact <= high)).mean(0), widths


def test_the_interval_is_as_wide_as_it_should_be():
    """Not 1.3 times as wide: a resampling of parts and queries together is 1.5 times here."""
    shares, widths = coverage(24, 48, 100)
    assert (shares >= 0.9).all()
    assert (widths > 0.85).all()
    assert (widths < 1.22).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "parts", "how"),
    [
        (16, 64, {}),
        (8, 32, {}),
        (8, 128, {"seeds": 2}),
        (64, 32, {"shared": 1.0}),
        (64, 64, {"shared": 1.0, "seeds": 2}),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(queries, parts, how):
    """Of 95 %, for the score and for the difference, whatever parts and queries share."""
    shares, _ = coverage(queries, parts, 1000, **how)
    assert (shares >= 0.92).all()  # 0.93 to 0.97, and the error of a thousand
    assert (shares <= 0.98).all()


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
    with pytest.raises(ValueError, match="compared on the same measurements"):
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


def test_constant_scores_of_a_query_are_left_out(plan):
    """Whatever the number: sums of it over parts differ by rounding alone."""
    truth, measured = retrained(plan)
    others = [q for q in range(Q) if q != 1]
    expected = linear_datamodelling_score(truth[others], plan.left_out, measured[:, others])
    for constant in (0.0, 0.1, -1e-7, 3e5 + 0.1):
        scores = truth.clone()
        scores[1] = constant
        found = linear_datamodelling_score(scores, plan.left_out, measured)
        assert found.per_query.isnan().tolist() == [False, True, False, False]
        assert found.mean == expected.mean
        assert found.interval == expected.interval
        worse = linear_datamodelling_score(-truth, plan.left_out, measured)
        difference, (low, high) = found.minus(worse)
        assert difference == pytest.approx(2 * expected.mean)
        assert low <= difference <= high


def test_sums_that_differ_by_rounding_are_ties():
    """Tenths, of which 0.1 + 0.2 is not 0.3, as ten times them."""
    plan = RetrainingPlan.random_subsets(60, M, seed=1)
    whole = (3 * draws(Q, 60)).round()
    measured = draws(M, Q, seed=1)
    exact, found = (
        linear_datamodelling_score(z, plan.left_out, measured) for z in (whole, whole / 10)
    )
    assert torch.equal(found.per_query, exact.per_query)


def test_nothing_is_defined(plan):
    """All scores constant, or all values: NaN, and in the interval as well."""
    truth, measured = retrained(plan, seeds=2)
    for scores, values in ((torch.ones(Q, N), measured), (truth, torch.ones(2, M, Q))):
        found = linear_datamodelling_score(scores, plan.left_out, values)
        assert np.isnan([found.mean, *found.interval]).all()
        assert np.isnan([*found.minus(found)[1]]).all()
    assert np.isnan(found.agreement)
    assert np.isnan(found.ceiling)


def test_few_parts_and_queries():
    left_out = torch.eye(3, dtype=torch.bool)
    found = linear_datamodelling_score(draws(2, 3), left_out, draws(3, 2, seed=1))
    assert -1 <= found.interval[0] <= found.mean <= found.interval[1] <= 1
    # without the one part that anything is known of, the others are tied
    scores = torch.tensor([[0.0, 0.0, 1.0]])
    found = linear_datamodelling_score(scores, left_out, draws(3, 1))
    assert torch.tensor(found.interval).isfinite().all()
    with pytest.raises(ValueError, match="at least 3 parts, got 2"):
        linear_datamodelling_score(draws(2, 3), left_out[:2], draws(2, 2))


def test_one_query_speaks_of_other_parts(plan):
    truth, measured = retrained(plan)
    found = linear_datamodelling_score(truth[:1], plan.left_out, measured[:, :1], bootstrap=4000)
    predicted = truth[:1] @ plan.left_out.double().T
    error = pseudovalues(predicted, measured.T[:1]).std(ddof=1) / M**0.5
    wider = student.ppf(0.975, M - 1) / 1.96
    assert float(found.resampled.std()) == pytest.approx(wider * error, rel=0.05)


@pytest.mark.parametrize("seeds", [2, 3])
def test_seeds_that_do_not_agree_have_no_ceiling(plan, seeds):
    """At an agreement of −1 for two, and of −1/2 for three, the formula has its pole."""
    _, one = retrained(plan)
    measured = torch.stack([one, -one, torch.zeros_like(one)][:seeds])
    if seeds == 3:
        measured = one.unsqueeze(0) * torch.tensor([1.0, -1.0, 1.0]).reshape(3, 1, 1)
    found = linear_datamodelling_score(draws(Q, N), plan.left_out, measured + 1e-9 * draws(M, Q))
    assert found.agreement == pytest.approx(-1 if seeds == 2 else -1 / 3, abs=0.05)
    assert found.ceiling == 0.0
    assert agreement_of_seeds(measured) == pytest.approx(found.agreement, abs=0.05)


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
    with pytest.raises(ValueError, match="`scores` must be finite, got 1"):
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
    with pytest.raises(ValueError, match="method='random'"):
        removal_effects(plan.parts, measured, "random")
    one = removal_effects(plan.parts[:6], measured[:6], "K-FAC_influence")[2]  # of two queries
    assert one.error is not None
    (single,) = removal_effects(
        RetrainingPlan.removals(truth[:1], [2], num_controls=0).parts, measured[[0, 4], :1]
    ).values()
    assert (single.error, single.control) == (None, None)
    assert single.change == pytest.approx(float(truth[0].topk(2).values.sum()) / 10)
    with pytest.raises(ValueError, match="got 0 for query 2"):
        removal_effects(plan.parts, measured * torch.tensor([1, 1, 0, 1]), "K-FAC_influence")
    with pytest.raises(ValueError, match="must be finite"):
        removal_effects(plan.parts, measured / 0, "K-FAC_influence")
    with pytest.raises(ValueError, match="method='other'"):
        removal_effects(plan.parts, measured, "other")


@pytest.mark.parametrize("method", ["random_projection", "random_0", "random_0_2", "a_b_3_4"])
def test_controls_are_no_method_s(method):
    """Removing what it chooses doubles the loss; removing at random changes nothing."""
    plan = RetrainingPlan.removals(draws(3, N), [2, 12], method=method, num_controls=2)
    values = torch.ones(len(plan.parts), 3)
    values[
        [
            p.startswith(f"{method}_")
            and p[len(method) :].count("_") == 2
            and p not in {f"random_{c}_{k}" for c in range(2) for k in (2, 12)}
            for p in plan.parts
        ]
    ] = 2.0
    for effect in removal_effects(plan.parts, values, method).values():
        assert effect.change == 1.0
        assert effect.control == 0.0
