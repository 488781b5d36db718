"""Sums of exact blocks, those of one size together."""

from types import SimpleNamespace

import pytest
import torch

from curvlinops_diffusion.curvature.exact_blocks import ExactBlock, ExactMoments
from curvlinops_diffusion.layers.coverage import Coverage
from tests.comparisons import assert_close

SHAPES = {"a": (3,), "b": (3,), "c": (2,), "d": (3, 1), "e": (4,)}
BLOCKS = [ExactBlock(key, (key,), (shape,), key != "e", None) for key, shape in SHAPES.items()]


def gradients(keys, seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(5, *SHAPES[key], generator=generator).double() for key in keys}


@pytest.mark.parametrize("restored", [False, True])
def test_blocks_that_are_seen_may_vary(restored):
    """They join and leave those that they are summed together with; also of what was restored."""
    objective = SimpleNamespace(working_dtype=torch.float64)
    moments, expected = ExactMoments(objective, BLOCKS, Coverage({}, (), {})), {}
    for seed, keys in enumerate(["abce", "abcde", "ab", "bd", "abcde", "ba", "ab"]):
        for key, g in gradients(keys, seed).items():
            moments._gradients.add(key, g)
            moment = g.flatten(1).T @ g.flatten(1)
            expected[key] = expected.get(key, 0) + (moment.diag() if key == "e" else moment)
        moments.pulled_back(None, None)
        if restored:
            kept = {name: z.clone() for name, z in moments.sums.tensors().items()}
            moments.sums.restore(kept)
    found = moments.by_block().tensors()
    assert found.keys() == expected.keys()
    for key, total in found.items():
        assert_close(total, expected[key], 1e-14)
