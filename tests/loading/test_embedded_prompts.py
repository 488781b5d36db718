"""Prompts in the files of generated images, as the programs write them that made these."""

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from curvlinops_diffusion.loading.embedded_prompts import embedded_prompt, plain_words
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form

A1111 = (
    "a (red:1.2) cat, <lora:cats:0.8>\nby the sea\nNegative prompt: dog, (bad:1.4)\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
)
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "positive": ["9", 0], "negative": ["7", 0]},
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["11", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog", "clip": ["4", 1]}},
    "9": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "11": {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}},
}


def png(path, **entries):
    info = PngImagePlugin.PngInfo()
    for name, text in entries.items():
        info.add_text(name, text)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"parameters": A1111}, "a red cat, by the sea"),
        ({"parameters": "a cat\nSteps: 20, Sampler: Euler"}, "a cat"),
        ({"prompt": json.dumps(COMFY), "workflow": "{}"}, "a cat"),
        ({"invokeai_metadata": json.dumps({"positive_prompt": "a cat"})}, "a cat"),
        ({"parameters": json.dumps({"sui_image_params": {"prompt": "a cat"}})}, "a cat"),
        ({"prompt": json.dumps({**COMFY, "6": {"inputs": {}}})}, None),
        ({"prompt": "{"}, None),
        ({"Software": "a cat"}, None),
    ],
)
def test_of_png(tmp_path, entries, expected):
    assert embedded_prompt(png(tmp_path / "a.png", **entries)) == expected


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_of_jpeg(tmp_path, encoding):
    """A1111's programs write the same text as an EXIF comment."""
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + A1111.encode(encoding)}
    image.save(tmp_path / "a.jpg", exif=exif)
    assert embedded_prompt(tmp_path / "a.jpg") == "a red cat, by the sea"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("((a cat)), [dog]", "a cat, dog"),
        ("a cat \\(breed\\), (of (two) kinds:1.1)", "a cat (breed), of two kinds"),
        (" a  cat ,, <lora:x:1>, ", "a cat"),
    ],
)
def test_words(prompt, words):
    assert plain_words(prompt) == words


def test_queries_without_captions_have_them(tmp_path):
    """A caption beside goes first; of training images, files are never asked."""
    form, condition = Form(3, None, None), Condition("prompt")
    for name in ("train", "queries"):
        (tmp_path / name).mkdir()
        for n in range(2):
            png(tmp_path / name / f"{n}.png", parameters=A1111)
        (tmp_path / name / "0.txt").write_text("a dog")
    with pytest.raises(ValueError, match="prompt"):
        open_images(tmp_path / "train", form, condition)
    (tmp_path / "train" / "1.txt").write_text("a cow")
    train = open_images(tmp_path / "train", form, condition)
    queries = open_images(tmp_path / "queries", form, condition, train)
    assert queries.conditions["prompt"] == ["a dog", "a red cat, by the sea"]
    assert "1 prompt as the images' files have them" in queries.summary()
