"""The parts of an objective, and what all pipelines from prompts to images share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.latents import LatentEncoder
from curvlinops_diffusion.diffusion.network_call import ModelKwargs
from curvlinops_diffusion.diffusion.noise import NoiseProcess, noise_process
from curvlinops_diffusion.diffusion.training_arguments import OF_SCHEDULER
from curvlinops_diffusion.runtime.digests import digest_of

#: Maps images and prompts to the condition that the network takes.
Embed = Callable[[Tensor, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """Arguments of a pipeline's training, and a folder for latents and embeddings."""

    arguments: Mapping[str, Any]
    cache: str | PathLike[str] | None = None

    @property
    def sample(self) -> bool:
        """True if latents were drawn, not their mean taken."""
        return bool(self.arguments.get("sample_latents", True))


@dataclass(frozen=True)
class PipelineParts:
    """The parts of an objective."""

    model: nn.Module
    process: NoiseProcess
    encode: LatentEncoder | None  # from images and labels or prompts to latents and embeddings
    null_condition: Callable[[], Mapping[str, Any]]  # what a dropped condition is replaced by
    model_kwargs: ModelKwargs | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of training


def prompted_parts(
    pipeline: Any,
    model: nn.Module,
    embed: Embed,
    training: Training,
    *,
    process: NoiseProcess | None = None,  # that of the scheduler
    pack: Callable[[Tensor], Tensor] | None = None,  # latents to the form that the denoiser takes
    model_kwargs: ModelKwargs | None = None,
    also: Sequence[str] = (),  # entries that ``embed`` reads beside the prompts
    shared: Sequence[str] = (),  # entries that no prompt decides
    size: int = 8,  # pixels of an image that the pipeline takes
    vae: Any = None,  # the pipeline's
    encoders: Sequence[nn.Module] | None = None,  # what ``embed`` runs: the text encoders
    embed_null: Embed | None = None,  # for the empty prompt: ``embed``
) -> PipelineParts:
    """Take a pipeline with prompts apart."""
    numbers = ("", "_2", "_3")
    if encoders is None:
        own = [getattr(pipeline, f"text_encoder{i}", None) for i in numbers]
        encoders = [encoder for encoder in own if encoder is not None]
    tokenizers = [getattr(pipeline, f"tokenizer{i}", None) for i in numbers]
    plain = {k: v for k, v in vars(pipeline).items() if isinstance(v, bool | int | float | str)}
    settings = [
        {k: v for k, v in sorted(plain.items()) if not k.startswith("_")},
        [_tokenizer_digest(t) for t in tokenizers if t is not None],
        {k: v for k, v in training.arguments.items() if k not in ("sample_latents", *OF_SCHEDULER)},
    ]

    def embed_prompts(x0: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(condition.keys() - {"prompt", *also})
        if "prompt" not in condition or unknown:
            raise ValueError(
                f"A {type(pipeline).__name__} takes "
                f"{', '.join(repr(name) for name in ('prompt', *also))} beside the images, got "
                f"{sorted(condition)}. Pass pairs (images, prompts), or dicts with keys 'x0' and "
                "'prompt'; for other entries pass denoiser and scheduler to DenoisingObjective, "
                "with an encode= that uses them."
            )
        return embed(x0, condition)

    def null_condition() -> Mapping[str, Any]:
        with torch.no_grad():
            embedded = (embed_null or embed)(torch.zeros(1, 3, size, size), {"prompt": [""]})
        for name in shared:  # these are not dropped
            embedded.pop(name, None)
        embedded.get("added_cond_kwargs", {}).pop("time_ids", None)
        return _first(embedded)

    encoder = LatentEncoder(
        pipeline.vae if vae is None else vae,
        sample=training.sample,
        embed=embed_prompts,
        pack=pack,
        cache=training.cache,
        encoders=encoders,
        settings=settings,
    )
    process = noise_process(pipeline.scheduler) if process is None else process
    return PipelineParts(model, process, encoder, null_condition, model_kwargs)


def _first(condition: Mapping[str, Any]) -> dict[str, Any]:
    """The first example of every entry that has some."""
    return {
        k: _first(v) if isinstance(v, Mapping) else v[0]
        for k, v in condition.items()
        if v is not None
    }


def _tokenizer_digest(tokenizer: Any) -> str:
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
