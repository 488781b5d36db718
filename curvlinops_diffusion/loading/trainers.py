"""Entries that trainers leave of a run, each as the option of ours that it decides.

An entry decides an option, changes the objective in a way that no option expresses, is worth a
sentence, or is of the optimiser, of files, of logs. A trainer is a function of its entries; what
each entry does is that of the trainer's own source.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log, sqrt
from typing import Any

# families of pipelines, by what trainers call them, the first that is found
_FAMILIES = {
    r"sdxl|stable.diffusion.xl": "StableDiffusionXL",
    r"sd3|stable.diffusion.3": "StableDiffusion3",
    r"sd[12_]|sd.v[12]|stable.diffusion.(v|1|2)|^sd$": "StableDiffusion",
    r"flux.?2": "Flux2",
    r"flux": "Flux",
    r"chroma": "Chroma",
    r"lumina.?2": "Lumina2",
    r"qwen": "QwenImage",
    r"z.?image": "ZImage",
    r"sana": "Sana",
    r"pixart": "PixArt",
}


def family_of(name: str) -> str | None:
    """The beginning of the class of a trainer's base in diffusers; ``None`` if it is not known."""
    found = (kind for pattern, kind in _FAMILIES.items() if re.search(pattern, name.lower()))
    return next(found, None)


@dataclass(frozen=True)
class Base:
    """The pipeline that is attributed, as far as trainers' entries depend on it.

    Attributes:
        kind: The name of its class.
        scheduler: The config of its scheduler, with the class as ``_class_name``.
        guided: Whether its network is shown a guidance scale.
        name: Where it was loaded from.
    """

    kind: str
    scheduler: Mapping[str, Any]
    guided: bool = False
    name: str = ""

    @property
    def flow(self) -> bool:
        """Whether it is of flow matching."""
        return "FlowMatch" in str(self.scheduler.get("_class_name", ""))

    @property
    def clip_alone(self) -> bool:
        """Whether it is Stable Diffusion 1 or 2, whose only text encoder is CLIP."""
        return self.family == "StableDiffusion"

    @property
    def family(self) -> str | None:
        """What the name of its class begins with."""
        found = (kind for kind in _FAMILIES.values() if self.kind.startswith(kind))
        return next(found, None)

    @property
    def prediction_type(self) -> str:
        """What its network regresses, by its scheduler."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def shift(self) -> float:
        """The shift of its levels as training draws them: dynamic ones are of sampling alone."""
        dynamic = self.scheduler.get("use_dynamic_shifting", False)
        return 1.0 if dynamic else float(self.scheduler.get("shift", 1.0))


@dataclass(frozen=True)
class Setting:
    """What an entry of a trainer comes to.

    Attributes:
        entry: Its name and value, as the trainer has them.
        option: The option that it decides; ``training_arguments.…`` for one of these.
        value: The option's value; ``None``, zero or false for that without the option.
        usual: What it is without the option, by the base.
        refused: What it does to the objective that no option expresses.
        note: A sentence for people.
    """

    entry: str
    option: str = ""
    value: Any = None
    usual: Any = None
    refused: str = ""
    note: str = ""


@dataclass
class Entries:
    """The entries of a trainer by name, which are read as plain values."""

    values: Mapping[str, Any]
    source: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an entry; of text, what it spells."""
        value = plain(self.values.get(name))
        return default if value is None else value

    def number(self, name: str, default: float = 0.0) -> float:
        """The number that an entry is.

        Raises:
            ValueError: If it is none.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(
                f"'{self.source}' holds {name}={self.values.get(name)!r}, which must be a finite "
                "number. Pass `recipe='none'`, and what training did by the options."
            )
        return value

    def sets(self, name: str, option: str, value: Any, usual: Any = None) -> Iterator[Setting]:
        """What an entry decides, if it is there."""
        if name in self:
            yield Setting(self.shown(name), option, value, usual)

    def refuses(self, name: str, does: str, *, unless: bool = False) -> Iterator[Setting]:
        """An entry that no option expresses, where it is neither zero nor false nor none."""
        if self.get(name) and not unless:
            yield Setting(self.shown(name), refused=does)

    def notes(self, name: str, text: str) -> Iterator[Setting]:
        """An entry that people should know of."""
        if self.get(name):
            yield Setting(self.shown(name), note=text)

    def shown(self, name: str) -> str:
        """An entry as messages have it."""
        text = str(self.values.get(name))
        return f"{name}={text if len(text) <= 60 else text[:57] + '…'}"


def plain(value: Any) -> Any:
    """What a text spells in JSON or Python; the text itself if it spells nothing."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value or None


