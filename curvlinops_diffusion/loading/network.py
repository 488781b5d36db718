"""Networks as pipelines hold them: objective, images and conditions taken, what was trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any
from warnings import warn

import diffusers
from torch import nn

from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.stable_diffusion import ControlledDenoiser
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.loading.trainer_entries import Base
from curvlinops_diffusion.loading.weights import listed
from curvlinops_diffusion.runtime.adapters import adapter_of, common_names

# diffusers imports it with its first network, and it warns of kernels that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_logger = logging.getLogger("curvlinops_diffusion")

#: What the names of text encoders in a pipeline begin with.
TEXT_ENCODERS = "text_encoder"


@dataclass(frozen=True)
class Network:
    """An objective, and how it takes images.

    Attributes:
        objective: The objective.
        channels: Colour channels of the images.
        size: Height and width of the images; ``None`` for any.
        multiple: What height and width must be multiples of.
        condition: The labels or prompts that are taken.
        made_for: The side of the images that it was made for; ``None`` where that is not known.
        params: Names of the parameters that curvature and gradients are of; ``None`` for all.
    """

    objective: DenoisingObjective
    channels: int | None
    size: tuple[int, int] | None
    multiple: int
    condition: Condition
    params: list[str] | None = None
    made_for: int | None = None

    @classmethod
    def of_pipeline(
        cls, pipeline: Any, params: Sequence[str] | None = None, **options: Any
    ) -> Network:
        """Take a pipeline apart; ``options`` are those of ``DenoisingObjective.from_pipeline``."""
        of_encoders = any(name.startswith(TEXT_ENCODERS) for name in params or ())
        options = {"text_encoders": of_encoders, **options}
        objective = DenoisingObjective.from_pipeline(pipeline, **options)
        return cls.of(objective, pipeline, params)

    @classmethod
    def of(
        cls,
        objective: DenoisingObjective,
        pipeline: Any = None,
        params: Sequence[str] | None = None,
        trained: Sequence[str] | None = None,
    ) -> Network:
        """Read off network and autoencoder which images and conditions they take.

        Args:
            objective: The objective.
            pipeline: The pipeline that it is of; ``None`` for a network alone.
            params: Names or patterns of the parameters; ``None`` for those of adapters if there are
                any, else of a ControlNet if there is one, else all.
            trained: The parameters that adapters' files hold, where these are known.

        Raises:
            ValueError: If a pattern names no parameter.
        """
        model: Any = objective.model
        config: Any = getattr(model, "config", {})
        autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
        channels, size, multiple = config.get("in_channels"), config.get("sample_size"), 1
        if autoencoder is not None:
            channels = autoencoder.config.get("in_channels", 3)
            multiple = getattr(pipeline, "vae_scale_factor", None) or 2 ** (
                len(autoencoder.config.block_out_channels) - 1
            )
        # of latents; of a video's there are three
        sides, made_for = None, size * multiple if isinstance(size, int) else None
        if size is not None and (
            autoencoder is None or isinstance(model, diffusers.DiTTransformer2DModel)
        ):
            height, width = size if isinstance(size, list | tuple) else (size, size)
            sides = (height * multiple, width * multiple)
        if isinstance(model, diffusers.UNet2DModel):  # its halves must be whole
            multiple *= 2 ** (len(config["down_block_types"]) - 1)
        elif type(pipeline).__name__.startswith(("Flux", "ZImage")):
            multiple *= 2  # packs 2×2 latents into a token
        elif isinstance(config.get("patch_size"), int):
            multiple *= config["patch_size"]
        chosen = _chosen_parameters(model, pipeline, params, trained)
        condition = _condition(model, config, pipeline)
        return cls(objective, channels, sides, multiple, condition, chosen, made_for)

    def with_prompt(self, prompt: str | None) -> Network:
        """Set the prompt of images that have none.

        Raises:
            ValueError: If the network takes no prompts.
        """
        if prompt is not None and self.condition.key != "prompt":
            takes = "no condition" if self.condition.key is None else "labels"
            raise ValueError(f"The network takes {takes}, got prompt={prompt!r}. Leave it out.")
        return replace(self, condition=replace(self.condition, prompt=prompt))

    def form(self, resolution: int | None, **sizing: Any) -> Form:
        """The form in which images are loaded; ``sizing`` are options of :class:`Form`.

        Raises:
            ValueError: If they do not fit together, or the network takes one size alone.
        """
        model = self.objective.model
        if sizing.get("buckets") and isinstance(model, diffusers.DiTTransformer2DModel):
            raise ValueError(
                "`buckets` must be left out: a DiTTransformer2DModel takes squares of one size."
            )
        return Form(
            self.channels,
            self.size,
            resolution,
            self.multiple,
            made_for=self.made_for if self.size is None else None,
            **sizing,
        )


def base_of(pipeline: Any) -> Base:
    """Describe a pipeline as far as trainers' entries depend on it."""
    scheduler, kind = getattr(pipeline, "scheduler", None), type(pipeline).__name__
    config = {"_class_name": type(scheduler).__name__, **getattr(scheduler, "config", {})}
    network = getattr(pipeline, "transformer", None)
    guided = bool(getattr(network, "config", {}).get("guidance_embeds"))
    name = getattr(pipeline, "config", {}).get("_name_or_path")
    return Base(kind, config, guided, str(name or ""))


