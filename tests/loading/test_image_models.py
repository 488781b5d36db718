"""Image models of ``transformers`` as embeddings: as the model itself says, and refused."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from curvlinops_diffusion.loading.image_models import ImageModel
from curvlinops_diffusion.runtime.digests import name_of

SMALL = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 8, "image_size": 16, "patch_size": 8},
}


def clip():
    text = {**SMALL, "vocab_size": 10, "max_position_embeddings": 4, "eos_token_id": 9}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=6))


MODELS = {
    "vit": (lambda: ViTModel(ViTConfig(**SMALL)), 8),
    "without a pooler": (lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), 8),
    "dino": (lambda: Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=1)), 8),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1])),
        6,
    ),
    "clip": (clip, 6),
}


def saved(folder, model, size=16):
    sides = {"height": size, "width": size}
    processor = CLIPImageProcessor(
        **{"size": sides, "do_center_crop": False, "image_mean": [0.5, 0.4, 0.3]},
        image_std=[0.2, 0.3, 0.4],
    )
    processor.save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_the_model(tmp_path, name):
    make, F = MODELS[name]
    torch.manual_seed(0)
    model = make()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    found = ImageModel(saved(tmp_path, model))(x)
    mean, std = (torch.tensor(z).reshape(3, 1, 1) for z in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pixels = ((x + 1) / 2 - mean) / std
    with torch.no_grad():
        if name == "clip":
            own = model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T
        elif name == "without a pooler":
            own = model(pixels).last_hidden_state.mean(1)
        else:
            own = model(pixels).pooler_output.flatten(1)
    assert found.shape == (3, F)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_images_of_other_sizes_and_of_one_channel(tmp_path):
    embed = ImageModel(saved(tmp_path, MODELS["vit"][0]()))
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(embed(x), embed(x.expand(2, 3, -1, -1)))
    assert embed(torch.rand(2, 3, 24, 20)).shape == (2, 8)
    with pytest.raises(ValueError, match="needs images of 1 or 3 channels, got 4"):
        embed(torch.rand(2, 4, 16, 16))


def test_it_is_known_by_its_weights_and_settings(tmp_path):
    torch.manual_seed(0)
    model = MODELS["vit"][0]()
    one, again = (ImageModel(saved(tmp_path / name, model)) for name in ("one", "again"))
    assert name_of(one) == name_of(again)
    assert name_of(one) != name_of(ImageModel(saved(tmp_path / "larger", model, 32)))
    assert name_of(one) != name_of(ImageModel(saved(tmp_path / "new", MODELS["vit"][0]())))


def test_half_precision_and_features_of_convolutions(tmp_path):
    """What was saved in float16 is computed in float32; maps are averaged over positions."""
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert ImageModel(saved(tmp_path / "half", MODELS["resnet"][0]().half()))(x).isfinite().all()
    sizes = {"hidden_sizes": [4, 8], "num_encoder_blocks": 2, "depths": [1, 1]}
    sizes |= {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [1, 1]}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2]}
    maps = SegformerModel(SegformerConfig(**sizes))
    assert ImageModel(saved(tmp_path / "maps", maps, 32))(x).shape == (2, 8)


def test_refused(tmp_path):
    masked = {**SMALL, "decoder_hidden_size": 8, "decoder_num_attention_heads": 2}
    masked = ViTMAEModel(ViTMAEConfig(**masked, decoder_num_hidden_layers=1))
    with pytest.raises(ValueError, match="masks parts of its input at random"):
        ImageModel(saved(tmp_path / "masked", masked))
    model = MODELS["vit"][0]()
    weights = {k: z for k, z in model.state_dict().items() if "embeddings" not in k}
    saved(tmp_path / "part", model)
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 4 of the model's weights, 'embeddings"):
        ImageModel(tmp_path / "part")
    with pytest.raises(ValueError, match=r"\(`embedding`\) is not the folder of a transformers"):
        ImageModel(tmp_path)