def square(value: Any) -> int | None:
    """The side of a square resolution: a number, ``512,512``, a pair; ``None`` for any other."""
    if isinstance(value, str):
        value = [plain(part) for part in re.split(r"[,x]", value)]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    found = sides.pop() if len(sides) == 1 else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _logit_normal(mean: float, std: float) -> str:
    plain_one = (mean, std) == (0, 1)
    return "logit-normal" if plain_one else f"logit-normal:{mean:.9g}:{std:.9g}"


def _min_snr(z: Entries, name: str, base: Base) -> Iterator[Setting]:
    """Min-SNR weights, which networks of flow matching are not trained with."""
    if name in z and not base.flow:
        gamma = z.number(name)
        yield from z.sets(name, "weighting", "min-snr" if gamma else None)
        if gamma:
            yield from z.sets(name, "snr_gamma", float(gamma))


def _resolution(z: Entries, name: str, value: Any) -> Iterator[Setting]:
    side = square(value)
    if side is not None:
        yield Setting(z.shown(name), "resolution", side)
    else:
        yield Setting(z.shown(name), "resolution", refused="trains on sizes that are no square")


# ---------------------------------------------------------------------------------------------
# kohya's sd-scripts
# ---------------------------------------------------------------------------------------------


def kohya(z: Entries, base: Base) -> Iterator[Setting]:
    """``ss_*`` in a file's header, or the arguments in a file of TOML under these names."""
    yield from _kohya_text(z, base)
    yield from (_kohya_flow if base.flow else _kohya_noise)(z, base)
    if z.get("ss_loss_type") not in (None, "l2"):
        yield Setting(z.shown("ss_loss_type"), refused="replaces the squared error")
    for name in ("ss_masked_loss", "ss_alpha_mask"):
        yield from z.refuses(name, "weights pixels by masks")
    yield from z.notes("ss_network_dropout", "the adapter's dropout is off here, as in sampling")
    if z.get("ss_num_reg_images") or z.get("ss_reg_dataset_dirs"):
        weight = z.number("ss_prior_loss_weight", 1.0)
        text = f"images of the class were trained on too, with weight {weight:g}: they are training"
        yield from z.notes("ss_prior_loss_weight", f"{text} images, of other `example_weights`")
    yield from z.notes("ss_vae_name", "latents were those of this autoencoder, not of the base's")
    yield from _kohya_data(z)


