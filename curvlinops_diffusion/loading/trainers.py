"""Trainers, each a function of the entries that it leaves of a run.

An entry decides an option, changes the objective in a way that no option expresses, is worth a
sentence, or is of the optimiser, of files, of logs. What each does is that of the trainer's source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

from curvlinops_diffusion.loading.trainer_entries import Base, Entries, Setting, plain

# what several trainers have
_MASKS, _ERROR = "weights pixels by masks", "replaces the squared error"
_ZEROS = "replaces a text encoder's output by zeros"
_PADDING, _LEVELS = "masks the padding of prompts", "draws levels in another way"
_DROPOUT = "the adapter's dropout is off here, as in sampling"
_VAE = "latents were those of this autoencoder, not of the base's"
_LOSS, _TARGET = "adds another loss", "replaces the target"
_NOT_RESIZED = "cuts parts out of images that are not resized"
_SHIFT, _GUIDANCE = "training_arguments.shift", "training_arguments.guidance_scale"
_TOKENS = "training_arguments.max_sequence_length"


def _square(value: Any) -> int | None:
    """The side of a square resolution: a number, ``512,512``, a pair; ``None`` for any other."""
    if isinstance(value, str):
        value = [plain(part) for part in re.split(r"[,x]", value)]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    found = sides.pop() if len(sides) == 1 else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _resolution(z: Entries, name: str = "resolution") -> Iterator[Setting]:
    if z.get(name) is not None:
        side = _square(z.get(name))
        refused = "" if side else "trains on several sizes, or on none that is square"
        yield Setting(z.shown(name), "resolution", side, refused=refused)


def _logit_normal(mean: float, std: float) -> str:
    return "logit-normal" if (mean, std) == (0, 1) else f"logit-normal:{mean:.9g}:{std:.9g}"


def _min_snr(z: Entries, name: str, base: Base) -> Iterator[Setting]:
    """Min-SNR weights, which networks of flow matching are not trained with."""
    if name in z and not base.flow:
        gamma = z.number(name)
        yield from z.sets(name, "weighting", "min-snr" if gamma else None)
        if gamma:
            yield from z.sets(name, "snr_gamma", gamma)


def _predicts(z: Entries, base: Base, name: str, predicts: str) -> Iterator[Setting]:
    """A prediction type, perhaps other than that of the base's scheduler."""
    option = "training_arguments.prediction_type"
    yield from z.sets(name, option, predicts, base.prediction_type)


def _zero_snr(z: Entries, base: Base, name: str) -> Iterator[Setting]:
    """Decide if the last level has no signal, perhaps other than by the base's scheduler."""
    option = "rescale_betas_zero_snr"
    here = bool(base.scheduler.get(option, False))
    yield from z.sets(name, f"training_arguments.{option}", bool(z.get(name)), here)


def _scheme(z: Entries, name: str, scheme: str, mean: float, std: float) -> Iterator[Setting]:
    """Decide the draws of levels that go with a scheme of weights of flow matching."""
    if scheme == "mode":
        yield from z.refuses("draws levels by a heavy-tailed distribution", name)
    else:
        levels = _logit_normal(mean, std) if scheme == "logit_normal" else None
        yield from z.sets(name, "timesteps", levels)


def _of_clean_image(z: Entries, name: str, scheme: str) -> Iterator[Setting]:
    """The weights of a scheme where errors are of the clean image, which are ``σ²`` times."""
    if scheme == "cosmap":
        yield from z.refuses("weights noise levels by cosmap times σ²", name)
    else:
        yield from z.sets(name, "weighting", None if scheme == "sigma_sqrt" else "preconditioned")


def _class_images(z: Entries, name: str, weight: str) -> Iterator[Setting]:
    """Images of the class, which are trained on beside those of the subject."""
    if z.get(name):
        yield from z.sets(weight, "prior_loss_weight", z.number(weight, 1.0), 1.0)
        text = "images of the class were trained on too, and are training images"
        yield Setting(z.shown(name), note=text)


# ---------------------------------------------------------------------------------------------
# kohya's sd-scripts
# ---------------------------------------------------------------------------------------------

_FLUX = {
    "ss_timestep_sampling": "sigma",
    "ss_discrete_flow_shift": 3.0,
    "ss_model_prediction_type": "sigma_scaled",
    "ss_guidance_scale": 3.5,
}
# by which the scripts run where they are not given
_KOHYA_FLOW: dict[str, dict[str, Any]] = {
    "Flux": _FLUX,
    "Chroma": _FLUX,
    "Lumina2": {"ss_timestep_sampling": "shift", "ss_discrete_flow_shift": 6.0},
}


