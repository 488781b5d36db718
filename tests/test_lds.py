"""The linear data-modelling score against SciPy, and on data where the answer is known."""

import scipy.stats
import torch

from benchmarks.lds import score
from benchmarks.lds.problems import PROBLEMS


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_spearman_is_scipys():
    x, y = random(3, 20), random(3, 20, seed=1)
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert torch.allclose(score.lds(x, y), torch.tensor(expected).double())
    tied = torch.randint(4, (3, 20), generator=torch.Generator().manual_seed(2)).double()
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(tied, y, strict=True)]
    assert torch.allclose(score._spearman_with_ties(tied, y), torch.tensor(expected).double())


def test_an_additive_world_is_predicted():
    """Measurements that are sums over what is left out, plus noise: one without, less with it."""
    effects, halves = random(5, 40), PROBLEMS["digits"].halves()[:, :40]
    exact = score.predicted(effects, halves)
    resampled = score.Resampled.of(64, 5, 200)
    assert resampled.summary(exact, exact)["lds"] == 1
    assert resampled.summary(-exact, exact)["lds"] == -1
    noisy = exact + 0.5 * exact.std() * random(*exact.shape, seed=3)
    found = resampled.summary(exact, noisy)
    assert 0.7 < found["lds"] < 0.95
    assert found["low"] < found["lds"] < found["high"]
    worse = exact + exact.std() * random(*exact.shape, seed=4)
    assert resampled.difference(exact, exact, noisy) == {"difference": 0, "low": 0, "high": 0}
    better = resampled.difference(exact, worse, noisy)
    assert 0 < better["low"] < better["difference"] < better["high"]


def test_ceiling():
    """Two noisy seeds: the exact prediction reaches about the ceiling."""
    exact = random(200, 64)
    seeds = torch.stack([exact + random(200, 64, seed=s) for s in (1, 2)])
    reached = float(score.lds(exact, seeds.mean(0)).mean())
    assert abs(score.ceiling(seeds) - reached) < 0.02


def test_halves():
    halves = PROBLEMS["digits"].halves()
    assert halves.shape == (64, 1000)
    assert (halves.sum(1) == 500).all()
    assert len({tuple(mask.tolist()) for mask in halves}) == 64
