"""How far the scores of two halves of the draws agree."""

import pytest
import torch
from scipy.stats import hypergeom, spearmanr

from curvlinops_diffusion.influence.agreement import Agreement, SplitHalfScores
from tests.comparisons import assert_close


def test_of_two_halves():
    """Against scipy and sets, with ties; read one query at a time, and back from a header."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 50, generator=generator).double()
    first[:, 3:6] = first[:, :1]
    second = first + torch.randn(4, 50, generator=generator).double()
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    halves = SplitHalfScores((first + second) / 2, first, second)
    assert_close(halves.rank_correlation(), torch.tensor(expected), 1e-12)
    by_hand = [
        len(set(a.topk(10).indices.tolist()) & set(b.topk(10).indices.tolist()))
        for a, b in zip(first, second, strict=True)
    ]
    assert (10 * halves.top_shared(10)).tolist() == pytest.approx(by_hand)
    assert SplitHalfScores(first, first, first).top_shared(99).tolist() == [1.0] * 4

    found = Agreement.of_halves(iter(first), iter(second))
    assert found.shared == pytest.approx(by_hand)
    assert found.by_chance == 2
    assert found.rank_correlation == pytest.approx(expected)
    assert found.standard_error == pytest.approx(halves.standard_error().tolist())
    header = {**found.as_header(), "train": ["name"] * 50}
    assert Agreement.of_header(header).rank_correlation == found.rank_correlation
    assert Agreement.of_header({}) is None
    constant = Agreement.of_halves(torch.zeros(1, 50), second[:1])
    assert constant.rank_correlation == (None,)
    assert "correlation" not in str(constant)


def test_noise_is_called_noise():
    """At the rate of its tests where halves are independent; never where they share an order."""
    generator = torch.Generator().manual_seed(0)
    for N in (6, 24, 300):
        first, second = torch.randn(2, 500, N, generator=generator)
        found = Agreement.of_halves(first, second)
        noise = sum(map(found.is_noise, range(500))) / 500
        assert 0.92 < noise < 0.99  # two tests at 2.5 % each, or less where few outcomes are
        shared = Agreement.of_halves(first[:50], first[:50] + 1e-3 * second[:50])
        assert not any(map(shared.is_noise, range(50)))
        assert str(found).endswith(" queries are noise: take more draws.")
        assert "noise" not in str(shared)
    few = Agreement.of_halves(first[:1, :4], -first[:1, :4])
    assert not few.is_noise(0)  # four images are no evidence of either


def test_chance_is_hypergeometric():
    """Of 24 images two random top tens share 4.2; and as often as scipy says."""
    for shared in range(11):
        found = Agreement(10, (shared,), 24, (None,), (None,), (False,))
        assert f"{found.by_chance:.1f}" == "4.2"
        assert found.is_top_told(0) == (hypergeom.sf(shared - 1, 24, 10, 10) <= 0.025)


def test_settled_where_half_of_the_queries_are():
    for shared, settled in (((8, 8, 0), True), ((10, 7, 7), False)):
        found = Agreement(10, shared, 24, (None,) * 3, (None,) * 3, (False,) * 3)
        assert found.is_settled == settled


def test_standard_error_is_that_of_the_mean_of_halves():
    """Of numbers of known spread: a 5 % wrong scale would be seen."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 20_000, generator=generator).double()
    first, second = (
        truth + 0.3 * torch.randn(1, 20_000, generator=generator).double() for _ in range(2)
    )
    error = ((first + second) / 2 - truth).square().mean().sqrt()
    assert_close(SplitHalfScores(truth, first, second).standard_error()[0], error, 0.02)


def test_a_copy_of_one_image_is_no_noise():
    """One training image stands out in both halves, and of all others there is noise alone."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, 200, generator=generator)
    assert Agreement.of_halves(first, second).is_noise(0)
    first[:, 7], second[:, 7] = 6, 7
    found = Agreement.of_halves(first, second)
    assert found.same_first == (True,)
    assert found.is_top_told(0)
    assert not found.is_noise(0)
    header = found.as_header() | {"train": ["image"] * 200}
    assert Agreement.of_header(header) == found
