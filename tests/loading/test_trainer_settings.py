"""What trainers leave of a run, against the trainers' own step and documentation."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from curvlinops_diffusion import Attributor
from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.cli.recipe import read_recipe
from curvlinops_diffusion.diffusion.noise import NoiseProcess, as_trained, noise_process
from curvlinops_diffusion.diffusion.timesteps import timestep_scheme
from curvlinops_diffusion.loading.trainer_settings import read_settings, settle
from curvlinops_diffusion.loading.trainers import Base, onetrainer_buckets
from curvlinops_diffusion.weightings import DebiasedWeighting
from tests.comparisons import assert_close
from tests.diffusion import test_pipelines as pipelines

SD = Base("StableDiffusionPipeline", {"_class_name": "PNDMScheduler"}, name="sd")
XL = Base("StableDiffusionXLPipeline", {"_class_name": "EulerDiscreteScheduler"})
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX = Base("FluxPipeline", _FLOW | {"use_dynamic_shifting": True}, guided=True)
SD3 = Base("StableDiffusion3Pipeline", _FLOW)
KNOWN = {
    *("noise_offset", "input_perturbation", "condition_dropout", "weighting", "snr_gamma"),
    *("augment", "resolution", "training_arguments", "timesteps", "buckets", "random_crop"),
    *("shuffle_captions", "keep_tokens", "prompt", "caption_column", "interpolation"),
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


def test_a_step_of_kohyas_scripts(tmp_path):
    """Input, target, condition and weight of each image as in the scripts' own step."""
    torch.manual_seed(0)
    pipeline = pipelines.stable_diffusion(tmp_path)
    x = write_images(tmp_path / "train")
    file = kohya_file(
        tmp_path,
        ss_base_model_version="sd_v1",
        ss_clip_skip=2,
        ss_noise_offset=0.1,
        ss_ip_noise_gamma=0.2,
        ss_min_snr_gamma=3.0,
        ss_zero_terminal_snr=True,
        ss_flip_aug=True,
        ss_resolution=(8, 8),
        **{"modelspec.prediction_type": "v"},
    )
    attributor = Attributor.from_pipeline(
        pipeline,
        tmp_path / "train",
        prompts="a cat",
        recipe=file,
        training_arguments={"sample_latents": False},
    )
    assert len(attributor.settings) == 9
    assert pipeline.scheduler.config.prediction_type == "epsilon"  # the user's stays as it is
    regression = attributor.regression.with_draws(4, antithetic=False)
    ids = pipeline.tokenizer(["a cat"] * 3, padding="max_length", max_length=8, return_tensors="pt")
    hidden = pipeline.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states[-2]
    parts = pipeline.text_encoder.named_modules()
    (norm,) = (part for name, part in parts if name.endswith("final_layer_norm"))

    # custom_train_functions.py: shifted so that the last root is zero, the first as it was
    root = torch.cumprod(1 - pipeline.scheduler.betas.double(), 0).sqrt()
    first, last = float(root[0]), float(root[-1])
    root = (root - last) * first / (first - last)
    alpha_T, sigma_T = root.float(), (1 - root**2).sqrt().float()
    seen, draws = [], regression.draws
    for r, batch in enumerate(regression.batches()):
        indices, shape = [0, 1, 2], batch.x_t.shape[1:]
        flipped = draws.versions(indices, r, 2).bool()
        shown = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        with torch.no_grad():
            x0 = pipeline.vae.encode(shown).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = draws.noise(indices, r, shape) + 0.1 * draws.noise_offset(indices, r, shape)
        alpha, sigma = (z[batch.level_B].reshape(-1, 1, 1, 1) for z in (alpha_T, sigma_T))
        perturbed = noise + 0.2 * draws.perturbation(indices, r, shape)
        assert_close(batch.x_t, alpha * x0 + sigma * perturbed, 1e-5)
        assert_close(batch.target_BD, (alpha * noise - sigma * x0).flatten(1), 1e-5)
        assert_close(batch.condition["encoder_hidden_states"], norm(hidden), 1e-5)
        snr = (alpha / sigma).square().flatten()
        weight = snr.clamp(max=3.0) / (snr + 1)
        assert_close(batch.weight_B, weight / x0[0].numel(), 1e-4)
        assert torch.equal(batch.timestep_B, batch.level_B)
        seen += flipped.tolist()
    assert len(set(seen)) == 2


