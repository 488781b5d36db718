"""What trainers leave of a run, against the trainers' own step and documentation."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image
from safetensors.torch import save_file

from curvlinops_diffusion import Attributor, DenoisingObjective
from curvlinops_diffusion.cli.decided import read_recipe
from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.diffusion.noise import NoiseProcess, as_trained, noise_process
from curvlinops_diffusion.diffusion.timesteps import (
    LogitNormalTimesteps,
    TimestepsWithin,
    UniformTimesteps,
    timestep_scheme,
)
from curvlinops_diffusion.diffusion.weightings import weight_table
from curvlinops_diffusion.loading.trainer_entries import Base
from curvlinops_diffusion.loading.trainer_settings import read_settings, settle
from curvlinops_diffusion.weightings import DebiasedWeighting, MinSNRWeighting
from tests.diffusion import test_pipelines as pipelines
from tests.loading.cases import USUAL_HEADER

SD = Base("StableDiffusionPipeline", {"_class_name": "PNDMScheduler"}, name="sd")
XL = Base("StableDiffusionXLPipeline", {"_class_name": "EulerDiscreteScheduler"})
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX = Base("FluxPipeline", _FLOW | {"use_dynamic_shifting": True}, guided=True)
SD3 = Base("StableDiffusion3Pipeline", _FLOW)
KNOWN = {
    *("noise_offset", "input_perturbation", "condition_dropout", "weighting", "snr_gamma"),
    *("augment", "resolution", "training_arguments", "timesteps", "buckets", "random_crop"),
    *("shuffle_captions", "keep_tokens", "tag_dropout", "prior_loss_weight", "prompt"),
    *("bucket_min", "bucket_max", "bucket_step", "caption_column", "interpolation"),
}
KOHYA = {"ss_session_id": "1", "ss_network_module": "networks.lora"}


def kohya_file(folder, name="lora.safetensors", **entries):
    """A file whose header is as the scripts write it: all values as Python spells them."""
    header = {key: str(value) for key, value in (KOHYA | entries).items()}
    save_file({"w": torch.zeros(1)}, folder / name, metadata=header)
    return folder / name


def decided(path, base, **given):
    return settle(read_settings(path), base, given, KNOWN)[0]


def by_kohya(tmp_path, base, **entries):
    return decided(kohya_file(tmp_path, **entries), base)


# ---------------------------------------------------------------------------------------------
# kohya's scripts
# ---------------------------------------------------------------------------------------------


def write_images(folder, count=3):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for n in range(count):
        Image.fromarray(pixels[n]).save(folder / f"{n}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_of_kohyas_scripts_before_they_rescale(prediction):
    """Levels are noised with the rescaled betas, and weighed by the signal before that."""
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    options = {"rescale_betas_zero_snr": True, "weights_before_rescaling": True}
    process = noise_process(as_trained(scheduler, prediction, **options))
    # custom_train_functions.py: shifted so that the last root is zero, the first as it was
    root_T = torch.cumprod(1 - scheduler.betas.double(), 0).sqrt()
    snr_T = root_T**2 / (1 - root_T**2)
    first, last = float(root_T[0]), float(root_T[-1])
    expected_T = (root_T - last) * first / (first - last)
    torch.testing.assert_close(process.alphas_T.double(), expected_T, atol=1e-5, rtol=0)
    weight_T = snr_T.clamp(max=3.0) / (snr_T + int(prediction == "v_prediction"))
    found_T = weight_table(MinSNRWeighting(3.0), process)
    torch.testing.assert_close(found_T, weight_T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("base", "entries", "expected"),
    [
        (SD, {"ss_clip_skip": 1, "ss_noise_offset": None, "ss_min_snr_gamma": None}, {}),
        (SD, {"ss_clip_skip": 2}, {"training_arguments.clip_skip": 1}),
        (SD, {"ss_max_token_length": 225}, {"training_arguments.max_token_length": 225}),
        (SD, {"ss_max_token_length": 75}, {}),
        (XL, {"ss_clip_skip": 2}, {}),  # which always takes the last layer but one
        (SD, {"ss_debiased_estimation": True}, {"weighting": "debiased"}),
        (SD, {"ss_min_snr_gamma": 1}, {"weighting": "min-snr", "snr_gamma": 1.0}),
        (SD, {"ss_caption_dropout_rate": 0.1}, {"condition_dropout": 0.1}),
        (SD, {"ss_caption_dropout_every_n_epochs": 4}, {"condition_dropout": 0.25}),
        (SD, {"modelspec.timestep_range": "0,1000"}, {}),
        (SD, {"modelspec.timestep_range": "700,700"}, {"timesteps": "stratified:700:701"}),
        (
            SD3,
            {"modelspec.timestep_range": "200,800"},
            {"timesteps": "stratified:200:800", "training_arguments.max_sequence_length": 256},
        ),
        (
            Base("StableDiffusionXLPipeline", {"rescale_betas_zero_snr": True}),
            {"ss_zero_terminal_snr": True, "ss_debiased_estimation": True},
            {"weighting": "debiased", "training_arguments.weights_before_rescaling": True},
        ),
        (SD, {"modelspec.timestep_range": "200,800"}, {"timesteps": "stratified:200:800"}),
        (SD, {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": False}, {}),
        (
            Base("StableDiffusionXLPipeline", {"rescale_betas_zero_snr": True}),
            {"ss_zero_terminal_snr": False},
            {"training_arguments.rescale_betas_zero_snr": False},
        ),
        (
            SD,
            {
                "ss_caption_dropout_rate": 0.5,
                "ss_caption_dropout_every_n_epochs": 4,
                "ss_num_epochs": 10,  # the fourth and eighth, and half of the others
            },
            {"condition_dropout": 0.6},
        ),
        (
            SD,
            {
                **{"ss_resolution": "512,512", "ss_enable_bucket": True, "ss_random_crop": True},
                **{"ss_shuffle_caption": True, "ss_keep_tokens": 2, "ss_max_bucket_reso": 2048},
                **{"ss_min_bucket_reso": 256, "ss_caption_tag_dropout_rate": 0.2},
                **{"ss_num_reg_images": 9, "ss_prior_loss_weight": 0.5},
                **{"ss_resize_interpolation": "cubic"},
            },
            {
                **{"resolution": 512, "buckets": True, "random_crop": True, "bucket_max": 2048},
                **{"shuffle_captions": True, "keep_tokens": 2, "tag_dropout": 0.2},
                **{"prior_loss_weight": 0.5, "interpolation": "bicubic"},
            },
        ),
        (
            SD,
            {
                "ss_datasets": json.dumps(
                    [
                        {
                            "resolution": [768, 768],
                            "enable_bucket": False,
                            "subsets": [
                                {"flip_aug": True, "image_dir": "1_dog"},
                                {"flip_aug": True, "is_reg": False},
                                {"flip_aug": False, "is_reg": True},  # images of the class
                            ],
                        }
                    ]
                )
            },
            {"resolution": 768, "augment": "flip", "buckets": "square"},
        ),
        (
            SD3,
            {"ss_weighting_scheme": "logit_normal", "ss_logit_mean": 0.5, "ss_logit_std": 2.0},
            {
                "training_arguments.shift": 1.0,
                "weighting": "preconditioned",
                "timesteps": "logit-normal:0.5:2",
                "training_arguments.max_sequence_length": 256,
            },
        ),
        (
            FLUX,
            {
                **{"ss_timestep_sampling": "sigma", "ss_weighting_scheme": "logit_normal"},
                **{"ss_logit_mean": 0.5, "ss_logit_std": 1.0, "ss_guidance_scale": 1.0},
                **{"ss_discrete_flow_shift": 3.0, "ss_model_prediction_type": "raw"},
            },
            {  # from noise to data
                "training_arguments.guidance_scale": 1.0,
                "training_arguments.shift": 3.0,
                "timesteps": "logit-normal:-0.5:1",
            },
        ),
    ],
)
def test_entries_of_kohyas_scripts(tmp_path, base, entries, expected):
    found = by_kohya(tmp_path, base, **entries)
    assert found == pytest.approx(expected) if "condition_dropout" in found else found == expected


@pytest.mark.parametrize("sampling", ["sigmoid", "shift", "flux_shift"])
def test_levels_of_flux_by_kohyas_scripts(tmp_path, sampling):
    """Quantiles of the share of noise as in flux_train_utils.py, of images of 512 pixels."""
    entries = {"ss_timestep_sampling": sampling, "ss_sigmoid_scale": 0.8, "ss_resolution": 512}
    found = by_kohya(tmp_path, FLUX, **entries, ss_discrete_flow_shift=3.1582)
    datasets = json.dumps([{"resolution": [512, 512], "subsets": []}])
    own = {k: z for k, z in entries.items() if k != "ss_resolution"} | {"ss_datasets": datasets}
    assert by_kohya(tmp_path, FLUX, **own, ss_discrete_flow_shift=3.1582) == found
    assert "training_arguments.shift" not in found  # levels are the pipeline's, without a shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    sigmas_T = noise_process(scheduler).sigmas_T
    quantiles = np.array([0.1, 0.4, 0.9])
    scheme = timestep_scheme(found["timesteps"], 1000)
    levels = np.floor(scheme._quantile(quantiles) * 1000).astype(int)

    sigma = torch.sigmoid(0.8 * torch.special.ndtri(torch.from_numpy(quantiles)))
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (32 * 32 - 256)
    shift = {"sigmoid": 1.0, "shift": 3.1582, "flux_shift": math.exp(mu)}[sampling]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    torch.testing.assert_close(sigmas_T[levels], sigma, atol=1.1e-3, rtol=0)


@pytest.mark.parametrize(
    ("base", "entries", "told"),
    [
        (SD, {"ss_multires_noise_iterations": 6}, "ss_multires_noise_iterations=6 adds noise of l"),
        (SD, {"ss_noise_offset": 0.1, "ss_adaptive_noise_scale": 0.01}, "adaptive_noise_scale=0.0"),
        (SD, {"ss_loss_type": "huber"}, "ss_loss_type=huber replaces the squared error"),
        (SD, {"ss_resize_interpolation": "area"}, "resizes images in another way"),
        (SD, {"ss_color_aug": True}, "ss_color_aug=True changes colours at random"),
        (SD, {"ss_resolution": "512,768"}, "trains on several sizes, or on none that is square"),
        (SD, {"ss_debiased_estimation": True, "ss_min_snr_gamma": 5}, "multiplies two weightings"),
        (FLUX, {"ss_model_prediction_type": "sigma_scaled"}, "compares other than the velocity"),
        (FLUX, {"ss_timestep_sampling": "new"}, "draws levels in another way"),
        (
            SD3,
            {"ss_weighting_scheme": "logit_normal", "modelspec.timestep_range": "200,800"},
            r"modelspec.timestep_range=200,800 draws levels within a range",
        ),
        (
            SD,
            {"ss_datasets": '[{"subsets": [{"secondary_separator": ";;;"}]}]'},
            "secondary_separator of ss_datasets=;;; joins tags, and becomes a comma",
        ),
        (
            SD,
            {"ss_datasets": '[{"subsets": [{"flip_aug": true}, {"flip_aug": false}]}]'},
            r"flip_aug of ss_datasets differs by subset \(True, False\)",
        ),
    ],
)
def test_what_no_option_expresses(tmp_path, base, entries, told):
    """Refused by name, with what else the file says; gone without where that is asked for."""
    with pytest.raises(ValueError, match=told) as caught:
        by_kohya(tmp_path, base, ss_random_crop=True, **entries)
    assert "by kohya's sd-scripts whose objective no options express" in str(caught.value)
    assert "`recipe='none'` to go without; it also says: " in str(caught.value)
    assert "`random_crop=True`" in str(caught.value)


def test_entries_as_they_are_by_default(tmp_path):
    """Of options that nobody gave nothing is decided."""
    more = {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v1"}
    path = kohya_file(tmp_path, **USUAL_HEADER, **more)
    assert settle(read_settings(path), SD, {}, KNOWN) == ({}, [])


def test_what_is_given_by_hand(tmp_path):
    """Wins, is said where it differs, and stands for a setting that no option expresses."""
    path = kohya_file(
        tmp_path,
        ss_noise_offset=0.1,
        ss_min_snr_gamma=5.0,
        ss_clip_skip=2,
        ss_resolution="512,768",
        ss_network_dropout=0.1,
        ss_dataset_dirs=json.dumps({"10_dog": {"n_repeats": 10, "img_count": 24}}),
        ss_bucket_no_upscale=True,
    )
    given = {"noise_offset": 0.0, "resolution": 512, "training_arguments.clip_skip": 1}
    found, lines = settle(read_settings(path), SD, given | {"weighting": None}, KNOWN)
    assert found == {}
    assert lines == [
        "`noise_offset=0.0` is given, against ss_noise_offset=0.1 of 'lora.safetensors'",
        "`weighting=None` is given, against ss_min_snr_gamma=5.0 of 'lora.safetensors'",
        "ss_network_dropout=0.1 of 'lora.safetensors': the adapter's dropout is off here, as in "
        "sampling",
        "'10_dog' of ss_dataset_dirs of 'lora.safetensors': 24 images, each 10 times",
        "`resolution=512` is given, against ss_resolution=(512, 768) of 'lora.safetensors'",
        "not applied: ss_bucket_no_upscale=True of 'lora.safetensors' (bucket_no_upscale=True), "
        "for which there is no option",
    ]


# ---------------------------------------------------------------------------------------------
# Others
# ---------------------------------------------------------------------------------------------


def written(trainer, folder, entries):
    """What a trainer leaves, in the folder of its weights."""
    save_file({"w": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    if trainer == "diffusers":  # as accelerate lays out what a script is run with
        run = folder / "logs" / "text2image-fine-tune" / "1700000000.5"
        run.mkdir(parents=True)
        (run / "hparams.yml").write_text(yaml.dump(entries))
    elif trainer == "ai-toolkit":
        config = {"name": "dog", "process": [{"train": {}, **entries}]}
        (folder / "config.yaml").write_text(yaml.dump({"job": "extension", "config": config}))
    elif trainer == "OneTrainer":
        usual = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}
        (folder / "config.json").write_text(json.dumps(usual | entries))
    else:
        (folder / "simpletuner_config.json").write_text(json.dumps(entries))
    return folder


SCRIPT = {
    "pretrained_model_name_or_path": "sd",
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "prediction_type": "v_prediction",
    "resolution": 512,
    "center_crop": False,
    "random_flip": True,
    "image_interpolation_mode": "lanczos",
    "aspect_ratio_buckets": "512,768",
    "caption_column": "text",
    "loss_type": "l2",
    "learning_rate": 1e-4,
    "max_train_samples": None,
}
BY_SCRIPT = {
    "weighting": "min-snr",
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "training_arguments.prediction_type": "v_prediction",
    "resolution": 512,
    "random_crop": True,
    "augment": "flip",
    "interpolation": "lanczos",
    "buckets": "512,768",
    "caption_column": "text",
}
# u runs from noise to data there
MEAN = {"logit_mean": 1.0, "logit_std": 1.0}
OF_FLUX = {"guidance_scale": 1.0, "weighting_scheme": "sigma_sqrt", **MEAN}
ONETRAINER = {
    "offset_noise_weight": 0.05,
    "perturbation_noise_weight": 0.0,
    "rescale_noise_scheduler_to_zero_terminal_snr": True,
    "force_v_prediction": False,  # as rescaling does
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0,
    "timestep_distribution": "LOGIT_NORMAL",
    "noising_bias": 0.5,
    "noising_weight": 1.0,
    "resolution": "512",
    "aspect_ratio_bucketing": True,
    "text_encoder_layer_skip": 1,
    "mse_strength": 1.0,
    "mae_strength": 0.0,
}
MEANS = {"training_arguments.sample_latents": False}  # whatever else it does
BY_ONETRAINER = {
    "buckets": "onetrainer",
    "bucket_step": 8,
    "noise_offset": 0.05,
    "training_arguments.rescale_betas_zero_snr": True,
    "training_arguments.prediction_type": "v_prediction",
    "weighting": "min-snr",
    "snr_gamma": 5.0,
    "timesteps": "logit-normal:0.5:2",
    "training_arguments.clip_skip": 1,
    "resolution": 512,
    **MEANS,
}
FORCED = {"force_v_prediction": True}  # adapters have the base's
DEV = {"model_type": "FLUX_DEV_1", "dynamic_timestep_shifting": True, "resolution": "512"}
DEV |= {"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5}
SHIFTED = 0.5 + 0.5 + 0.65 / 3840 * (1024 - 256)  # of the bias, and of 1,024 tokens
TEXT = {"prompt_source": "filename", "enable_tag_shuffling": True, "tag_dropout_enable": True}
TEXT |= {"tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.2, "keep_tags_count": 2}
IMAGE = {"enable_random_flip": True, "enable_crop_jitter": False}
UNUSED = [{"enabled": False, "image": {"enable_fixed_hue": True}}, {"type": "VALIDATION"}]
BY_CONCEPT = {"shuffle_captions": True, "tag_dropout": 0.2, "keep_tokens": 2, "augment": "flip"}
BY_CONCEPT |= {"caption_column": "file_name", **MEANS}
VELOCITY = {"name_or_path": "sd", "is_v_pred": True}
TOOLKIT = {
    "model": {"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True},
    "train": {"timestep_type": "sigmoid", "noise_scheduler": "flowmatch", "steps": 2000},
}
IMAGES = {"folder_path": "train", "caption_ext": "txt", "caption_dropout_rate": 0.05}
IMAGES |= {"shuffle_tokens": False, "flip_x": True}
BY_TOOLKIT = {
    "timesteps": "logit-normal",
    "training_arguments.guidance_scale": 1.0,
    "condition_dropout": 0.05,
    "augment": "flip",
    "buckets": "ai-toolkit",
    "bucket_step": 32,
    "resolution": 512,
}
TUNER = {
    "model_family": "flux",
    "flow_schedule_shift": 2.0,
    "flow_sigmoid_scale": 0.5,
    "flux_guidance_value": 1.0,
    "caption_dropout_probability": 0.2,
    "resolution": 1024,
}
BY_TUNER = {
    "timesteps": f"logit-normal:{math.log(2):.9g}:0.5",
    "training_arguments.guidance_scale": 1.0,
    "condition_dropout": 0.2,
    "resolution": 1024,
}
RESCALED = Base("StableDiffusionXLPipeline", {"rescale_betas_zero_snr": True})
TOKENS = "training_arguments.max_sequence_length"


def data_sets(*own):
    return {"datasets": list(own)}


def concepts(*own):
    return {"concepts": [{"name": f"c{n}", **each} for n, each in enumerate(own)]}


PRECONDITIONED = {"weighting": "preconditioned", "timesteps": "logit-normal:-1:1"}
COSMAP = {"weighting_scheme": "cosmap", "precondition_outputs": 0}
INVERSE = {"weighting": "inverse-variance", "training_arguments.guidance_scale": 1.0}
FINE_TUNE = FORCED | {"training_method": "FINE_TUNE"}
VELOCITIES = {"training_arguments.prediction_type": "v_prediction", **MEANS}
ZEROED = {"text_encoder": {"dropout_probability": 0.1}}
BY_DEV = {"timesteps": f"logit-normal:{SHIFTED:.9g}:1", "resolution": 512, **MEANS}
WEIGHED = {"model": VELOCITY, "train": {"min_snr_gamma": 5.0}}
BUCKETED = {"buckets": "ai-toolkit", "bucket_step": 16, "resolution": 512}
PLAIN = {"buckets": False, "resolution": 256}
BY_SD3 = {"timesteps": f"logit-normal:{math.log(3):.9g}:1", "training_arguments.shift": 1.0}
BY_SD3 |= {"condition_dropout": 0.1, TOKENS: 154}
BY_XL = {"condition_dropout": 0.1, "training_arguments.rescale_betas_zero_snr": False}
# of a base and entries the options, or why they are refused
BY_OTHERS = {
    "diffusers": [
        (SD, SCRIPT, BY_SCRIPT),
        # the weights of compute_loss_weighting_for_sd3, of the clean image or of the velocity
        (
            SD3,
            {"weighting_scheme": "logit_normal", "precondition_outputs": 1} | MEAN,
            PRECONDITIONED,
        ),
        (SD3, {"weighting_scheme": "sigma_sqrt", "precondition_outputs": 1}, {}),
        (SD3, COSMAP, {"weighting": "cosmap"}),
        (FLUX, OF_FLUX, INVERSE),
    ],
    "OneTrainer": [
        (SD, ONETRAINER, BY_ONETRAINER),
        (SD, FORCED, MEANS),
        (SD, FINE_TUNE, VELOCITIES),
        (FLUX, DEV, BY_DEV),
        (FLUX, DEV | {"text_encoder_layer_skip": 1}, "=1 skips layers of a text encoder"),
        (FLUX, DEV | {"transformer": {"attention_mask": True}}, "masks the padding of prompts"),
        (SD, {"perturbation_noise_weight": 0.1}, "adds noise to input and target"),
        (SD, ZEROED, "text_encoder.dropout_probability=0.1 replaces"),
        (SD, {"loss_weight_fn": "P2"}, "weights noise levels"),
        (SD, {"resolution": "512,768"}, "trains on several sizes"),
        (SD, concepts({"text": TEXT, "image": IMAGE}, *UNUSED), BY_CONCEPT),
        (SD, concepts({"text": {"keep_tags_count": 1}}), MEANS),  # as it is usually
        (SD, concepts({"image_variations": 5}), {"random_crop": True, **MEANS}),
        (SD, concepts({"image": IMAGE}, {}), "enable_random_flip of concepts differs by concept"),
        (SD, concepts({"image": {"enable_random_hue": True}}), "random_hue=True changes hues"),
        (SD, concepts({"text": TEXT | {"tag_dropout_mode": "FULL"}}), "drops tags in another way"),
        (SD, concepts({"text": TEXT | {"tag_delimiter": ";"}}), "delimiter=; separates tags by an"),
    ],
    "ai-toolkit": [
        (FLUX, TOOLKIT | data_sets(IMAGES | {"resolution": [512]}), BY_TOOLKIT),
        (
            FLUX,
            data_sets(IMAGES | {"resolution": [512, 768]}),
            "several .* Pass `resolution` to de",
        ),
        (SD, TOOLKIT, r"trained on a FluxPipeline .*FLUX.1-dev.*, got a StableD"),
        (SD, WEIGHED, "min_snr_gamma=5.0 weighs velocities as it does noise"),
        (SD, {"train": {"max_denoising_steps": 500}}, "=500 draws levels in another way"),
        (SD, {"train": {"noise_multiplier": 1.1}}, "noise_multiplier=1.1 scales the noise"),
        (SD, {"train": {"loss_target": "source"}}, "loss_target=source replaces the target"),
        (SD, {"train": {"do_fft_loss": True}}, "do_fft_loss=True adds another loss"),
        (SD, data_sets({"use_short_captions": True}), "use_short_captions=True shows short capt"),
        (SD, data_sets({}), BUCKETED),  # where nothing is said of them
        (SD, data_sets(PLAIN), {"resolution": 256, "interpolation": "bicubic"}),
        (SD, data_sets({"square_crop": True}), {"interpolation": "bicubic"}),
        (SD, data_sets({"resolution": 256}, PLAIN), "False, True differs by"),
        (SD, data_sets({"buckets": False, "random_crop": True}), "images that are not resized"),
    ],
    "SimpleTuner": [
        (FLUX, TUNER, BY_TUNER),
        (FLUX, TUNER | {"t5_padding": "zero"}, "t5_padding=zero shows zeros for padding"),
        (FLUX, TUNER | {"flux_attention_masked_training": True}, "masks the padding of prompts"),
        (FLUX, TUNER | {"flow_custom_timesteps": "100,200"}, "draws levels in another way"),
        (SD3, {"model_family": "sd3"}, BY_SD3),
        (RESCALED, {"model_family": "sdxl"}, BY_XL),
    ],
}
ROWS = [(trainer, *row) for trainer, rows in BY_OTHERS.items() for row in rows]


@pytest.mark.parametrize(("trainer", "base", "entries", "expected"), ROWS)
def test_entries_of_other_trainers(tmp_path, trainer, base, entries, expected):
    path = written(trainer, tmp_path, entries)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            decided(path, base)
    else:
        assert decided(path, base) == expected


def test_where_the_log_of_a_script_lies(tmp_path):
    folder = written("diffusers", tmp_path, SCRIPT)
    (log,) = folder.glob("logs/*/*/hparams.yml")  # with whatever objects of Python
    objects = {"betas": (0.9, 0.99), "logging_dir": Path("logs")}
    log.write_text(yaml.dump(SCRIPT | objects, Dumper=yaml.Dumper))
    assert "python/object" in log.read_text()
    (folder / "checkpoint-500").mkdir()
    weights = folder / "checkpoint-500" / "pytorch_lora_weights.safetensors"
    save_file({"w": torch.zeros(1)}, weights)
    for path in (folder / weights.name, weights.parent):
        assert decided(path, SD) == BY_SCRIPT


def test_notes_on_trainings(tmp_path):
    config = {"model_type": "STABLE_DIFFUSION_15", "base_model_name": "runwayml/sd-v1-5"}
    config |= concepts({"balancing": 2.0}, {"balancing": 1.0})
    path = tmp_path / "ot.safetensors"  # in the header
    save_file({"w": torch.zeros(1)}, path, metadata={"ot_config": json.dumps(config)})
    found, lines = settle(read_settings(path), SD, {}, KNOWN)
    assert found == MEANS
    told = "".join(lines)
    assert "trained on 'runwayml/sd-v1-5', got 'sd'" in told
    assert "images were cut once" in told
    assert (
        "balancing of concepts of 'ot.safetensors': images were not seen alike often ('c0' 2"
        in (told)
    )
    folder = tmp_path / "tuner"
    folder.mkdir()
    found = read_settings(written("SimpleTuner", folder, {"model_family": "sdxl"}))
    assert any("told sizes after resizing" in line for line in settle(found, XL, {}, KNOWN)[1])


def test_random_crops_of_kohyas_scripts_without_buckets(tmp_path):
    """They cut parts out of images as these are; ours are resized before."""
    entries = {"ss_random_crop": True, "ss_enable_bucket": False, "ss_resolution": "512,512"}
    with pytest.raises(ValueError, match=r"images that are not resized.* Pass `random_crop` to"):
        by_kohya(tmp_path, SD, **entries)


def test_a_card_and_peft(tmp_path):
    """Name the base, and the prompt of DreamBooth."""
    save_file({"w": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    card = "---\nbase_model: stabilityai/sdxl\ninstance_prompt: a shs dog\n---\n# A dog\n"
    (tmp_path / "README.md").write_text(card)
    found, lines = settle(read_settings(tmp_path), SD, {}, KNOWN)
    assert found == {"prompt": "a shs dog"}
    assert lines[0] == "trained on 'stabilityai/sdxl', got 'sd': the same weights are needed"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")  # a text for people
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/sd"}')
    found, (line,) = settle(read_settings(tmp_path), SD, {}, KNOWN)
    assert found == {}
    assert line.startswith("no settings of a trainer known here are in or beside '")


# ---------------------------------------------------------------------------------------------
# The base, and files that are damaged
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "StableDiffusionXLPipeline"),
        ({"ss_v2": True, "ss_base_model_version": "sd_v2"}, "StableDiffusionPipeline"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "FluxPipeline"),
        ({"ss_base_model_version": "sd3"}, "StableDiffusion3Pipeline"),
    ],
)
def test_adapters_of_another_kind_of_pipeline(tmp_path, entries, kind):
    path = kohya_file(tmp_path, **entries)
    for base in (SD, XL, SD3, FLUX):
        if base.kind == kind:  # T5's tokens are of no entry
            usual = {"training_arguments.max_sequence_length": 256} if base is SD3 else {}
            assert decided(path, base) == usual
        else:
            with pytest.raises(ValueError, match=rf"trained on a {kind}.*, got a {base.kind}. Pa"):
                decided(path, base)


def test_the_arguments_in_a_file_of_toml(tmp_path):
    (tmp_path / "kohya.toml").write_text(
        "v_parameterization = true\n[loss]\ndebiased_estimation_loss = true\nmin_timestep = 100\n"
        '[data]\nresolution = "512,512"\nflip_aug = true\nbucket_reso_steps = 32\n'
        'reg_data_dir = "reg"\nprior_loss_weight = 0.5\nmax_train_epochs = 10\n'
        "caption_dropout_every_n_epochs = 4\n"
    )
    assert decided(tmp_path / "kohya.toml", SD) == {
        "training_arguments.prediction_type": "v_prediction",
        "weighting": "debiased",
        "timesteps": "stratified:100:1000",
        "resolution": 512,
        "augment": "flip",
        "bucket_step": 32,
        "prior_loss_weight": 0.5,
        "condition_dropout": pytest.approx(0.2),
    }


def test_a_run_by_arguments_in_a_file(tmp_path):
    """What is not in it is as the scripts have it without, whatever the pipeline's scheduler."""
    file, run = tmp_path / "kohya.toml", 'pretrained_model_name_or_path = "sd"\n'
    file.write_text(run)
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert decided(file, Base("StableDiffusionXLPipeline", scheduler)) == {
        "training_arguments.prediction_type": "epsilon",
        "training_arguments.rescale_betas_zero_snr": False,
    }
    with pytest.raises(ValueError, match="ss_model_prediction_type=sigma_scaled compares other"):
        decided(file, FLUX)
    file.write_text(run + 'model_prediction_type = "raw"\n')
    assert decided(file, FLUX) == {
        "training_arguments.shift": 3.0,
        "training_arguments.guidance_scale": 3.5,
    }
    file.write_text(run + "training_shift = 3.0\n[more]\nweighting_scheme = 'sigma_sqrt'\n")
    base = Base("StableDiffusion3Pipeline", _FLOW | {"shift": 1.0})
    assert decided(file, base) == {
        "training_arguments.shift": 3.0,
        "training_arguments.max_sequence_length": 256,
    }
    file.write_text(run + 'model_prediction_type = "raw"\nt5xxl_max_token_length = 128\n')
    assert decided(file, FLUX)["training_arguments.max_sequence_length"] == 128
    file.write_text(run + "t5_dropout_rate = 0.1\n")
    with pytest.raises(ValueError, match=r"ss_t5_dropout_rate=0\.1 replaces a text encoder's out"):
        decided(file, SD3)


