"""What four trainers find and leave on disk: images, captions, adapters with their metadata.

Laid out by the documentation and source of kohya's ``sd-scripts`` (``train_network.py``),
``diffusers`` (``train_text_to_image_lora.py``), OneTrainer and ai-toolkit, for a tiny Stable
Diffusion whose autoencoder divides sides by 8, as the real one's.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from benchmarks.models import tiny_conditional_unet
from tests.diffusion.test_pipelines import clip, clip_tokenizer, vae
from tests.loading.cases import USUAL_HEADER, lora, trained


@dataclass(frozen=True)
class Recipe:
    """How a network was trained, whatever the trainer calls it.

    Attributes:
        resolution: Pixels of a side, or of an area's root with buckets.
        skipped: Last layers of the text encoder that are left out.
        offset: The strength of offset noise.
        gamma: That of min-SNR weights; ``None`` for none.
        flips: Whether images are mirrored at random.
        dropout: How often a caption is dropped.
        kept: Tags in front of those that are shuffled; ``None`` if none are.
        buckets: Whether images keep their shapes; ``'ai-toolkit'`` for its own buckets.
        means: Whether latents are means of the autoencoder's distribution, and not drawn from it.
        crops: Whether images are cut at random, where they are larger.
    """

    resolution: int = 64
    skipped: int = 0
    offset: float = 0.0
    gamma: float | None = None
    flips: bool = False
    dropout: float = 0.0
    kept: int | None = None
    buckets: bool | str = False
    means: bool = False
    crops: bool = False

    def options(self):
        """The recipe in our words, without what is none."""
        found = {"resolution": self.resolution, "noise_offset": self.offset}
        found |= {
            "random_crop": self.crops,
            "condition_dropout": self.dropout,
            "augment": "flip" if self.flips else None,
        }
        arguments = {"clip_skip": self.skipped} if self.skipped else {}
        arguments |= {"sample_latents": False} if self.means else {}
        found["training_arguments"] = arguments
        if self.kept is not None:
            found |= {"shuffle_captions": True, "keep_tokens": self.kept}
        if self.buckets is True:
            found |= {"buckets": True, "bucket_min": 64, "bucket_max": 256}
        elif self.buckets:
            found |= {"buckets": self.buckets, "bucket_step": 16}
        return {name: z for name, z in found.items() if z}


@dataclass(frozen=True)
class Trained:
    """The folders of a training, and what it saw.

    Attributes:
        base: The pipeline that was fine-tuned.
        lora: The adapter's file.
        data: The images.
        recipe: How it was trained.
        captions: The caption of each image as the trainer reads it, by the image's name in the
            folder.
        repeats: How often an epoch has each image.
        read: The trainer's entries that decide something, as messages should name them.
    """

    base: Path
    lora: Path
    data: Path
    recipe: Recipe
    captions: dict[str, str]
    repeats: dict[str, int] = field(default_factory=dict)
    read: tuple[str, ...] = ()

    def shown(self, name):
        """The captions that training may have shown with an image, dropped ones included."""
        tags, kept = self.captions[name].split(", "), self.recipe.kept
        first, rest = (tags, []) if kept is None else (tags[:kept], tags[kept:])
        orders = [", ".join([*first, *order]) for order in permutations(rest)]
        return [*orders, *([""] if self.recipe.dropout else [])]


def write_base(folder):
    """A pipeline with the noise schedule of Stable Diffusion 1."""
    (folder / "tokenizer").mkdir(parents=True)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusionPipeline(
            vae=vae(blocks=4),
            text_encoder=clip(),
            tokenizer=clip_tokenizer(folder / "tokenizer"),
            unet=tiny_conditional_unet(cross_attention_dim=8, sample_size=8),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "base")
    return folder / "base"


def write_images(folder, sizes):
    """Images by name and (width, height)."""
    generator = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_queries(folder, size):
    """A picture that was generated, with its prompt."""
    write_images(folder, {"sample.png": (size, size)})
    (folder / "sample.txt").write_text("a, b, c")


@cache
def adapter(base):
    """The matrices that were trained, by PEFT's names, and the scale's numerator."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    inject_adapter_in_model(lora(), unet)
    trained(unet)
    return get_peft_model_state_dict(unet), lora().lora_alpha


def as_kohya(matrices, alpha):
    """The names of kohya's files, which OneTrainer and ai-toolkit write as well."""
    tensors = {}
    for name, z in matrices.items():
        layer, _, matrix = name.rpartition(".lora_")
        stem = f"lora_unet_{layer.replace('.', '_')}"
        side = "down" if matrix.startswith("A") else "up"
        tensors[f"{stem}.lora_{side}.weight"] = z.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


