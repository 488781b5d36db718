"""A training step of any of the trainers, written from their documentation, one image at a time.

Noise, level and what samples latents are given; what is drawn among finitely many (mirrored or not,
the order of tags, no caption) is enumerated.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Step:
    """What the network was shown, and what was right.

    Attributes:
        choice: Whether the image was mirrored, and the caption.
        x_t: The noised latent, ``[C, H, W]``.
        states: The states of the text encoder, ``[tokens, size]``.
        target: The noise, ``[C, H, W]``.
        weight: The factor of the mean squared error.
    """

    choice: tuple[bool, str]
    x_t: torch.Tensor
    states: torch.Tensor
    target: torch.Tensor
    weight: float


@cache
@torch.no_grad()
def latent_distribution(pipeline, path, mirrored):
    """The image in [-1, 1] through the autoencoder: mean and standard deviation."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    pixels = pixels[:, ::-1] if mirrored else pixels
    x = torch.tensor(pixels.copy() / 127.5 - 1).permute(2, 0, 1)[None]
    found = pipeline.vae.encode(x).latent_dist
    return found.mean[0], found.std[0]


@cache
@torch.no_grad()
def text_states(pipeline, caption, skipped):
    """States of a caption, cut and padded to the tokenizer's length.

    Without a number of skipped layers the encoder's own answer; else those before the last layers,
    through its last normalisation.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length}
    ids = tokenizer([caption], truncation=True, return_tensors="pt", **options).input_ids
    if not skipped:
        return encoder(ids)[0][0]
    states = encoder(ids, output_hidden_states=True).hidden_states[-1 - skipped]
    (norm,) = (m for name, m in encoder.named_modules() if name.endswith("final_layer_norm"))
    return norm(states)[0]


def steps(trained, pipeline, name, draws, n, r, t):
    """Every step that training may have made of an image at time ``t``, with draw ``r``'s noise."""
    recipe = trained.recipe
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[t]
    snr = float(alpha_bar / (1 - alpha_bar))
    weight = 1.0 if recipe.gamma is None else min(recipe.gamma / snr, 1.0)
    if trained.repeats:  # of the mean over an epoch
        weight *= trained.repeats[name] * len(trained.repeats) / sum(trained.repeats.values())
    for mirrored in (False, True)[: 1 + recipe.flips]:
        mean, std = latent_distribution(pipeline, trained.data / name, mirrored)
        drawn = 0.0 if recipe.means else std * draws.latent_noise([n], r, mean.shape)[0]
        z = (mean + drawn) * pipeline.vae.config.scaling_factor
        noise = draws.noise([n], r, z.shape)[0]
        if recipe.offset:  # a number for each channel
            noise = noise + recipe.offset * draws.noise_offset([n], r, z.shape)[0]
        x_t = alpha_bar.sqrt().float() * z + (1 - alpha_bar).sqrt().float() * noise
        for caption in trained.shown(name):
            states = text_states(pipeline, caption, recipe.skipped)
            yield Step((mirrored, caption), x_t, states, noise, weight)
