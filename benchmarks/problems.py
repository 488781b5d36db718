"""The problems on which is measured."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import mse_loss

from curvlinops_diffusion import DenoisingObjective, NoisedRegression


def unet_regression(
    quick: bool, device: str, num_data: int | None = None, size: int = 16
) -> NoisedRegression:
    """Square images in batches of 32, a UNet of 2.8 million parameters with attention.

    Args:
        quick: Take few images and a small network instead.
        device: Where the network is.
        num_data: The number of images; 128, or 8 for a quick run.
        size: The height and width of the images.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 8) if quick else (64, 128),
        norm_num_groups=4 if quick else 32,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet = unet.eval().to(device)
    images = torch.randn(num_data or (8 if quick else 128), 3, size, size)
    objective = DenoisingObjective(unet, DDPMScheduler())
    return NoisedRegression(objective, images, num_draws=1, batch_size=4 if quick else 32)


def trained_on_digits(steps: int) -> tuple[UNet2DModel, DDPMScheduler, Tensor]:
    """A UNet of about 175,000 parameters, trained on scikit-learn's digits.

    Args:
        steps: Training steps; 1,500 take about a minute on two cores.

    Returns:
        The network, its scheduler, and the digits in [-1, 1], shape ``[1797, 1, 8, 8]``.
    """
    torch.manual_seed(0)
    x0 = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = x0[torch.randint(len(x0), (128,))]
        noise = torch.randn_like(batch)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(batch),))
        loss = mse_loss(unet(scheduler.add_noise(batch, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return unet.eval(), scheduler, x0
