"""Draws are pure functions of ``(seed, n, r)``, well distributed, and leave random states alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.diffusion.draws import ProbeType, make_draws
from curvlinops_diffusion.diffusion.timesteps import (
    LogitNormalTimesteps,
    StratifiedTimesteps,
    TimestepsWithin,
    UniformTimesteps,
)
from tests.cases import noise_levels, plain_regression, seeded, unet_regression

RADEMACHER, GAUSSIAN = ProbeType.RADEMACHER, ProbeType.GAUSSIAN


def draws_of(timesteps="stratified", num_draws=4, seed=0, num_levels=1000, antithetic=False):
    return make_draws(timesteps, num_draws, seed, num_levels, antithetic)


def test_pure_functions_of_seed_example_and_draw():
    draws = draws_of()
    together, shape = range(20), (2, 3)
    for r in range(3):
        for n in (19, 0, 7):
            assert torch.equal(draws.noise(together, r, shape)[n], draws.noise([n], r, shape)[0])
            assert draws.levels(together, r)[n] == draws.levels([n], r)[0]
            for kind in ProbeType:
                one = draws.probe([n], r, 2, 9, kind)[0]
                assert torch.equal(draws.probe(together, r, 2, 9, kind)[n], one)


def test_different_arguments_give_independent_numbers():
    size = 4000
    samples = [
        draws_of(seed=seed).noise([n], r, (size,))[0]
        for seed, n, r in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 0, 0)]
    ]
    draws = draws_of()
    samples += [draws.probe([0], 0, k, size, GAUSSIAN)[0] for k in range(2)]
    correlations = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    assert correlations.abs().max() < 4.5 / size**0.5


@pytest.mark.parametrize(
    "sample",
    [
        lambda d: d.noise(range(50), 1, (2, 100)),
        lambda d: d.probe(range(50), 1, 0, 200, GAUSSIAN),
        lambda d: d.probe(range(50), 1, 0, 200, RADEMACHER),
    ],
    ids=["noise", "gaussian", "rademacher"],
)
def test_moments(sample):
    """Mean zero, variance one: 10,000 numbers would show a scale that is 5 % wrong."""
    z = sample(draws_of()).flatten().double()
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    spread = z.square().std() / len(z) ** 0.5
    assert abs(z.square().mean() - 1) <= 4 * spread
    assert 4 * spread < 1.05**2 - 1  # the test has the power that it claims


def test_rademacher_entries_are_signs():
    z = draws_of().probe(range(3), 0, 0, 13, RADEMACHER)
    assert set(z.flatten().tolist()) == {-1.0, 1.0}
    assert z.shape == (3, 13)


def test_golden_values():
    """Saved operators and resumed runs rely on these numbers: they must never change silently."""
    draws = make_draws("stratified", 4, 3, 1000)
    assert draws.levels([0, 1, 5], 2).tolist() == GOLDEN_LEVELS
    noise = draws.noise([0, 5], 1, (2,)).flatten().tolist()
    assert noise == pytest.approx(GOLDEN_NOISE, abs=1e-6)
    assert draws.probe([2], 1, 1, 8, RADEMACHER)[0].tolist() == GOLDEN_SIGNS
    uniform = make_draws("uniform", 4, 3, 1000)
    assert uniform.levels([0, 1, 5], 2).tolist() == GOLDEN_UNIFORM


GOLDEN_LEVELS = [733, 638, 506]
GOLDEN_NOISE = [1.1057024, 0.0266436, 1.4271320, -0.6539341]
GOLDEN_SIGNS = [1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0]
GOLDEN_UNIFORM = [504, 677, 559]


# ---------------------------------------------------------------------------------------------
# Timesteps
# ---------------------------------------------------------------------------------------------


def test_stratified_over_the_draws_of_an_example():
    draws = draws_of(num_draws=8)
    levels = torch.stack([draws.levels(range(50), r) for r in range(8)], 1)
    strata = levels // 125
    assert torch.equal(strata, torch.arange(8).expand(50, 8))


def _discrepancy(levels, num_levels):
    """Largest gap between the levels' distribution function and the uniform one."""
    counts = torch.bincount(levels, minlength=num_levels).cumsum(0) / len(levels)
    uniform = torch.arange(1, num_levels + 1) / num_levels
    return float((counts - uniform).abs().max())


