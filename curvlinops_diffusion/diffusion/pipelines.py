"""Read the objective that a denoiser was trained with off its pipeline in ``diffusers``.

A kind of pipeline is an entry of :data:`PIPELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.adapted_denoiser import AdaptedDenoiser
from curvlinops_diffusion.diffusion.interface import (
    BY_HAND,
    SIZE,
    Frames,
    interface_of,
    packed,
    repeated,
    seen_of,
)
from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.diffusion.prompted import (
    Cache,
    PipelineParts,
    check_inputs,
    prompted_parts,
)
from curvlinops_diffusion.diffusion.schedulers import noise_process
from curvlinops_diffusion.diffusion.stable_diffusion import controlled, inpainting, stable_diffusion


def pipeline_parts(pipeline: Any, sample_latents: bool, cache: Cache) -> PipelineParts:
    """Take a pipeline apart.

    Args:
        pipeline: The pipeline.
        sample_latents: Whether latents are drawn, or their mean is taken.
        cache: A folder for latents and embeddings.

    Raises:
        ValueError: If the pipeline is of no known kind.
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in PIPELINES:
            return PIPELINES[cls.__name__](pipeline, sample_latents, cache)
    needed = ("vae", "scheduler", "encode_prompt")
    if all(hasattr(pipeline, name) for name in needed) and _denoiser(pipeline) is not None:
        return _by_interface(pipeline, sample_latents, cache)
    raise ValueError(
        f"The pipeline arrived as {type(pipeline).__name__}. Known are {sorted(PIPELINES)}, and "
        f"those from prompts to images by latents. {BY_HAND}"
    )


def _nothing() -> Mapping[str, Any]:
    raise ValueError(
        "condition_dropout arrived for a pipeline without a condition. Pass condition_dropout=0."
    )


def _pixels(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``DDPMPipeline`` and ``DDIMPipeline``."""
    return PipelineParts(pipeline.unet, noise_process(pipeline.scheduler), None, _nothing)


def _latents(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``LDMPipeline``: unconditional, on the latents of a ``VQModel``."""
    encode = LatentEncoder(pipeline.vqvae, sample=sample, cache=cache)
    return PipelineParts(pipeline.unet, noise_process(pipeline.scheduler), encode, _nothing)


def _dit(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``DiTPipeline``: class labels, the one after the last for no class."""
    encode = LatentEncoder(pipeline.vae, sample=sample, cache=cache)
    classes = pipeline.transformer.config.num_embeds_ada_norm
    return PipelineParts(
        pipeline.transformer,
        noise_process(pipeline.scheduler),
        encode,
        lambda: {"class_labels": classes},
    )


def _stable_diffusion_3(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``StableDiffusion3Pipeline``: flow matching."""
    check_inputs(pipeline, pipeline.transformer)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompt = condition["prompt"]
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    return prompted_parts(pipeline, pipeline.transformer, embed, sample, cache)


def _flux(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``FluxPipeline``: flow matching on latents packed into tokens of 2×2, guidance distilled in.

    The guidance that a distilled model is told is 1, as when it is trained further.
    """
    transformer = pipeline.transformer
    check_inputs(pipeline, transformer)
    guided = bool(transformer.config.guidance_embeds)
    process = noise_process(pipeline.scheduler)
    process = replace(process, timesteps_T=process.timesteps_T / 1000)  # the model multiplies

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompt = condition["prompt"]
        states, pooled, _ = pipeline.encode_prompt(prompt, prompt)
        H, W = (size // (2 * pipeline.vae_scale_factor) for size in x0.shape[2:])
        ids = torch.zeros(H, W, 3, device=states.device)
        ids[..., 1] = torch.arange(H).unsqueeze(1)
        ids[..., 2] = torch.arange(W)
        embedded = {
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
            "img_ids": ids.flatten(0, 1).repeat(len(states), 1, 1),
        }
        if guided:
            embedded["guidance"] = torch.ones(len(states), device=states.device)
        return embedded

    def positions(x_t: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        tokens = condition["encoder_hidden_states"].shape[-2]
        # the model wants those of one example, which all share
        return {"img_ids": condition["img_ids"][0], "txt_ids": torch.zeros(tokens, 3).to(x_t)}

    return prompted_parts(pipeline, transformer, embed, sample, cache, process, packed, positions)


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def _by_interface(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """Any other pipeline from prompts to images: what it shows its network is what training did."""
    network = _denoiser(pipeline)
    found = interface_of(pipeline, network)
    shared, model = found.shared, network
    if found.listed or found.ragged or found.sign < 0:
        model = AdaptedDenoiser(network, found.names, found.listed, found.ragged, found.sign)
    process, (factor, summand) = noise_process(pipeline.scheduler), found.scale
    if found.scale != (1.0, 0.0):
        process = replace(process, timesteps_T=process.timesteps_T * factor + summand)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        # the network is the pipeline's: enclosed, its weights would be among what latents are of
        prompts, (height, width) = condition["prompt"], x0.shape[2:]
        embedded = seen_of(pipeline, _denoiser(pipeline), prompts, (height, width)).condition
        return embedded | {name: repeated(embedded[name], len(x0)) for name in shared}

    def of_one(x_t: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return {name: condition[name][0] for name in shared}

    return prompted_parts(
        pipeline,
        model,
        embed,
        sample,
        cache,
        process,
        found.pack,
        of_one,
        shared=(*shared, *found.of_size, "guidance"),
        size=SIZE,
        vae=Frames(pipeline.vae) if found.frames else None,
    )


PIPELINES: dict[str, Callable[[Any, bool, Cache], PipelineParts]] = {
    "DDPMPipeline": _pixels,
    "DDIMPipeline": _pixels,
    "LDMPipeline": _latents,
    "DiTPipeline": _dit,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion,
    "StableDiffusionInpaintPipeline": inpainting,
    "StableDiffusionXLInpaintPipeline": inpainting,
    "StableDiffusionControlNetPipeline": controlled,
    "StableDiffusionXLControlNetPipeline": controlled,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
}