def test_what_a_file_that_lists_the_images_says_itself(tmp_path):
    """Does not refuse the rest of the recipe."""
    subsets = [{"caption_prefix": "photo", "flip_aug": True}, {"flip_aug": False}]
    path = kohya_file(tmp_path, ss_clip_skip=2, ss_datasets=json.dumps([{"subsets": subsets}]))
    with pytest.raises(ValueError, match="caption_prefix of ss_datasets=photo adds text"):
        decided(path, SD)
    found, _ = settle(read_settings(path), SD, {}, KNOWN, listed=True)
    assert found == {"training_arguments.clip_skip": 1}


def test_derivatives_through_norms(tmp_path):
    args = json.dumps({"algo": "lokr", "dora_wd": "True"})
    entries = {"ss_network_module": "lycoris.kohya", "ss_network_args": args}
    _, (line,) = settle(read_settings(kohya_file(tmp_path, **entries)), SD, {}, KNOWN)
    assert line.startswith("dora_wd=True of 'lora.safetensors': its derivatives went through")


def test_the_file_of_the_base(tmp_path):
    """Compared by the hash of kohya's scripts where it lies beside the pipeline."""
    data = bytes(range(256)) * 5000
    (tmp_path / "base.safetensors").write_bytes(data)
    short = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    base = Base(SD.kind, SD.scheduler, name=str(tmp_path / "base"))
    for value, told in ((short, "is the file"), ("0" * 8, "has another hash than the file")):
        path = kohya_file(tmp_path, ss_sd_model_name="base.safetensors", ss_sd_model_hash=value)
        (line,) = settle(read_settings(path), base, {}, KNOWN)[1]
        assert line == f"'{tmp_path / 'base.safetensors'}' {told} that was trained on"


