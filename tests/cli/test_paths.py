"""Paths are checked before PyTorch is loaded, each error in one line with a remedy."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.cli.paths import check_network, check_paths
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import OPERATOR
from tests.cli.cases import outcomes, write_images


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Files of every kind, some of them damaged, without a network to be loaded."""
    folder = tmp_path_factory.mktemp("paths")
    write_images(folder / "train", 2, seed=0)
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("no image")
    for name in ("pipeline", "pickled", "cut", "pointer", "variant", "apart", "no_json"):
        unet = folder / name / "unet"
        unet.mkdir(parents=True)
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        index |= {"safety_checker": [None, None], "requires": True}
        (folder / name / "model_index.json").write_text(json.dumps(index))
        (unet / "config.json").write_text("{}")
        save_file({"w": np.zeros(100)}, unet / "diffusion_pytorch_model.safetensors")
    weights = "unet/diffusion_pytorch_model.safetensors"
    whole = (folder / "pipeline" / weights).read_bytes()
    (folder / "pickled" / weights).rename(folder / "pickled" / "unet" / "model.bin")
    (folder / "cut" / weights).write_bytes(whole[:-8])
    (folder / "pointer" / weights).write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "variant" / weights).rename(
        folder / "variant" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    (folder / "apart" / weights).rename(folder / "apart" / "unet" / "m-1-of-2.safetensors")
    (folder / "apart" / f"{weights}.index.json").write_text(
        json.dumps({"weight_map": {"a": "m-1-of-2.safetensors", "b": "m-2-of-2.safetensors"}})
    )
    (folder / "no_json" / "model_index.json").write_text("{")
    shutil.copytree(folder / "pipeline", folder / "cache" / "snapshots" / "abc")
    (folder / "scheduler").mkdir()
    header = {"kind": "ekfac", "parameters": [], "dtype": "", "blocks": [], "info": {}}
    OPERATOR.write(folder / "o.safetensors", {}, header)
    shards = header | {"shards": ["gone.safetensors"]}
    OPERATOR.write(folder / "shards.safetensors", {}, shards)
    SCORES.write(folder / "s.safetensors", {}, {})
    np.save(folder / "alone.npy", np.zeros(3))
    for name in ("single.safetensors", "model.ckpt"):
        shutil.copy(folder / "pipeline" / weights, folder / name)
    save_file({"unet.lora_A.weight": np.zeros(3)}, folder / "adapter.safetensors")
    (folder / "cut.safetensors").write_bytes(whole[:-8])
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "precious.safetensors").write_bytes(whole)
    (folder / "log.safetensors").write_bytes(whole)
    return folder


