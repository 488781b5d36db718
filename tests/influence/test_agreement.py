"""How far the scores of two halves of the draws agree."""

import pytest
import torch
from scipy.stats import spearmanr

from curvlinops_diffusion.influence.agreement import (
    Agreement,
    SplitHalfScores,
)
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


def test_standard_error_is_that_of_the_mean_of_halves():
    """Of numbers of known spread: a 5 % wrong scale would be seen."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 20_000, generator=generator).double()
    first, second = (
        truth + 0.3 * torch.randn(1, 20_000, generator=generator).double() for _ in range(2)
    )
    error = ((first + second) / 2 - truth).square().mean().sqrt()
    assert_close(SplitHalfScores(truth, first, second).standard_error()[0], error, 0.02)
