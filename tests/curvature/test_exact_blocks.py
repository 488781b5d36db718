"""Sums of exact blocks, those of one size together."""

import torch

from curvlinops_diffusion.curvature.exact_blocks import ExactBlock, ExactSums
from tests.comparisons import assert_close

SHAPES = {"a": (3,), "b": (3,), "c": (2,), "d": (3, 1), "e": (4,)}
BLOCKS = {key: ExactBlock(key, (key,), (shape,), True, None) for key, shape in SHAPES.items()}
BLOCKS["e"] = ExactBlock("e", ("e",), ((4,),), False, None)  # its diagonal alone


def gradients(keys, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(5, *SHAPES[key], generator=generator, dtype=torch.float64) for key in keys
    }


def added(terms, sums=None):
    """The sums of what arrives, term by term, perhaps onto others."""
    sums = sums or ExactSums()
    for seed, keys in terms:
        sums.add_gradients([BLOCKS[key] for key in keys], gradients(keys, seed))
    return sums


def one_by_one(terms):
    totals = {}
    for seed, keys in terms:
        for key, g in gradients(keys, seed).items():
            moment = g.flatten(1).T @ g.flatten(1)
            totals[key] = totals.get(key, 0) + (moment if BLOCKS[key].dense else moment.diag())
    return totals


def test_what_arrives_may_vary():
    """Blocks join and leave those that they are added to together with."""
    terms = [(0, "abce"), (1, "abcde"), (2, "ab"), (3, "bd"), (4, "abcde"), (5, "ba"), (6, "ab")]
    sums, expected = added(terms), one_by_one(terms)
    assert sums.tensors().keys() == expected.keys()
    for key, total in sums.tensors().items():
        assert_close(total, expected[key], 1e-14)


def test_gone_on_with():
    """From what was written down, which is not added to; and the same sums go on after it."""
    first, second = [(0, "abde"), (1, "abde")], [(2, "abde"), (3, "abcde")]
    sums = added(first)
    kept = {key: total.clone() for key, total in sums.tensors().items()}
    again = ExactSums()
    again.restore(kept)
    added(second, again)
    added(second, sums)
    expected = one_by_one(first + second)
    for key, total in expected.items():
        assert_close(sums.tensors()[key], total, 1e-14)
        assert_close(again.tensors()[key], total, 1e-14)
        assert_close(again.take_mean(key, 4, lambda: torch.zeros(1)), total / 4, 1e-14)


def test_means_are_given_away():
    """One by one; what comes afterwards begins anew."""
    sums = added([(0, "ab")])
    mean = sums.take_mean("a", 2, lambda: torch.zeros(1)).clone()
    added([(1, "ab")], sums)
    assert_close(mean, one_by_one([(0, "a")])["a"] / 2, 1e-14)
    assert_close(sums.tensors()["a"], one_by_one([(1, "ab")])["a"], 1e-14)
