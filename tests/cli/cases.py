"""A saved pipeline with images, and the program, run in this process or as one of its own."""

import json
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


# runs each list of words, and tells code, what was printed, and which modules were imported
_SCRIPT = """
import contextlib, io, json, resource, sys
from curvlinops_diffusion.cli.program import run
told = []
for words in json.load(sys.stdin):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = run(words)
        except SystemExit as end:
            code = end.code
    told.append([code, out.getvalue(), error.getvalue(), list(sys.modules)])
print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_utime]))
"""
HEAVY = {"curvlinops", "diffusers", "matplotlib", "scipy", "torch"}


def outcomes(commands):
    """Code, output, errors, and heavy imports of each command in one new process; its seconds."""
    text = json.dumps([[str(word) for word in words] for words in commands])
    finished = subprocess.run(
        [sys.executable, "-c", _SCRIPT], input=text, capture_output=True, text=True, check=True
    )
    found, seconds = json.loads(finished.stdout)
    return [(code, out, err, HEAVY & {*modules}) for code, out, err, modules in found], seconds
