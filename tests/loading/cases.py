"""Adapters as training leaves them, and images with prompts."""

import json

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.diffusion import test_pipelines as pipelines

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COUNT = 3


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
