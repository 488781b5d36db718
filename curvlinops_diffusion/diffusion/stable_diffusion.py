"""The objectives of Stable Diffusion's pipelines, versions 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from curvlinops_diffusion.diffusion.image_conditions import (
    ControlledDenoiser,
    InpaintingDenoiser,
    checked_image,
)
from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.diffusion.prompted import (
    Cache,
    PipelineParts,
    check_inputs,
    prompted_parts,
)
from curvlinops_diffusion.diffusion.text_encoders import (
    PromptedDenoiser,
    embedded,
    embedded_xl,
    tokenized,
    tokens_of,
)
from curvlinops_diffusion.diffusion.training_arguments import training_arguments

# what of an image's sizes Stable Diffusion XL may be told
_SIZES_XL = ("original_size", "crops_coords_top_left", "target_size", "time_ids")


def stable_diffusion(
    pipeline: Any, sample: bool, cache: Cache, arguments: Mapping[str, Any]
) -> PipelineParts:
    """``StableDiffusionPipeline``, versions 1 and 2, and ``StableDiffusionXLPipeline``.

    For XL, what training told the network of each image may stand beside the prompt:
    ``original_size`` and ``crops_coords_top_left`` and ``target_size``, ``[B, 2]`` each (height or
    top first), or all of it as ``time_ids``, ``[B, 6]``. Else images count as uncropped and of the
    size they have.
    """
    check_inputs(pipeline, pipeline.unet)
    embed, also = _prompts_of(pipeline, arguments)
    return prompted_parts(
        pipeline, pipeline.unet, embed, sample, cache, also=also, arguments=arguments
    )


def inpainting(
    pipeline: Any, sample: bool, cache: Cache, arguments: Mapping[str, Any]
) -> PipelineParts:
    """``StableDiffusionInpaintPipeline`` and ``StableDiffusionXLInpaintPipeline``.

    ``'mask_image'`` stands beside each image and prompt, ``[B, 1, H, W]``, one where the network
    was to paint; the network sees it at the latents' size, and the mean latents of the image
    without what is masked. A UNet that takes latents alone was not trained on masks, and needs
    none.
    """
    takes, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes == latents:
        return stable_diffusion(pipeline, sample, cache, arguments)
    if takes != 2 * latents + 1:
        raise ValueError(
            f"The UNet takes {takes} channels. One that paints into images takes latents "
            f"({latents}), a mask (1) and the masked image's latents ({latents})."
        )
    model, encoder = InpaintingDenoiser(pipeline.unet), LatentEncoder(pipeline.vae, sample=False)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        mask = checked_image("mask_image", condition, x0, 1).to(x0)
        mask = (mask >= 0.5).to(x0)
        masked_latents = encoder(x0 * (1 - mask), {}).mean
        return {
            "mask": interpolate(mask, masked_latents.shape[2:]),
            "masked_latents": masked_latents,
        }

    return _with_image(pipeline, model, embed, sample, cache, arguments)


def controlled(
    pipeline: Any, sample: bool, cache: Cache, arguments: Mapping[str, Any]
) -> PipelineParts:
    """``StableDiffusionControlNetPipeline`` and ``StableDiffusionXLControlNetPipeline``.

    ``'conditioning_image'`` stands beside each image and prompt, ``[B, 3, H, W]`` in [0, 1].
    """
    check_inputs(pipeline, pipeline.unet)
    controlnet = pipeline.controlnet
    if not hasattr(controlnet, "config"):
        raise ValueError(
            f"The pipeline arrived with a {type(controlnet).__name__}. Pass one with a single "
            "ControlNet: each is trained by itself."
        )
    model = ControlledDenoiser(pipeline.unet, controlnet)
    ((name, channels),) = model.images.items()

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return {"controlnet_cond": checked_image(name, condition, x0, channels)}

    return _with_image(pipeline, model, embed, sample, cache, arguments)


def _with_image(
    pipeline: Any,
    model: InpaintingDenoiser | ControlledDenoiser,
    embed_image: Callable[[Tensor, dict[str, Any]], dict[str, Any]],
    sample: bool,
    cache: Cache,
    arguments: Mapping[str, Any],
) -> PipelineParts:
    """The parts of a pipeline whose network is shown another image, which is never dropped."""
    embed_prompt, also = _prompts_of(pipeline, arguments)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return embed_prompt(x0, condition) | embed_image(x0, condition)

    return prompted_parts(
        pipeline,
        model,
        embed,
        sample,
        cache,
        also=(*model.images, *also),
        embed_null=embed_prompt,
        arguments=arguments,
    )


def _prompts_of(
    pipeline: Any, arguments: Mapping[str, Any]
) -> tuple[Callable[[Tensor, dict[str, Any]], dict[str, Any]], tuple[str, ...]]:
    """The function that embeds prompts, and the entries that it reads beside them."""
    xl = hasattr(pipeline, "text_encoder_2")
    embed, sizes = (_embed_xl, _SIZES_XL) if xl else (_embed, ())
    clip_skip = arguments.get("clip_skip")
    if clip_skip is None:
        return partial(embed, pipeline), sizes
    return partial(_embed_skipping, pipeline, clip_skip), sizes


def _embed(pipeline: Any, x0: Tensor, condition: Mapping[str, Any]) -> dict[str, Any]:
    """The condition of Stable Diffusion, versions 1 and 2."""
    device = pipeline.text_encoder.device
    states, _ = pipeline.encode_prompt(condition["prompt"], device, 1, False)
    return {"encoder_hidden_states": states}


def _embed_xl(pipeline: Any, x0: Tensor, condition: Mapping[str, Any]) -> dict[str, Any]:
    """The condition of Stable Diffusion XL."""
    states, _, pooled, _ = pipeline.encode_prompt(
        condition["prompt"],
        device=pipeline.text_encoder_2.device,
        do_classifier_free_guidance=False,
    )
    added = {"text_embeds": pooled, "time_ids": _time_ids(x0, condition).to(states)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def _embed_skipping(
    pipeline: Any, clip_skip: int, x0: Tensor, condition: Mapping[str, Any]
) -> dict[str, Any]:
    """The condition without the text encoders' last layers."""
    names = _encoders_of(pipeline)
    encoders, prompts = [getattr(pipeline, name) for name in names], list(condition["prompt"])
    tokenizers = [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in names]
    tokens = [
        tokenized(tokenizer, prompts).to(encoder.device)
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
    ]
    if len(names) == 1:
        return embedded(encoders, tokens, {}, clip_skip)
    return embedded_xl(encoders, tokens, {"time_ids": _time_ids(x0, condition)}, clip_skip)


