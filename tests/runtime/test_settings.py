"""Networks of the same weights that compute other things are told apart, and others are not."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionKFACLinearOperator,
    NoisedRegression,
    PassOptions,
    load_operator,
)
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError
from curvlinops_diffusion.runtime.digests import fingerprint
from tests.cases import TimeBlind, noise_levels


def network(groups=2, act=nn.SiLU, padding="zeros", eps=1e-5):
    return TimeBlind(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding),
        nn.GroupNorm(groups, 4, eps=eps),
        act(),
        nn.Conv2d(4, 2, 1),
    )


def unet(**options):
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"attention_head_dim": 4, **options},
    )


def adapted(scale=1.0, disabled=False, names=("default",)):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for name in names:
        config = LoraConfig(r=1, lora_alpha=scale, target_modules=["0"], init_lora_weights=False)
        inject_adapter_in_model(config, model, name)
    layer = model[0]
    layer.enable_adapters(not disabled)
    return model


def autoencoder(tiled=False):
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    if tiled:
        model.enable_tiling()
    return model


OTHERS = {
    "groups of a norm": (network(), network(groups=4)),
    "rounding of a norm": (network(), network(eps=1e-3)),
    "activation": (network(), network(act=nn.GELU)),
    "padding": (network(), network(padding="circular")),
    "heads, by a config": (unet(), unet(attention_head_dim=8)),
    "scale of an adapter": (adapted(), adapted(scale=0.5)),
    "adapter switched off": (adapted(), adapted(disabled=True)),
    "adapter that is used": (adapted(names="ab"), adapted(names="ab")),
    "tiles": (autoencoder(), autoencoder(tiled=True)),
}
OTHERS["adapter that is used"][1][0].set_adapter(["a", "b"])


@pytest.mark.parametrize("kind", OTHERS)
def test_settings_that_decide(kind):
    one, other = OTHERS[kind]
    other.load_state_dict(one.state_dict())
    first, second = fingerprint(one), fingerprint(other)
    assert {key for key in first if first[key] != second[key]} == {"settings"}
    assert fingerprint(copy.deepcopy(one)) == first


SAME = {
    "dropout": (unet(), unet(dropout=0.5)),
    "mode": (network(), network().eval()),
    "name of an adapter": (adapted(), adapted(names=["other"])),
    "class of a layer": (nn.Linear(2, 2), type("Counting", (nn.Linear,), {"calls": 3})(2, 2)),
}


@pytest.mark.parametrize("kind", SAME)
def test_settings_that_do_not(kind):
    one, other = SAME[kind]
    assert fingerprint(one)["settings"] == fingerprint(other)["settings"]


def test_checkpoints_and_operators_are_of_one_network(tmp_path):
    """Neither sums nor factors of a network are taken for those of another with its weights."""
    one, other = network(), network(groups=4)
    other.load_state_dict(one.state_dict())
    x0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def fitted(model, passes):
        regression = NoisedRegression(DenoisingObjective(model, noise_levels()), x0, 2)
        return DiffusionKFACLinearOperator(regression, passes=passes)

    K = fitted(one, PassOptions(tmp_path / "checkpoint"))
    with pytest.raises(OtherCheckpointError, match=r"model.settings"):
        fitted(other, PassOptions(tmp_path / "checkpoint"))
    K.save(tmp_path / "k.safetensors")
    assert load_operator(tmp_path / "k.safetensors", one).shape == K.shape
    with pytest.raises(ValueError, match=r"with other settings of this model: its config, const"):
        load_operator(tmp_path / "k.safetensors", other)
