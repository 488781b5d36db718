"""What the program reads off a trained network: how it takes images."""

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.cli.images.images import open_images
from curvlinops_diffusion.cli.images.labels import Condition
from curvlinops_diffusion.cli.images.preprocessing import Form
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import FitOptions
from tests.diffusion import test_pipelines as pipelines


@pytest.mark.parametrize(
    ("make", "size", "multiple", "condition"),
    [
        (pipelines.ddpm, (8, 8), 2, Condition()),
        (pipelines.ldm, None, 4, Condition()),
        (pipelines.dit, (8, 8), 4, Condition("class_labels", 4)),
    ],
)
def test_what_networks_take(tmp_path, make, size, multiple, condition):
    """Grey images become three channels; sizes that would not fit are known beforehand."""
    make(tmp_path).save_pretrained(tmp_path / "p")
    network = load_network(FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path))
    assert network.form(None) == Form(3, size, None, multiple)
    assert network.condition == condition


def test_a_prompt_for_a_network_that_takes_none(tmp_path):
    pipelines.dit(tmp_path).save_pretrained(tmp_path / "p")
    options = FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path, prompt="a cat")
    with pytest.raises(
        ValueError, match="--prompt 'a cat' arrived for a network that takes labels"
    ):
        load_network(options)


def test_variants_of_weights(tmp_path):
    pipeline = pipelines.ddpm(tmp_path)
    pipeline.save_pretrained(tmp_path / "p")
    pipeline.unet.conv_in.weight.data.zero_()
    pipeline.save_pretrained(tmp_path / "p", variant="fp16")
    options = {"pipeline": tmp_path / "p", "data": tmp_path, "output": tmp_path}
    norms = [
        float(load_network(FitOptions(**options, variant=v)).objective.model.conv_in.weight.norm())
        for v in (None, "fp16")
    ]
    assert norms[0] > 0 == norms[1]
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_network(FitOptions(**options, variant="fp8"))


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "conv_in.weight"), ("vae", "encoder.conv_in.bias"), ("text_encoder", "layer_norm1.")],
)
def test_weights_that_are_not_in_the_files(tmp_path, part, name):
    """Neither made up nor an error of torch's: named, with what is there instead."""
    pipelines.stable_diffusion(tmp_path).save_pretrained(tmp_path / "p")
    options = FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path)
    load_network(options)
    (path,) = (tmp_path / "p" / part).glob("*.safetensors")
    tensors = load_file(path)
    name = next(key for key in tensors if name in key)
    tensors[f"renamed.{name}"[::-1]] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    told = f"1 weights of the .* are not in the files of .*{part}', which hold .* instead: '.*"
    with pytest.raises(ValueError, match=f"{told}{name}'. Save"):
        load_network(options)


@pytest.mark.parametrize("make", [pipelines.stable_diffusion_xl, pipelines.flux, pipelines.ldm])
def test_weights_that_are(tmp_path, make):
    """Also those that a text encoder holds under two names."""
    make(tmp_path).save_pretrained(tmp_path / "p")
    load_network(FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path))


def test_sizes_that_stable_diffusion_xl_is_told(tmp_path):
    """The file's own size, and the corner of what was cut out: as in training, in every form."""
    pipelines.stable_diffusion_xl(tmp_path).save_pretrained(tmp_path / "p")
    (tmp_path / "train").mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (8, 16), (99, 0, 0)).save(tmp_path / "train" / "a.jpg")
    Image.new("RGB", (24, 12), (0, 99, 0)).save(tmp_path / "train" / "b.jpg", exif=rotated)
    options = FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path, prompt="a cat")
    network = load_network(options)
    images = open_images(tmp_path / "train", network.form(8), network.condition)
    batch = next(NoisedRegression(network.objective, images, 1).batches())
    told = batch.condition["added_cond_kwargs"]["time_ids"].tolist()
    assert told == [[16, 8, 4, 0, 8, 8], [24, 12, 4, 0, 8, 8]]
    uncut = open_images(tmp_path / "train" / "a.jpg", network.form(None), network.condition)
    batch = next(NoisedRegression(network.objective, uncut, 1).batches())
    assert batch.condition["added_cond_kwargs"]["time_ids"].tolist() == [[16, 8, 0, 0, 16, 8]]