@pytest.mark.parametrize(
    ("name", "here", "same"),
    [
        ("runwayml/stable-diffusion-v1-5", "/m/stable-diffusion-v1-5", True),
        ("black/FLUX.1-dev", "/m/models--black--FLUX.1-dev/snapshots/abc", True),
        ("black/FLUX.1-dev", "/m/FLUX.1-schnell", False),
        ("C:\\\\models\\\\anime.safetensors", "/m/anime", True),
    ],
)
def test_names_of_the_base(tmp_path, name, here, same):
    path = kohya_file(tmp_path, ss_sd_model_name=name)
    lines = settle(read_settings(path), Base(SD.kind, SD.scheduler, name=here), {}, KNOWN)[1]
    assert (lines == []) == same


def test_files_that_are_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist. Pass an adapter, or a trainer's config"):
        read_settings(tmp_path / "none")
    path = kohya_file(tmp_path, ss_noise_offset="many")
    with pytest.raises(ValueError, match=r"holds ss_noise_offset='many', which must be a finite"):
        decided(path, SD)
    path = kohya_file(tmp_path, **{"modelspec.timestep_range": "700"})
    with pytest.raises(ValueError, match="timestep_range=700, which must be two numbers"):
        decided(path, SD)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_settings(path)
    save_file({"w": torch.zeros(1)}, path, metadata={"ot_config": "{"})
    with pytest.raises(ValueError, match="holds a damaged ot_config"):
        read_settings(path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"is no config of kohya's sd-scripts, diffusers' scripts"):
        read_settings(tmp_path / "config.json")
    for name, text in (("config.json", "{"), ("config.yaml", "a: ["), ("kohya.toml", "a")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}' cannot be read \(.*\). Copy it again"):
            read_settings(tmp_path / name)


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------