FIT = {"--pipeline": "pipeline", "--data": "train", "--output": "new.safetensors"}
SCORE = FIT | {"--operator": "o.safetensors", "--queries": "train"}
REPORT = {"--scores": "s.safetensors", "--data": "train", "--queries": "train"}
REPORT |= {"--output": "new.html"}
PLAN = {"--data": "train", "--output": "plan"}
CASES = [
    ("fit", FIT, {"--pipeline": "pipelin"}, "pipeline'?"),
    (
        "fit",
        FIT,
        {"--pipeline": "single.safetensors"},
        "diffusers would ask the Hub: pass --pipeline",
    ),
    ("fit", FIT, {"--pipeline": "model.ckpt"}, "a .ckpt is a pickle, which may hold a program"),
    ("fit", FIT, {"--pipeline": "adapter.safetensors"}, "is an adapter. Pass it by --lora"),
    ("fit", FIT, {"--pipeline-config": "pipeline"}, "is of a single file, got the folder"),
    ("fit", FIT, {"--pipeline": "train"}, "holds no model_index.json. Pass a folder"),
    ("fit", FIT, {"--pipeline": "cache"}, "snapshots/abc'?"),
    ("fit", FIT, {"--pipeline": "no_json"}, "'model_index.json' is not as save_pretrained"),
    ("fit", FIT, {"--pipeline": "pickled"}, "but 'model.bin', which is a pickle"),
    ("fit", FIT, {"--pipeline": "cut"}, "not a whole safetensors file (it has "),
    ("fit", FIT, {"--pipeline": "pointer"}, "pointer of Git LFS: run git lfs pull"),
    ("fit", FIT, {"--pipeline": "variant"}, "are of variant fp16. Pass --variant fp16"),
    ("fit", FIT, {"--pipeline": "apart"}, "are missing, 'm-2-of-2.safetensors' first"),
    ("fit", FIT, {"--pipeline": None}, "Pass --pipeline FOLDER, or --model FOLDER and"),
    (
        "fit",
        FIT,
        {"--pipeline": None, "--model": "pipeline", "--scheduler": "scheduler"},
        "pipeline' is a pipeline. Pass it as --pipeline",
    ),
    (
        "fit",
        FIT,
        {"--pipeline": None, "--model": "pipeline/unet", "--scheduler": "scheduler"},
        "scheduler' holds no scheduler_config.json",
    ),
    ("fit", FIT, {"--lora": "none.safetensors"}, "does not exist. Pass the file or folder of an"),
    ("fit", FIT, {"--lora": "alone.npy"}, "alone.npy' is no .safetensors file"),
    (
        "fit",
        FIT,
        {"--lora": "empty"},
        "empty' should hold the weights of one adapter",
    ),
    ("fit", FIT, {"--data": "tr\\ain"}, "separated by /, not by backslashes"),
    ("fit", FIT, {"--data": "link"}, "link' (--data) is a link to what does not exist"),
    ("fit", FIT, {"--data": "pipeline"}, "is a pipeline, not images"),
    ("fit", FIT, {"--data": "o.safetensors"}, "o.safetensors' is in no known form"),
    ("fit", FIT, {"--data": "x" * 300}, "(--data) cannot be read: File name too long"),
    ("fit", FIT, {"--output": "no/e.safetensors"}, "of --output does not exist. Create it first"),
    ("fit", FIT, {"--output": "e"}, "must end in .safetensors"),
    ("fit", FIT, {"--output": "s.safetensors"}, "a file of another kind (scores)"),
    ("fit", FIT, {"--output": "/proc/e.safetensors"}, "of --output cannot be written to"),
    (
        "fit",
        FIT,
        {"--output": "precious.safetensors", "--overwrite": "true"},
        "a file of another kind (weights). Pass another name",
    ),
    ("fit", FIT, {"--log": "log.safetensors"}, "exists, and holds no lines of JSON"),
    ("fit", FIT, {"--latent-cache": "adapter.safetensors"}, "is a file"),
    ("score", SCORE, {"--operator": "none.safetensors"}, "Make it by curvlinops-diffusion fit"),
    ("score", SCORE, {"--operator": "train"}, "train' is a folder, not a file of an operator"),
    ("score", SCORE, {"--operator": "shards.safetensors"}, "'gone.safetensors' first. Copy them"),
    ("score", SCORE, {"--output": "o.safetensors"}, "is what --operator reads"),
    ("score", SCORE, {"--queries": "none"}, "as --queries."),
    ("report", REPORT, {"--scores": "o.safetensors"}, "of kind 'curvlinops_diffusion.operator'"),
    ("report", REPORT, {"--output": "new.pdf"}, "must end in .html"),
    ("validate-plan", PLAN, {"--data": "empty"}, "empty' holds no images"),
    ("validate-plan", PLAN, {"--output": "alone.npy"}, "is a file"),
]


def test_errors_of_paths_come_before_pytorch(there):
    def word(value):
        if value == "true" or value.startswith("/"):
            return value
        name, equals, path = value.rpartition("=")
        return f"{name}{equals}{there / path}"

    commands = []
    for command, usual, changed, _ in CASES:
        options = {key: value for key, value in (usual | changed).items() if value is not None}
        commands.append([command, *(f"{key}={word(value)}" for key, value in options.items())])
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    for case, (code, out, error, heavy) in zip(CASES, outcomes(commands)[0], strict=True):
        assert (code, out, heavy) == (2, "", set()), case
        assert error.startswith("error: "), case
        assert error.count("\n") == 1, error
        assert case[-1] in error, (case, error)
    assert before == {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}


def test_a_latent_cache_that_cannot_be_written_to(there, tmp_path, monkeypatch):
    """A full one is only read; one that is not there must be made."""

    def refuse(path, option):
        raise ValueError(f"{option} was to be made")

    monkeypatch.setattr("curvlinops_diffusion.cli.paths.check_can_be_made", refuse)
    output = tmp_path / "o.safetensors"
    options = {"pipeline": there / "pipeline", "data": there / "train", "output": output}
    check_paths(options_of("fit", **options, latent_cache=there / "empty"))
    with pytest.raises(ValueError, match="--latent-cache was to be made"):
        check_paths(options_of("fit", **options, latent_cache=there / "none"))


def test_paths_with_equals_signs(there, tmp_path, monkeypatch):
    """A path that exists or begins as one is no name and a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r=4").mkdir()
    shutil.copy(there / "adapter.safetensors", tmp_path / "r=4" / "a.safetensors")
    given = ["r=4/a.safetensors", "./r=4/a.safetensors", "s=r=4/a.safetensors"]
    given += [str(tmp_path / "r=4" / "a.safetensors")]
    check_network(options_of("fit", pipeline=there / "pipeline", lora=given))
    with pytest.raises(ValueError, match=r"'/none/r=4' does not exist"):
        check_network(options_of("fit", pipeline=there / "pipeline", lora=["/none/r=4"]))