@pytest.mark.parametrize("num_draws", [1, 4])
def test_stratified_over_examples(num_draws):
    """The golden sequence has discrepancy ``O(log N / N)``; uniform draws ``O(1/√N)``."""
    N = 500
    gaps = {}
    for scheme in ("stratified", "uniform"):
        draws = draws_of(scheme, num_draws)
        levels = torch.cat([draws.levels(range(N), r) for r in range(num_draws)])
        gaps[scheme] = _discrepancy(levels, 1000)
    assert gaps["stratified"] < 3 / (N * num_draws) + 1e-3
    assert gaps["uniform"] > 5 * gaps["stratified"]


@pytest.mark.parametrize("scheme", [StratifiedTimesteps(), UniformTimesteps()])
def test_uniform_marginals(scheme):
    """Averages over the draws are unbiased: over seeds, the mean of ``t²`` is that over levels."""
    means = []
    for seed in range(300):
        draws = make_draws(scheme, 2, seed, 50)
        levels = torch.cat([draws.levels(range(3), r) for r in range(2)])
        means.append((levels.double() / 50).square().mean())
    truth = (torch.arange(50).double() / 50).square().mean()
    means = torch.stack(means)
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - truth) < 4 * error
    assert error < 0.05 * truth


@pytest.mark.parametrize("stratified", [True, False])
def test_logit_normal(stratified):
    """Quantiles of ``sigmoid(m + s z)``; ``u`` rises with the noise."""
    draws = make_draws(LogitNormalTimesteps(0.5, 1.5, stratified), 4, 0, 1000)
    levels = torch.cat([draws.levels(range(1000), r) for r in range(4)]).double() / 1000
    probabilities = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    expected = torch.sigmoid(0.5 + 1.5 * torch.special.ndtri(probabilities))
    tolerance = 0.005 if stratified else 0.04
    assert (levels.quantile(probabilities) - expected).abs().max() < tolerance


@pytest.mark.parametrize("scheme", [StratifiedTimesteps(), UniformTimesteps()])
def test_uniform_within_a_range(scheme):
    """Every level of an expert's range equally often, none outside."""
    draws = make_draws(TimestepsWithin(35, 43, scheme), 4, 0, 50)
    levels = torch.cat([draws.levels(range(2000), r) for r in range(4)])
    counts = torch.bincount(levels, minlength=50)
    assert counts.sum() == counts[35:43].sum() == 8000
    assert (counts[35:43] - 1000).abs().max() < (20 if scheme == StratifiedTimesteps() else 150)
    assert not draws.uniform_levels


def test_other_distributions_within_a_range():
    """What the whole distribution is, given that it falls there: the same ratios."""
    whole = LogitNormalTimesteps(0.5, 1.5)
    draws = make_draws(whole, 4, 0, 10)
    counts = torch.bincount(torch.cat([draws.levels(range(5000), r) for r in range(4)]))[6:9]
    draws = make_draws(TimestepsWithin(6, 9, whole), 4, 0, 10)
    within = torch.bincount(torch.cat([draws.levels(range(5000), r) for r in range(4)]))[6:9]
    assert within.sum() == 20_000
    assert (counts / counts.sum() - within / within.sum()).abs().max() < 2e-3
    below = torch.special.ndtr((torch.logit(torch.tensor([0.6, 0.9])) - 0.5) / 1.5)
    assert abs(float(counts.sum()) / 20_000 - float(below.diff())) < 2e-3