def test_the_program(tmp_path, capsys):
    """Reads the recipe of the adapter before anything is loaded; what is given wins."""
    pipelines.stable_diffusion(tmp_path).save_pretrained(tmp_path / "p")
    path = kohya_file(
        tmp_path, ss_noise_offset=0.1, ss_flip_aug=True, ss_clip_skip=2, ss_min_snr_gamma=1
    )

    def read(**given):
        given = {"pipeline": tmp_path / "p", "lora": [str(path)], **given}
        options = options_of("fit", **given)
        read_recipe(options, given)
        return options

    options = read(noise_offset=0.2, training_arguments=["sample_latents=false"])
    assert (options.noise_offset, options.augment, options.snr_gamma) == (0.2, "flip", 1.0)
    assert options.training_arguments == ["sample_latents=false", "clip_skip=1"]
    assert options.recipe == str(path)
    told = capsys.readouterr().err
    assert "Recipe: --augment flip, by ss_flip_aug=True of 'lora.safetensors'" in told
    assert "Recipe: --training-arguments clip_skip=1, by ss_clip_skip=2" in told
    assert "Recipe: --noise-offset 0.2 is given, against ss_noise_offset=0.1" in told
    assert read(recipe="none").augment is None
    assert read(lora=[f"a={path}", f"b={path}"]).augment is None
    assert "not read of several adapters" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--recipe is of a --pipeline, got --model alone\. Leave"):
        read(pipeline=None, recipe=str(path))
    kohya_file(tmp_path, ss_loss_type="l1")
    with pytest.raises(ValueError, match=r"ss_loss_type=l1 replaces the squared error. Pass `"):
        read()


