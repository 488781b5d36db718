"""A UNet and what it is trained with, as one network: text encoders, masks, a ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Entries = dict[str, Any]


class _WithUNet(nn.Module):
    """A UNet in a larger network; its parameters are called ``unet.…``.

    Attributes:
        images: The entries of the data that are images, and their channels.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.images: dict[str, int] = {}

    @property
    def config(self) -> Any:
        """The UNet's."""
        return self.unet.config


class InpaintingDenoiser(_WithUNet):
    """A UNet that takes latents, mask and masked image's latents as channels after each other."""

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        self.images = {"mask_image": 1}

    def forward(
        self, sample: Tensor, timestep: Tensor, mask: Tensor, masked_latents: Tensor, **entries: Any
    ) -> Any:
        """Denoise latents ``[B, C, H, W]``, by a mask ``[B, 1, H, W]``."""
        return self.unet(torch.cat([sample, mask, masked_latents], 1), timestep, **entries)


class ControlledDenoiser(_WithUNet):
    """A UNet and the ControlNet that steers it, whose parameters are called ``controlnet.…``."""

    def __init__(self, unet: nn.Module, controlnet: Any):
        super().__init__(unet)
        self.controlnet = controlnet
        self.images = {"conditioning_image": controlnet.config.conditioning_channels}

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


class PromptedDenoiser(_WithUNet):
    """A UNet and its text encoders, which takes tokens in place of embeddings.

    The encoders' parameters are called by their names in the pipeline: ``text_encoder.…``.

    Args:
        unet: The UNet.
        encoders: The text encoders by their names.
        embed: Maps encoders, tokens and further entries to the UNet's condition.
    """

    def __init__(
        self,
        unet: nn.Module,
        encoders: dict[str, nn.Module],
        embed: Callable[[list[nn.Module], list[Tensor], Entries], Entries],
    ):
        super().__init__(unet)
        self._names = list(encoders)
        for name, encoder in encoders.items():
            self.add_module(name, encoder)
        self._embed = embed

    def forward(self, sample: Tensor, timestep: Tensor, **entries: Any) -> Any:
        """Denoise, the condition being embedded on the way."""
        tokens = [entries.pop(tokens_of(name)) for name in self._names]
        encoders = [self.get_submodule(name) for name in self._names]
        return self.unet(sample, timestep, **self._embed(encoders, tokens, entries))


def tokens_of(encoder: str) -> str:
    """The entry of a condition with the tokens of a text encoder."""
    return encoder.replace("text_encoder", "input_ids")


def tokenized(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Tokens of prompts, ``[B, length]``, as the pipelines make them."""
    ids: Tensor = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def embedded(
    encoders: list[Any], tokens: list[Tensor], entries: Entries, clip_skip: int = 0
) -> Entries:
    """The condition of Stable Diffusion 1 and 2, without the last ``clip_skip`` layers."""
    (encoder,), (ids,) = encoders, tokens
    if clip_skip == 0:
        return {"encoder_hidden_states": encoder(ids)[0]}
    states = encoder(ids, output_hidden_states=True).hidden_states[-1 - clip_skip]
    # transformers 5 has the layers in the model itself
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return {"encoder_hidden_states": norm(states)}


def embedded_xl(
    encoders: list[Any], tokens: list[Tensor], entries: Entries, clip_skip: int = 0
) -> Entries:
    """The condition of Stable Diffusion XL, likewise."""
    outputs = [e(ids, output_hidden_states=True) for e, ids in zip(encoders, tokens, strict=True)]
    states = torch.cat([output.hidden_states[-2 - clip_skip] for output in outputs], -1)
    added = {"text_embeds": outputs[-1][0], "time_ids": entries["time_ids"].to(states)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}
