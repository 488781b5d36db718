"""The parts of an objective, and what all pipelines from prompts to images share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.diffusion.noise import NoiseProcess
from curvlinops_diffusion.diffusion.schedulers import noise_process
from curvlinops_diffusion.runtime.digests import digest_of

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
        arguments: The arguments of training (:func:`training_arguments`).
    """

    model: nn.Module
    process: NoiseProcess
    encode: LatentEncoder | None
    null_condition: Callable[[], Mapping[str, Any]]
    model_kwargs: Callable[[Tensor, dict[str, Any]], Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def prompted_parts(
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
    embed_null: Callable[[Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
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
        embed_null: Maps an empty prompt to what a dropped condition is replaced by; ``None`` for
            ``embed``.
        arguments: The arguments of training.
    """
    if encoders is None:
        own = [getattr(pipeline, f"text_encoder{i}", None) for i in ("", "_2", "_3")]
        encoders = [encoder for encoder in own if encoder is not None]
    tokenizers = [getattr(pipeline, f"tokenizer{i}", None) for i in ("", "_2", "_3")]
    plain = {k: v for k, v in vars(pipeline).items() if isinstance(v, bool | int | float | str)}
    own_settings = {k: v for k, v in sorted(plain.items()) if not k.startswith("_")}
    settings: list[Any] = [own_settings]
    settings += [tokenizer_digest(t) for t in tokenizers if t is not None]
    embedding = {k: v for k, v in arguments.items() if k != "sample_latents"}
    settings += [embedding] if embedding else []

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
            embedded = (embed_null or embed)(torch.zeros(1, 3, size, size), {"prompt": [""]})
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
        arguments,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of the tokens that a tokenizer of ``transformers`` makes of texts.

    Its vocabulary, and where it says so its rules, without the padding of its last call.
    """
    rules = {}
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    lasting = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    vocabulary = {} if "model" in rules else tokenizer.get_vocab()
    template = getattr(tokenizer, "chat_template", None)
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    own = [tokenizer.model_max_length, len(tokenizer), tokenizer.padding_side, special]
    return digest_of(json.dumps([own, lasting, vocabulary, template], sort_keys=True))


def check_inputs(pipeline: Any, model: Any) -> None:
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
