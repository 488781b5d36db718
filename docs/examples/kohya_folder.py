"""From kohya's output folder to a page
====================================

A LoRA of kohya's ``sd-scripts`` lies in a folder, and so do the images that it was trained on. One
command reads both as they are: captions beside the images, repeats from the names of their folders,
and from the adapter's file how it was trained.
"""

# %%
# A Stable Diffusion in miniature: the same parts, of some thousand weights.

import csv
import json
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from curvlinops_diffusion.cli.program import run

warnings.simplefilter("ignore")
torch.manual_seed(0)
SIZE, folder = 16, Path(tempfile.mkdtemp())
letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
words = [*letters, *(c + "</w>" for c in letters), ",</w>", "<|startoftext|>", "<|endoftext|>"]
(folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
config = transformers.CLIPTextConfig(
    vocab_size=len(words),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
    bos_token_id=53,
    eos_token_id=54,
    pad_token_id=54,
)
pipeline = StableDiffusionPipeline(
    vae=AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ),
    text_encoder=transformers.CLIPTextModel(config),
    tokenizer=transformers.CLIPTokenizer(*files, model_max_length=24),
    unet=UNet2DConditionModel(
        sample_size=SIZE // 4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    scheduler=PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    ),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)

# %%
# What one trains on: a folder for each style, called by its repeats and a name, captions beside the
# images. Another picture of each style stands for what was generated.

STYLES = {"striped": 6, "dotted": 5}


def picture(style, generator):
    """A disc in a style, ``[16, 16, 3]`` in [-1, 1]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    cx, cy, r = generator.uniform(6, 10), generator.uniform(6, 10), generator.uniform(4, 6)
    inside = ((x - cx) ** 2 + (y - cy) ** 2 < r**2)[..., None]
    bands, dots = (y % 4 < 2)[..., None], ((x + y) % 2 == 0)[..., None]
    shown, ground = {
        "striped": (np.where(bands, (0.9, 0.8, -0.8), (0.9, -0.8, -0.8)), -0.6),
        "dotted": (np.where(dots, (-0.8, 0.2, 1.0), (-0.8, 0.2, -0.8)), 0.7),
        "plain": (np.full(3, 0.5), -0.6),
    }[style]
    return np.where(inside, shown, ground)


def write(where, style, generator):
    """An image and its caption."""
    where.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((picture(style, generator) + 1) * 127.5).round().astype(np.uint8)
    Image.fromarray(pixels).save(where.with_suffix(".png"))
    where.with_suffix(".txt").write_text(f"{style}, disc\n")


generator = np.random.default_rng(0)
for style, repeats in STYLES.items():
    for n in range(10):
        write(folder / "train" / f"{repeats}_{style}" / f"{n}", style, generator)
    write(folder / "samples" / style, style, generator)

# %%
# The base has seen plain discs. What follows is what ``sd-scripts`` do with ``--min_snr_gamma 5
# --noise_offset 0.05``, which the file that they leave says.

alpha_bar, unet = pipeline.scheduler.alphas_cumprod, pipeline.unet


def train(images, captions, steps, rate, gamma=None, offset=0.0):
    """Steps of Adam on the parameters that are to be trained."""
    x0 = torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = pipeline.vae.encode(x0).latent_dist
        states, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        n, t = torch.randint(len(x0), (16,)), torch.randint(1000, (16,))
        z = latents.sample()[n] * pipeline.vae.config.scaling_factor
        eps = torch.randn_like(z) + offset * torch.randn(*z.shape[:2], 1, 1)
        predicted = unet(pipeline.scheduler.add_noise(z, eps, t), t, states[n]).sample
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        weight = 1.0 if gamma is None else (gamma / snr).clamp(max=1)
        loss = (weight * (predicted - eps).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


train([picture("plain", generator) for _ in range(100)], ["plain, disc"] * 100, 100, 3e-3)
pipeline.save_pretrained(folder / "base")

images, captions = [], []
for path in sorted((folder / "train").rglob("*.png")):
    repeats = int(path.parent.name.split("_")[0])
    images += [np.asarray(Image.open(path)) / 127.5 - 1] * repeats
    captions += [path.with_suffix(".txt").read_text().strip()] * repeats
unet.requires_grad_(False)
targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
train(images, captions, 150, 5e-3, gamma=5.0, offset=0.05)

weights = {}
for name, matrix in get_peft_model_state_dict(unet).items():
    layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
    stem = f"lora_unet_{layer.replace('.', '_')}"
    weights[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = matrix.contiguous()
    weights[f"{stem}.alpha"] = torch.tensor(8.0)
told = {"ss_network_module": "networks.lora", "ss_network_dim": 8, "ss_network_alpha": 8}
told |= {"ss_base_model_version": "sd_v1", "ss_v2": False, "ss_sd_model_name": "base"}
told |= {"ss_clip_skip": None, "ss_min_snr_gamma": 5.0, "ss_noise_offset": 0.05}
told |= {"ss_resolution": (SIZE, SIZE), "ss_enable_bucket": False, "ss_flip_aug": False}
(folder / "out").mkdir()
output = folder / "out" / "discs.safetensors"
save_file(weights, output, {key: str(value) for key, value in told.items()})

# %%
# And the command: no prompt, no resolution, nothing of the loss is asked for. It prints what it
# read and from where, and adds up the scores of each folder.

words = ["attribute", "--pipeline", folder / "base", "--lora", output, "--data", folder / "train"]
words += ["--queries", folder / "samples", "--output", folder / "result", "--group-by", "folder"]
words += ["--num-draws", 64, "--damping", 1e-3, "--quiet"]
assert run([str(word) for word in words]) == 0
print(sorted(path.name for path in (folder / "result").iterdir()))

# %%
# For each picture the folder of its own style helps most.


def rows(name):
    """A table that the program wrote."""
    with (folder / "result" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


for row in rows("groups.csv"):
    print(f"{row['query']:12} {row['group']:10} {float(row['sum']):+.3g} {row['effect']}")
scores = rows("scores.csv")
figure, axes = plt.subplots(2, 7, figsize=(7.5, 2.6))
for axis in axes.flat:
    axis.axis("off")
for row, style in zip(axes, STYLES, strict=True):
    best = [each for each in scores if each["query"] == f"{style}.png"][:5]
    row[0].imshow(Image.open(folder / "samples" / f"{style}.png"))
    row[0].set_title("picture", fontsize=8)
    for axis, each in zip(row[2:], best, strict=True):
        axis.imshow(Image.open(each["path"]))
        axis.set_title(f"{100 * float(each['share']):+.2g} %", fontsize=8)
figure.suptitle("the images that each picture comes from", fontsize=10)

first = {row["query"]: row["group"] for row in rows("groups.csv") if row["rank"] == "1"}
assert all(style in first[f"{style}.png"] for style in STYLES), "the folder of its own style"
assert (folder / "result" / "report.html").stat().st_size > 10_000