# ---------------------------------------------------------------------------------------------


def kohya(folder, base, recipe):
    """``sd-scripts``: folders ``N_name``, captions beside images, ``ss_*`` in the file's header."""
    side, area = recipe.resolution, (recipe.resolution,) * 2
    shapes = [area, (2 * side, side // 2), (side // 2, 2 * side)] if recipe.buckets else [area] * 3
    names = ["1_r dog/c.png", "3_q cat/a.png", "3_q cat/b.png"]
    write_images(folder / "train", dict(zip(names, shapes, strict=True)))
    texts = {"1_r dog/c.txt": "d, e, f\r\n", "3_q cat/a.txt": "a, b, c\nnot read\n"}
    for name, text in texts.items():
        (folder / "train" / name).write_bytes(text.encode())
    folders = {"1_r dog": {"n_repeats": 1, "img_count": 1}}
    folders |= {"3_q cat": {"n_repeats": 3, "img_count": 2}}
    metadata = USUAL_HEADER | {
        "ss_session_id": 1234,
        "ss_network_module": "networks.lora",
        "ss_clip_skip": recipe.skipped + 1 if recipe.skipped else None,
        "ss_noise_offset": recipe.offset or None,
        "ss_caption_dropout_rate": recipe.dropout,
        "ss_min_snr_gamma": recipe.gamma,
        "ss_resolution": area,
        "ss_flip_aug": recipe.flips,
        "ss_shuffle_caption": recipe.kept is not None,
        "ss_keep_tokens": recipe.kept or 0,
        "ss_enable_bucket": recipe.buckets,
        "ss_min_bucket_reso": 64 if recipe.buckets else None,
        "ss_max_bucket_reso": 256 if recipe.buckets else None,
        "ss_dataset_dirs": json.dumps(folders),
        "ss_sd_model_hash": "IsADirectory",  # which sd-scripts say of a folder
        "ss_sd_model_name": base.name,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
    }
    path = folder / "out" / "style.safetensors"
    path.parent.mkdir()
    save_file(as_kohya(*adapter(base)), path, {key: str(z) for key, z in metadata.items()})
    read = {"ss_clip_skip": recipe.skipped, "ss_noise_offset": recipe.offset}
    read |= {"ss_min_snr_gamma": recipe.gamma, "ss_flip_aug": recipe.flips, "ss_resolution": 1}
    read |= {"ss_caption_dropout_rate": recipe.dropout, "ss_enable_bucket": recipe.buckets}
    read |= {"ss_shuffle_caption": recipe.kept is not None}
    captions = dict(zip(names, ["d, e, f", "a, b, c", "q cat"], strict=True))
    repeats = dict(zip(names, [1, 3, 3], strict=True))
    told = tuple(key for key, z in read.items() if z)
    return Trained(base, path, folder / "train", recipe, captions, repeats, told)


def diffusers(folder, base, recipe):
    """The script: an imagefolder with ``metadata.csv``, one file of weights, and a model card."""
    captions = {"a.png": "a cat", "b.png": "two, b"}
    write_images(folder / "train", dict.fromkeys(captions, (recipe.resolution,) * 2))
    lines = ["file_name,text", 'b.png,"two, b"', "a.png,a cat"]
    (folder / "train" / "metadata.csv").write_text("\n".join(lines) + "\n")
    weights = convert_state_dict_to_diffusers(adapter(base)[0])
    for inner in (".", "checkpoint-500"):
        out = folder / "out" / inner
        StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=weights)
    card = f"---\nbase_model: {base}\nlibrary_name: diffusers\ntags:\n- diffusers\n- lora\n---\n\n"
    (folder / "out" / "README.md").write_text(card + "# LoRA text2image fine-tuning - out\n")
    path = folder / "out" / "pytorch_lora_weights.safetensors"
    return Trained(base, path, folder / "train", recipe, captions)


def onetrainer(folder, base, recipe):
    """A folder for each concept, a line of text beside each image, its settings in the header."""
    captions = {"cats/a.png": "a, b, c", "dogs/b.png": "two d"}
    write_images(folder / "train", dict.fromkeys(captions, (recipe.resolution,) * 2))
    for name, text in captions.items():
        (folder / "train" / name).with_suffix(".txt").write_text(f"{text}\n")
    text = {"prompt_source": "sample", "enable_tag_shuffling": recipe.kept is not None}
    text["keep_tags_count"] = recipe.kept or 0
    image = {"enable_crop_jitter": recipe.crops, "enable_random_flip": recipe.flips}
    concept = {"enabled": True, "type": "STANDARD", "balancing": 1.0, "loss_weight": 1.0}
    concept |= {"image": image, "text": text}
    concepts = [
        {"name": name, "path": str(folder / "train" / name), **concept} for name in ("cats", "dogs")
    ]
    config = {
        "__version": 10,
        "training_method": "LORA",
        "model_type": "STABLE_DIFFUSION_15",
        "base_model_name": str(base),
        "output_model_destination": "models/lora.safetensors",
        "aspect_ratio_bucketing": False,
        "resolution": str(recipe.resolution),
        "latent_caching": not recipe.crops,
        "concepts": concepts,
        "loss_weight_fn": "CONSTANT" if recipe.gamma is None else "MIN_SNR_GAMMA",
        "loss_weight_strength": recipe.gamma or 5.0,
        "mae_strength": 0.0,
        "offset_noise_weight": recipe.offset,
        "generalized_offset_noise": False,
        "timestep_distribution": "UNIFORM",
        "min_noising_strength": 0.0,
        "max_noising_strength": 1.0,
        "masked_training": False,
        "text_encoder_layer_skip": recipe.skipped,
        "text_encoder": {"train": False, "dropout_probability": 0.0},
    }
    metadata = {"ot_branch": "master", "ot_config": json.dumps(config)}
    metadata["modelspec.architecture"] = "stable-diffusion-v1/lora"
    path = folder / "models" / "lora.safetensors"
    path.parent.mkdir()
    save_file(as_kohya(*adapter(base)), path, metadata)
    read = ("offset_noise_weight", "loss_weight_fn", "text_encoder_layer_skip", "resolution")
    read += ("enable_random_flip", "enable_crop_jitter", "enable_tag_shuffling", "keep_tags_count")
    return Trained(base, path, folder / "train", recipe, captions, read=read)


def ai_toolkit(folder, base, recipe):
    """A folder with texts beside images; the job's ``config.yaml`` beside what it wrote."""
    captions = {"a.png": "a, b, c", "b.png": "two d"}
    write_images(folder / "train", {"a.png": (80, 48), "b.png": (recipe.resolution,) * 2})
    for name, text in captions.items():
        (folder / "train" / name).with_suffix(".txt").write_text(text)
    data = {
        "folder_path": str(folder / "train"),
        "caption_ext": "txt",
        "caption_dropout_rate": recipe.dropout,
        "shuffle_tokens": recipe.kept is not None,
        "flip_x": recipe.flips,
        "resolution": [recipe.resolution],
    }
    train = {"batch_size": 1, "noise_scheduler": "ddpm", "lr": 1e-4, "train_text_encoder": False}
    train |= {"noise_offset": recipe.offset, "min_snr_gamma": recipe.gamma}
    process = {"type": "sd_trainer", "network": {"type": "lora", "linear": 2, "linear_alpha": 3}}
    process |= {"datasets": [data], "train": train, "model": {"name_or_path": str(base)}}
    job = {"job": "extension", "config": {"name": "style", "process": [process]}}
    out = folder / "output" / "style"
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    metadata = {"format": "pt", "name": "style", "ss_base_model_version": "sd_1.5"}
    metadata["software"] = json.dumps({"name": "ai-toolkit", "version": "0.7.0"})
    save_file(as_kohya(*adapter(base)), out / "style.safetensors", metadata)
    read = ("noise_offset", "min_snr_gamma", "flip_x", "caption_dropout_rate", "resolution")
    return Trained(base, out / "style.safetensors", folder / "train", recipe, captions, read=read)


WEIGHTED = {"gamma": 5.0, "offset": 0.05}
#: Each trainer with what the options of single images can say; and with all that it does.
PLAIN = {
    kohya: Recipe(skipped=1, flips=True, dropout=0.3, **WEIGHTED),
    diffusers: Recipe(),
    onetrainer: Recipe(skipped=1, means=True, crops=True, flips=True, kept=1, **WEIGHTED),
    ai_toolkit: Recipe(flips=True, dropout=0.3, buckets="ai-toolkit", **WEIGHTED),
}
FULL = {
    **PLAIN,
    kohya: Recipe(128, 1, flips=True, dropout=0.3, kept=1, buckets=True, **WEIGHTED),
}