def test_lists_and_every_level_once():
    draws = draws_of([3, 1, 4], num_draws=None)
    assert draws.num_draws == 3
    assert [draws.levels([0, 9], r).tolist() for r in range(3)] == [[3, 3], [1, 1], [4, 4]]
    assert draws_of(torch.tensor([3, 1]), num_draws=6).levels([0], 5).item() == 1
    every = draws_of("all", num_draws=None, num_levels=7)
    assert [every.levels([2], r).item() for r in range(every.num_draws)] == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": "random"}, r"must be one of 'stratified', .*, got 'random'"),
        ({"timesteps": 3}, r"`timesteps` must be one of .*, got 3"),
        ({"timesteps": TimestepsWithin(5, 5)}, r"lowest < end <= 1000.*got .*lowest=5, end=5"),
        ({"timesteps": TimestepsWithin(5, 5000)}, "0 <= lowest < end <= 1000"),
        ({"timesteps": [1, 1000]}, r"from 0 to 999, .* of which \[1000\] do not exist"),
        ({"timesteps": []}, r"at least one level, .* got 0 levels"),
        ({"timesteps": [1, 2, 3], "num_draws": 8}, "multiple of 3 with 3 listed levels, got 8"),
        ({"num_draws": 0}, r"num_draws.* whole number of at least 1"),
        ({"num_draws": 2.0}, r"num_draws.* whole number of at least 1"),
        ({"antithetic": True, "num_draws": 3}, "multiple of 2 with antithetic pairs, got 3"),
        (
            {"antithetic": True, "timesteps": [1, 2], "num_draws": 6},
            "multiple of 4 with 2 listed levels and antithetic pairs, got 6",
        ),
        ({"seed": -1}, r"`seed` must be a whole number from 0 to .* got -1"),
        ({"seed": None}, "got None"),
        ({"seed": 2**64}, "got 18446744073709551616"),
    ],
)
def test_bad_draws(arguments, message):
    with pytest.raises(ValueError, match=message):
        draws_of(**arguments)


# ---------------------------------------------------------------------------------------------
# Antithetic pairs
# ---------------------------------------------------------------------------------------------


def test_pairs_differ_in_the_sign_of_the_noise_alone():
    draws = make_draws("stratified", 8, 3, 1000, antithetic=True)
    n, shape = [0, 4, 9], (2, 3)

    def probe(r):
        return draws.probe(n, r, 0, 9, GAUSSIAN)

    shared = [
        lambda r: draws.levels(n, r),
        lambda r: draws.latent_noise(n, r, shape),
        lambda r: draws.versions(n, r, 2),
        lambda r: draws.dropped(n, r, 0.5),
    ]
    for r in range(0, 8, 2):
        assert torch.equal(draws.noise(n, r, shape), -draws.noise(n, r + 1, shape))
        assert not torch.equal(probe(r), probe(r + 1))
        assert all(torch.equal(f(r), f(r + 1)) for f in shared)
    assert not torch.equal(draws.noise(n, 0, shape), draws.noise(n, 2, shape))
    levels = torch.stack([draws.levels(range(50), r) for r in range(0, 8, 2)], 1)
    assert torch.equal(levels // 250, torch.arange(4).expand(50, 4))  # each pair has a stratum
    listed = make_draws([3, 1], None, 0, 10, antithetic=True)
    assert [listed.levels([0], r).item() for r in range(listed.num_draws)] == [3, 3, 1, 1]


def test_gradients_of_pairs_are_unbiased():
    """A linear network, the gradient's expectation in closed form; two pairs, many times.

    ``E[2 r (W x_t - ε) x_tᵀ] = 2 r (α² W x0 x0ᵀ + σ² W - σ I)``, averaged over the levels.
    """
    rows, W, x0, process = linear_rows(True, num_draws=4)
    truth = torch.zeros(3, 3).double()
    for alpha, sigma in zip(process.alphas_T, process.sigmas_T, strict=True):
        truth += 2 / 3 * (alpha**2 * W @ x0.T @ x0 + sigma**2 * W - sigma * torch.eye(3))
    truth = truth.flatten() / process.num_levels
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - truth).abs() < 4.5 * error).all()
    scale = rows @ truth / truth.square().sum()
    assert abs(scale.mean() - 1) < 4 * scale.std() / len(rows) ** 0.5
    assert 4 * scale.std() / len(rows) ** 0.5 < 0.05  # a scale wrong by 5 % would be seen