@pytest.mark.parametrize(
    ("base", "entries", "expected"),
    [
        (SD, {"ss_clip_skip": 1, "ss_noise_offset": None, "ss_min_snr_gamma": None}, {}),
        (SD, {"ss_clip_skip": 2}, {"training_arguments.clip_skip": 1}),
        (XL, {"ss_clip_skip": 2}, {}),  # which always takes the last layer but one
        (SD, {"ss_debiased_estimation": True}, {"weighting": "debiased"}),
        (SD, {"ss_min_snr_gamma": 1}, {"weighting": "min-snr", "snr_gamma": 1.0}),
        (SD, {"ss_caption_dropout_rate": 0.1}, {"condition_dropout": 0.1}),
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
                **{"ss_shuffle_caption": True, "ss_keep_tokens": 2},
            },
            {
                **{"resolution": 512, "buckets": True, "random_crop": True},
                **{"shuffle_captions": True, "keep_tokens": 2},
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
            {"resolution": 768, "augment": "flip"},
        ),
        (
            SD3,
            {"ss_weighting_scheme": "logit_normal", "ss_logit_mean": 0.5, "ss_logit_std": 2.0},
            {
                "training_arguments.shift": 1.0,
                "weighting": "preconditioned",
                "timesteps": "logit-normal:0.5:2",
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
        (SD, {"ss_max_token_length": 225}, "shows the network 225 tokens"),
        (SD, {"ss_caption_tag_dropout_rate": 0.1}, "drops tags of captions"),
        (SD, {"ss_color_aug": True}, "ss_color_aug=True changes colours at random"),
        (SD, {"ss_resolution": "512,768"}, "trains on sizes that are no square"),
        (SD, {"ss_debiased_estimation": True, "ss_min_snr_gamma": 5}, "multiplies two weightings"),
        (FLUX, {"ss_model_prediction_type": "sigma_scaled"}, "compares other than the velocity"),
        (FLUX, {"ss_timestep_sampling": "new"}, "draws levels in another way"),
        (
            SD,
            {"ss_datasets": '[{"subsets": [{"flip_aug": true}, {"flip_aug": false}]}]'},
            r"flip_aug \(ss_datasets\) differs by subset \(True, False\)",
        ),
    ],
)
def test_what_no_option_expresses(tmp_path, base, entries, told):
    """Refused by name, with what else the file says; gone without where that is asked for."""
    with pytest.raises(ValueError, match=told) as caught:
        by_kohya(tmp_path, base, ss_flip_aug=entries.keys() < {"ss_loss_type"}, **entries)
    assert "by kohya's sd-scripts whose objective no options express" in str(caught.value)
    assert "Pass `recipe='none'` to go without; it also says: " in str(caught.value)


def test_what_is_given_by_hand(tmp_path):
    """Wins, is said where it differs, and stands for a setting that no option expresses."""
    path = kohya_file(
        tmp_path,
        ss_noise_offset=0.1,
        ss_min_snr_gamma=5.0,
        ss_clip_skip=2,
        ss_resolution="512,768",
        ss_network_dropout=0.1,
        ss_bucket_no_upscale=True,
    )
    given = {"noise_offset": 0.0, "resolution": 512, "training_arguments.clip_skip": 1}
    found, lines = settle(read_settings(path), SD, given | {"weighting": None}, KNOWN)
    assert found == {}
    assert lines == [
        "`training_arguments` clip_skip=1 is given" * 0
        + "`noise_offset=0.0` is given, against ss_noise_offset=0.1 of 'lora.safetensors'",
        "`weighting=None` is given, against ss_min_snr_gamma=5.0 of 'lora.safetensors'",
        "ss_network_dropout=0.1 of 'lora.safetensors': the adapter's dropout is off here, as in "
        "sampling",
        "`resolution=512` is given, against ss_resolution=512,768 of 'lora.safetensors'",
        "not applied: ss_bucket_no_upscale=True of 'lora.safetensors' (bucket_no_upscale=True), "
        "for which there is no option",
    ]
