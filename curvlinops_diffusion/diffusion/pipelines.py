"""Read the objective that a denoiser was trained with off its pipeline in ``diffusers``.

A kind of pipeline is an entry of :data:`PIPELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

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
from curvlinops_diffusion.diffusion.schedulers import noise_process
from curvlinops_diffusion.diffusion.text_encoders import (
    PromptedDenoiser,
    embedded,
    embedded_xl,
    tokenized,
    tokens_of,
)

Cache = str | PathLike[str] | None


@dataclass(frozen=True)
class PipelineParts:
    """The parts of an objective.

    Attributes:
        model: The denoiser.
        process: The noise process.
        encode: From images and labels or prompts to latents and embeddings; ``None`` for neither.
        null_condition: Returns what a dropped condition is replaced by.
        model_kwargs: Further arguments of the denoiser.
    """

    model: nn.Module
    process: NoiseProcess
    encode: LatentEncoder | None
    null_condition: Callable[[], Mapping[str, Any]]
    model_kwargs: Callable[[Tensor, dict[str, Any]], Any] | None = None


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


def _prompted(
    pipeline: Any,
    model: nn.Module,
    embed: Callable[[Tensor, dict[str, Any]], dict[str, Any]],
    sample: bool,
    cache: Cache,
    process: NoiseProcess | None = None,
    pack: Callable[[Tensor], Tensor] | None = None,
    model_kwargs: Callable[[Tensor, dict[str, Any]], Any] | None = None,
    also: Sequence[str] = (),
    shared: Sequence[str] = ("img_ids", "guidance"),
    size: int = 8,
    vae: Any = None,
    encoders: Sequence[nn.Module] | None = None,
) -> PipelineParts:
    """Take a pipeline with prompts apart.

    Args:
        pipeline: The pipeline.
        model: Its denoiser.
        embed: Maps images and prompts to the condition.
        sample: Whether latents are drawn.
        cache: A folder for latents and embeddings.
        process: The noise process, if it is not the scheduler's.
        pack: Maps latents to the form that the denoiser takes.
        model_kwargs: Further arguments of the denoiser.
        also: Entries that ``embed`` reads beside the prompts.
        shared: Entries of the condition that do not depend on the prompt.
        size: Pixels of an image that the pipeline takes.
        vae: The autoencoder, if it is not the pipeline's as it is.
        encoders: What ``embed`` runs; ``None`` for the pipeline's text encoders.
    """
    if encoders is None:
        own = [getattr(pipeline, f"text_encoder{i}", None) for i in ("", "_2", "_3")]
        encoders = [encoder for encoder in own if encoder is not None]
    tokenizers = [getattr(pipeline, f"tokenizer{i}", None) for i in ("", "_2", "_3")]
    settings = [[t.model_max_length, len(t)] for t in tokenizers if t is not None]

    def embed_prompts(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        if "prompt" not in condition:
            raise ValueError(
                f"A batch arrived with condition {sorted(condition)} for a pipeline with prompts. "
                "Pass pairs (images, prompts), or dicts with keys 'x0' and 'prompt'."
            )
        unknown = sorted(condition.keys() - {"prompt", *also})
        if unknown:
            known = ", ".join(f"'{name}'" for name in ("prompt", *also))
            raise ValueError(
                f"A batch arrived with {unknown} beside the images, of which a "
                f"{type(pipeline).__name__} makes nothing. It takes {known}. Leave the others out, "
                "or pass denoiser and scheduler to DenoisingObjective, with an encode= that uses "
                "them."
            )
        return embed(x0, condition)

    def null_condition() -> Mapping[str, Any]:
        with torch.no_grad():
            embedded = embed(torch.zeros(1, 3, size, size), {"prompt": [""]})
        for name in shared:  # these are not dropped
            embedded.pop(name, None)
        embedded.get("added_cond_kwargs", {}).pop("time_ids", None)
        return _first(embedded)

    return PipelineParts(
        model,
        noise_process(pipeline.scheduler) if process is None else process,
        LatentEncoder(
            pipeline.vae if vae is None else vae,
            sample=sample,
            embed=embed_prompts,
            pack=pack,
            cache=cache,
            encoders=encoders,
            settings=settings,
        ),
        null_condition,
        model_kwargs,
    )


def _check_inputs(pipeline: Any, model: Any) -> None:
    """Check that the network takes latents and prompts, and nothing else.

    Raises:
        ValueError: If it takes more.
    """
    takes, latents = model.config.get("in_channels"), pipeline.vae.config.latent_channels
    own = "Pass denoiser and scheduler to DenoisingObjective, and what else it takes in the data."
    if takes not in (None, latents, 4 * latents):
        raise ValueError(
            f"The network takes {takes} channels, and latents have {latents}: it was trained on "
            f"more (a mask, another image) than a {type(pipeline).__name__} gives it. {own}"
        )
    if model.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "The network takes an embedding of the guidance scale (time_cond_proj_dim, as latent "
            f"consistency models do), which training chose. {own}"
        )


def _first(condition: Mapping[str, Any]) -> dict[str, Any]:
    """The first example of every entry that has some."""
    return {
        k: _first(v) if isinstance(v, Mapping) else v[0]
        for k, v in condition.items()
        if v is not None
    }


def _stable_diffusion(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``StableDiffusionPipeline``, versions 1 and 2."""
    _check_inputs(pipeline, pipeline.unet)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        device = pipeline.text_encoder.device
        states, _ = pipeline.encode_prompt(condition["prompt"], device, 1, False)
        return {"encoder_hidden_states": states}

    return _prompted(pipeline, pipeline.unet, embed, sample, cache)


