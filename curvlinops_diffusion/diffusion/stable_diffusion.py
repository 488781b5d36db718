"""The objectives of Stable Diffusion's pipelines, versions 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.diffusion.prompted import (
    Embed,
    PipelineParts,
    Training,
    prompted_parts,
)

# what of an image's sizes Stable Diffusion XL may be given
_SIZES_XL = ("original_size", "crops_coords_top_left", "target_size", "time_ids")


def stable_diffusion(pipeline: Any, training: Training) -> PipelineParts:
    """``StableDiffusionPipeline``, versions 1 and 2, and ``StableDiffusionXLPipeline``.

    For XL, what training gave the network of each image may stand beside the prompt:
    ``original_size`` and ``crops_coords_top_left`` and ``target_size``, ``[B, 2]`` each (height or
    top first), or all of it as ``time_ids``, ``[B, 6]``. Else images count as uncropped and of the
    size they have.
    """
    _check_inputs(pipeline, pipeline.unet)
    embed = partial(_embed, pipeline, training)
    return prompted_parts(pipeline, pipeline.unet, embed, training, also=_sizes_of(pipeline))


def inpainting(pipeline: Any, training: Training) -> PipelineParts:
    """``StableDiffusionInpaintPipeline`` and ``StableDiffusionXLInpaintPipeline``.

    ``'mask_image'`` stands beside each image and prompt, ``[B, 1, H, W]``, one where the network
    was to paint; the network sees it at the latents' size, and the mean latents of the image
    without what is masked. A UNet that takes latents alone was not trained on masks, and needs
    none.
    """
    takes, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes == latents:
        return stable_diffusion(pipeline, training)
    if takes != 2 * latents + 1:
        raise ValueError(
            f"A UNet that paints into images must take latents ({latents} channels), a mask (1) "
            f"and the masked image's latents ({latents}), got one of {takes} channels."
        )
    encoder = LatentEncoder(pipeline.vae, sample=False)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        mask = _checked_image("mask_image", condition, x0, 1).to(x0)
        mask = (mask >= 0.5).to(x0)
        masked_latents = encoder(x0 * (1 - mask), {}).mean
        return {
            "mask": interpolate(mask, masked_latents.shape[2:]),
            "masked_latents": masked_latents,
        }

    return _with_image(pipeline, InpaintingDenoiser(pipeline.unet), embed, training)


def controlled(pipeline: Any, training: Training) -> PipelineParts:
    """``StableDiffusionControlNetPipeline`` and ``StableDiffusionXLControlNetPipeline``.

    ``'conditioning_image'`` stands beside each image and prompt, ``[B, 3, H, W]`` in [0, 1].
    """
    _check_inputs(pipeline, pipeline.unet)
    if not hasattr(pipeline.controlnet, "config"):
        raise ValueError(
            "The pipeline must have a single ControlNet, as each is trained by itself, got a "
            f"{type(pipeline.controlnet).__name__}."
        )
    model = ControlledDenoiser(pipeline.unet, pipeline.controlnet)
    ((name, channels),) = model.images.items()

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return {"controlnet_cond": _checked_image(name, condition, x0, channels)}

    return _with_image(pipeline, model, embed, training)


def _with_image(
    pipeline: Any,
    model: InpaintingDenoiser | ControlledDenoiser,
    embed_image: Embed,
    training: Training,
) -> PipelineParts:
    """The parts of a pipeline whose network is shown another image, which is never dropped."""
    embed_prompt = partial(_embed, pipeline, training)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        return embed_prompt(x0, condition) | embed_image(x0, condition)

    also = (*model.images, *_sizes_of(pipeline))
    return prompted_parts(pipeline, model, embed, training, also=also, embed_null=embed_prompt)


def _checked_image(name: str, condition: dict[str, Any], x0: Tensor, channels: int) -> Tensor:
    """An image in [0, 1] beside the images, of their size."""
    image, shape = condition.get(name), (len(x0), channels, *x0.shape[2:])
    if isinstance(image, Tensor) and image.shape == shape:
        low, high = float(image.min()), float(image.max())
        if low >= 0 and high <= 1:
            return image
        found = f"numbers from {low:g} to {high:g}"
    else:
        found = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else "none"
    raise ValueError(
        f"'{name}' must hold numbers in [0, 1] of shape {shape} beside images and prompts, got "
        f"{found}."
    )


def with_text_encoders(pipeline: Any, training: Training) -> PipelineParts:
    """A pipeline of Stable Diffusion whose text encoders were trained as well."""
    _check_inputs(pipeline, pipeline.unet)
    xl, names = _is_xl(pipeline), _encoders_of(pipeline)
    skipped = training.arguments.get("clip_skip") or 0
    embed_tokens = partial(embedded_xl if xl else embedded, clip_skip=skipped)
    encoders = {name: getattr(pipeline, name) for name in names}
    model = PromptedDenoiser(pipeline.unet, encoders, embed_tokens)

    def embed(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        tokens = _tokens(pipeline, training, condition["prompt"])
        named = {tokens_of(name): ids for name, ids in zip(names, tokens, strict=True)}
        return named | ({"time_ids": _time_ids(x0, condition)} if xl else {})

    return prompted_parts(
        pipeline,
        model,
        embed,
        training,
        also=_sizes_of(pipeline),
        shared=("time_ids",),
        encoders=(),  # they belong to the network: tokens do not depend on their weights
    )


def _check_inputs(pipeline: Any, model: Any) -> None:
    """Check that the network takes latents and prompts, and nothing else."""
    takes, latents = model.config.get("in_channels"), pipeline.vae.config.latent_channels
    own = "Pass denoiser and scheduler to DenoisingObjective, and what else it takes in the data."
    if takes not in (None, latents):
        raise ValueError(
            f"The network takes {takes} channels, and latents have {latents}: it was trained on "
            f"more (a mask, another image) than a {type(pipeline).__name__} gives it. {own}"
        )
    if model.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "The network takes an embedding of the guidance scale (time_cond_proj_dim, as latent "
            f"consistency models do), which training chose. {own}"
        )


def _is_xl(pipeline: Any) -> bool:
    return hasattr(pipeline, "text_encoder_2")


def _encoders_of(pipeline: Any) -> list[str]:
    """The names of the text encoders."""
    return ["text_encoder", "text_encoder_2"] if _is_xl(pipeline) else ["text_encoder"]


def _tokens(pipeline: Any, training: Training, prompts: Iterable[str]) -> list[Tensor]:
    """The tokens of prompts for each text encoder."""
    length, texts = training.arguments.get("max_token_length"), list(prompts)
    names = [name.replace("text_encoder", "tokenizer") for name in _encoders_of(pipeline)]
    return [tokenized(getattr(pipeline, name), texts, length) for name in names]


def _sizes_of(pipeline: Any) -> tuple[str, ...]:
    """The entries of the data that embedding prompts reads beside them."""
    return _SIZES_XL if _is_xl(pipeline) else ()


def _embed(
    pipeline: Any, training: Training, x0: Tensor, condition: Mapping[str, Any]
) -> dict[str, Any]:
    """Embed prompts, with the images' sizes beside them for XL."""
    xl, clip_skip = _is_xl(pipeline), training.arguments.get("clip_skip")
    encoders = [getattr(pipeline, name) for name in _encoders_of(pipeline)]
    added = {"time_ids": _time_ids(x0, condition)} if xl else {}
    # parts no pipeline knows; to skip layers, that of 1 and 2 looks for those of transformers 4
    if training.arguments.get("max_token_length") or (clip_skip is not None and not xl):
        every = zip(_tokens(pipeline, training, condition["prompt"]), encoders, strict=True)
        tokens = [ids.to(encoder.device) for ids, encoder in every]
        return (embedded_xl if xl else embedded)(encoders, tokens, added, clip_skip or 0)
    states, _, *pooled = pipeline.encode_prompt(
        condition["prompt"],
        device=encoders[-1].device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )
    if not xl:
        return {"encoder_hidden_states": states}
    added = {"text_embeds": pooled[0], "time_ids": added["time_ids"].to(states)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def _time_ids(x0: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """Original size, top left corner of the crop and target size of each image, ``[B, 6]``."""
    B, _, H, W = x0.shape
    parts = {"original_size": (H, W), "crops_coords_top_left": (0, 0), "target_size": (H, W)}

    def of_shape(name: str, default: Any, shape: tuple[int, ...]) -> Tensor:
        found = torch.as_tensor(condition.get(name, torch.tensor(default).expand(shape)))
        if found.shape != shape:
            raise ValueError(f"'{name}' must have shape {shape}, got {tuple(found.shape)}.")
        return found

    given = [name for name in parts if name in condition]
    if "time_ids" in condition:
        if given:
            raise ValueError(f"A batch must have either 'time_ids' or {given}, got both.")
        return of_shape("time_ids", 0, (B, 6))
    columns = [of_shape(name, default, (B, 2)) for name, default in parts.items()]
    return torch.cat([column.cpu().double() for column in columns], 1)


# ---------------------------------------------------------------------------------------------
# A UNet and what it is trained with, as one network
# ---------------------------------------------------------------------------------------------


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
        embed: Callable[[list[nn.Module], list[Tensor], dict[str, Any]], dict[str, Any]],
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


def tokenized(tokenizer: Any, prompts: list[str], length: int | None = None) -> Tensor:
    """Tokens of prompts, ``[B, L]``, as the pipelines make them, of the encoder's length ``L``.

    Or ``[B, K, L]`` for a longer ``length`` of ``K`` times ``L - 2`` tokens between the first and
    the last, which are those of each part (kohya's ``--max_token_length``).
    """
    L = tokenizer.model_max_length
    inner = L - 2 if length is None else length
    if inner % (L - 2) != 0:
        raise ValueError(
            f"`max_token_length` must be a multiple of {L - 2}, got {length}. Pass training's."
        )
    ids: Tensor = tokenizer(
        prompts, padding="max_length", max_length=inner + 2, truncation=True, return_tensors="pt"
    ).input_ids
    if inner == L - 2:
        return ids
    inside = ids[:, 1:-1].unflatten(1, (-1, L - 2))
    first, last = (ids[:, n, None, None].expand(*inside.shape[:2], 1) for n in (0, -1))
    parts = torch.cat([first, inside, last], 2)
    # a part of words alone ends with the end, a part of none begins with it
    full = (inside[..., -1] != tokenizer.eos_token_id) & (inside[..., -1] != tokenizer.pad_token_id)
    parts[..., -1] = torch.where(full, tokenizer.eos_token_id, parts[..., -1])
    empty = parts[..., 1] == tokenizer.pad_token_id
    parts[..., 1] = torch.where(empty, tokenizer.eos_token_id, parts[..., 1])
    return parts


def _joined(states: Tensor, ids: Tensor) -> Tensor:
    """The states of the parts of prompts, one after the other: the first, those inside, the last.

    ``[B K, L, C]`` becomes ``[B, K (L - 2) + 2, C]``; without parts they are as they are.
    """
    if ids.ndim == 2:
        return states
    parts = states.unflatten(0, ids.shape[:2])
    return torch.cat([parts[:, 0, :1], parts[:, :, 1:-1].flatten(1, 2), parts[:, -1, -1:]], 1)


def embedded(
    encoders: list[Any], tokens: list[Tensor], entries: dict[str, Any], clip_skip: int = 0
) -> dict[str, Any]:
    """The condition of Stable Diffusion 1 and 2, without the last ``clip_skip`` layers."""
    (encoder,), (ids,) = encoders, tokens
    flat = ids.reshape(-1, ids.shape[-1])
    if clip_skip == 0:
        return {"encoder_hidden_states": _joined(encoder(flat)[0], ids)}
    states = encoder(flat, output_hidden_states=True).hidden_states[-1 - clip_skip]
    # transformers 5 has the layers in the model itself
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return {"encoder_hidden_states": _joined(norm(states), ids)}


def embedded_xl(
    encoders: list[Any], tokens: list[Tensor], entries: dict[str, Any], clip_skip: int = 0
) -> dict[str, Any]:
    """The condition of Stable Diffusion XL, likewise."""
    outputs = [
        encoder(ids.reshape(-1, ids.shape[-1]), output_hidden_states=True)
        for encoder, ids in zip(encoders, tokens, strict=True)
    ]
    layers = [output.hidden_states[-2 - clip_skip] for output in outputs]
    states = torch.cat([_joined(z, ids) for z, ids in zip(layers, tokens, strict=True)], -1)
    parts = len(layers[-1]) // len(tokens[-1])  # of which the first is pooled
    pooled = outputs[-1][0][::parts]
    added = {"text_embeds": pooled, "time_ids": entries["time_ids"].to(states)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}