def test_objects_that_are_given_in_python(tmp_path):
    """Stand for what a trainer left by another name."""
    write_images(tmp_path / "train")
    attributor = Attributor.from_pipeline(
        pipelines.stable_diffusion(tmp_path),
        tmp_path / "train",
        prompts="a cat",
        recipe=kohya_file(tmp_path, ss_min_snr_gamma=5, ss_noise_offset=0.1),
        weighting=torch.ones(1000),
        noise_offset=0.2,
    )
    assert attributor.settings == [
        "`noise_offset=0.2` is given, against ss_noise_offset=0.1 of 'lora.safetensors'",
        "`weighting='Tensor'` is given, against ss_min_snr_gamma=5 of 'lora.safetensors'",
    ]
    assert attributor.regression.recipe.noise_offset == 0.2
    assert (attributor.objective.weights_T == 1).all()


def test_numbers_at_their_defaults_are_not_given_in_python(tmp_path):
    """A trainer decides them; those that are given beside it are the user's."""
    write_images(tmp_path / "train")
    sizes = {"ss_resolution": (16, 16), "ss_enable_bucket": True, "ss_min_bucket_reso": 16}
    attributor = Attributor.from_pipeline(
        pipelines.stable_diffusion(tmp_path),
        tmp_path / "train",
        prompts="a cat",
        recipe=kohya_file(tmp_path, **sizes, ss_max_bucket_reso=512),
        bucket_max=2048,
        bucket_step=8,
    )
    assert "`bucket_min=16`, by ss_min_bucket_reso=16 of 'lora.safetensors'" in attributor.settings
    told = "`bucket_max=2048` is given, against ss_max_bucket_reso=512 of 'lora.safetensors'"
    assert told in attributor.settings
    assert attributor.images[0]["x0"].shape == (3, 16, 16)


