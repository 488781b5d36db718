"""Read the objective that a denoiser was trained with off its pipeline in ``diffusers``.

A kind of pipeline is an entry of :data:`PIPELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import Tensor

from curvlinops_diffusion.diffusion.interface import (
    BY_HAND,
    SIZE,
    AdaptedDenoiser,
    Frames,
    interface_of,
    seen_of,
)
from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.diffusion.noise import as_trained, noise_process
from curvlinops_diffusion.diffusion.prompted import (
    PipelineParts,
    Training,
    prompted_parts,
)
from curvlinops_diffusion.diffusion.stable_diffusion import (
    controlled,
    inpainting,
    stable_diffusion,
    with_text_encoders,
)
from curvlinops_diffusion.diffusion.training_arguments import OF_SCHEDULER, training_arguments


def pipeline_parts(
    pipeline: Any,
    sample_latents: bool | None = None,
    cache: str | PathLike[str] | None = None,
    given: Mapping[str, Any] | None = None,
    text_encoders: bool = False,
) -> PipelineParts:
    """Take a pipeline apart."""
    kinds = [cls.__name__ for cls in type(pipeline).__mro__]
    take_apart = next((PIPELINES[kind] for kind in kinds if kind in PIPELINES), None)
    needed = ("vae", "scheduler", "encode_prompt")
    if all(hasattr(pipeline, name) for name in needed) and _denoiser(pipeline) is not None:
        take_apart = take_apart or by_interface
    if text_encoders and take_apart is not stable_diffusion:
        raise ValueError(
            "`text_encoders` can be part of the network for Stable Diffusion 1, 2 and XL, got a "
            f"{type(pipeline).__name__}. For others pass a module of both to DenoisingObjective, "
            "which takes tokens."
        )
    if take_apart is None:
        raise ValueError(
            f"The pipeline must be one of {sorted(PIPELINES)}, or another from prompts to images "
            f"by latents, got {type(pipeline).__name__}. {BY_HAND}"
        )
    arguments = training_arguments(pipeline, given, sample_latents)
    if scheduled := {name: arguments[name] for name in OF_SCHEDULER if name in arguments}:
        pipeline = copy(pipeline)  # that of the user stays as it is
        pipeline.scheduler = as_trained(pipeline.scheduler, **scheduled)
    take_apart = with_text_encoders if text_encoders else take_apart
    return replace(take_apart(pipeline, Training(arguments, cache)), arguments=arguments)


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def _nothing() -> Mapping[str, Any]:
    raise ValueError("`condition_dropout` must be 0 for a pipeline without a condition, got more.")


def _pixels(pipeline: Any, training: Training) -> PipelineParts:
    """``DDPMPipeline`` and ``DDIMPipeline``."""
    return PipelineParts(pipeline.unet, noise_process(pipeline.scheduler), None, _nothing)


def _latents(pipeline: Any, training: Training) -> PipelineParts:
    """``LDMPipeline``: unconditional, on the latents of a ``VQModel``."""
    encode = LatentEncoder(pipeline.vqvae, sample=training.sample, cache=training.cache)
    return PipelineParts(pipeline.unet, noise_process(pipeline.scheduler), encode, _nothing)


def _dit(pipeline: Any, training: Training) -> PipelineParts:
    """``DiTPipeline``: class labels, the one after the last for no class."""
    encode = LatentEncoder(pipeline.vae, sample=training.sample, cache=training.cache)
    process, model = noise_process(pipeline.scheduler), pipeline.transformer
    null = {"class_labels": model.config.num_embeds_ada_norm}
    return PipelineParts(model, process, encode, lambda: null)


def by_interface(pipeline: Any, training: Training) -> PipelineParts:
    """Any other pipeline from prompts to images: what it shows its network is what training did."""
    network, arguments = _denoiser(pipeline), training.arguments
    found = interface_of(pipeline, network, arguments)
    shared, model = found.shared, network
    if found.listed or found.ragged or found.sign < 0:
        model = AdaptedDenoiser(network, found)
    process, (factor, summand) = noise_process(pipeline.scheduler), found.scale
    if arguments.get("mirrored_levels"):
        # train_dreambooth_lora_lumina2.py takes the scheduler's (shifted) share of noise for the
        # share of data; the network is given the time of the share of noise, as ever
        alphas_T, sigmas_T = process.sigmas_T.flip(0), process.alphas_T.flip(0)
        times_T = pipeline.scheduler.config.num_train_timesteps - process.timesteps_T.flip(0)
        process = replace(process, alphas_T=alphas_T, sigmas_T=sigmas_T, timesteps_T=times_T)
    factor = arguments.get("timestep_scale", factor)  # Sana's script leaves the config's out
    if (factor, summand) != (1.0, 0.0):
        # divided, as trainers divide: a product with 1/1000 differs in the last bits
        process = replace(process, timesteps_T=process.timesteps_T / (1 / factor) + summand)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        # the network is the pipeline's: enclosed, its weights would be among what latents are of
        prompts, (height, width) = condition["prompt"], x0.shape[2:]
        seen = seen_of(pipeline, _denoiser(pipeline), prompts, (height, width), arguments)
        return seen.condition | {
            name: z.expand(len(x0), *z.shape) if isinstance(z, Tensor) else [z] * len(x0)
            for name, z in seen.condition.items()
            if name in shared
        }

    def of_one(x_t: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return {name: condition[name][0] for name in shared}

    return prompted_parts(
        pipeline,
        model,
        embed,
        training,
        process=process,
        pack=found.pack,
        model_kwargs=of_one,
        shared=(*shared, *found.of_size, "guidance"),
        size=SIZE,
        vae=Frames(pipeline.vae) if found.frames else None,
    )


PIPELINES: dict[str, Callable[[Any, Training], PipelineParts]] = {
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
}
