"""Adapters of one training by step, as trainers name them, and repositories in the Hub's cache."""

import itertools
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.cli.paths import find_paths
from curvlinops_diffusion.loading.epochs import adapters_by_step
from curvlinops_diffusion.loading.hub import on_hub
from tests.cli.cases import write_images

NUMBERS = itertools.count()


def weights(path, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.array([next(NUMBERS)])}, path, metadata)  # of another step each
    return path


DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
# by trainer: what lies in its folder in its order, and beside that
WRITTEN = {
    "kohya's epochs": (
        ["cat-000002", "cat-000004", "cat-000010", "cat"],
        ["cat-000004-state/m.txt"],
    ),
    "kohya's steps": (["cat-step00000500", "cat-step00001000"], []),
    "ai-toolkit": (["cat_000000250", "cat_000000500", "cat"], ["optimizer.pt", "config.yaml"]),
    "OneTrainer": (
        ["2024-05-01_09-00-00-save-90-1-0", "2024-05-02_09-00-00-save-100-2-0"],
        ["config.json", "._x.safetensors"],
    ),
    "diffusers": (["checkpoint-500", "checkpoint-1000", "."], ["checkpoint-1500/optimizer.bin"]),
    "PEFT": (["checkpoint-20", "checkpoint-100"], []),
    "one": (["."], ["notes.txt"]),
}


@pytest.mark.parametrize("trainer", WRITTEN)
def test_in_order(tmp_path, trainer):
    names, beside = WRITTEN[trainer]
    expected = []
    for name in reversed(names):
        if name.startswith("checkpoint") or name == ".":
            weights(tmp_path / name / (PEFT if trainer == "PEFT" else DIFFUSERS))
            if trainer == "PEFT":
                (tmp_path / name / "adapter_config.json").write_text("{}")
            expected.append(tmp_path / name)
        else:
            expected.append(weights(tmp_path / f"{name}.safetensors"))
    for name in beside:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert adapters_by_step(tmp_path, None) == expected[::-1]
    assert adapters_by_step(tmp_path) == expected[:1]
    assert adapters_by_step(tmp_path, 2) == expected[:2][::-1]
    assert adapters_by_step(expected[0]) == [expected[0]]


def test_the_last_step_and_the_end_of_training(tmp_path):
    """Both hold the same weights, which are one checkpoint."""
    for name in ("checkpoint-10", "checkpoint-20", "."):
        weights(tmp_path / name / DIFFUSERS)
    save_file({"w": np.array([1])}, tmp_path / DIFFUSERS, {"end": "of training"})
    save_file({"w": np.array([1])}, tmp_path / "checkpoint-20" / DIFFUSERS)
    assert adapters_by_step(tmp_path, None) == [tmp_path / "checkpoint-10", tmp_path]


def test_epochs_beside_steps(tmp_path):
    """In the order of the steps that the files count; without, none is guessed."""
    epoch = weights(tmp_path / "a-000001.safetensors", ss_steps="700")
    step = weights(tmp_path / "a-step00000500.safetensors", ss_steps="500")
    assert adapters_by_step(tmp_path, None) == [step, epoch]
    weights(step)
    with pytest.raises(ValueError, match=r"by epochs and by steps, and do not say \(ss_steps\)"):
        adapters_by_step(tmp_path)


def test_several_trainings(tmp_path):
    """Files of an earlier run by later names are refused; a run that went on is one training."""
    for name, began in (("a-000001", 2.5), ("a-000002", 7.0), ("a", 7.0)):
        weights(tmp_path / f"{name}.safetensors", ss_training_started_at=str(began))
    assert len(adapters_by_step(tmp_path, None)) == 3
    weights(tmp_path / "a-000003.safetensors", ss_training_started_at="1.5")
    told = r"'a-000003\.safetensors' is of a later step than 'a-000002\.safetensors', and of an ear"
    with pytest.raises(ValueError, match=told):
        adapters_by_step(tmp_path)
    for name in ("2024-05-02_09-00-00-save-90-1-0", "2024-05-01_09-00-00-save-100-2-0"):
        weights(tmp_path / "ot" / f"{name}.safetensors")
    with pytest.raises(ValueError, match="and of an earlier run"):
        adapters_by_step(tmp_path / "ot")
    weights(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"several trainings \('a', 'b'\)\. Pass the file of one"):
        adapters_by_step(tmp_path)


def found(**given):
    options = options_of("attribute", **given)
    find_paths(options)
    return options