def test_a_recipe_that_is_given_is_read_where_scores_do_not_tell(tmp_path):
    pipelines.stable_diffusion(tmp_path).save_pretrained(tmp_path / "p")
    path = kohya_file(tmp_path, ss_flip_aug=True, ss_noise_offset=0.1)
    given = {"recipe": str(path), "pipeline": tmp_path / "p"}
    options = options_of("validate-measure", **given)
    read_recipe(options, given)
    assert (options.noise_offset, options.augment) == (0.1, "flip")
    options = options_of("validate-measure", scores=tmp_path / "s.safetensors", **given)
    read_recipe(options, given)
    assert options.augment is None  # these say all of it


# ---------------------------------------------------------------------------------------------
# What the entries decide
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_schedulers_as_they_were_trained(cls):
    """As diffusers' own rescaling, of schedulers that have none as well."""
    scheduler = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    rescaled = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    expected = noise_process(rescaled)
    made = noise_process(as_trained(scheduler, "v_prediction", rescale_betas_zero_snr=True))
    assert made.prediction_type == "v_prediction"
    assert made.alphas_T[-1] == 0
    torch.testing.assert_close(made.alphas_T, expected.alphas_T, atol=1e-5, rtol=0)
    assert scheduler.config.prediction_type == "epsilon"
    again = noise_process(as_trained(rescaled, rescale_betas_zero_snr=False))
    torch.testing.assert_close(again.alphas_T, noise_process(scheduler).alphas_T)