def _chosen_parameters(
    model: nn.Module,
    pipeline: Any,
    patterns: Iterable[str] | None,
    trained: Sequence[str] | None,
) -> list[str] | None:
    """Choose the parameters that patterns name; else those that were trained."""
    if patterns:
        return _matching(model, list(patterns))
    adapters = _of_adapters(model) if trained is None else list(trained)
    # text encoders that were trained are part of the network, whose adapters these are then
    inside = {id(module) for module in model.modules()}
    components = {} if pipeline is None else pipeline.components
    beside = [
        name
        for name, part in components.items()
        if name.startswith(TEXT_ENCODERS) and isinstance(part, nn.Module)
        if id(part) not in inside and _of_adapters(part)
    ]
    if adapters:
        if beside:
            warn(
                f"The adapters have weights in {' and '.join(beside)} too, which are left out. "
                f"Pass params=['unet.*lora*', '{beside[0]}.*lora*'] to cover both.",
                stacklevel=2,
            )
        return adapters
    if beside:
        raise ValueError(
            f"The adapters have no weights in the {type(model).__name__}, only in "
            f"{' and '.join(beside)}. Pass params=['{beside[0]}.*lora*']."
        )
    if isinstance(model, ControlledDenoiser):  # its UNet was not trained
        _logger.info("Covering the ControlNet alone; params=['unet.*', 'controlnet.*'] has both")
        return _matching(model, ["controlnet.*"])
    return None


def _of_adapters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if adapter_of(name) is not None]


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The parameters that match shell patterns, in order; adapters may be called ``default``."""
    common = common_names(name for name, _ in model.named_parameters())
    chosen = set()
    for pattern in patterns:
        found = {
            name
            for name, plain in common.items()
            if fnmatchcase(name, pattern) or fnmatchcase(plain, pattern)
        }
        if not found:
            raise ValueError(
                f"--params {pattern!r} matches no parameter of the {type(model).__name__}, which "
                f"are called like {listed(common)}. Pass names, or patterns such as '*attn*'."
            )
        chosen |= found
    return [name for name in common if name in chosen]


def _condition(model: Any, config: Any, pipeline: Any) -> Condition:
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    if any(getattr(pipeline, name, None) is not None for name in encoders):
        sizes = type(pipeline).__name__.startswith("StableDiffusionXL")
        return Condition("prompt", sizes=sizes, images=getattr(model, "images", {}))
    if config.get("num_class_embeds") is not None:
        return Condition("class_labels", config["num_class_embeds"])
    if config.get("num_embeds_ada_norm") is not None:
        # and a last one for no class
        return Condition("class_labels", config["num_embeds_ada_norm"] + 1)
    if config.get("class_embed_type") == "timestep":
        return Condition("class_labels")
    return Condition()
