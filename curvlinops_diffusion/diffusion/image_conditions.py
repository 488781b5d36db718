"""Networks that are shown another image beside the noised one: masks, control images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InpaintingDenoiser(nn.Module):
    """A UNet that is given a mask, and the latents of the image where nothing is masked.

    Its parameters are called ``unet.…``.

    Args:
        unet: Takes noised latents, mask and masked image's latents as channels after each other.

    Attributes:
        images: The entries of the data that are images, and their channels.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.images = {"mask_image": 1}

    @property
    def config(self) -> Any:
        """The UNet's."""
        return self.unet.config

    def forward(
        self, sample: Tensor, timestep: Tensor, mask: Tensor, masked_latents: Tensor, **entries: Any
    ) -> Any:
        """Denoise latents ``[B, C, H, W]``, by a mask ``[B, 1, H, W]``."""
        return self.unet(torch.cat([sample, mask, masked_latents], 1), timestep, **entries)


class ControlledDenoiser(nn.Module):
    """A UNet and the ControlNet that steers it, as one network of both.

    Their parameters are called ``unet.…`` and ``controlnet.…``.

    Args:
        unet: The UNet.
        controlnet: Its ControlNet.

    Attributes:
        images: The entries of the data that are images, and their channels.
    """

    def __init__(self, unet: nn.Module, controlnet: Any):
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet
        self.images = {"conditioning_image": controlnet.config.conditioning_channels}

    @property
    def config(self) -> Any:
        """The UNet's."""
        return self.unet.config

    def forward(
        self, sample: Tensor, timestep: Tensor, controlnet_cond: Tensor, **entries: Any
    ) -> Any:
        """Denoise latents ``[B, C, H, W]``, by a control image in pixels."""
        down, mid = self.controlnet(
            sample, timestep, controlnet_cond=controlnet_cond, **entries, return_dict=False
        )
        return self.unet(
            sample,
            timestep,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            **entries,
        )


def checked_image(name: str, condition: dict[str, Any], x0: Tensor, channels: int) -> Tensor:
    """An image in [0, 1] beside the images, of their size.

    Raises:
        ValueError: If there is none, or it is something else.
    """
    image, shape = condition.get(name), (len(x0), channels, *x0.shape[2:])
    wanted = f"Pass '{name}' beside each image and prompt: numbers in [0, 1], shape {shape}."
    if not isinstance(image, Tensor):
        raise ValueError(f"A batch arrived with {sorted(condition)} and no '{name}'. {wanted}")
    if image.shape != shape:
        raise ValueError(f"'{name}' arrived with shape {tuple(image.shape)}. {wanted}")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise ValueError(f"'{name}' arrived with numbers from {low:g} to {high:g}. {wanted}")
    return image
