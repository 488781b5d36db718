"""Adapters' files against the networks they are loaded into: scales, values, what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.loading.adapter_files import converted, read_adapter
from curvlinops_diffusion.loading.adapters import load_adapters, names_in
from tests.comparisons import assert_close
from tests.diffusion import test_pipelines as pipelines
from tests.loading.cases import TARGETS, again, doubled, lora, write
from tests.reference import dense_loss_ggn, example_gradients, params_of

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
STEM = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(layer, rank, seed, rows=1):
    """Two matrices for a layer, or for several of its size that were one in training."""
    weight = layer.weight
    down = random(rank, *weight.shape[1:], seed=seed)
    up = random(rows * len(weight), rank, *[1] * (weight.ndim - 2), seed=seed + 100)
    return down, up


def product(down, up, scale):
    """``scale · up @ down`` in float64, of a convolution as well."""
    up = up.double().reshape(len(up), -1)
    return scale * torch.tensordot(up, down.double(), 1)


def effective(layer, adapter="default"):
    """What an adapted layer adds to its weight, from its own matrices and scale."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return product(A.detach(), B.detach(), layer.scaling[adapter])


def kohya(entries):
    """A file's tensors from ``stem: (down, up, alpha)``."""
    tensors = {}
    for stem, (down, up, alpha) in entries.items():
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def adapted(module):
    return {name for name, layer in module.named_modules() if getattr(layer, "lora_A", None)}


# by part and layer: rank, alpha, and the name in kohya's file where it is not that of the layer
MIXED = {
    "unet": {
        f"{BLOCK}.attn1.to_q": (4, 16.0),
        f"{BLOCK}.attn1.to_out.0": (4, 12.0),  # of zeros: it was not trained
        f"{BLOCK}.attn2.to_k": (4, 4.0),
        f"{BLOCK}.attn2.to_v": (4, 1.0),
        f"{BLOCK}.ff.net.0.proj": (2, 4.0),
        f"{BLOCK}.ff.net.2": (3, None),
        "down_blocks.0.attentions.0.proj_in": (2, 3.0),
        "down_blocks.0.resnets.0.conv1": (2, 0.5),
        "down_blocks.0.downsamplers.0.conv": (1, 8.0),
    },
    "text_encoder": {
        "encoder.layers.0.self_attn.q_proj": (2, 3.0),
        "encoder.layers.0.mlp.fc1": (4, 1.0),
    },
}
# by the names of the original network, which are mapped to those of diffusers
ORIGINAL = {
    "unet": {
        f"{BLOCK}.attn1.to_q": (2, 1.0, "input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
        f"{BLOCK}.attn2.to_k": (2, 2.0, "input_blocks_1_1_transformer_blocks_0_attn2_to_k"),
        "down_blocks.0.resnets.0.conv1": (2, 3.0, "input_blocks_1_0_in_layers_2"),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (
            *(2, 4.0, "middle_block_1_transformer_blocks_0_attn1_to_v"),
        ),
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            *(2, 5.0, "output_blocks_2_1_transformer_blocks_0_attn1_to_q"),
        ),
    },
    "text_encoder_2": {"encoder.layers.0.self_attn.v_proj": (2, 5.0)},
}
# as ai-toolkit and others write them: alphas beside PEFT's names
PEFTS = {
    "transformer": {
        "transformer_blocks.0.attn.to_q": (4, 16.0),
        "transformer_blocks.0.attn.to_k": (4, 4.0),
        "transformer_blocks.0.attn.to_v": (2, 6.0),
    }
}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (pipelines.stable_diffusion, MIXED),
        (pipelines.stable_diffusion_xl, ORIGINAL),
        (pipelines.flux, PEFTS),
        (pipelines.stable_diffusion_3, PEFTS),
    ],
)
def test_scales(saved, tmp_path, make, layers):
    """Alphas and ranks of every layer its own, as ``conv_alpha`` and blocks make them."""
    pipeline, parts = again(saved, make)
    tensors, expected = {}, {}
    for part, own in layers.items():
        modules = dict(parts[part].named_modules())
        for n, (name, (rank, alpha, *other)) in enumerate(own.items()):
            inner = next(full for full in modules if full.endswith(name))
            down, up = pair(modules[inner], rank, seed=n + len(expected))
            up = up * (name != f"{BLOCK}.attn1.to_out.0")
            expected[part, inner] = (down, up, 1.0 if alpha is None else alpha / rank)
            if layers is PEFTS:
                ends, stem = ("lora_A", "lora_B"), f"transformer.{name}"
            else:
                full = f"text_model.{name}" if "text" in part else name
                stem = PREFIXES[part] + (*other, full.replace(".", "_"))[0]
                ends = ("lora_down", "lora_up")
            tensors |= {f"{stem}.{end}.weight": z for end, z in zip(ends, (down, up), strict=True)}
            if alpha is not None:
                dtype = torch.bfloat16 if n % 2 else torch.float32
                tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    found = load_adapters([write(tensors, tmp_path / "a.safetensors")], parts, pipeline)
    assert {part: len(names) for part, names in found.items() if names} == {
        part: 2 * len(own) for part, own in layers.items()
    }
    assert {(part, name) for part in parts for name in adapted(parts[part])} == expected.keys()
    for (part, name), (down, up, scale) in expected.items():
        layer = parts[part].get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, down)
        assert torch.equal(layer.lora_B["default"].weight, up)
        assert layer.scaling["default"] == scale
        layer.set_scale("default", 1.0)  # PEFT's own way back
        assert_close(effective(layer), product(down, up, scale), 1e-12)


