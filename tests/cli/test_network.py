"""What the program reads off a trained network: how it takes images."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import functional as transforms

from curvlinops_diffusion import Attributor, NoisedRegression
from curvlinops_diffusion.cli.network import arguments_text, parse_arguments
from curvlinops_diffusion.diffusion.training_arguments import training_arguments
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from tests.cli.cases import network
from tests.diffusion import test_pipelines as pipelines
from tests.loading.cases import as_single_file
from tests.trainers.folders import write_base


@pytest.mark.parametrize(
    ("make", "size", "multiple", "made_for", "condition"),
    [
        (pipelines.ddpm, (8, 8), 2, None, Condition()),
        (pipelines.ldm, None, 4, 8, Condition()),
        (pipelines.dit, (8, 8), 4, None, Condition("class_labels", 4)),
    ],
)
def test_what_networks_take(tmp_path, make, size, multiple, made_for, condition):
    """Grey images become three channels; sizes that would not fit are known beforehand."""
    make(tmp_path).save_pretrained(tmp_path / "p")
    found = network(tmp_path / "p")
    assert found.form(None) == Form(3, size, None, multiple, made_for=made_for)
    assert found.condition == condition
    if condition.key == "class_labels":
        with pytest.raises(ValueError, match="The network takes labels, got prompt='a cat'"):
            network(tmp_path / "p", prompt="a cat")


def test_a_pipeline_in_a_single_folder(tmp_path):
    """As google/ddpm-cifar10-32 is: libraries read its parts from there, and messages name it."""
    pipelines.ddpm(tmp_path).save_pretrained(tmp_path / "p")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(tmp_path / "p" / "model_index.json", flat)
    for part in ("unet", "scheduler"):
        shutil.copytree(tmp_path / "p" / part, flat, dirs_exist_ok=True)
    expected, *found = (
        dict(network(**given).objective.model.named_parameters())
        for given in (
            {"pipeline": tmp_path / "p"},
            {"pipeline": flat},
            {"model": flat, "scheduler": flat},
        )
    )
    for own in found:
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], expected[name]) for name in own)
    resized(".", "conv_in.w")(flat)
    with pytest.raises(ValueError, match=r"in 'flat', 'conv_in.weight' is 5×4×4×4 in the file"):
        network(flat)
    (flat / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="names a part 'scheduler', and there is no such folder"):
        network(flat)


def test_variants_of_weights(tmp_path):
    pipeline = pipelines.ddpm(tmp_path)
    pipeline.save_pretrained(tmp_path / "p")
    pipeline.unet.conv_in.weight.data.zero_()
    pipeline.save_pretrained(tmp_path / "p", variant="fp16")
    norms = [
        float(network(tmp_path / "p", variant=v).objective.model.conv_in.weight.norm())
        for v in (None, "fp16")
    ]
    assert norms[0] > 0 == norms[1]
    with pytest.raises(ValueError, match="cannot be loaded"):
        network(tmp_path / "p", variant="fp8")


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "conv_in.weight"), ("text_encoder", "layer_norm1.")],
)
def test_weights_that_are_not_in_the_files(stable_diffusion, tmp_path, part, name):
    """Neither made up nor an error of torch's: named, with what is there instead."""
    shutil.copytree(stable_diffusion, tmp_path / "p")
    (path,) = (tmp_path / "p" / part).glob("*.safetensors")
    tensors = load_file(path)
    name = next(key for key in tensors if name in key)
    tensors[f"renamed.{name}"[::-1]] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    told = f"1 weights of the .* are not in the files of .*{part}', which hold .* instead: '.*"
    with pytest.raises(ValueError, match=f"{told}{name}'. Save"):
        network(tmp_path / "p")


def removed(*parts):
    def change(folder):
        path = folder.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def truncated(folder):
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])


def resized(part, name):
    """A weight that is one larger in all directions than its configuration says."""

    def change(folder):
        (path,) = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        key = next(key for key in tensors if name in key)
        tensors[key] = torch.zeros([size + 1 for size in tensors[key].shape])
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def changed(file, **entries):
    def change(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **entries}))

    return change


