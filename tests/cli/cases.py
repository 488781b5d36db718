"""A saved pipeline with images, and the program, run in this process or as one of its own."""

import subprocess
import sys

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import options_of
from tests.cases import tiny_unet

COUNT = 7


def write_images(folder, count, seed, size=8, suffix=".png"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for n in range(count):
        pixels = generator.integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{n}{suffix}")


def write_problem(folder):
    """A pipeline, training images and queries."""
    unet = tiny_unet(torch.float32, num_class_embeds=None)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "pipeline")
    write_images(folder / "train", COUNT, seed=0)
    write_images(folder / "queries", 2, seed=1)
    return folder


def arguments(folder, command, *more):
    """Words of the program; score is told what is new alone."""
    own = {
        "fit": [
            *("--pipeline", folder / "pipeline", "--data", folder / "train", "--batch-size", 3),
            *("--output", folder / "ekfac.safetensors", "--num-draws", 3),
        ],
        "score": [
            *("--operator", folder / "ekfac.safetensors", "--queries", folder / "queries"),
            *("--output", folder / "scores.safetensors", "--num-draws", 3, "--query-draws", 4),
            *("--damping", 1e-3),
        ],
    }[command]
    if command == "score" and "--method" not in more:
        own += ["--method", "influence"]
    return [str(word) for word in [command, *own, "--quiet", *more]]


def network(pipeline=None, **more):
    """What the program loads from the folder of a pipeline."""
    return load_network(options_of("fit", pipeline=pipeline, quiet=True, **more))


def process(*words):
    """The real program, which takes six CPU-seconds to start: for what needs a process alone."""
    command = [sys.executable, "-m", "curvlinops_diffusion", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