def kohya(z: Entries, base: Base) -> Iterator[Setting]:
    """``ss_*`` in a file's header, or the arguments in a file of TOML under these names."""
    if "ss_session_id" not in z and "ss_sd_model_name" in z:  # no header, which has everything
        usual = {"ss_v_parameterization": False, "ss_zero_terminal_snr": False}
        flow = _KOHYA_FLOW.get(base.family or "", {}) if base.flow else {}
        z = replace(z, values={**usual, **flow, **z.values})
    for name in ("ss_clip_skip", "modelspec.encoder_layer"):
        if z.get(name) is not None and base.family == "StableDiffusion":  # 1 is the last layer
            skipped = max(int(z.number(name)) - 1, 0)
            yield from z.sets(name, "training_arguments.clip_skip", skipped)
            break
    name = "ss_max_token_length"
    if z.get(name, 75) != 75 and not base.flow:
        yield from z.sets(name, "training_arguments.max_token_length", z.get(name))
    name, dropped = "ss_caption_dropout_rate", z.number("ss_caption_dropout_rate")
    if every := int(z.number("ss_caption_dropout_every_n_epochs")):
        name = "ss_caption_dropout_every_n_epochs"
        total = max(int(z.number("ss_num_epochs", every)), 1)
        dropped = 1 - (1 - dropped) * (1 - total // every / total)
    yield from z.sets(name, "condition_dropout", dropped)
    yield from z.decides(ss_caption_tag_dropout_rate="tag_dropout")
    yield from (_kohya_flow if base.flow else _kohya_noise)(z, base)
    yield from z.refuses(_ERROR, "ss_loss_type")
    yield from z.refuses(_MASKS, "ss_masked_loss", "ss_alpha_mask")
    yield from z.refuses("weights words of captions", "ss_weighted_captions")
    yield from z.refuses(_PADDING, "ss_apply_t5_attn_mask", "ss_apply_lg_attn_mask")
    zeros = (f"ss_{encoder}_dropout_rate" for encoder in ("clip_l", "clip_g", "t5"))
    yield from z.refuses(_ZEROS, *zeros)
    yield from z.notes("ss_network_dropout", _DROPOUT)
    if "lycoris" in str(z.get("ss_network_module")):
        text = "its derivatives went through the norms of weights, and here none does"
        yield from z.table("ss_network_args").notes("dora_wd", text)
    yield from z.notes("ss_vae_name", _VAE)
    yield from z.notes("ss_token_warmup_step", "training began with some of the tags")
    yield from z.notes("ss_validation_split", "so much of the images was kept from training")
    for name in ("ss_num_reg_images", "ss_reg_data_dir"):
        yield from _class_images(z, name, "ss_prior_loss_weight")
    for folder, own in z.table("ss_dataset_dirs").values.items():
        times = f"{own.get('img_count')} images, each {own.get('n_repeats')} times"
        yield Setting(f"'{folder}' of ss_dataset_dirs", note=times)
    for setting in _kohya_data(z):
        yield replace(setting, of_data=True)


def _kohya_noise(z: Entries, base: Base) -> Iterator[Setting]:
    """Noise, target and weights of Stable Diffusion 1, 2 and XL."""
    yield from _zero_snr(z, base, "ss_zero_terminal_snr")
    name = "ss_v_parameterization"
    velocity = bool(z.get(name))
    if name not in z and z.get("modelspec.prediction_type") in ("v", "epsilon"):
        name = "modelspec.prediction_type"
        velocity = z.get(name) == "v"
    elif name not in z and str(z.get("ss_base_model_version")).endswith("_v"):
        name, velocity = "ss_base_model_version", True
    yield from _predicts(z, base, name, "v_prediction" if velocity else "epsilon")
    yield from z.decides(ss_noise_offset="noise_offset")
    if z.number("ss_noise_offset"):
        names = ("ss_adaptive_noise_scale", "ss_noise_offset_random_strength")
        yield from z.refuses("makes the offset of the noise another one", *names)
    yield from _kohya_perturbation(z)
    yield from _min_snr(z, "ss_min_snr_gamma", base)
    weighed = z.get("ss_min_snr_gamma") or z.get("ss_debiased_estimation")
    if weighed and z.get("ss_zero_terminal_snr"):  # they are made before levels are rescaled
        option = "training_arguments.weights_before_rescaling"
        yield from z.sets("ss_zero_terminal_snr", option, True)
    if z.get("ss_debiased_estimation"):
        refused = "multiplies two weightings" if z.get("ss_min_snr_gamma") else ""
        yield from z.sets("ss_debiased_estimation", "weighting", "debiased", refused=refused)
    yield from z.refuses("adds noise of lower resolutions", "ss_multires_noise_iterations")
    names = ("ss_v_pred_like_loss", "ss_scale_v_pred_loss_like_noise_pred")
    yield from z.refuses("weights noise levels", *names)
    yield from _kohya_range(z)


def _kohya_range(z: Entries) -> Iterator[Setting]:
    """The levels from one to before another; where these are one level, that alone."""
    name = "modelspec.timestep_range"
    if z.get(name) is None:
        return
    ends = [int(end) for end in re.findall(r"\d+", str(z.values[name]))]
    if len(ends) != 2:
        raise ValueError(
            f"'{z.source}' holds {z.shown(name)}, which must be two numbers. Pass "
            "`recipe='none'`, and what training did by the options."
        )
    lowest, end = ends if ends[0] < ends[1] else (ends[1], ends[1] + 1)
    levels = None if ends == [0, 1000] else f"stratified:{lowest}:{end}"
    yield from z.sets(name, "timesteps", levels)


def _kohya_perturbation(z: Entries) -> Iterator[Setting]:
    yield from z.decides(ss_ip_noise_gamma="input_perturbation")
    if z.number("ss_ip_noise_gamma"):
        name = "ss_ip_noise_gamma_random_strength"
        yield from z.refuses("draws the perturbation's strength", name)


def _kohya_flow(z: Entries, base: Base) -> Iterator[Setting]:
    """Levels, target and weights of flow matching."""
    sampling, scheme = z.get("ss_timestep_sampling"), str(z.get("ss_weighting_scheme", "none"))
    mean, std = z.number("ss_logit_mean"), z.number("ss_logit_std", 1.0)
    if base.family == "StableDiffusion3":  # whose levels have none of the scheduler's shift
        name, shift = "ss_weighting_scheme", z.number("ss_training_shift", 1.0)
        yield from z.sets(name, _SHIFT, shift, base.shift)
        yield from _of_clean_image(z, name, scheme)
        yield from _scheme(z, name, scheme, mean, std)
        tokens = int(z.number("ss_t5xxl_max_token_length", 256))
        yield Setting(f"t5xxl_max_token_length={tokens}", _TOKENS, tokens)
        if scheme == "logit_normal" or shift != 1:
            yield from z.refuses("draws levels within a range", "modelspec.timestep_range")
        else:
            yield from _kohya_range(z)
        return
    yield from _kohya_perturbation(z)
    if base.guided and "ss_guidance_scale" in z:
        yield from z.decides(ss_guidance_scale=_GUIDANCE)
    if (name := "ss_t5xxl_max_token_length") in z:
        yield from z.sets(name, _TOKENS, z.get(name))
    elif "schnell" in str(z.get("modelspec.architecture")):
        yield from z.sets("modelspec.architecture", _TOKENS, 256)
    yield from z.refuses("compares other than the velocity", "ss_model_prediction_type")
    scale, shift = z.number("ss_sigmoid_scale", 1.0), z.number("ss_discrete_flow_shift", 1.0)
    datasets, name = z.get("ss_datasets"), "ss_timestep_sampling"
    sides = _of_subsets(datasets).get("resolution", []) if isinstance(datasets, list) else []
    side = _square(z.get("ss_resolution") if len(sides) != 1 else sides[0])
    if sampling == "sigma":
        yield from z.sets("ss_discrete_flow_shift", _SHIFT, shift, base.shift)
        yield from _scheme(z, "ss_weighting_scheme", scheme, -mean, std)  # from noise to data
        return
    # tokens of two by two latents, of eight by eight pixels each
    means = {"sigmoid": 0.0, "shift": log(shift)}
    means |= {} if side is None else {"flux_shift": _flux_mean((side // 16) ** 2)}
    if sampling == "uniform" or sampling in means:
        levels = _logit_normal(means[sampling], scale) if sampling in means else None
        yield from z.sets(name, _SHIFT, 1.0, base.shift)
        yield from z.sets(name, "timesteps", levels)
        if sampling == "flux_shift":
            yield from z.notes(name, "levels are those of a square, for images of other shapes too")
    else:
        yield from z.refuses(_LEVELS, name)


def _flux_mean(tokens: int) -> float:
    """The shift of Flux's levels by the number of an image's tokens: a line through two points."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


# what a subset says of its images, and the options that it decides
_KOHYA_DATA = {
    "resolution": "resolution",
    "enable_bucket": "buckets",
    "min_bucket_reso": "bucket_min",
    "max_bucket_reso": "bucket_max",
    "bucket_no_upscale": "bucket_no_upscale",
    "bucket_reso_steps": "bucket_step",  # of a file of arguments alone, as the extension
    "caption_extension": "caption_extension",
    "flip_aug": "augment",
    "random_crop": "random_crop",
    "shuffle_caption": "shuffle_captions",
    "keep_tokens": "keep_tokens",
    "resize_interpolation": "interpolation",
}
_KOHYA_USUAL = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
_KOHYA_DRAWN = {
    "color_aug": "changes colours at random",
    "face_crop_aug_range": "crops faces at random",
    "enable_wildcard": "draws words of captions",
    "keep_tokens_separator": "separates the tokens of captions that are kept",
    "secondary_separator": "joins tags, and becomes a comma",
    "caption_separator": "separates tags by another sign",
    "caption_prefix": "adds text to captions, as a dataset.toml as `images` says",
    "caption_suffix": "adds text to captions, as a dataset.toml as `images` says",
}


def _kohya_data(z: Entries) -> Iterator[Setting]:
    """Changes of images and captions: of one folder, or of data sets with subsets."""
    datasets, name = z.get("ss_datasets"), "ss_datasets"
    several = _of_subsets(datasets) if isinstance(datasets, list) else {}
    # what is kept is not shuffled, nor dropped
    shuffled = z.get("ss_shuffle_caption") or z.get("ss_caption_tag_dropout_rate")
    shuffled = shuffled or True in several.get("shuffle_caption", ())
    bucketed = several.get("enable_bucket", [z.get("ss_enable_bucket")])
    sized = "resolution" in several or bool(z.get("ss_resolution"))
    for key in (*_KOHYA_DATA, *_KOHYA_DRAWN):
        if key.startswith(("keep_tokens", "caption_separator")) and not shuffled:
            continue
        name = f"ss_{key}" if key not in several else f"{key} of ss_datasets"
        values = several.get(key, [z.get(name)])
        option, value = _KOHYA_DATA.get(key, ""), values[0]
        own = Entries({name: value}, z.source)
        if len(values) > 1:
            said = ", ".join(map(str, values))
            yield Setting(name, option, refused=f"differs by subset ({said})")
        elif key == "resolution":
            yield from _resolution(own, name)
        elif key == "enable_bucket" and value is False and sized:
            yield from own.sets(name, option, "square")
        elif key == "random_crop" and value and bucketed == [False]:
            yield from own.sets(name, option, None, refused=_NOT_RESIZED)
        elif option == "interpolation" and value is not None:
            how = {"linear": "bilinear", "cubic": "bicubic"}.get(value, value)
            known = how in ("bilinear", "bicubic", "lanczos")
            refused = "" if known else "resizes images in another way"
            yield from own.sets(name, option, how, refused=refused)
        elif option and value is not None:
            shown = ("flip" if value else None) if option == "augment" else value
            yield from own.sets(name, option, shown, _KOHYA_USUAL.get(key))
        else:
            yield from own.refuses(_KOHYA_DRAWN.get(key, ""), name)


def _of_subsets(datasets: Sequence[Any]) -> dict[str, list[Any]]:
    """The different values of each key in data sets and their subsets, but those of the class."""
    found: dict[str, list[Any]] = {}
    for dataset in datasets:
        own = [subset for subset in dataset.get("subsets", ()) if not subset.get("is_reg")]
        # of a data set and of its subsets: what these leave open
        for one in (dataset, *own):
            for key, value in one.items():
                values = found.setdefault(key, [])
                if value is not None and value not in values:
                    values.append(value)
    return {key: values for key, values in found.items() if values}


# ---------------------------------------------------------------------------------------------
# The training scripts of diffusers
# ---------------------------------------------------------------------------------------------


def diffusers(z: Entries, base: Base) -> Iterator[Setting]:
    """The arguments of a script, as ``accelerate`` writes them for TensorBoard."""
    yield from _min_snr(z, "snr_gamma", base)
    yield from z.decides(
        noise_offset="noise_offset",
        input_perturbation="input_perturbation",
        proportion_empty_prompts="condition_dropout",
    )
    # of the scripts of DreamBooth, whose strength is fixed
    yield from z.sets("offset_noise", "noise_offset", 0.1 if z.get("offset_noise") else 0.0)
    if not base.flow and z.get("prediction_type"):
        yield from _predicts(z, base, "prediction_type", str(z.get("prediction_type")))
    if base.flow and "weighting_scheme" in z:
        name, scheme = "weighting_scheme", str(z.get("weighting_scheme"))
        mirrored = base.family == "Lumina2"  # whose shares of noise are of data
        mean, std = z.number("logit_mean") * (1 if mirrored else -1), z.number("logit_std", 1.0)
        if z.get("precondition_outputs"):
            yield from _of_clean_image(z, name, scheme)
        elif mirrored and scheme == "sigma_sqrt":
            yield from z.refuses("weights noise levels by the share of data", name)
        else:
            weighting = {"sigma_sqrt": "inverse-variance", "cosmap": "cosmap"}.get(scheme)
            yield from z.sets(name, "weighting", weighting)
        yield from _scheme(z, name, scheme, mean, std)  # from noise to data
    if base.guided and "guidance_scale" in z:
        yield from z.decides(guidance_scale=_GUIDANCE)
    if base.flow:
        tokens = z.get("max_sequence_length")
        yield from z.sets("max_sequence_length", _TOKENS, tokens)
    yield from z.refuses(_ERROR, "loss_type")
    yield from z.refuses("adds what the network predicts to the target", "dream_training")
    yield from z.refuses("noises as EDM does", "do_edm_style_training")
    yield from z.refuses("skips layers of the text encoder", "clip_skip")
    yield from z.refuses(_PADDING, "text_encoder_use_attention_mask")
    yield from z.refuses(_LEVELS, "timestep_bias_strategy")
    if z.get("tokenizer_max_length") != 77:
        yield from z.refuses("shows another number of tokens", "tokenizer_max_length")
    yield from _resolution(z)
    name = "aspect_ratio_buckets"
    yield from z.sets(name, "buckets", str(z.values.get(name) or "") or False)
    yield from z.sets("center_crop", "random_crop", not z.get("center_crop"))
    yield from z.sets("random_flip", "augment", "flip" if z.get("random_flip") else None)
    name = "image_interpolation_mode"
    yield from z.sets(name, "interpolation", z.get(name))
    for name in ("image_column", "caption_column"):
        yield from z.sets(name, name, z.get(name))
    if not z.get("caption_column"):
        yield from z.sets("instance_prompt", "prompt", z.get("instance_prompt"))
    yield from _class_images(z, "with_prior_preservation", "prior_loss_weight")
    yield from z.notes("pretrained_vae_model_name_or_path", _VAE)
    yield from z.notes("max_train_samples", "training took so many of the images, shuffled")


# ---------------------------------------------------------------------------------------------
# OneTrainer
# ---------------------------------------------------------------------------------------------


def onetrainer(z: Entries, base: Base) -> Iterator[Setting]:
    """``ot_config`` in a file's header, or a config of its own."""
    yield from z.decides(offset_noise_weight="noise_offset")
    if z.number("offset_noise_weight") and not base.flow:
        yield from z.refuses("scales offset noise by the level", "generalized_offset_noise")
    predicts, name = base.prediction_type, "rescale_noise_scheduler_to_zero_terminal_snr"
    if not base.flow:
        if z.get(name):  # a scheduler that has it stays as it is without
            yield from _zero_snr(z, base, name)
        forced = {name: "v_prediction"}
        if z.get("training_method") == "FINE_TUNE":  # adapters have the base's, whatever is said
            forced |= {"force_v_prediction": "v_prediction", "force_epsilon_prediction": "epsilon"}
        if name := next(filter(z.get, forced), ""):
            predicts = forced[name]
            yield from _predicts(z, base, name, predicts)
    name, weight = "loss_weight_fn", z.get("loss_weight_fn", "CONSTANT")
    if weight == "MIN_SNR_GAMMA":
        yield from z.sets(name, "weighting", "min-snr")
        yield from z.decides(loss_weight_strength="snr_gamma")
    elif weight == "CONSTANT" or (weight == "DEBIASED_ESTIMATION" and predicts == "epsilon"):
        yield from z.sets(name, "weighting", None if weight == "CONSTANT" else "debiased")
    else:
        yield from z.refuses("weights noise levels", name)
    yield from _onetrainer_levels(z, base)
    yield from _onetrainer_text(z, base)
    # its text-to-image loaders take the means of latents, which no entry says
    yield Setting("latents of OneTrainer", "training_arguments.sample_latents", False, True)
    yield from z.refuses(_ERROR, "mae_strength", "log_cosh_strength", "huber_strength")
    yield from z.refuses("adds noise to input and target", "perturbation_noise_weight")
    yield from z.refuses(_MASKS, "masked_training")
    yield from z.notes("dropout_probability", _DROPOUT)
    yield from _resolution(z)
    yield from _onetrainer_concepts(z)
    side, name = _square(z.get("resolution")), "aspect_ratio_bucketing"
    if side is not None and z.get(name):
        step = {"StableDiffusion": 8, "PixArt": 16, "Sana": 32}.get(base.family or "", 64)
        yield from z.sets(name, "buckets", "onetrainer")
        yield from z.sets(name, "bucket_step", step, 64)


def _onetrainer_text(z: Entries, base: Base) -> Iterator[Setting]:
    """Tokens and layers of text encoders, and their guidance."""
    name, layers = "text_encoder_layer_skip", "training_arguments.clip_skip"
    skipped = [z.get(name, 0)]
    if base.family == "StableDiffusionXL":
        skipped.append(z.get("text_encoder_2_layer_skip", 0))
    if base.family in ("StableDiffusion", "StableDiffusionXL"):
        refused = "" if len(set(skipped)) == 1 else "skips unlike layers of two text encoders"
        yield Setting(z.shown(name), layers, skipped[0], refused=refused)
    else:
        names = (f"text_encoder{which}_layer_skip" for which in ("", "_2", "_3"))
        yield from z.refuses("skips layers of a text encoder", *names)
    if base.family == "Flux":
        name = "text_encoder_2_sequence_length"
        yield from z.sets(name, _TOKENS, z.get(name))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        for setting in z.table(name).refuses(_ZEROS, "dropout_probability"):
            yield replace(setting, entry=f"{name}.{setting.entry}")
    own = z.table("transformer")
    if base.guided and "guidance_scale" in own:
        yield from own.decides(guidance_scale=_GUIDANCE)
    if base.family in ("Flux", "StableDiffusion3"):
        yield from own.refuses(_PADDING, "attention_mask")


# what a concept does to images that no option expresses, at random or always
_CHANGES = {
    "flip": "mirrors images",
    "rotate": "rotates images",
    "brightness": "changes brightness",
    "contrast": "changes contrast",
    "saturation": "changes saturation",
    "hue": "changes hues",
}


def _onetrainer_concepts(z: Entries) -> Iterator[Setting]:
    """Changes of the images and captions of concepts, where a config has these."""
    found = [own for own in z.get("concepts") or () if isinstance(own, Mapping)]
    found = [own for own in found if own.get("enabled", True)]
    if any(own.get("type") == "PRIOR_PREDICTION" for own in found):
        yield Setting("concepts", note="the base's predictions of others were trained on too")
    found = [own for own in found if own.get("type", "STANDARD") == "STANDARD"]
    if not found:
        return
    concepts = [Entries(own, z.source) for own in found]
    image, text = ([own.table(name) for own in concepts] for name in ("image", "text"))
    for own in image:
        for what, does in _CHANGES.items():
            drawn = () if what == "flip" else (f"enable_random_{what}",)
            yield from own.refuses(does, f"enable_fixed_{what}", *drawn)
        yield from own.refuses("trains on several sizes", "enable_resolution_override")
    shuffled = [bool(own.get("enable_tag_shuffling")) for own in text]
    dropped = [
        own.number("tag_dropout_probability") if own.get("tag_dropout_enable") else 0.0
        for own in text
    ]
    for own, varied, rate in zip(text, shuffled, dropped, strict=True):
        yield from own.refuses("changes capitals of captions", "caps_randomize_enable")
        special = own.get("tag_dropout_special_tags_mode", "NONE") != "NONE"
        if rate and (special or own.get("tag_dropout_mode", "FULL") != "RANDOM"):
            yield from own.refuses("drops tags in another way", "tag_dropout_enable")
        if (rate or varied) and own.get("tag_delimiter", ",") != ",":
            yield from own.refuses("separates tags by another sign", "tag_delimiter")
    flips = ["flip" if own.get("enable_random_flip") else None for own in image]
    named = ["file_name" if own.get("prompt_source") == "filename" else None for own in text]
    kept = [own.get("keep_tags_count", 1) for own in text]
    kept = [n if a or b else 0 for n, a, b in zip(kept, shuffled, dropped, strict=True)]
    # of one variation, whose latents are kept, each image was cut at one place
    once = z.get("latent_caching", True) and all(c.get("image_variations", 1) == 1 for c in found)
    cut = [bool(own.get("enable_crop_jitter", True)) for own in image]
    if once and any(cut):
        said = "images were cut once, at places that nothing tells, and here in the middle"
        yield Setting("enable_crop_jitter of concepts", note=said)
    decided: dict[str, tuple[str, Sequence[Any]]] = {
        "enable_crop_jitter": ("random_crop", [each and not once for each in cut]),
        "enable_random_flip": ("augment", flips),
        "enable_tag_shuffling": ("shuffle_captions", shuffled),
        "tag_dropout_probability": ("tag_dropout", dropped),
        "keep_tags_count": ("keep_tokens", kept),
        "prompt_source": ("caption_column", named),
    }
    for name, (option, values) in decided.items():
        refused = "" if all(value == values[0] for value in values) else "differs by concept"
        yield Setting(f"{name} of concepts", option, values[0], refused=refused)
    for name, does in (
        ("balancing", "images were not seen alike often"),
        ("loss_weight", "images did not weigh alike"),
    ):
        numbers = {own.get(name, 1.0) for own in found}
        if len(numbers) > 1:
            said = ", ".join(f"'{own.get('name', '')}' {own.get(name, 1.0)}" for own in found)
            yield Setting(f"{name} of concepts", note=f"{does} ({said})")


def _onetrainer_levels(z: Entries, base: Base) -> Iterator[Setting]:
    name, how = "timestep_distribution", z.get("timestep_distribution", "UNIFORM")
    low, high = z.number("min_noising_strength"), z.number("max_noising_strength", 1.0)
    shift, within = z.number("timestep_shift", 1.0), (low, high) != (0, 1)
    dynamic, side = z.get("dynamic_timestep_shifting") and base.flow, _square(z.get("resolution"))
    if dynamic and side is not None and base.family == "Flux":
        shift, dynamic = exp(_flux_mean((side // 16) ** 2)), False
    if dynamic:
        yield from z.refuses("draws levels by the size of each image", "dynamic_timestep_shifting")
    elif how == "LOGIT_NORMAL" and not within:
        mean, std = z.number("noising_bias") + log(shift), z.number("noising_weight") + 1
        yield from z.sets(name, _SHIFT, 1.0, base.shift)
        yield from z.sets(name, "timesteps", _logit_normal(mean, std))
    elif how == "UNIFORM" and (shift == 1 or (base.flow and not within)):
        if base.flow:
            yield from z.sets("timestep_shift", _SHIFT, shift, base.shift)
        levels = f"stratified:{int(1000 * low)}:{int(1000 * high)}" if within else None
        yield from z.sets(name, "timesteps", levels)
    else:
        yield from z.refuses(_LEVELS, name)


# ---------------------------------------------------------------------------------------------
# ai-toolkit and SimpleTuner
# ---------------------------------------------------------------------------------------------


# changes of its step that no option expresses, with the entries that make them
_TOOLKIT_STEP = {
    _ERROR: "loss_type",
    _LEVELS: "content_or_style",
    _TARGET: "do_guidance_loss do_differential_guidance",
    _LOSS: "diff_output_preservation blank_prompt_preservation inverted_mask_prior do_fft_loss "
    "do_prior_divergence target_norm_std",
    "weights noise levels": "snr_gamma learnable_snr_gos linear_timesteps linear_timesteps2",
    "changes the noise": "dynamic_noise_offset random_noise_multiplier random_noise_shift "
    "blended_blur_noise force_consistent_noise do_signal_correction_noise "
    "do_batch_noise_correction",
    "changes images or latents": "do_signal_amplification standardize_images standardize_latents "
    "adaptive_scaling_factor",
    "changes captions": "short_and_long_captions prompt_saturation_chance",
    "drops prompts of single text encoders": "prompt_dropout_prob",
    "shows the network no guidance": "bypass_guidance_embedding",
    "rescales what is compared": "match_noise_norm correct_pred_norm",
    "compares other than the velocity": "t0_loss_target",
    "trains several steps at once": "train_turbo",
    "guides what the network predicts": "do_cfg do_random_cfg",
}
_TOOLKIT_FACTORS = {
    "noise_multiplier": "scales the noise",
    "target_noise_multiplier": "scales the target",
    "img_multiplier": "scales images",
    "latent_multiplier": "scales latents",
    "noisy_latent_multiplier": "scales noised latents",
    "pred_scaler": "scales what the network predicts",
    "optimal_noise_pairing_samples": "chooses the noise by the image",
}
# and of images and captions
_TOOLKIT_DATA = {
    "mirrors images upside down": "flip_y",
    "changes images at random": "random_scale augmentations augments",
    "standardises images": "standardize_images",
    "changes captions": "random_triggers replacements",
    "shows short captions": "use_short_captions",
    "cuts around a part of each image": "poi",
    _MASKS: "mask_path alpha_mask",
}


def ai_toolkit(z: Entries, base: Base) -> Iterator[Setting]:
    """``config.yaml`` of the output folder: train and data sets of its process."""
    for name in ("train", "model"):
        if not isinstance(z.get(name, {}), Mapping):
            raise ValueError(
                f"'{z.source}' holds {name}={z.get(name)!r}, which must be a table of entries. "
                "Pass `recipe='none'`, and what training did by the options."
            )
    train, model = z.table("train"), z.table("model")
    yield from train.decides(noise_offset="noise_offset")
    if model.get("is_v_pred"):
        yield from train.refuses("weighs velocities as it does noise", "min_snr_gamma")
    else:
        yield from _min_snr(train, "min_snr_gamma", base)
    if not base.flow:
        predicts = "v_prediction" if model.get("is_v_pred") else "epsilon"
        yield from _predicts(model, base, "is_v_pred", predicts)
    yield from model.notes("vae_path", _VAE)
    yield from model.refuses(_PADDING, "attn_masking")
    if base.family == "StableDiffusion3":
        yield Setting("prompts of 256 tokens", _TOKENS, 256)
    for does, names in _TOOLKIT_STEP.items():
        yield from train.refuses(does, *names.split())
    for name, does in _TOOLKIT_FACTORS.items():
        if train.get(name, 1) != 1:
            yield Setting(train.shown(name), refused=does)
    if train.get("loss_target", "noise") != "noise":
        yield Setting(train.shown("loss_target"), refused=_TARGET)
    if train.get("min_denoising_steps"):
        yield Setting(train.shown("min_denoising_steps"), refused=_LEVELS)
    if train.number("max_denoising_steps", 999) < 999:
        yield Setting(train.shown("max_denoising_steps"), refused=_LEVELS)
    if base.flow:
        how = train.get("timestep_type", "sigmoid")
        entry, known = f"timestep_type={how}", {"sigmoid": "logit-normal", "linear": None}
        if how in known:
            yield Setting(entry, _SHIFT, 1.0, base.shift)
            yield Setting(entry, "timesteps", known[how])
        else:
            yield Setting(entry, refused=_LEVELS)
    if base.guided:
        scale = train.number("cfg_scale", 1.0)
        yield Setting(f"cfg_scale={scale:g}", _GUIDANCE, scale)
    sets = [Entries(own, z.source) for own in z.get("datasets", ()) if isinstance(own, Mapping)]
    for own in sets:
        for does, names in _TOOLKIT_DATA.items():
            yield from own.refuses(does, *names.split())
    decided = {
        "caption_dropout_rate": "condition_dropout",
        "shuffle_tokens": "shuffle_captions",
        "keep_tokens": "keep_tokens",
        "token_dropout_rate": "tag_dropout",
        "random_crop": "random_crop",
        "flip_x": "augment",
        "caption_ext": "caption_extension",
        "default_caption": "prompt",
        "resolution": "resolution",
    }
    for name, option in decided.items():
        found = [own for own in sets if own.get(name)]
        if not found:
            continue
        own, value = found[0], found[0].get(name)
        if any(other.get(name) != value for other in sets):
            yield Setting(own.shown(name), option, refused="differs by data set")
        elif name == "resolution":
            yield from _resolution(own)
        elif name == "caption_dropout_rate" and z.get("trigger_word"):
            yield Setting(own.shown(name), option, refused="drops all but the trigger word")
        else:
            yield from own.sets(name, option, "flip" if option == "augment" else value)
    yield from z.sets("trigger_word", "trigger_word", z.get("trigger_word"))
    yield from _toolkit_sizes(sets, base)
    if sets:
        yield Setting("all lines of captions", "caption_lines", "all")


def _toolkit_sizes(sets: Sequence[Entries], base: Base) -> Iterator[Setting]:
    """Buckets, which ai-toolkit has unless it is told otherwise, and how images are resized."""
    shaped = {own.get("buckets", True) and not own.get("square_crop") for own in sets}
    entry = f"buckets={', '.join(map(str, sorted(shaped)))}"
    if len(shaped) > 1:
        yield Setting(entry, "buckets", refused="differs by data set")
    elif True in shaped:
        # of autoencoders, and of patches where its class for several networks doubles them
        coarse = base.family in ("Flux", "StableDiffusion3", "QwenImage", "Chroma")
        step = 32 if coarse and not base.kind.startswith("FluxKontext") else 16
        yield Setting(entry, "buckets", "ai-toolkit")
        yield Setting(entry, "bucket_step", step, 64)
        if not any("resolution" in own for own in sets):
            yield Setting("resolution=512, which is its default", "resolution", 512)
    elif sets:
        yield Setting(entry, "interpolation", "bicubic")
        if any(own.get("random_crop") and not own.get("square_crop") for own in sets):
            yield Setting("random_crop=True without buckets", "random_crop", refused=_NOT_RESIZED)


def simpletuner(z: Entries, base: Base) -> Iterator[Setting]:
    """``simpletuner_config.json`` of the output folder, or the config it was started with."""
    if not base.flow:
        yield from _min_snr(z, "snr_gamma", base)
        offset = z.number("noise_offset", 0.1) if z.get("offset_noise") else 0.0
        some = offset and z.number("noise_offset_probability", 0.25) != 1
        refused = "offsets some of the noise alone" if some else ""
        yield Setting(f"offset_noise={offset > 0}", "noise_offset", offset, refused=refused)
        if z.get("prediction_type"):
            yield from _predicts(z, base, "prediction_type", str(z.get("prediction_type")))
        name = "rescale_betas_zero_snr"  # without it false, whatever the base has
        yield from _zero_snr(replace(z, values={name: False, **z.values}), base, name)
        if base.family == "StableDiffusionXL":
            text = (
                "the network was told sizes after resizing, and zeros where captions were dropped"
            )
            yield Setting("sizes of SimpleTuner", note=text)
    else:
        shift = z.number("flow_schedule_shift", 3.0) or 1.0
        scale, uniform = z.number("flow_sigmoid_scale", 1.0), z.get("flow_use_uniform_schedule")
        entry = f"flow_schedule_shift={shift:g}"
        yield Setting(entry, _SHIFT, shift if uniform else 1.0, base.shift)
        yield Setting(entry, "timesteps", None if uniform else _logit_normal(log(shift), scale))
    yield from z.decides(input_perturbation="input_perturbation")
    if z.number("input_perturbation"):
        yield from z.refuses("lowers the perturbation by the step", "input_perturbation_steps")
    dropped = z.number("caption_dropout_probability", 0.1)
    yield Setting(f"caption_dropout_probability={dropped:g}", "condition_dropout", dropped)
    if base.family == "StableDiffusion3":
        tokens = min(int(z.number("tokenizer_max_length", 154)), 154)
        yield Setting(f"tokenizer_max_length={tokens}", _TOKENS, tokens)
    padded = z.get("t5_padding") == "zero" and base.family in ("Flux", "StableDiffusion3")
    yield from z.refuses("shows zeros for padding", "t5_padding") if padded else ()
    yield from z.refuses(_ERROR, "loss_type")
    yield from z.refuses(_PADDING, "flux_attention_masked_training")
    levels = ("use_beta_schedule", "schedule_auto_shift", "cubic_schedule_weights")
    names = (f"flow_{name}" for name in (*levels, "custom_timesteps"))
    yield from z.refuses(_LEVELS, *names, "flux_fast_schedule", "timestep_bias_strategy")
    yield from z.refuses("mixes the noise of several levels", "mixflow_enabled")
    yield from z.refuses(_TARGET, "diff2flow_enabled")
    yield from z.refuses("adds losses of twin trajectories", "twinflow_enabled")
    if base.guided:
        scale, constant = z.number("flux_guidance_value", 1.0), "constant"
        drawn = z.get("flux_guidance_mode", constant) != constant
        refused = "draws the guidance scale" if drawn else ""
        yield Setting(f"flux_guidance_value={scale:g}", _GUIDANCE, scale, refused=refused)
    if z.get("resolution_type", "pixel_area") != "area":
        yield from _resolution(z)


TRAINERS: dict[str, Callable[[Entries, Base], Iterator[Setting]]] = {
    "kohya's sd-scripts": kohya,
    "diffusers' scripts": diffusers,
    "OneTrainer": onetrainer,
    "ai-toolkit": ai_toolkit,
    "SimpleTuner": simpletuner,
}