def test_names_of_two_kinds(saved, tmp_path):
    """Beside diffusers' names the loader drops the original ones in silence."""
    pipeline, parts = again(saved, pipelines.stable_diffusion_xl)
    original = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    weights = (*pair(parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q"), 2, 9), 1.0)
    tensors = kohya(dict.fromkeys((STEM, original), weights))
    tensors = {key: z.clone() for key, z in tensors.items()}
    with pytest.raises(ValueError, match=r"2 of its weights have no place .*'lora_unet_input_bl"):
        load_adapters([write(tensors, tmp_path / "mixed.safetensors")], parts, pipeline)


@pytest.mark.parametrize("sparse", [False, True])
def test_scales_of_kohya_files_for_flux(saved, tmp_path, sparse):
    """One pair for queries, keys and values, divided among three layers with the file's scale."""
    pipeline, parts = again(saved, pipelines.flux)
    transformer = parts["transformer"]
    attention = transformer.transformer_blocks[0].attn
    down, up = pair(attention.to_q, 6, seed=0, rows=3)
    if sparse:  # three pairs of rank 2 side by side
        up = up * torch.block_diag(*[torch.ones(len(up) // 3, 2)] * 3)
    alone = pair(attention.to_out[0], 2, seed=1)
    entries = {
        "lora_unet_double_blocks_0_img_attn_qkv": (down, up, 2.0),
        "lora_unet_double_blocks_0_img_attn_proj": (*alone, 3.0),
    }
    trained = load_adapters([write(kohya(entries), tmp_path / "k.safetensors")], parts, pipeline)
    assert len(trained["transformer"]) == 8
    there = torch.cat([effective(getattr(attention, name)) for name in ("to_q", "to_k", "to_v")])
    assert_close(there, product(down, up, 2 / 6), 1e-12)
    assert_close(effective(attention.to_out[0]), product(*alone, 1.5), 1e-12)
    # as they were trained: factors are not multiplied into the matrices
    assert torch.equal(attention.to_out[0].lora_A["default"].weight, alone[0])
    rows = down[:2] if sparse else down
    assert torch.equal(attention.to_q.lora_A["default"].weight, rows)


def trained_folder(module, folder, adapter_config):
    """A trained adapter as PEFT saves it, and the network that it is in."""
    wrapped = get_peft_model(type(module).from_config(module.config), adapter_config)
    inner = wrapped.base_model.model
    # the base's weights by the names that they have in an adapted network
    for key in (state := inner.state_dict()):
        plain = key.replace(".base_layer.", ".").replace(".original_module.", ".")
        plain = plain.replace(".modules_to_save.default.", ".")
        state[key] = module.state_dict().get(plain, state[key])
    inner.load_state_dict(state)
    generator = torch.Generator().manual_seed(5)
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


WHOLE = {
    "whole modules": lora(modules_to_save=["conv_in", "time_embedding"]),
    "lora biases": lora(target_modules=["to_out.0", "conv_shortcut", "conv1"], bias="lora_only"),
    "all biases": lora(bias="all"),
    "patterns": lora(
        rank_pattern={"attn1.to_q": 1}, alpha_pattern={"attn1.to_q": 7}, use_rslora=True
    ),
    "magnitudes": lora(target_modules=["to_q", "to_v"], use_dora=True),
    "products": LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_all_that_was_trained_is_covered(saved, tmp_path, kind):
    """PEFT's folders: values, predictions and gradients are those of the network in training."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion)
    inner = trained_folder(parts["unet"], tmp_path / "lora", WHOLE[kind]).double().base_model.model
    found = load_adapters([str(tmp_path / "lora")], parts, pipeline)
    objective = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    model = objective.model.eval()  # which the program does
    names, own = names_in(model, parts, found), dict(model.named_parameters())
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    assert set(names) == set(trained)
    assert all(torch.equal(own[name], p) for name, p in trained.items())
    regression = NoisedRegression(objective, pipelines.data_for(pipelines.stable_diffusion), 2)
    batch = next(regression.batches())
    ours = objective.predict(batch)
    objective.model = inner
    assert torch.equal(objective.predict(batch), ours)
    objective.model = model
    if kind in ("magnitudes", "products"):
        params = params_of(model, names)
        J = ExampleGradientLinearOperator(regression, names)
        assert_close(J.rows(), example_gradients(regression, params), 1e-8)
        EK = DiffusionEKFACLinearOperator(regression, names, fisher_type="empirical")
        assert_close(EK.trace(), dense_loss_ggn(regression, params).trace(), 1e-8)


def test_differences_of_whole_weights(saved, tmp_path):
    """LyCORIS' full layers and norms: added to the base, and covered."""
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    unet = parts["unet"]
    changed = {
        "conv_norm_out.weight": "conv_norm_out.w_norm",
        "conv_norm_out.bias": "conv_norm_out.b_norm",
        "conv_in.weight": "conv_in.diff",
        "conv_in.bias": "conv_in.diff_b",
        f"{BLOCK}.attn1.to_q.base_layer.weight": f"{BLOCK}.attn1.to_q.diff",
    }
    tensors, expected = {}, {}
    for n, (name, key) in enumerate(changed.items()):
        weight = unet.get_parameter(name.replace(".base_layer", "")).detach().clone()
        layer, _, end = key.rpartition(".")
        difference = random(*weight.shape, seed=n)
        tensors[f"lora_unet_{layer.replace('.', '_')}.{end}"] = difference
        expected[name] = weight + difference
    stem = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
    pairs = kohya({stem: (*pair(unet.get_submodule(f"{BLOCK}.attn1.to_q"), 2, 9), 6.0)})
    file = write(tensors | pairs, tmp_path / "full.safetensors")
    trained = load_adapters([file], parts, pipeline)
    names = names_in(unet, parts, trained)
    assert set(names) == {*expected, *(n for n, _ in unet.named_parameters() if "lora_" in n)}
    for name, weight in expected.items():
        assert torch.equal(unet.get_parameter(name), weight)
    # without matrices beside them
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    del tensors[f"{stem}.diff"]
    trained = load_adapters([write(tensors, tmp_path / "d.safetensors")], parts, pipeline)
    assert len(trained["unet"]) == 4
    for bad in ("lora_unet_conv_out_of.diff", "lora_unet_conv_in.diff_b", "lora_te3_x.diff"):
        pipeline, parts = again(saved, pipelines.stable_diffusion)
        before = parts["unet"].conv_in.weight.detach().clone()
        file = write(tensors | {bad: torch.ones(3)}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=f"1 of its weights .differences .*: '{bad}'. Pass"):
            load_adapters([file], parts, pipeline)
        assert torch.equal(parts["unet"].conv_in.weight, before)


MORE = {
    "two products": (f"{STEM}.hada_w1_a", (4, 2), "'hada_w1_a', 'lora_A', 'lora_B' of .* one"),
    "OFT": (f"{STEM}.oft_blocks", (2, 2, 2), r"1 of its weights \(OFT\).*oft_blocks'"),
    "unknown": (f"{STEM}.scalar", (1,), r"cannot be loaded: .*attn1_to_q\.scalar\. Pass"),
    "alpha of nothing": ("lora_unet_conv_in.alpha", (), "holds 'lora_unet_conv_in.alpha' and no"),
    "alphas": (f"{STEM}.alpha", (2,), r"attn1_to_q.alpha' = \[1.0, 1.0\], which is read"),
    "alpha 0": (f"{STEM}.alpha", 0.0, "attn1_to_q.alpha' = 0.0, which"),
    "alpha -1": (f"{STEM}.alpha", -1.0, "attn1_to_q.alpha' = -1.0, which"),
    "no alpha": (f"{STEM}.alpha", torch.nan, "NaN or infinite .*attn1_to_q.alp"),
    "half a pair": (
        *("lora_unet_conv_in.lora_up.weight", (4, 2)),
        "lacks 'lora_unet_conv_in.lora_down.weight', of a pair",
    ),
    "third encoder": (
        *("lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff", (2, 8)),
        "cannot be loaded: .*lora_te3_encoder",
    ),
}


@pytest.mark.parametrize("case", MORE)
def test_what_loaders_leave_out_is_named(saved, tmp_path, case):
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    key, added, told = MORE[case]
    z = torch.ones(added) if isinstance(added, tuple) else torch.tensor(added)
    tensors = kohya({STEM: (*pair(parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q"), 2, 0), 1.0)})
    file = write(tensors | {key: z}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=told) as caught:
        load_adapters([file], parts, pipeline)
    assert "more.safetensors'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


WIDE = r"attn2.to_k' is 16 wide in the file and 8 in the network, and \d+ more layers"
DIFFERENT = {
    "PEFT's": (str, WIDE),
    "diffusers'": ("unet.{}".format, WIDE),
    "kohya's": (
        lambda key: (
            f"lora_unet_{key.split('.lora_')[0].replace('.', '_')}."
            f"lora_{'down' if 'lora_A' in key else 'up'}.weight"
        ),
        WIDE,
    ),
    "another part": (
        "transformer.{}".format,
        r"names of 64 of its weights begin with 'transformer', and the networks are .* 'unet'",
    ),
    "other layers": (
        lambda key: (
            key.replace("down_blocks.0", "unet.down_blocks.7")
            if f"{BLOCK}.attn1.to_q" in key
            else ""
        ),
        r"1 of its layers are not in the network \('down_blocks.7",
    ),
}


@pytest.fixture(scope="module")
def of_another_network(saved, tmp_path_factory):
    file = tmp_path_factory.mktemp("xl") / "peft"
    trained_folder(saved(pipelines.stable_diffusion_xl)[1].unet, file, lora())
    return file


@pytest.mark.parametrize("form", DIFFERENT)
def test_networks_that_differ(saved, of_another_network, tmp_path, form):
    """One line says how, whatever the form and however many layers there are."""
    (named, told), file = DIFFERENT[form], of_another_network
    if named is not str:
        tensors = load_file(file / "adapter_model.safetensors")
        tensors = {named(key.removeprefix("base_model.model.")): z for key, z in tensors.items()}
        tensors.pop("", None)
        file = write(tensors, tmp_path / "a.safetensors")
    pipeline, own = again(saved, pipelines.stable_diffusion)
    with pytest.raises(ValueError, match=told) as caught:
        load_adapters([str(file)], own, pipeline)
    assert str(caught.value).endswith("Pass the network that it was trained on.")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_are_broken(saved, tmp_path):
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    trained_folder(parts["unet"], tmp_path / "peft", lora())
    path = tmp_path / "peft" / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-10])
    for given in (path, path.parent):
        with pytest.raises(ValueError, match=r"model.safetensors' is not a whole safetensors file"):
            load_adapters([str(given)], parts, pipeline)
    some = next(iter(tensors))
    save_file(tensors | {some: tensors[some] * torch.nan}, path)
    with pytest.raises(ValueError, match=f"holds NaN or infinite numbers in '{some}'"):
        load_adapters([str(path)], parts, pipeline)
    path.write_bytes(whole)
    (path.parent / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"peft' cannot be loaded: .*double quotes.* Pass a .saf"):
        load_adapters([str(path.parent)], parts, pipeline)


def test_the_file_within_pefts_folder(saved, tmp_path):
    """The scale stands beside it, and is found; by another program it is read as what it holds."""
    _, parts = again(saved, pipelines.stable_diffusion)
    trained_folder(parts["unet"], tmp_path / "p", lora(lora_alpha=6))
    for given in (tmp_path / "p", tmp_path / "p" / "adapter_model.safetensors"):
        pipeline, parts = again(saved, pipelines.stable_diffusion)
        load_adapters([str(given)], parts, pipeline)
        layer = parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q")
        assert layer.scaling == {"default": 3.0}
    alone = shutil.copy(tmp_path / "p" / "adapter_model.safetensors", tmp_path)
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    with pytest.raises(ValueError, match=r"without its adapter_config.json, which holds the scale"):
        load_adapters([str(alone)], parts, pipeline)
    down, up = pair(parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q"), 2, 0)
    file = write(kohya({STEM: (down, up, 1.0)}), tmp_path / "adapter_model.safetensors")
    load_adapters([file], parts, pipeline)
    layer = parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q")
    assert_close(effective(layer), product(down, up, 0.5), 1e-12)


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_matrices_of_8_bits(saved, tmp_path, dtype):
    """They are trained in 32, from the values in the file; NaN is refused as of others."""
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    layer = parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q")
    down, up = (z.to(dtype) for z in pair(layer, 2, 0))
    tensors = kohya({STEM: (down, up, 1.0)}) | {
        "lora_unet_conv_in.diff_b": torch.full((4,), 0.5).to(dtype)
    }
    bias = parts["unet"].conv_in.bias.detach().clone()
    load_adapters([write(tensors, tmp_path / "a.safetensors")], parts, pipeline)
    layer = parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q")
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert_close(effective(layer), product(down, up, 0.5), 1e-12)
    assert torch.equal(parts["unet"].conv_in.bias, bias + 0.5)
    tensors["lora_unet_conv_in.diff_b"] = torch.full((4,), torch.nan).to(dtype)
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in 'lora_unet_conv_in.diff_b'"):
        load_adapters([write(tensors, tmp_path / "a.safetensors")], parts, pipeline)


def test_which_weights_a_result_is_made_of(tmp_path):
    """Marks are found among whatever else a conversion makes of them."""
    tensors = kohya({"a": (torch.ones(2, 3), torch.ones(4, 2), 1.0)})
    tensors |= kohya({"b": (torch.ones(2, 3), torch.zeros(4, 2), 1.0)})
    file = read_adapter(Path(write(tensors, tmp_path / "a.safetensors")), tmp_path)

    def convert(given):
        z = given["a.lora_down.weight"]
        return {"x": torch.cat([given["b.lora_down.weight"], z]), "y": z * 1.5, "z": -z}

    _, scales, unplaced = converted(file, convert)
    assert scales == {"x": 0.5}
    assert unplaced == ["a.lora_up.weight"]  # that of b is all zeros


def test_a_denoiser_alone(saved, tmp_path):
    """The scale that diffusers' ``save_lora_adapter`` writes beside the weights."""
    _, parts = again(saved, pipelines.stable_diffusion)
    unet = parts["unet"]
    unet.add_adapter(lora(lora_alpha=6))
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    unet.save_lora_adapter(tmp_path)
    there = effective(unet.get_submodule(f"{BLOCK}.attn1.to_q"))
    _, parts = again(saved, pipelines.stable_diffusion)
    load_adapters([str(tmp_path)], {"model": parts["unet"]}, None)
    assert_close(effective(parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q")), there, 1e-12)
    # of 8 bits, which diffusers reads itself
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    eight = {key: z.to(EIGHT_BITS[0]) for key, z in load_file(path).items()}
    write(eight, path, metadata)
    _, parts = again(saved, pipelines.stable_diffusion)
    load_adapters([str(tmp_path)], {"model": parts["unet"]}, None)
    layer = parts["unet"].get_submodule(f"{BLOCK}.attn1.to_q")
    A, B = (eight[f"{BLOCK}.attn1.to_q.lora_{n}.weight"].float() for n in "AB")
    assert_close(effective(layer), product(A, B, 3.0), 1e-12)


def test_modules_of_several_adapters(saved, tmp_path):
    """A module's trained copy stays in use beside other adapters; two of one are refused."""
    _, parts = again(saved, pipelines.stable_diffusion)
    whole = lora(modules_to_save=["conv_in"])
    with_module = trained_folder(parts["unet"], tmp_path / "a", whole)
    trained_folder(parts["unet"], tmp_path / "b", whole)
    trained_folder(parts["unet"], tmp_path / "c", lora(target_modules=["to_q"]))
    biased = lora(target_modules=["to_out.0"], bias="lora_only")
    for name in "de":
        trained_folder(parts["unet"], tmp_path / name, biased)
    layer = f"{BLOCK}.attn1.to_out.0"
    bias = torch.ones_like(parts["unet"].get_submodule(layer).bias)
    (tmp_path / "f").mkdir()
    write({f"lora_unet_{layer.replace('.', '_')}.diff_b": bias}, tmp_path / "f" / "f.safetensors")
    (tmp_path / "g").mkdir()
    difference = torch.ones_like(parts["unet"].conv_in.weight)
    write({"lora_unet_conv_in.diff": difference}, tmp_path / "g" / "g.safetensors")
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    trained = load_adapters([str(tmp_path / name) for name in "ac"], parts, pipeline)
    unet = parts["unet"]
    x = random(1, 2, 4, 4, seed=0)
    assert torch.equal(unet.conv_in(x), with_module.base_model.model.conv_in(x))
    assert "conv_in.modules_to_save.a.weight" in names_in(unet, parts, trained)
    assert unet.get_submodule(f"{BLOCK}.attn1.to_q").active_adapters == ["a", "c"]
    # a bias that was changed before its layer was wrapped
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    trained = load_adapters([str(tmp_path / name) for name in "fa"], parts, pipeline)
    assert f"{layer}.base_layer.bias" in names_in(parts["unet"], parts, trained)
    for two, told in (
        ("ab", "each hold a trained copy of 'unet.conv_in', .* Pass one of them alone"),
        ("de", "e' cannot be loaded: LoraModel supports only 1 adapter with bias"),
        ("fd", "change the same weights of the network, .*bias', and one replaces .*d'.. Pass one"),
        ("ga", "change the same weights of the network, 'conv_in.original_module.weight', and"),
    ):
        pipeline, parts = again(saved, pipelines.stable_diffusion)
        with pytest.raises(ValueError, match=told):
            load_adapters([str(tmp_path / name) for name in two], parts, pipeline)