def _encoders_of(pipeline: Any) -> list[str]:
    """The names of the text encoders."""
    xl = hasattr(pipeline, "text_encoder_2")
    return ["text_encoder", "text_encoder_2"] if xl else ["text_encoder"]


def _time_ids(x0: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """Original size, top left corner of the crop and target size of each image, ``[B, 6]``.

    Raises:
        ValueError: If an entry has another shape, or contradicts another.
    """
    B, _, H, W = x0.shape
    parts = {"original_size": (H, W), "crops_coords_top_left": (0, 0), "target_size": (H, W)}
    given = [name for name in parts if name in condition]
    if "time_ids" in condition:
        if given:
            raise ValueError(f"A batch arrived with time_ids and {given}. Pass only one of them.")
        return _of_shape("time_ids", condition["time_ids"], (B, 6))
    columns = [
        _of_shape(name, condition[name], (B, 2))
        if name in condition
        else torch.tensor(default).expand(B, 2)
        for name, default in parts.items()
    ]
    return torch.cat([column.cpu().double() for column in columns], 1)


def _of_shape(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    found = torch.as_tensor(value)
    if found.shape != shape:
        raise ValueError(f"{name} arrived with shape {tuple(found.shape)}. Pass numbers {shape}.")
    return found


def with_text_encoders(
    pipeline: Any, sample_latents: bool | None, cache: Cache, given: Mapping[str, Any] | None
) -> PipelineParts:
    """Take a pipeline apart whose text encoders were trained as well.

    Args:
        pipeline: A pipeline of Stable Diffusion, 1, 2 or XL.
        sample_latents: Whether latents are drawn, or their mean is taken; ``None`` for what its
            training script does.
        cache: A folder for latents and tokens.
        given: Arguments of training that differ from its script's defaults.

    Raises:
        ValueError: If it is another.
    """
    kinds = {cls.__name__ for cls in type(pipeline).__mro__}
    xl = "StableDiffusionXLPipeline" in kinds
    if not xl and "StableDiffusionPipeline" not in kinds:
        raise ValueError(
            f"text_encoders=True arrived for a {type(pipeline).__name__}. Text encoders can be "
            "part of the network for Stable Diffusion 1, 2 and XL. For others pass a module of "
            "both to DenoisingObjective, which takes tokens."
        )
    check_inputs(pipeline, pipeline.unet)
    arguments = training_arguments(pipeline, given, sample_latents)
    names = _encoders_of(pipeline)
    encoders = {name: getattr(pipeline, name) for name in names}
    embed_tokens, clip_skip = embedded_xl if xl else embedded, arguments.get("clip_skip")
    if clip_skip is not None:
        embed_tokens = partial(embed_tokens, clip_skip=clip_skip)
    model = PromptedDenoiser(pipeline.unet, encoders, embed_tokens)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompts = list(condition["prompt"])
        tokens = {
            tokens_of(name): tokenized(
                getattr(pipeline, name.replace("text_encoder", "tokenizer")), prompts
            )
            for name in names
        }
        return tokens | ({"time_ids": _time_ids(x0, condition)} if xl else {})

    return prompted_parts(
        pipeline,
        model,
        embed,
        arguments.get("sample_latents", True),
        cache,
        also=_SIZES_XL if xl else (),
        shared=("time_ids",),
        encoders=(),  # they belong to the network: tokens do not depend on their weights
        arguments=arguments,
    )
