"""What is read of a folder of ``save_pretrained`` or an adapter is checked, and nothing else."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from curvlinops_diffusion.loading.saved_networks import (
    check_adapter,
    check_pipeline,
    parts_of,
    weights_files,
)


def write_part(folder, weights, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(3)}, folder / weights)


def test_what_stands_beside_a_network_is_not_in_its_way(tmp_path):
    """Parts without weights, entries that are no parts, and files that nobody reads."""
    index = {"unet": ["diffusers", "UNet2DModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    nothing = {"range": [0, 1], "flags": [True, None], "image_encoder": [None, "CLIPModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | nothing))
    unet = tmp_path / "unet"
    write_part(unet, "diffusion_pytorch_model.safetensors")
    for name in ("tokenizer", "feature_extractor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    for name in ("old", "._diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        (unet / f"{name}.safetensors").write_bytes(b"cut")
    check_pipeline(tmp_path, None)
    absent = [name for name, kind in parts_of(tmp_path).items() if kind is None]
    assert absent == ["image_encoder"]
    assert parts_of(tmp_path).keys() == {*index, *absent}
    with pytest.raises(ValueError, match=r"fp16.safetensors' is not a whole safetensors file"):
        check_pipeline(tmp_path, "fp16")
    (tmp_path / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer' has no vocabulary"):
        check_pipeline(tmp_path, None)


@pytest.mark.parametrize("end", [".safetensors.fp16.index.json", ".safetensors.index.fp16.json"])
def test_an_index_of_a_variant(tmp_path, end):
    """Its files are read, whatever their names; those without the variant where it has none."""
    for stem in ("model", "diffusion_pytorch_model"):
        write_part(tmp_path, f"{stem}.safetensors")
        assert weights_files(tmp_path, "fp16")[0].name == f"{stem}.safetensors"
        text = json.dumps({"weight_map": {"a": "one.safetensors"}})
        (tmp_path / f"{stem}{end}").write_text(text)
        with pytest.raises(ValueError, match=r"are missing, 'one.safetensors' first"):
            weights_files(tmp_path, "fp16")
        write_part(tmp_path, "one.safetensors")
        assert weights_files(tmp_path, "fp16") == [tmp_path / "one.safetensors"]
        (tmp_path / "one.safetensors").unlink()
        (tmp_path / f"{stem}{end}").unlink()


def test_adapters_among_other_files(tmp_path):
    """Only what is read of an adapter is checked, and what is not read does not replace it."""
    folder = tmp_path / "run"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="should hold the weights of one adapter, and holds none"):
        check_adapter(folder, ["unet"])
    save_file({"w": np.zeros(3)}, folder / "a.safetensors")
    (folder / "._a.safetensors").write_bytes(b"cut")
    check_adapter(folder, ["unet"])
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"weights.safetensors' is not a whole safetensors file"):
        check_adapter(folder, ["unet"])
    (folder / "unet").mkdir()
    (folder / "unet" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unet' holds adapter_config.json and no adapter_model"):
        check_adapter(folder, ["unet"])
    save_file({"w": np.zeros(3)}, folder / "unet" / "adapter_model.safetensors")
    check_adapter(folder, ["unet"])