def _kohya_text(z: Entries, base: Base) -> Iterator[Setting]:
    """What the network was shown of captions."""
    for name in ("ss_clip_skip", "modelspec.encoder_layer"):
        if name in z and base.clip_alone:
            # 1 is the last layer; 0 is not given
            skipped = max(int(z.number(name)) - 1, 0)
            yield from z.sets(name, "training_arguments.clip_skip", skipped)
            break
    tokens = z.get("ss_max_token_length")
    if tokens not in (None, 75) and not base.flow:
        yield Setting(
            z.shown("ss_max_token_length"),
            refused=f"shows the network {tokens} tokens, in several runs of the text encoder",
        )
    yield from z.refuses("ss_weighted_captions", "weights words of captions")
    yield from z.refuses("ss_apply_t5_attn_mask", "masks the padding of prompts")
    yield from z.refuses("ss_apply_lg_attn_mask", "masks the padding of prompts")
    if "ss_caption_dropout_rate" in z:
        dropped, every = z.number("ss_caption_dropout_rate"), "ss_caption_dropout_every_n_epochs"
        if epochs := int(z.number(every)):
            total = int(z.number("ss_num_epochs", epochs))
            dropped = 1 - (1 - dropped) * (1 - total // epochs / total)
        yield from z.sets("ss_caption_dropout_rate", "condition_dropout", float(dropped))
    yield from z.refuses("ss_caption_tag_dropout_rate", "drops tags of captions")


def _kohya_noise(z: Entries, base: Base) -> Iterator[Setting]:
    """Noise, target and weights of Stable Diffusion 1, 2 and XL."""
    yield from _scheduled(z, base, "ss_zero_terminal_snr")
    predicts = {"v": "v_prediction", "epsilon": "epsilon"}.get(
        str(z.get("modelspec.prediction_type"))
    )
    if "ss_v_parameterization" in z:
        predicts = "v_prediction" if z.get("ss_v_parameterization") else "epsilon"
    name = "ss_v_parameterization" if "ss_v_parameterization" in z else "modelspec.prediction_type"
    if predicts is not None:
        yield from _predicts(z, base, name, predicts)
    offset = z.number("ss_noise_offset")
    yield from z.sets("ss_noise_offset", "noise_offset", float(offset))
    for name in ("ss_adaptive_noise_scale", "ss_noise_offset_random_strength"):
        yield from z.refuses(name, "makes the offset of the noise another one", unless=not offset)
    yield from z.refuses("ss_multires_noise_iterations", "adds noise of lower resolutions")
    yield from _perturbed(z)
    yield from _min_snr(z, "ss_min_snr_gamma", base)
    own = z.get("ss_min_snr_gamma")
    if z.get("ss_debiased_estimation") and not own:
        yield from z.sets("ss_debiased_estimation", "weighting", "debiased")
    else:
        yield from z.refuses("ss_debiased_estimation", "multiplies two weightings")
    for name in ("ss_v_pred_like_loss", "ss_scale_v_pred_loss_like_noise_pred"):
        yield from z.refuses(name, "weights noise levels")
    within = z.get("modelspec.timestep_range")
    lowest, end = z.get("ss_min_timestep"), z.get("ss_max_timestep")
    if within is not None:
        lowest, end = (plain(part) for part in str(within).strip("()").split(","))
    if lowest is not None or end is not None:
        levels = f"stratified:{lowest or 0}:{end or 1000}"
        name = "modelspec.timestep_range" if within is not None else "ss_min_timestep"
        yield Setting(z.shown(name), "timesteps", levels)


def _perturbed(z: Entries) -> Iterator[Setting]:
    strength = z.number("ss_ip_noise_gamma")
    yield from z.sets("ss_ip_noise_gamma", "input_perturbation", float(strength))
    yield from z.refuses(
        "ss_ip_noise_gamma_random_strength",
        "draws the perturbation's strength",
        unless=not strength,
    )


def _predicts(z: Entries, base: Base, name: str, predicts: str) -> Iterator[Setting]:
    """A prediction type, perhaps other than that of the base's scheduler."""
    option = "training_arguments.prediction_type"
    yield from z.sets(name, option, predicts, base.prediction_type)


def _scheduled(z: Entries, base: Base, name: str) -> Iterator[Setting]:
    """Whether there is a terminal signal, perhaps other than by the base's scheduler."""
    if name in z and not base.flow:
        option = "rescale_betas_zero_snr"
        here = bool(base.scheduler.get(option, False))
        yield from z.sets(name, f"training_arguments.{option}", bool(z.get(name)), here)


def _kohya_flow(z: Entries, base: Base) -> Iterator[Setting]:
    """Levels, target and weights of flow matching."""
    sampling, scheme = z.get("ss_timestep_sampling"), str(z.get("ss_weighting_scheme", "none"))
    mean, std = z.number("ss_logit_mean"), z.number("ss_logit_std", 1.0)
    if base.family == "StableDiffusion3":
        # levels are those of the network's time, without a shift; errors are of the clean image
        yield from z.sets("ss_weighting_scheme", "training_arguments.shift", 1.0, base.shift)
        weighting = {"sigma_sqrt": None, "cosmap": ""}.get(scheme, "preconditioned")
        if weighting == "":
            yield from z.refuses("ss_weighting_scheme", "weights noise levels by cosmap times σ²")
        else:
            yield from z.sets("ss_weighting_scheme", "weighting", weighting)
        yield from _scheme(z, "ss_weighting_scheme", scheme, mean, std)
        return
    yield from _perturbed(z)
    if base.guided:
        guidance = z.number("ss_guidance_scale", 3.5)
        yield from z.sets("ss_guidance_scale", "training_arguments.guidance_scale", guidance)
    if "schnell" in str(z.get("modelspec.architecture")):
        yield from z.sets("modelspec.architecture", "training_arguments.max_sequence_length", 256)
    if z.get("ss_model_prediction_type") not in (None, "raw"):
        yield from z.refuses("ss_model_prediction_type", "compares other than the velocity")
    scale, shift = z.number("ss_sigmoid_scale", 1.0), z.number("ss_discrete_flow_shift", 1.0)
    name, levels = "ss_timestep_sampling", "training_arguments.shift"
    if sampling == "sigma":
        yield from z.sets("ss_discrete_flow_shift", levels, float(shift), base.shift)
        # from noise to data
        yield from _scheme(z, "ss_weighting_scheme", scheme, -mean, std)
    elif sampling == "uniform":
        yield from z.sets(name, levels, 1.0, base.shift)
        yield from z.sets(name, "timesteps", None)
    elif sampling in ("sigmoid", "shift"):
        middle = log(shift) if sampling == "shift" else 0.0
        yield from z.sets(name, levels, 1.0, base.shift)
        yield from z.sets(name, "timesteps", _logit_normal(middle, scale))
    elif sampling == "flux_shift":
        side = square(z.get("ss_resolution"))
        if side is None:
            yield from z.refuses(name, "draws levels by the size of each image")
        else:  # half as many tokens a side as latents, of a sixteenth of the pixels
            yield from z.sets(name, levels, 1.0, base.shift)
            yield from z.sets(
                name, "timesteps", _logit_normal(_flux_mean((side // 16) ** 2), scale)
            )
    else:
        yield from z.refuses(name, "draws levels in another way")


def _flux_mean(tokens: int) -> float:
    """The shift of levels by the number of an image's tokens: a line through two points."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def _scheme(z: Entries, name: str, scheme: str, mean: float, std: float) -> Iterator[Setting]:
    """The draws of levels that goes with a scheme of weights."""
    if scheme == "mode":
        yield from z.refuses(name, "draws levels by a heavy-tailed distribution")
    elif scheme == "logit_normal":
        yield from z.sets(name, "timesteps", _logit_normal(mean, std))
    else:
        yield from z.sets(name, "timesteps", None)


# what a subset says of its images, and the options that it decides
_KOHYA_DATA = {
    "enable_bucket": "buckets",
    "bucket_no_upscale": "bucket_no_upscale",
    "random_crop": "random_crop",
    "shuffle_caption": "shuffle_captions",
    "keep_tokens": "keep_tokens",
    "resize_interpolation": "interpolation",
}
_KOHYA_OTHER = {
    "color_aug": "changes colours at random",
    "face_crop_aug_range": "crops faces at random",
    "enable_wildcard": "draws words of captions",
    "keep_tokens_separator": "separates the tokens of captions that are kept",
    "caption_prefix": "adds text to captions, which `data` as kohya's dataset.toml would say",
    "caption_suffix": "adds text to captions, which `data` as kohya's dataset.toml would say",
}


def _kohya_data(z: Entries) -> Iterator[Setting]:
    """What images and captions were made to: of one folder, or of data sets with subsets."""
    own = {name.removeprefix("ss_"): [z.get(name)] for name in z.values if name.startswith("ss_")}
    datasets, name = z.get("ss_datasets"), "ss_datasets"
    if isinstance(datasets, list):
        own |= _of_subsets(datasets)
    for key, values in own.items():
        known = {*_KOHYA_DATA, *_KOHYA_OTHER, "flip_aug", "resolution"}
        name = f"ss_{key}" if f"ss_{key}" in z else "ss_datasets"
        if key not in known or values == [None]:
            continue
        entry = z.shown(name) if name != "ss_datasets" else f"{key}={values[0]} (ss_datasets)"
        if len(values) > 1:
            said = ", ".join(str(value) for value in values)
            yield Setting(f"{key} ({name})", _option(key), refused=f"differs by subset ({said})")
        elif key == "resolution":
            yield from _resolution(Entries({key: values[0]}, z.source), key, values[0])
        elif key == "flip_aug":
            yield Setting(entry, "augment", "flip" if values[0] else None)
        elif key in _KOHYA_DATA:
            yield Setting(entry, _KOHYA_DATA[key], values[0])
        elif values[0]:
            yield Setting(entry, refused=_KOHYA_OTHER[key])


def _option(key: str) -> str:
    return {"flip_aug": "augment", "resolution": "resolution"}.get(key) or _KOHYA_DATA.get(key, "")


def _of_subsets(datasets: Sequence[Any]) -> dict[str, list[Any]]:
    """The different values of each key in data sets and their subsets, but those of the class."""
    found: dict[str, list[Any]] = {}
    for dataset in datasets:
        subsets = [own for own in dataset.get("subsets", ()) if not own.get("is_reg")]
        for one in (dataset, *subsets):
            for key, value in one.items():
                values = found.setdefault(key, [])
                if key != "subsets" and value not in values:
                    values.append(value)
    # a subset's own stands above that of its data set
    return {k: [v for v in vs if v is not None] or [None] for k, vs in found.items()}


# ---------------------------------------------------------------------------------------------
# The training scripts of diffusers
# ---------------------------------------------------------------------------------------------


def diffusers(z: Entries, base: Base) -> Iterator[Setting]:
    """The arguments of a script, as ``accelerate`` writes them for TensorBoard."""
    yield from _min_snr(z, "snr_gamma", base)
    yield from z.sets("noise_offset", "noise_offset", float(z.number("noise_offset")))
    if "offset_noise" in z:  # of the scripts of DreamBooth, whose strength is fixed
        yield from z.sets("offset_noise", "noise_offset", 0.1 if z.get("offset_noise") else 0.0)
    strength = float(z.number("input_perturbation"))
    yield from z.sets("input_perturbation", "input_perturbation", strength)
    if not base.flow and z.get("prediction_type"):
        yield from _predicts(z, base, "prediction_type", str(z.get("prediction_type")))
    dropped = float(z.number("proportion_empty_prompts"))
    yield from z.sets("proportion_empty_prompts", "condition_dropout", dropped)
    if base.flow and "weighting_scheme" in z:
        yield from _diffusers_flow(z)
    if base.guided and "guidance_scale" in z:
        guidance = z.number("guidance_scale")
        yield from z.sets("guidance_scale", "training_arguments.guidance_scale", guidance)
    if base.family != "StableDiffusionXL" and not base.clip_alone:
        tokens = z.get("max_sequence_length")
        yield from z.sets("max_sequence_length", "training_arguments.max_sequence_length", tokens)
    for name, does in (
        ("dream_training", "adds what the network predicts to the target"),
        ("do_edm_style_training", "noises as EDM does"),
        ("clip_skip", "skips layers of the text encoder"),
        ("text_encoder_use_attention_mask", "masks the padding of prompts"),
    ):
        yield from z.refuses(name, does)
    for name, usual, does in (
        ("timestep_bias_strategy", "none", "draws levels by a biased distribution"),
        ("loss_type", "l2", "replaces the squared error"),
        ("tokenizer_max_length", 77, "shows the network another number of tokens"),
    ):
        yield from z.refuses(name, does, unless=z.get(name) == usual)
    if "resolution" in z:
        yield from _resolution(z, "resolution", z.get("resolution"))
    if z.get("aspect_ratio_buckets"):
        pairs = str(z.get("aspect_ratio_buckets")).split(";")
        sides = [tuple(int(side) for side in pair.split(",")) for pair in pairs if pair.strip()]
        yield from z.sets("aspect_ratio_buckets", "buckets", sides)
    elif "center_crop" in z:
        centred = bool(z.get("center_crop"))
        yield from z.sets("center_crop", "center_crop", centred)
        yield from z.sets("center_crop", "random_crop", not centred)
    flipped = "flip" if z.get("random_flip") else None
    yield from z.sets("random_flip", "augment", flipped)
    how = z.get("image_interpolation_mode")
    yield from z.sets("image_interpolation_mode", "interpolation", how)
    for name in ("image_column", "caption_column"):
        yield from z.sets(name, name, z.get(name))
    if not z.get("caption_column"):
        yield from z.sets("instance_prompt", "prompt", z.get("instance_prompt"))
    if z.get("with_prior_preservation"):
        weight = z.number("prior_loss_weight", 1.0)
        text = f"images of the class were trained on too, with weight {weight:g}: they are training"
        yield from z.notes("with_prior_preservation", f"{text} images, of other `example_weights`")
    name = "pretrained_vae_model_name_or_path"
    yield from z.notes(name, "latents were those of this autoencoder, not of the base's")
    yield from z.notes("max_train_samples", "training took so many of the images, shuffled")


def _diffusers_flow(z: Entries) -> Iterator[Setting]:
    scheme = str(z.get("weighting_scheme"))
    mean, std = z.number("logit_mean"), z.number("logit_std", 1.0)
    weighting = {"sigma_sqrt": "inverse-variance", "cosmap": "cosmap"}.get(scheme)
    if z.get("precondition_outputs"):  # errors are of the clean image, which is σ² times
        weighting = {"inverse-variance": None, "cosmap": ""}.get(weighting or "", "preconditioned")
    if weighting == "":
        yield from z.refuses("weighting_scheme", "weights noise levels by cosmap times σ²")
    else:
        yield from z.sets("weighting_scheme", "weighting", weighting)
    yield from _scheme(z, "weighting_scheme", scheme, -mean, std)  # from noise to data


# ---------------------------------------------------------------------------------------------
# OneTrainer
# ---------------------------------------------------------------------------------------------


def onetrainer(z: Entries, base: Base) -> Iterator[Setting]:
    """``ot_config`` in a file's header, or a config of its own."""
    offset = float(z.number("offset_noise_weight"))
    yield from z.sets("offset_noise_weight", "noise_offset", offset)
    general = z.get("generalized_offset_noise") and not base.flow
    yield from z.refuses(
        "generalized_offset_noise",
        "scales offset noise by the level",
        unless=not (offset and general),
    )
    yield from z.refuses("perturbation_noise_weight", "adds noise to input and target")
    if not base.flow:
        yield from _scheduled(z, base, "rescale_noise_scheduler_to_zero_terminal_snr")
        for name, predicts in (
            ("force_v_prediction", "v_prediction"),
            ("force_epsilon_prediction", "epsilon"),
        ):
            if z.get(name):
                yield from _predicts(z, base, name, predicts)
    weight, strength = z.get("loss_weight_fn", "CONSTANT"), z.number("loss_weight_strength", 5.0)
    predicts_v = z.get("force_v_prediction") or base.prediction_type != "epsilon"
    if weight == "MIN_SNR_GAMMA":
        yield from z.sets("loss_weight_fn", "weighting", "min-snr")
        yield from z.sets("loss_weight_strength", "snr_gamma", float(strength))
    elif weight == "DEBIASED_ESTIMATION" and not predicts_v:
        yield from z.sets("loss_weight_fn", "weighting", "debiased")
    elif weight == "CONSTANT":
        yield from z.sets("loss_weight_fn", "weighting", None)
    else:
        yield from z.refuses("loss_weight_fn", "weights noise levels")
    for name in ("mae_strength", "log_cosh_strength", "huber_strength"):
        yield from z.refuses(name, "adds to the squared error")
    yield from z.refuses("masked_training", "weights pixels by masks")
    yield from _onetrainer_levels(z, base)
    skipped = z.get("text_encoder_layer_skip")
    if base.clip_alone:
        yield from z.sets("text_encoder_layer_skip", "training_arguments.clip_skip", skipped)
    elif base.family == "StableDiffusionXL":
        both = {skipped or 0, z.get("text_encoder_2_layer_skip") or 0}
        if len(both) == 1:
            yield from z.sets("text_encoder_layer_skip", "training_arguments.clip_skip", skipped)
        else:
            yield Setting(z.shown("text_encoder_layer_skip"), refused="skips unlike layers")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        own = z.get(part)
        dropped = own.get("dropout_probability") if isinstance(own, Mapping) else 0
        if dropped:
            entry = f"{part}.dropout_probability={dropped}"
            yield Setting(entry, refused="replaces the text encoder's output by zeros")
    network = z.get("transformer")
    if base.guided and isinstance(network, Mapping) and "guidance_scale" in network:
        entry, value = f"transformer.guidance_scale={network['guidance_scale']}", network
        yield Setting(entry, "training_arguments.guidance_scale", float(value["guidance_scale"]))
    if base.family == "Flux":
        tokens = z.get("text_encoder_2_sequence_length")
        name = "text_encoder_2_sequence_length"
        yield from z.sets(name, "training_arguments.max_sequence_length", tokens)
    yield from z.notes("dropout_probability", "the adapter's dropout is off here, as in sampling")
    if "resolution" in z:
        yield from _resolution(z, "resolution", z.get("resolution"))
    if z.get("aspect_ratio_bucketing") and square(z.get("resolution")) is not None:
        side, step = square(z.get("resolution")) or 0, 8 if base.clip_alone else 64
        step = {"PixArt": 16, "Sana": 32}.get(base.family or "", step)
        yield from z.sets("aspect_ratio_bucketing", "buckets", onetrainer_buckets(side, step))


def _onetrainer_levels(z: Entries, base: Base) -> Iterator[Setting]:
    name, how = "timestep_distribution", z.get("timestep_distribution", "UNIFORM")
    shift = z.number("timestep_shift", 1.0)
    low, high = z.number("min_noising_strength"), z.number("max_noising_strength", 1.0)
    part = (low, high) != (0, 1)
    if z.get("dynamic_timestep_shifting") and base.flow:
        yield from z.refuses("dynamic_timestep_shifting", "draws levels by the size of each image")
    elif how == "LOGIT_NORMAL" and not part:
        mean = z.number("noising_bias") + log(shift)
        if base.flow:
            yield from z.sets(name, "training_arguments.shift", 1.0, base.shift)
        yield from z.sets(name, "timesteps", _logit_normal(mean, z.number("noising_weight") + 1))
    elif how == "UNIFORM" and (base.flow or shift == 1):
        if base.flow:
            option = "training_arguments.shift"
            yield from z.sets("timestep_shift", option, float(shift), base.shift)
        levels = f"stratified:{int(1000 * low)}:{int(1000 * high)}" if part else None
        yield from z.sets(name, "timesteps", levels)
    else:
        yield from z.refuses(name, "draws levels in another way")


def onetrainer_buckets(side: int, step: int) -> list[tuple[int, int]]:
    """OneTrainer's sizes (height, width) of about the area of a square: nine shapes, both ways."""
    shapes = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)
    sides = [(side / sqrt(shape), side * sqrt(shape)) for shape in shapes]
    sizes = [(round(h / step) * step, round(w / step) * step) for h, w in sides]
    return list(dict.fromkeys([*sizes, *((w, h) for h, w in sizes)]))


# ---------------------------------------------------------------------------------------------
# ai-toolkit and SimpleTuner
# ---------------------------------------------------------------------------------------------


def ai_toolkit(z: Entries, base: Base) -> Iterator[Setting]:
    """``config.yaml`` of the output folder: train and data sets of its process."""
    train = Entries(z.get("train") or {}, z.source)
    yield from train.sets("noise_offset", "noise_offset", float(train.number("noise_offset")))
    yield from _min_snr(train, "min_snr_gamma", base)
    if train.get("loss_type", "mse") != "mse":
        yield from train.refuses("loss_type", "replaces the squared error")
    for name, does in (
        ("snr_gamma", "weights noise levels by a fixed scale"),
        ("learnable_snr_gos", "learns weights of noise levels"),
        ("dynamic_noise_offset", "adds the images' means to the noise"),
        ("diff_output_preservation", "adds a loss of the class"),
        ("blank_prompt_preservation", "adds a loss of the empty prompt"),
        ("do_guidance_loss", "replaces the target"),
        ("do_differential_guidance", "replaces the target"),
        ("inverted_mask_prior", "adds a loss outside masks"),
        ("short_and_long_captions", "shows two captions of each image"),
        ("prompt_dropout_prob", "drops prompts of single text encoders"),
    ):
        yield from train.refuses(name, does)
    favoured = train.get("content_or_style", "balanced")
    if favoured != "balanced":
        yield from train.refuses("content_or_style", "draws levels by a biased distribution")
    if base.flow:
        how = train.get("timestep_type", "sigmoid")
        entry = f"timestep_type={how}"
        if train.get("linear_timesteps") or train.get("linear_timesteps2"):
            yield Setting("linear_timesteps=True", refused="weights noise levels")
        elif how in ("sigmoid", "linear"):
            yield Setting(entry, "training_arguments.shift", 1.0, base.shift)
            yield Setting(entry, "timesteps", "logit-normal" if how == "sigmoid" else None)
        else:
            yield Setting(entry, refused="draws or weights levels in another way")
    if base.guided:
        if train.get("bypass_guidance_embedding"):
            yield from train.refuses("bypass_guidance_embedding", "shows the network no guidance")
        scale = float(train.number("cfg_scale", 1.0))
        yield Setting(f"cfg_scale={scale:g}", "training_arguments.guidance_scale", scale)
    yield from _ai_toolkit_data(z)


def _ai_toolkit_data(z: Entries) -> Iterator[Setting]:
    sets = [Entries(own, z.source) for own in z.get("datasets") or () if isinstance(own, Mapping)]
    decided: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
        ("caption_dropout_rate", "condition_dropout", lambda v: float(v or 0)),
        ("shuffle_tokens", "shuffle_captions", bool),
        ("keep_tokens", "keep_tokens", lambda v: v),
        ("random_crop", "random_crop", bool),
        ("flip_x", "augment", lambda v: "flip" if v else None),
        ("caption_ext", "caption_extension", lambda v: v),
        ("default_caption", "prompt", lambda v: v),
    )
    for name, option, value in decided:
        found = list(dict.fromkeys(str(own.get(name)) for own in sets if name in own))
        if len(found) > 1:
            said = f"differs by data set ({', '.join(found)})"
            yield Setting(name, option, refused=said)
        elif found:
            own = next(own for own in sets if name in own)
            if name == "caption_dropout_rate" and z.get("trigger_word") and own.number(name):
                yield Setting(own.shown(name), option, refused="drops all but the trigger word")
            else:
                yield from own.sets(name, option, value(own.get(name)))
    for own in sets[:1]:
        if "resolution" in own:
            yield from _resolution(own, "resolution", own.get("resolution"))
    for own in sets:
        for name, does in (
            ("token_dropout_rate", "drops tags of captions"),
            ("flip_y", "mirrors images upside down"),
            ("random_scale", "scales images at random"),
            ("augmentations", "changes images at random"),
            ("mask_path", "weights pixels by masks"),
            ("alpha_mask", "weights pixels by masks"),
        ):
            yield from own.refuses(name, does)
    if word := z.get("trigger_word"):
        text = "captions had it in place of [trigger], or before them: write it into captions"
        yield Setting(f"trigger_word={word}", note=text)


def simpletuner(z: Entries, base: Base) -> Iterator[Setting]:
    """``simpletuner_config.json`` of the output folder, or the config it was started with."""
    if not base.flow:
        yield from _min_snr(z, "snr_gamma", base)
        always = z.number("noise_offset_probability", 0.25) == 1
        offset = float(z.number("noise_offset", 0.1)) if z.get("offset_noise") else 0.0
        yield from z.sets("offset_noise", "noise_offset", offset)
        yield from z.refuses(
            "noise_offset_probability", "offsets some of the noise", unless=always or not offset
        )
        if z.get("prediction_type"):
            yield from _predicts(z, base, "prediction_type", str(z.get("prediction_type")))
        yield from _scheduled(z, base, "rescale_betas_zero_snr")
    strength = float(z.number("input_perturbation"))
    yield from z.sets("input_perturbation", "input_perturbation", strength)
    yield from z.refuses(
        "input_perturbation_steps", "lowers the perturbation by the step", unless=not strength
    )
    dropped = float(z.number("caption_dropout_probability", 0.1))
    yield Setting(f"caption_dropout_probability={dropped:g}", "condition_dropout", dropped)
    if z.get("loss_type", "l2") != "l2":
        yield from z.refuses("loss_type", "replaces the squared error")
    if base.flow:
        for name in ("flow_use_beta_schedule", "flow_schedule_auto_shift"):
            yield from z.refuses(name, "draws levels in another way")
        shift = z.number("flow_schedule_shift", 3.0) or 1.0
        scale, name = z.number("flow_sigmoid_scale", 1.0), "flow_schedule_shift"
        uniform = bool(z.get("flow_use_uniform_schedule"))
        levels = None if uniform else _logit_normal(log(shift), scale)
        entry, table = f"{name}={shift:g}", float(shift) if uniform else 1.0
        yield Setting(entry, "training_arguments.shift", table, base.shift)
        yield Setting(entry, "timesteps", levels)
    if base.guided and z.get("flux_guidance_mode", "constant") == "constant":
        scale = z.number("flux_guidance_value", 1.0)
        yield Setting(f"flux_guidance_value={scale:g}", "training_arguments.guidance_scale", scale)
    elif base.guided:
        yield from z.refuses("flux_guidance_mode", "draws the guidance scale")
    if "resolution" in z and z.get("resolution_type", "pixel") == "pixel":
        yield from _resolution(z, "resolution", z.get("resolution"))


TRAINERS: dict[str, Callable[[Entries, Base], Iterator[Setting]]] = {
    "kohya's sd-scripts": kohya,
    "diffusers' scripts": diffusers,
    "OneTrainer": onetrainer,
    "ai-toolkit": ai_toolkit,
    "SimpleTuner": simpletuner,
}
