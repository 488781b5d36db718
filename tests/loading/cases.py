"""Adapters as training leaves them, and images with prompts."""

import copy
import json
import re

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file

from curvlinops_diffusion.loading.adapters import networks_of
from tests.diffusion import test_pipelines as pipelines

# all that train_network.py of kohya's scripts writes of options that nobody gave
_USUAL = """
learning_rate=0.0001 text_encoder_lr=None unet_lr=None num_train_images=240
num_validation_images=0 num_reg_images=0 num_batches_per_epoch=240 num_epochs=10
gradient_checkpointing=False gradient_accumulation_steps=1 max_train_steps=2400
lr_warmup_steps=0 lr_scheduler=constant network_dim=16 network_alpha=8 network_dropout=None
mixed_precision=no full_fp16=False v2=False base_model_version=sd_v1 clip_skip=None
max_token_length=None cache_latents=False seed=42 lowram=False noise_offset=None
multires_noise_iterations=None multires_noise_discount=0.3 adaptive_noise_scale=None
zero_terminal_snr=False training_comment=None optimizer=torch.optim.adamw.AdamW
max_grad_norm=1.0 caption_dropout_rate=0.0 caption_dropout_every_n_epochs=0
caption_tag_dropout_rate=0.0 face_crop_aug_range=None prior_loss_weight=1.0
min_snr_gamma=None scale_weight_norms=None ip_noise_gamma=None debiased_estimation=False
noise_offset_random_strength=False ip_noise_gamma_random_strength=False loss_type=l2
huber_schedule=snr huber_scale=1.0 huber_c=0.1 fp8_base=False fp8_base_unet=False
resize_interpolation=None resolution=None color_aug=False flip_aug=False random_crop=False
shuffle_caption=False enable_bucket=False bucket_no_upscale=False min_bucket_reso=None
max_bucket_reso=None keep_tokens=0 reg_dataset_dirs={} tag_frequency={} bucket_info=null
"""
USUAL_HEADER = dict(f"ss_{word}".split("=") for word in _USUAL.split())
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COUNT = 3


def again(saved, make):
    """A pipeline as it is on disk, and its networks."""
    pipeline = copy.deepcopy(saved(make)[1])
    return pipeline, networks_of(pipeline)


def doubled(saved, make):
    """In double precision."""
    pipeline, parts = again(saved, make)
    for module in parts.values():
        module.double()
    return pipeline, parts


def write(tensors, path, metadata=None):
    save_file({key: z.contiguous() for key, z in tensors.items()}, path, metadata)
    return str(path)


def lora(**options):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **options})


def lora_names(model):
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def trained(model, seed=0):
    """Adapters as after training: both matrices away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name in lora_names(model):
        model.get_parameter(name).data.normal_(generator=generator)


def peft_folder(model, folder):
    """PEFT's folder of adapters that are in a network already."""
    wrapped = get_peft_model(type(model).from_config(model.config), lora())
    inner = dict(wrapped.base_model.model.named_parameters())
    for name in lora_names(model):
        inner[name].data.copy_(model.get_parameter(name))
    wrapped.save_pretrained(folder)
    return folder


def images_with_prompts(folder, size=8, beside=()):
    """Images, and perhaps masks or control images of theirs."""
    (folder / "beside").mkdir(parents=True)
    generator, lines = np.random.default_rng(0), []
    for n in range(COUNT):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"i{n}.png")
        lines.append({"file_name": f"i{n}.png", "text": pipelines.PROMPTS[n]})
        for name in beside:
            mode = "L" if name == "mask_image" else "RGB"
            Image.fromarray(pixels[::-1]).convert(mode).save(folder / "beside" / f"i{n}.png")
            lines[-1][f"{name}_file_name"] = f"beside/i{n}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


# names of diffusers in the networks that it has taken apart, and of the original ones
_IN_UNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"conv_norm_out": "out.0", "conv_out": "out.2", "conv_in": "input_blocks.0.0"},
}
_IN_VAE = {
    **{"conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1"},
    **{"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    **{"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"},
    **{"conv_norm_out": "norm_out", "samplers.0.conv": "sample.conv", "resnets": "block"},
}


def as_single_file(pipeline):
    """The weights of a Stable Diffusion by the names of the original checkpoints."""
    found, L = {}, pipeline.unet.config.layers_per_block + 1

    for name, z in pipeline.unet.state_dict().items():
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            side, block, kind, n, rest = match.groups()
            place = int(block) * L + (int(n) if kind in ("resnets", "attentions") else L - 1)
            whole = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
            below = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}.get(kind)
            if kind == "upsamplers":  # after attention, where there is any
                has = hasattr(pipeline.unet.up_blocks[int(block)], "attentions")
                below = f"{2 if has else 1}.conv"
            if kind.endswith("samplers"):
                rest = rest.removeprefix("conv.")
            name = f"{whole}.{below}.{rest}"
        elif match := re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", name):
            kind, n, rest = match.groups()
            name = f"middle_block.{2 * int(n) if kind == 'resnets' else 1}.{rest}"
        for ours, theirs in _IN_UNET.items():
            if ".attn" not in name and ".transformer_blocks" not in name:
                name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
        found[f"model.diffusion_model.{name}"] = z
    last = len(pipeline.vae.config.block_out_channels) - 1
    for name, z in pipeline.vae.state_dict().items():
        if "attentions" in name and name.endswith("weight") and z.ndim == 2:
            z = z[..., None, None]
        for ours, theirs in _IN_VAE.items():
            name = re.sub(rf"{re.escape(ours)}\.", f"{theirs}.", name)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
        found[f"first_stage_model.{name}"] = z
    for name, z in pipeline.text_encoder.state_dict().items():
        inner = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{inner}"] = z
    return {name: z.contiguous() for name, z in found.items()}
