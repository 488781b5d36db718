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
from curvlinops_diffusion.diffusion.noise import NoiseProcess
from curvlinops_diffusion.diffusion.prompted import (
    Cache,
    PipelineParts,
    check_inputs,
    prompted_parts,
)
from curvlinops_diffusion.diffusion.schedulers import noise_process
from curvlinops_diffusion.diffusion.stable_diffusion import controlled, inpainting, stable_diffusion
from curvlinops_diffusion.diffusion.training_arguments import training_arguments

Arguments = Mapping[str, Any]


def pipeline_parts(
    pipeline: Any, sample_latents: bool | None, cache: Cache, given: Arguments | None = None
) -> PipelineParts:
    """Take a pipeline apart.

    Args:
        pipeline: The pipeline.
        sample_latents: Whether latents are drawn, or their mean is taken; ``None`` for what its
            training script does.
        cache: A folder for latents and embeddings.
        given: Arguments of training that differ from its script's defaults.

    Raises:
        ValueError: If the pipeline is of no known kind.
    """
    kinds = [cls.__name__ for cls in type(pipeline).__mro__]
    take_apart = next((PIPELINES[kind] for kind in kinds if kind in PIPELINES), None)
    needed = ("vae", "scheduler", "encode_prompt")
    if all(hasattr(pipeline, name) for name in needed) and _denoiser(pipeline) is not None:
        take_apart = take_apart or _by_interface
    if take_apart is not None:
        arguments = training_arguments(pipeline, given, sample_latents)
        return take_apart(pipeline, arguments.get("sample_latents", True), cache, arguments)
    raise ValueError(
        f"The pipeline arrived as {type(pipeline).__name__}. Known are {sorted(PIPELINES)}, and "
        f"those from prompts to images by latents. {BY_HAND}"
    )


def _nothing() -> Mapping[str, Any]:
    raise ValueError(
        "condition_dropout arrived for a pipeline without a condition. Pass condition_dropout=0."
    )


def _pixels(pipeline: Any, sample: bool, cache: Cache, arguments: Arguments) -> PipelineParts:
    """``DDPMPipeline`` and ``DDIMPipeline``."""
    return PipelineParts(
        pipeline.unet, noise_process(pipeline.scheduler), None, _nothing, arguments=arguments
    )


def _latents(pipeline: Any, sample: bool, cache: Cache, arguments: Arguments) -> PipelineParts:
    """``LDMPipeline``: unconditional, on the latents of a ``VQModel``."""
    encode = LatentEncoder(pipeline.vqvae, sample=sample, cache=cache)
    process = noise_process(pipeline.scheduler)
    return PipelineParts(pipeline.unet, process, encode, _nothing, arguments=arguments)


def _dit(pipeline: Any, sample: bool, cache: Cache, arguments: Arguments) -> PipelineParts:
    """``DiTPipeline``: class labels, the one after the last for no class."""
    encode = LatentEncoder(pipeline.vae, sample=sample, cache=cache)
    classes = pipeline.transformer.config.num_embeds_ada_norm
    return PipelineParts(
        pipeline.transformer,
        noise_process(pipeline.scheduler),
        encode,
        lambda: {"class_labels": classes},
        arguments=arguments,
    )


def _stable_diffusion_3(
    pipeline: Any, sample: bool, cache: Cache, arguments: Arguments
) -> PipelineParts:
    """``StableDiffusion3Pipeline``: flow matching."""
    check_inputs(pipeline, pipeline.transformer)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompt = condition["prompt"]
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt,
            prompt,
            prompt,
            do_classifier_free_guidance=False,
            clip_skip=arguments.get("clip_skip"),
            max_sequence_length=arguments["max_sequence_length"],
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    return prompted_parts(pipeline, pipeline.transformer, embed, sample, cache, arguments=arguments)


def _flux(pipeline: Any, sample: bool, cache: Cache, arguments: Arguments) -> PipelineParts:
    """``FluxPipeline``: flow matching on latents packed into tokens, guidance distilled in."""
    transformer = pipeline.transformer
    check_inputs(pipeline, transformer)
    process = noise_process(pipeline.scheduler)
    process = replace(process, timesteps_T=process.timesteps_T / 1000)  # the model multiplies

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompt = condition["prompt"]
        length = arguments["max_sequence_length"]
        states, pooled, _ = pipeline.encode_prompt(prompt, prompt, max_sequence_length=length)
        H, W = (size // (2 * pipeline.vae_scale_factor) for size in x0.shape[2:])
        ids = torch.zeros(H, W, 3, device=states.device)
        ids[..., 1] = torch.arange(H).unsqueeze(1)
        ids[..., 2] = torch.arange(W)
        embedded = {
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
            "img_ids": ids.flatten(0, 1).repeat(len(states), 1, 1),
        }
        if "guidance_scale" in arguments:
            guidance = float(arguments["guidance_scale"])
            embedded["guidance"] = torch.full((len(states),), guidance, device=states.device)
        return embedded

    def positions(x_t: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        tokens = condition["encoder_hidden_states"].shape[-2]
        # the model wants those of one example, which all share
        return {"img_ids": condition["img_ids"][0], "txt_ids": torch.zeros(tokens, 3).to(x_t)}

    return prompted_parts(
        pipeline,
        transformer,
        embed,
        sample,
        cache,
        process,
        packed,
        positions,
        arguments=arguments,
    )


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def _by_interface(
    pipeline: Any, sample: bool, cache: Cache, arguments: Arguments | None = None
) -> PipelineParts:
    """Any other pipeline from prompts to images: what it shows its network is what training did."""
    network = _denoiser(pipeline)
    told = training_arguments(pipeline) if arguments is None else arguments
    found = interface_of(pipeline, network, told)
    shared, model = found.shared, network
    if found.listed or found.ragged or found.sign < 0:
        model = AdaptedDenoiser(network, found.names, found.listed, found.ragged, found.sign)
    process, (factor, summand) = noise_process(pipeline.scheduler), found.scale
    if told.get("mirrored_levels"):
        process = _mirrored(process, pipeline.scheduler)
    factor = told.get("timestep_scale", factor)  # Sana's script leaves the config's out
    if (factor, summand) != (1.0, 0.0):
        process = replace(process, timesteps_T=process.timesteps_T * factor + summand)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        # the network is the pipeline's: enclosed, its weights would be among what latents are of
        prompts, (height, width) = condition["prompt"], x0.shape[2:]
        seen = seen_of(pipeline, _denoiser(pipeline), prompts, (height, width), told)
        embedded = seen.condition
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
        arguments=told,
    )


def _mirrored(process: NoiseProcess, scheduler: Any) -> NoiseProcess:
    """A flow whose share of data at each level is the scheduler's share of noise.

    So ``train_dreambooth_lora_lumina2.py`` draws its levels: ``x_t = (1 - s) eps + s x0`` with the
    scheduler's (shifted) ``s``. The network is told the time of the share of noise, as ever; only
    how often each share is drawn differs, where the scheduler has a shift.
    """
    end = scheduler.config.num_train_timesteps
    return replace(
        process,
        alphas_T=process.sigmas_T.flip(0),
        sigmas_T=process.alphas_T.flip(0),
        timesteps_T=(end - process.timesteps_T).flip(0),
    )


PIPELINES: dict[str, Callable[[Any, bool, Cache, Arguments], PipelineParts]] = {
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