def _stable_diffusion_xl(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``StableDiffusionXLPipeline``.

    What training told the network of each image may stand beside the prompt: ``original_size`` and
    ``crops_coords_top_left`` and ``target_size``, ``[B, 2]`` each (height or top first), or all of
    it as ``time_ids``, ``[B, 6]``. Else images count as uncropped and of the size they have.
    """
    _check_inputs(pipeline, pipeline.unet)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        states, _, pooled, _ = pipeline.encode_prompt(
            condition["prompt"],
            device=pipeline.text_encoder_2.device,
            do_classifier_free_guidance=False,
        )
        added = {"text_embeds": pooled, "time_ids": _time_ids(x0, condition).to(states)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    return _prompted(pipeline, pipeline.unet, embed, sample, cache, also=_SIZES_XL)


# what of an image's sizes Stable Diffusion XL may be told
_SIZES_XL = ("original_size", "crops_coords_top_left", "target_size", "time_ids")


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


def with_text_encoders(pipeline: Any, sample_latents: bool, cache: Cache) -> PipelineParts:
    """Take a pipeline apart whose text encoders were trained as well.

    Args:
        pipeline: A pipeline of Stable Diffusion, 1, 2 or XL.
        sample_latents: Whether latents are drawn, or their mean is taken.
        cache: A folder for latents and tokens.

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
    _check_inputs(pipeline, pipeline.unet)
    names = ["text_encoder", "text_encoder_2"] if xl else ["text_encoder"]
    encoders = {name: getattr(pipeline, name) for name in names}
    model = PromptedDenoiser(pipeline.unet, encoders, embedded_xl if xl else embedded)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompts = list(condition["prompt"])
        tokens = {
            tokens_of(name): tokenized(
                getattr(pipeline, name.replace("text_encoder", "tokenizer")), prompts
            )
            for name in names
        }
        return tokens | ({"time_ids": _time_ids(x0, condition)} if xl else {})

    return _prompted(
        pipeline,
        model,
        embed,
        sample_latents,
        cache,
        also=_SIZES_XL if xl else (),
        shared=("time_ids",),
        encoders=(),  # they belong to the network: tokens do not depend on their weights
    )


def _stable_diffusion_3(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``StableDiffusion3Pipeline``: flow matching."""
    _check_inputs(pipeline, pipeline.transformer)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompt = condition["prompt"]
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    return _prompted(pipeline, pipeline.transformer, embed, sample, cache)


def _flux(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """``FluxPipeline``: flow matching on latents packed into tokens of 2×2, guidance distilled in.

    The guidance that a distilled model is told is 1, as when it is trained further.
    """
    transformer = pipeline.transformer
    _check_inputs(pipeline, transformer)
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
        if transformer.config.guidance_embeds:
            embedded["guidance"] = torch.ones(len(states), device=states.device)
        return embedded

    def positions(x_t: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        tokens = condition["encoder_hidden_states"].shape[-2]
        # the model wants those of one example, which all share
        return {"img_ids": condition["img_ids"][0], "txt_ids": torch.zeros(tokens, 3).to(x_t)}

    return _prompted(pipeline, transformer, embed, sample, cache, process, packed, positions)


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def _by_interface(pipeline: Any, sample: bool, cache: Cache) -> PipelineParts:
    """Any other pipeline from prompts to images: what it shows its network is what training did."""
    model = _denoiser(pipeline)
    found = interface_of(pipeline, model)
    shared = found.shared
    process, (factor, summand) = noise_process(pipeline.scheduler), found.scale
    if found.scale != (1.0, 0.0):
        process = replace(process, timesteps_T=process.timesteps_T * factor + summand)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        prompts, (height, width) = condition["prompt"], x0.shape[2:]
        embedded = seen_of(pipeline, model, prompts, (height, width)).condition
        return embedded | {name: repeated(embedded[name], len(x0)) for name in shared}

    def of_one(x_t: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return {name: condition[name][0] for name in shared}

    return _prompted(
        pipeline,
        model,
        embed,
        sample,
        cache,
        process,
        found.pack,
        of_one,
        shared=(*shared, "guidance"),
        size=SIZE,
        vae=Frames(pipeline.vae) if found.frames else None,
    )


PIPELINES: dict[str, Callable[[Any, bool, Cache], PipelineParts]] = {
    "DDPMPipeline": _pixels,
    "DDIMPipeline": _pixels,
    "LDMPipeline": _latents,
    "DiTPipeline": _dit,
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
}
