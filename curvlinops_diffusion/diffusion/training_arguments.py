"""Arguments of training that change what a network was given, with the scripts' defaults.

The same pipeline can be trained with prompts of 77 or 512 tokens, or with guidance 1 or 3.5: no
file of the pipeline says which. The names are those of ``diffusers``' training scripts and
pipelines, and so are the defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

# defaults of diffusers' training scripts (examples/dreambooth), by the class of the pipeline
_FLUX_2 = {
    "max_sequence_length": 512,
    "text_encoder_out_layers": [10, 20, 30],
    "sample_latents": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {"max_sequence_length": 77},
    "FluxPipeline": {"max_sequence_length": 512, "guidance_scale": 3.5},
    "Flux2Pipeline": {**_FLUX_2, "guidance_scale": 3.5},
    "Flux2KleinPipeline": _FLUX_2,
    "ZImagePipeline": {"max_sequence_length": 512, "sample_latents": False},
    "SanaPipeline": {
        "max_sequence_length": 300,
        "complex_human_instruction": None,
        "timestep_scale": 1.0,
    },
    "Lumina2Pipeline": {"max_sequence_length": 256, "system_prompt": None, "mirrored_levels": True},
    "QwenImagePipeline": {"max_sequence_length": 512},
}
_SIZES = ("original_size", "crops_coords_top_left", "target_size")
# arguments of a pipeline's call that change what its network is given, and nothing else
_OF_CALL = (
    *("max_sequence_length", "guidance_scale", "distilled_guidance_scale", "clip_skip"),
    *("system_prompt", "complex_human_instruction", "text_encoder_out_layers", "clean_caption"),
    *("frame_rate", *_SIZES),
)
#: What training may have set otherwise in the scheduler, and not shown the network.
OF_SCHEDULER = ("prediction_type", "rescale_betas_zero_snr", "weights_before_rescaling", "shift")


def training_arguments(
    pipeline: Any, given: Mapping[str, Any] | None = None, sample_latents: bool | None = None
) -> dict[str, Any]:
    """The arguments of a pipeline's training.

    Returns:
        All of them, as plain values. ``sample_latents`` is left out where it is true.
    """
    kinds = [cls.__name__ for cls in type(pipeline).__mro__]
    defaults = dict(next((_DEFAULTS[kind] for kind in kinds if kind in _DEFAULTS), {}))
    network = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    guided = bool(getattr(network, "config", {}).get("guidance_embeds"))
    asked = inspect.signature(pipeline.__call__).parameters
    optional = {name for name in _OF_CALL if name in asked}
    if any(kind.startswith("StableDiffusionXL") for kind in kinds):  # whose sizes are in the data
        optional -= {*_SIZES}
    if hasattr(pipeline, "unet") and any(kind.startswith("StableDiffusion") for kind in kinds):
        optional.add("max_token_length")  # of kohya's scripts
    if getattr(pipeline, "text_encoder_3", True) is None:  # the scripts are never without
        defaults["max_sequence_length"] = asked["max_sequence_length"].default
    for name in ("max_sequence_length", "guidance_scale"):
        if name in optional and asked[name].default is not None:
            defaults.setdefault(name, asked[name].default)
    if "original_size" in optional:
        defaults["original_size"] = None  # that of each image
    if not _has_layers(pipeline, defaults.get("text_encoder_out_layers", ())):
        defaults["text_encoder_out_layers"] = list(asked["text_encoder_out_layers"].default)
    taken = {*defaults, *optional, *_of_scheduler(pipeline), "sample_latents"}
    if not guided:  # it is then the weight of a second prediction, which training does not make
        defaults.pop("guidance_scale", None)
        taken.discard("guidance_scale")
    sampled = {} if sample_latents is None else {"sample_latents": sample_latents}
    found = {**defaults, **(given or {}), **sampled}
    unknown = sorted(found.keys() - taken)
    if unknown:
        raise ValueError(
            f"`training_arguments` must be some of {sorted(taken)}, on which the network of this "
            f"{type(pipeline).__name__} depends, got {unknown}."
        )
    if guided and "guidance_scale" in taken - found.keys():
        raise ValueError(
            f"The network of this {type(pipeline).__name__} is shown a guidance_scale, and its "
            "call has no default. Pass training's: --training-arguments guidance_scale=…, or "
            "training_arguments={'guidance_scale': …}."
        )
    for name, (form, fits) in _FORMS.items():
        if name in found and not fits(found[name]):
            raise ValueError(f"`{name}` must be {form}, got {found[name]!r}. Pass training's.")
    config = getattr(getattr(pipeline, "text_encoder", None), "config", None)
    layers, skipped = getattr(config, "num_hidden_layers", None), found.get("clip_skip") or 0
    if layers is not None and skipped >= layers:
        raise ValueError(
            f"`clip_skip` must leave one of the text encoder's {layers} layers, got {skipped}. "
            "Pass training's; kohya's numbers are one larger."
        )
    return {k: v for k, v in found.items() if k != "sample_latents" or v is not True}


def _of_scheduler(pipeline: Any) -> set[str]:
    """The arguments that a pipeline's scheduler has."""
    scheduler = getattr(pipeline, "scheduler", None)
    if hasattr(scheduler, "alphas_cumprod"):
        return {*OF_SCHEDULER} - {"shift"}
    return {"shift"} if hasattr(scheduler, "sigmas") else set()


def _has_layers(pipeline: Any, layers: Any) -> bool:
    """Tell whether the text encoder has the layers whose states are shown to the network."""
    config = getattr(getattr(pipeline, "text_encoder", None), "config", None)
    if not layers or config is None:
        return True
    return bool(config.get_text_config().num_hidden_layers >= max(layers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


_COUNT = "a whole number of at least 1", lambda z: isinstance(z, int) and _is_number(z) and z >= 1
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("max_sequence_length", "max_token_length"), _COUNT),
    "guidance_scale": ("a finite number", _is_number),
    "timestep_scale": ("a finite number", _is_number),
    "mirrored_levels": ("True or False", lambda z: isinstance(z, bool)),
    "sample_latents": ("True or False", lambda z: isinstance(z, bool)),
    "prediction_type": (
        "'epsilon', 'sample' or 'v_prediction'",
        lambda z: z in ("epsilon", "sample", "v_prediction"),
    ),
    **dict.fromkeys(
        ("rescale_betas_zero_snr", "weights_before_rescaling"),
        ("True or False", lambda z: isinstance(z, bool)),
    ),
    "shift": ("a finite number above 0", lambda z: _is_number(z) and z > 0),
    "clip_skip": (
        "a whole number of at least 0, or None",
        lambda z: z is None or (isinstance(z, int) and _is_number(z) and z >= 0),
    ),
}