BROKEN = [
    (truncated, r"text_encoder/model.safetensors' is not a whole safetensors file \(it.*copy it"),
    (removed("vae"), r"its model_index.json names a part 'vae', and there is no such folder"),
    (removed("tokenizer", "tokenizer.json"), r"tokenizer' has no vocabulary"),
    (removed("unet", "config.json"), r"no file named config.json found in directory .*unet"),
    (resized("text_encoder", "q_proj.w"), r"in 'text_encoder', '.*q_proj.weight' is 9×9 in the f"),
    (
        changed("unet/config.json", block_out_channels=[8, 8]),
        r"in 'unet', '.*' is 4 in the file and 8 by its config.json \(\d+ more weights differ\)",
    ),
    (changed("model_index.json", scheduler=["a.b", "C"]), r"a.b is not one of the libraries"),
    (lambda folder: (folder / "model_index.json").write_text("[1]"), r"it holds no names"),
]


def test_pipelines_that_are_broken(stable_diffusion, tmp_path):
    """The part, the file and the weight are named, in one line."""
    for number, (change, told) in enumerate(BROKEN):
        folder = tmp_path / str(number)
        shutil.copytree(stable_diffusion, folder)
        change(folder)
        with pytest.raises(ValueError, match=told) as caught:
            network(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pipelines.stable_diffusion(folder).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_a_single_file(tmp_path):
    """All of its weights, by diffusers' own loader; a folder beside it says what it is made of."""
    base = write_base(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    weights, file = as_single_file(pipeline), tmp_path / "single.safetensors"
    save_file(weights, file)
    with pytest.raises(ValueError, match="would ask the Hub: pass --pipeline-config with"):
        network(file)
    configs = tmp_path / "configs"
    shutil.copytree(base, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def losses(*path, **more):
        own = Attributor.of_network(network(*path, **more), images, prompts=["a", "b, a"])
        return own.gradients(num_draws=2).values()

    found = losses(file, pipeline_config=configs)
    assert torch.equal(found, losses(base))
    configs.rename(tmp_path / "single")
    assert torch.equal(found, losses(file))
    lost = next(name for name in weights if name.endswith("in_layers.2.weight"))
    save_file({name: z for name, z in weights.items() if name != lost}, file)
    with pytest.raises(ValueError, match="describes it: it lacks some of the weights"):
        network(file)


def test_folders_of_something_else(stable_diffusion, tmp_path):
    (file,) = (stable_diffusion / "unet").glob("*.safetensors")
    for path, told in (
        (file, r"is a single file, which does not say"),
        (stable_diffusion / "unet", r"is a network alone: pass it by --model"),
    ):
        with pytest.raises(ValueError, match=told):
            network(path)
    scheduler = tmp_path / "scheduler"
    with pytest.raises(ValueError, match=r"is a pipeline. Pass it as --pipeline, without"):
        network(model=stable_diffusion, scheduler=scheduler)
    pipelines.ddpm(tmp_path).save_pretrained(tmp_path / "d")
    shutil.copytree(tmp_path / "d" / "scheduler", scheduler)
    for entries, told in (
        ({"_class_name": "Foo"}, "no scheduler of diffusers: .*no attribute Foo. Pass a"),
        ({"_class_name": "UNet2DModel"}, "no scheduler of diffusers: UNet2DModel is none"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "foo"}, "foo is not implemented for"),
    ):
        changed("scheduler_config.json", **entries)(scheduler)
        with pytest.raises(ValueError, match=told):
            network(model=tmp_path / "d" / "unet", scheduler=scheduler)


def write_beside(folder, names, entry, mode, **columns):
    """Images, and another one beside each, in a folder of theirs."""
    (folder / "beside").mkdir(parents=True)
    lines = []
    for k, name in enumerate(names):
        noise = np.random.default_rng(k).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise[0]).save(folder / name)
        Image.fromarray(noise[1]).convert(mode).save(folder / "beside" / name)
        line = {"file_name": name, "text": "a cat", f"{entry}_file_name": f"beside/{name}"}
        lines.append(json.dumps(line | columns))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("make", "entry", "mode"),
    [
        (pipelines.sd_inpainting, "mask_image", "L"),
        (pipelines.xl_controlled, "conditioning_image", "RGB"),
    ],
)
def test_images_beside_the_images(tmp_path, make, entry, mode):
    """Read by the program as the library is given them, from a folder and a data set."""
    make(tmp_path).save_pretrained(tmp_path / "p")
    train = tmp_path / "train"
    write_beside(train, ["a.png", "b.png"], entry, mode)
    found = network(tmp_path / "p")
    images = open_images(train, found.form(None), found.condition)
    assert images.names == ["a.png", "b.png"]
    assert images.left_out == []
    channels = found.condition.images[entry]
    pixels = transforms.pil_to_tensor(Image.open(train / "beside" / "b.png")) / 255
    assert images[1][entry].shape == (channels, 8, 8)
    torch.testing.assert_close(images[1][entry], pixels, atol=1e-6, rtol=0)
    attributor = Attributor.of_network(found, train, augment="flip")
    assert attributor.regression.description["augmented_conditions"] == [entry]

    (train / "beside" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b.png' has vanished"):
        images[1]
    (train / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{n}.png", "text": "a cat"}) for n in "ab")
    )
    shutil.rmtree(train / "beside")
    with pytest.raises(ValueError, match=f"'a.png' of .* has no '{entry}', .* '{entry}_file_name'"):
        open_images(train, found.form(None), found.condition)


def test_a_controlnet_alone(tmp_path):
    """Which is what was trained, unless somebody says otherwise."""
    pipelines.sd_controlled(tmp_path).save_pretrained(tmp_path / "p")
    found = network(tmp_path / "p")
    names = [name for name, _ in found.objective.model.named_parameters()]
    own = [name for name in names if name.startswith("controlnet.")]
    assert found.params == own
    assert 0 < len(own) < len(names)
    assert network(tmp_path / "p", params=["unet.*", "controlnet.*"]).params == names


def test_sizes_that_stable_diffusion_xl_is_told(tmp_path):
    """The file's own size, and the corner of what was cut out: as in training, in every form."""
    pipelines.stable_diffusion_xl(tmp_path).save_pretrained(tmp_path / "p")
    (tmp_path / "train").mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (8, 16), (99, 0, 0)).save(tmp_path / "train" / "a.jpg")
    Image.new("RGB", (24, 12), (0, 99, 0)).save(tmp_path / "train" / "b.jpg", exif=rotated)
    found = network(tmp_path / "p", prompt="a cat")

    def time_ids(path, resolution):
        images = open_images(path, found.form(resolution), found.condition)
        batch = next(NoisedRegression(found.objective, images, 1).batches())
        return batch.condition["added_cond_kwargs"]["time_ids"].tolist()

    train = tmp_path / "train"
    assert time_ids(train, 8) == [[16, 8, 4, 0, 8, 8], [24, 12, 4, 0, 8, 8]]
    assert time_ids(train / "a.jpg", None) == [[16, 8, 0, 0, 16, 8]]
    # or what was noted of it
    lines = [
        {"file_name": "a.jpg", "original_size": [64, 32], "crops_coords_top_left": [3, 1]},
        {"file_name": "b.jpg", "original_size": [48, 24], "crops_coords_top_left": [0, 0]},
    ]
    (train / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert time_ids(train, 8) == [[64, 32, 3, 1, 8, 8], [48, 24, 0, 0, 8, 8]]
    lines[1]["original_size"] = 48
    (train / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"'original_size' of image 'b.jpg' of .* is 48. Give two"):
        time_ids(train, 8)


def test_arguments_of_training():
    texts = ["max_sequence_length=77", "guidance_scale=3.5", "system_prompt=a = b", "x=null"]
    values = {"max_sequence_length": 77, "guidance_scale": 3.5, "system_prompt": "a = b", "x": None}
    assert parse_arguments([*texts, "text-encoder-out-layers=[1, 2]"]) == values | {
        "text_encoder_out_layers": [1, 2]
    }
    assert parse_arguments(None) == {}
    assert arguments_text({"a": 1, "b": None}) == "Training gave the network a=1 b=null"
    for wrong in (["guidance_scale"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="Pass each as name=value, once"):
            parse_arguments(wrong)


@pytest.mark.parametrize("guided", [False, True])
def test_a_call_without_numbers(guided):
    """Its arguments are taken and left to the pipeline; guidance that is embedded is needed."""

    class Unknown:
        transformer = SimpleNamespace(config={"guidance_embeds": guided})

        def __call__(self, prompt=None, max_sequence_length=None, guidance_scale=None):
            raise AssertionError

    length = {"max_sequence_length": 9}
    if guided:
        with pytest.raises(ValueError, match=r"--training-arguments guidance_scale=…, or"):
            training_arguments(Unknown(), length)
        length["guidance_scale"] = 3.5
    else:
        assert training_arguments(Unknown()) == {}
    assert training_arguments(Unknown(), length) == length