def test_levels_with_another_shift(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    u_T = noise_process(scheduler).sigmas_T
    found = noise_process(as_trained(scheduler, shift=2.0)).sigmas_T
    torch.testing.assert_close(found, 2 * u_T / (1 + u_T), atol=1e-6, rtol=0)
    pipeline = pipelines.stable_diffusion_3(tmp_path)  # which is read by its interface
    objective = DenoisingObjective.from_pipeline(pipeline, training_arguments={"shift": 1.0})
    torch.testing.assert_close(objective.process.sigmas_T, u_T, atol=1e-6, rtol=0)
    assert pipeline.scheduler.config.shift == 3.0


def test_debiased_weights():
    """apply_debiased_estimation of kohya's scripts."""
    for kind in ("epsilon", "v_prediction"):
        process = noise_process(DDPMScheduler(prediction_type=kind))
        snr_T = (process.alphas_T / process.sigmas_T).square()
        snr_T = torch.minimum(snr_T, torch.ones_like(snr_T) * 1000)
        expected = 1 / (snr_T + 1) if kind == "v_prediction" else 1 / torch.sqrt(snr_T)
        torch.testing.assert_close(DebiasedWeighting()(process), expected)
    with pytest.raises(ValueError, match=r"got .*flow"):
        DebiasedWeighting()(NoiseProcess.flow())


def test_schemes_by_names_with_numbers():
    assert timestep_scheme("logit-normal:0.5:2", 10) == LogitNormalTimesteps(0.5, 2.0)
    assert timestep_scheme("uniform:2:8", 10) == TimestepsWithin(2, 8, UniformTimesteps())
    for wrong in ("uniform:2", "uniform:8:2", "all:1:2", "logit-normal:0:-1", "logit-normal:a:1"):
        with pytest.raises(ValueError, match="`timesteps` must"):
            timestep_scheme(wrong, 10)
