"""The problems on which is measured."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel

from curvlinops_diffusion import DenoisingObjective, NoisedRegression


def unet_regression(quick: bool, device: str, dtype: torch.dtype | None = None) -> NoisedRegression:
    """128 images of 16×16 in batches of 32, a UNet of 2.8 million parameters with attention.

    Args:
        quick: Take 8 images and a small network instead.
        device: Where the network is.
        dtype: The network's precision; ``None`` for float32.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8) if quick else (64, 128),
        norm_num_groups=4 if quick else 32,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet = unet.eval().to(device, dtype)
    images = torch.randn(8 if quick else 128, 3, 16, 16)
    objective = DenoisingObjective(unet, DDPMScheduler())
    return NoisedRegression(objective, images, num_draws=1, batch_size=4 if quick else 32)