def test_by_the_program(tmp_path, capsys):
    """The final one is the network's, others are earlier checkpoints where they are asked for."""
    names = ["cat-000001", "cat-000002", "cat"]
    files = [str(weights(tmp_path / "out" / f"{name}.safetensors")) for name in names]
    folder = str(tmp_path / "out")
    for given, lora, checkpoints in (
        ({"lora": [folder]}, files[2:], None),
        ({"lora": [folder], "last": 2}, files[2:], files[1:2]),
        ({"lora": [folder], "last": 9}, files[2:], files[:2]),
        ({"lora": [folder], "checkpoints": [folder]}, files[2:], files[:2]),
        ({"lora": [f"x={folder}"]}, [f"x={files[2]}"], None),
        ({"lora": files[2:], "checkpoints": files[:1]}, files[2:], files[:1]),
    ):
        options = found(**given)
        assert (options.lora, options.checkpoints, options.last) == (lora, checkpoints, 1)
    told = capsys.readouterr().err
    assert f"Of 3 adapters in '{folder}' took 'cat.safetensors', the final one" in told
    assert "with 'cat-000002.safetensors' as earlier checkpoints" in told
    with pytest.raises(ValueError, match="--last 2 needs a folder of several adapters of one"):
        found(lora=files[:1], last=2)


# ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache with a pipeline and an adapter."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("models--one--base", "models--one--style", "datasets--one--cats"):
        repository = folder / name
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0a")
        (repository / "blobs").mkdir()
    base = folder / "models--one--base" / "snapshots" / "0a"
    blob = base.parent.parent / "blobs" / "ff"
    blob.write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet2DModel"]}))
    weights(base / "unet" / "diffusion_pytorch_model.safetensors")
    (base / "model_index.json").symlink_to(blob)
    weights(folder / "models--one--style" / "snapshots" / "0a" / "a-000001.safetensors")
    weights(folder / "models--one--style" / "snapshots" / "0a" / "a.safetensors")
    write_images(folder / "datasets--one--cats" / "snapshots" / "0a", 2, seed=0)
    return folder


def test_ids_in_the_cache(cache):
    base, style = (cache / f"models--one--{n}" / "snapshots" / "0a" for n in ("base", "style"))
    data = cache / "datasets--one--cats" / "snapshots" / "0a"
    options = found(pipeline=Path("one/base"), data=Path("one/cats"), lora=["one/style"], last=2)
    assert (options.pipeline, options.data) == (base, data)
    assert options.lora == [str(style / "a.safetensors")]
    assert options.checkpoints == [str(style / "a-000001.safetensors")]
    for text in ("one/style/a-000001.safetensors", "one/style:a-000001.safetensors"):
        assert found(lora=[f"x={text}"]).lora == [f"x={style / 'a-000001.safetensors'}"]


def test_what_is_on_disk_is_a_path(cache, tmp_path):
    weights(tmp_path / "one" / "style" / "b.safetensors")
    assert found(lora=["one/style"]).lora == [str(Path("one/style"))]
    # a file that was meant to be there
    assert found(lora=["one/stile"]).lora == ["one/stile"]
    assert found(lora=["two/a.safetensors"]).lora == ["two/a.safetensors"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pipeline": Path("two/base")}, "'two/base' does not exist, nor is the repository 'two/b"),
        ({"lora": ["one/style/c.safetensors"]}, r"'one/style/c\.safetensors' does not exist, nor"),
        ({"data": Path("one/style")}, "HF_HUB_OFFLINE is set, so that none is downloaded. Pass"),
    ],
)
def test_what_is_not_there(cache, given, told):
    with pytest.raises(ValueError, match=told):
        found(**given)


def test_downloads(cache, monkeypatch):
    """What is missing in the cache is asked for: texts and safetensors files alone."""
    asked = []

    def download(name, local_files_only=False, **options):
        asked.append((name, local_files_only, options))
        if local_files_only and name != "two/half":
            raise FileNotFoundError("nothing here")
        if name == "two/none":
            raise OSError("404 Client Error\n(Request ID: 1)")
        return str(cache)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert on_hub("two/base", "pipeline", str, "fp16") == cache
    (_, first, _), (name, second, options) = asked
    assert (name, first, second, options["repo_type"]) == ("two/base", True, False, "model")
    allowed, ignored = options["allow_patterns"], options["ignore_patterns"]

    def matches(path):
        named = [p for p in allowed if Path(path).match(p.removeprefix("*/"))]
        return bool(named) and not any(Path(path).match(p) for p in ignored)

    assert matches("unet/diffusion_pytorch_model.fp16.safetensors")
    assert matches("tokenizer/vocab.json")
    for path in ("unet/m.bin", "pipeline.py", "model.ckpt", "unet/m.bf16.safetensors"):
        assert not matches(path)

    def incomplete(path):
        raise ValueError("it lacks weights")

    assert on_hub("two/half", "adapter", incomplete) == cache
    assert [local for name, local, _ in asked if name == "two/half"] == [True, False]
    allowed, ignored = asked[-1][2]["allow_patterns"], []
    for path in ("README.md", "config.yaml", "simpletuner_config.json", "logs/a/1/hparams.yml"):
        assert matches(path)  # by which the recipe is known
    with pytest.raises(ValueError, match=r"cannot be had from the Hub: 404 Client Error \(Req.*Pa"):
        on_hub("two/none", "adapter", str)
