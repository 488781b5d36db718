"""Copies of training images as queries, and weights that are shuffled for a while."""

import pytest
import torch

from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.influence.validation.probes import (
    chosen,
    copies_of,
    mirrored,
    recompressed,
    shuffled,
)
from tests.cases import images, tiny_unet, unet_regression


def all_of(regression):
    return next(iter(regression.clean_batches()))


def test_copies_go_with_their_conditions():
    train = unet_regression(count=5, batch_size=2, noise_offset=0.1)
    kinds, queries = copies_of(train, [4, 1], 4)
    assert kinds == ["itself", "mirrored", "recompressed"]
    assert isinstance(queries, NoisedRegression)
    assert queries.num_data == 6
    x0 = torch.cat([clean.x0 for clean in queries.clean_batches()])
    labels = torch.cat([clean.condition["class_labels"] for clean in queries.clean_batches()])
    asked = images(5)[[4, 1]]
    assert torch.equal(x0[:2], asked)
    assert torch.equal(x0[2:4], asked.flip(-1))
    assert labels.tolist() == [1, 1] * 3
    assert queries.recipe.noise_offset == 0.1
    # other draws than training's, in pairs
    assert (queries.draws.seed, queries.num_draws) == (train.draws.seed + 1, 4)
    assert queries.draws.antithetic


def test_jpeg_changes_little():
    """Of a smooth image, at most a few of 256 levels; values beyond the range are cut."""
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16).contiguous()
    clean = all_of(unet_regression(tiny_unet(in_channels=3, out_channels=3), count=1))
    clean = type(clean)([0], torch.cat([ramp, 2 * ramp]), {})
    again = recompressed(clean).x0
    assert 0 < (again[0] - ramp[0]).abs().max() < 0.1
    assert (again[1] - (2 * ramp[0]).clamp(-1, 1)).abs().mean() < 0.1


def test_masks_and_images_beside_are_mirrored():
    clean = all_of(unet_regression(count=2))
    beside = {"control": clean.x0 * 2, "class_labels": clean.condition["class_labels"]}
    found = mirrored(type(clean)([0, 1], clean.x0, beside, clean.x0[:, :1].abs()))
    assert torch.equal(found.condition["control"], 2 * clean.x0.flip(-1))
    assert torch.equal(found.condition["class_labels"], beside["class_labels"])
    assert torch.equal(found.mask, clean.x0[:, :1].abs().flip(-1))


def test_shuffled_weights_come_back():
    """Whatever happens meanwhile; the entries stay the same ones."""
    unet = tiny_unet()
    name, before = "conv_in.weight", {k: v.clone() for k, v in unet.state_dict().items()}

    def inside():
        with shuffled(unet, [name], seed=0):
            now = unet.state_dict()
            assert not torch.equal(now[name], before[name])
            assert torch.equal(now[name].flatten().sort()[0], before[name].flatten().sort()[0])
            assert all(torch.equal(now[k], before[k]) for k in before if k != name)
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_chosen_images():
    assert sorted(chosen(6, 10, seed=0)) == list(range(6))
    assert len(set(chosen(100, 10, seed=1)) & set(chosen(100, 10, seed=2))) < 5
    with pytest.raises(ValueError, match="num_queries"):
        chosen(6, 0, seed=0)