def test_pairs_help_where_gradients_are_linear_in_the_noise():
    """At little noise, ``(W x_t - ε) x_tᵀ ≈ -ε α x0ᵀ``; at much noise, ``-σ ε εᵀ`` is even."""

    def variance(antithetic, level):
        return linear_rows(antithetic, 500, num_draws=2, timesteps=[level])[0].var(0).sum()

    assert variance(True, 0) < 0.2 * variance(False, 0)
    assert variance(True, 9) > variance(False, 9)


def linear_rows(antithetic, count=4000, **options):
    """Gradients of the same example many times, and the linear network, example and process."""
    model, process = seeded(nn.Linear(3, 3, bias=False)), noise_levels()
    x0 = torch.tensor([[0.5, -1.0, 0.3]]).double()
    regression = NoisedRegression(
        DenoisingObjective(model, process), x0.expand(count, 3), antithetic=antithetic, **options
    )
    W = next(model.parameters()).detach()
    return ExampleGradientLinearOperator(regression).rows(), W, x0, process


@pytest.mark.parametrize(
    ("timesteps", "antithetic", "num_draws"),
    [("stratified", True, 12), ("uniform", False, 6), ([3, 1, 4], True, 18)],
)
def test_parts_are_those_of_the_whole(timesteps, antithetic, num_draws):
    """Each draw of the whole once, pairs and lists of levels together, every part spread."""
    whole = make_draws(timesteps, num_draws, 3, 1000, antithetic)
    parts = [whole.divided(k, 3) for k in range(3)]

    def seen(draws):
        return [
            (int(draws.levels([5], r)), draws.noise([5], r, (2,))[0].tolist())
            for r in range(draws.num_draws)
        ]

    assert sorted(draw for part in parts for draw in seen(part)) == sorted(seen(whole))
    for part in parts:
        assert part.num_draws == num_draws // 3
        own = seen(part)
        if antithetic:
            for (t, eps), (u, opposite) in zip(own[::2], own[1::2], strict=True):
                assert t == u
                assert eps == [-e for e in opposite]
        if timesteps == "stratified":  # two pairs, one in either half of the schedule
            assert [t >= 500 for t, _ in own[::2]] == [False, True]
        if isinstance(timesteps, list):
            assert sorted(t for t, _ in own) == sorted(2 * timesteps)
    with pytest.raises(ValueError, match=r"multiple of \d+ to be divided into 5 parts, got"):
        whole.divided(0, 5)
    with pytest.raises(ValueError, match="to be divided"):
        parts[0].divided(0, 2)


def test_pairs_of_a_regression():
    """They stay pairs with another number of draws, and files tell them from single draws."""
    pairs, single = (unet_regression(num_draws=4, antithetic=a) for a in (True, False))
    assert pairs.with_draws(6).draws.antithetic
    assert pairs.description != single.description
    with pytest.raises(ValueError, match="multiple of 2 with antithetic pairs, got 3"):
        pairs.with_draws(3)


# ---------------------------------------------------------------------------------------------
# Global random states
# ---------------------------------------------------------------------------------------------


def _states():
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), python, [str(part) for part in numpy]


USES = {
    "iterate": list,
    "ggn": lambda r: DiffusionGGNLinearOperator(r) @ torch.ones(17).double(),
    "rows": lambda r: ExampleGradientLinearOperator(r).rows(),
    "inverse": lambda r: DiffusionEKFACLinearOperator(r).inverse(1.0) @ torch.ones(17).double(),
}


@pytest.mark.parametrize(("use", "workers"), [*((use, None) for use in USES), ("iterate", 2)])
def test_random_states_are_left_alone(use, workers):
    model = seeded(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    regression = plain_regression(model, (3,), count=4)
    x0 = torch.cat([b.x0 for b in regression.clean_batches()])
    data = x0 if workers is None else DataLoader(x0, batch_size=2, num_workers=workers)
    before = _states()
    regression = NoisedRegression(regression.objective, data, 2)
    USES[use](regression)
    assert _states() == before
