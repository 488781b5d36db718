"""Files of LyCORIS and of DoRA: layers act as with the weight that training ran them with."""

import json
import warnings
from itertools import cycle

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.nn import functional

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.layers.coverage import cover
from curvlinops_diffusion.loading.adapters import load_adapters, names_in
from tests.comparisons import assert_close
from tests.diffusion import test_pipelines as pipelines
from tests.loading.cases import again, doubled, lora, lora_names, trained, write
from tests.reference import dense_loss_ggn, example_gradients, params_of

GENERATOR = torch.Generator().manual_seed(0)
RANK = 2
TUCKER = "ijkl,ip,jr->prkl"


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def kron(w1, w2):
    """By its definition, from the entries of the first."""
    return torch.cat([torch.cat([entry * w2 for entry in row], 1) for row in w1])


# As trainers document it: of a layer with the weight [O, I, *k] the tensors of a file, and the
# change of the weight in units of alpha over rank.


def matrices(O, I, *k):
    up, down = random(O, RANK), random(RANK, I, *k)
    file = {"lora_up.weight": up.view(O, RANK, *[1] * len(k)), "lora_down.weight": down}
    return file, torch.tensordot(up, down, 1)


def matrices_with_core(O, I, *k):
    up, down, core = random(O, RANK), random(RANK, I), random(RANK, RANK, *k)
    file = {"lora_up.weight": up[..., None, None], "lora_down.weight": down[..., None, None]}
    product = torch.einsum("ijkl,pi,jr->prkl", core, up, down)
    return file | {"lora_mid.weight": core}, product


def loha(O, I, *k):
    file, change = {}, 1
    for n in (1, 2):
        a, b = random(O, RANK), random(RANK, I * torch.Size(k).numel())
        file |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b}
        change = change * (a @ b).view(O, I, *k)
    return file, change


def loha_of_convolutions(O, I, *k):
    """As OneTrainer has them, whose factors are those of two convolutions."""
    file, change = loha(O, I, *k)
    shapes = {"a": (O, RANK, *[1] * len(k)), "b": (RANK, I, *k)}
    return {key: z.view(shapes[key[-1]]) for key, z in file.items()}, change


def loha_with_core(O, I, *k):
    file, change = {}, 1
    for n in (1, 2):
        a, b, core = random(RANK, O), random(RANK, I), random(RANK, RANK, *k)
        file |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b, f"hada_t{n}": core}
        change = change * torch.einsum(TUCKER, core, a, b)
    return file, change


def lokr(O, I, *k):
    w1, w2 = random(2, 2), random(O // 2, I // 2, *k)
    return {"lokr_w1": w1, "lokr_w2": w2}, kron(w1, w2)


def lokr_of_products(O, I, *k):
    a, b, c = random(2, RANK), random(RANK, 2), random(O // 2, RANK)
    d = random(RANK, I // 2 * torch.Size(k).numel())
    file = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}
    return file, kron(a @ b, (c @ d).view(O // 2, I // 2, *k))


def lokr_with_core(O, I, *k):
    w1, a, b, core = random(2, 2), random(RANK, O // 2), random(RANK, I // 2), random(2, 2, *k)
    file = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
    return file, kron(w1, torch.einsum(TUCKER, core, a, b))


FORMS = [loha, lokr, lokr_of_products, matrices]
CORES = [matrices_with_core, loha_with_core, lokr_with_core, loha_of_convolutions]


class Written:
    """Entries of a file, and the weights that training ran the layers with."""

    def __init__(self):
        self.tensors, self.weights = {}, {}

    def add(self, stem, form, weight, along=None):
        """A change of a weight by its name in the file; ``along`` has magnitudes of DoRA."""
        file, change = form(*weight.shape)
        # of two whole factors there is no rank, and what stands for alpha is not used
        scale = 1 if form is lokr else 3 / RANK
        self.tensors |= {f"{stem}.{key}": z for key, z in file.items()}
        self.tensors[f"{stem}.alpha"] = torch.tensor(3.0)
        weight = weight.detach() + scale * change
        if along is not None:
            dims = [dim for dim in range(weight.ndim) if dim != along]
            magnitudes = random(*[n if dim == along else 1 for dim, n in enumerate(weight.shape)])
            self.tensors[f"{stem}.dora_scale"] = magnitudes
            weight = magnitudes * weight / weight.square().sum(dims, keepdim=True).sqrt()
        return weight


def acts_as(layer, weight):
    """Whether an adapted layer is the one below it with another weight."""
    inner = layer.get_base_layer()
    if isinstance(inner, nn.Linear):
        x = random(3, 5, inner.in_features)
        expected = functional.linear(x, weight, inner.bias)
    else:
        x = random(3, inner.in_channels, 6, 6)
        expected = functional.conv2d(x, weight, inner.bias, inner.stride, inner.padding)
    assert_close(layer(x).detach(), expected.detach(), 1e-10)


@pytest.mark.parametrize("along", [None, 0, 1])
def test_every_layer_in_every_form(saved, tmp_path, along):
    """By kohya's names of the U-Net and the text encoder, with magnitudes of rows or columns."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion)
    written, expected = Written(), {}
    # plain pairs are the loader's
    linear = cycle(FORMS if along is not None else FORMS[:-1])
    convolutions = cycle([*FORMS, *CORES] if along is not None else [*FORMS[:-1], *CORES])
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te_text_model")):
        for name, layer in parts[part].named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or min(layer.weight.shape[:2]) < 4:
                continue
            over = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
            form = next(convolutions if over else linear)
            stem = f"{prefix}_{name.replace('.', '_')}"
            expected[part, name] = written.add(stem, form, layer.weight, along)
    file = write(written.tensors, tmp_path / "a.safetensors")
    found = load_adapters([file], parts, pipeline)
    for (part, name), weight in expected.items():
        acts_as(parts[part].get_submodule(name), weight)
    left_out = sum(key.endswith("alpha") for key in written.tensors)
    assert sum(map(len, found.values())) == len(written.tensors) - left_out
    own = parts["unet"].get_submodule("mid_block.resnets.0.conv1")
    own.enable_adapters(False)
    acts_as(own, own.get_base_layer().weight)


# by their original names: layers that were one
SPLIT = {
    pipelines.stable_diffusion_xl: {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": [
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        ],
        "lora_unet_input_blocks_1_0_in_layers_2": ["unet.down_blocks.0.resnets.0.conv1"],
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj": [
            "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj"
        ],
    },
    pipelines.flux: {
        "lora_unet_double_blocks_0_img_attn_qkv": [
            f"transformer.transformer_blocks.0.attn.to_{n}" for n in "qkv"
        ],
        "lora_unet_double_blocks_0_txt_attn_proj": [
            "transformer.transformer_blocks.0.attn.to_add_out"
        ],
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": [
            "text_encoder.encoder.layers.1.self_attn.q_proj"
        ],
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": [
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
        ],
    },
    pipelines.stable_diffusion_3: {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": [
            f"transformer.transformer_blocks.0.attn.to_{n}" for n in "qkv"
        ],
        "lora_unet_joint_blocks_0_context_block_attn_qkv": [
            f"transformer.transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"
        ],
        "lora_unet_context_embedder": ["transformer.context_embedder"],
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": [
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
        ],
        "lora_unet_joint_blocks_0_x_block_mlp_fc2": ["transformer.transformer_blocks.0.ff.net.2"],
        "lycoris_transformer_blocks_0_ff_net_0_proj": [
            "transformer.transformer_blocks.0.ff.net.0.proj"
        ],
    },
}


QKV = [f"transformer.transformer_blocks.0.attn.to_{n}" for n in "qkv"]
# and as ai-toolkit has them
FILES = [(*own, form) for own in SPLIT.items() for form in (matrices, loha, lokr_of_products)]
FILES += [
    (pipelines.flux, {"diffusion_model.double_blocks.0.img_attn.qkv": QKV}, loha),
    (pipelines.stable_diffusion_3, {"diffusion_model.joint_blocks.0.x_block.attn.qkv": QKV}, loha),
]


@pytest.mark.parametrize(("make", "stems", "form"), FILES)
def test_original_names(saved, tmp_path, make, stems, form):
    """A joint layer's rows are those of its parts, pairs and magnitudes of rows included."""
    pipeline, parts = doubled(saved, make)
    written, expected = Written(), {}
    for stem, names in stems.items():
        layers = [parts[n.split(".")[0]].get_submodule(n.split(".", 1)[1]) for n in names]
        whole = torch.cat([layer.weight for layer in layers])
        if form is lokr_of_products and len(layers) > 1:  # of which the first is divided

            def own(O, I):
                a, b = random(6, RANK), random(RANK, 2)
                c, d = random(O // 6, RANK), random(RANK, I // 2)
                file = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}
                return file, kron(a @ b, c @ d)
        else:
            own = form
        weight = written.add(stem, own, whole, None if form is matrices else 0)
        expected |= zip(names, weight.chunk(len(names)), strict=True)
    load_adapters([write(written.tensors, tmp_path / "a.safetensors")], parts, pipeline)
    for name, weight in expected.items():
        part, _, layer = name.partition(".")
        acts_as(parts[part].get_submodule(layer), weight)


def test_scale_and_shift_of_the_last_block(saved, tmp_path):
    """Diffusers has them in the other order."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion_3)
    name = "transformer_blocks.0.norm1_context.linear"
    whole = parts["transformer"].get_submodule(name).weight
    swapped = torch.cat(whole.chunk(2)[::-1])
    written = Written()
    stem = "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1"
    weight = written.add(stem, matrices, swapped)
    load_adapters([write(written.tensors, tmp_path / "a.safetensors")], parts, pipeline)
    acts_as(parts["transformer"].get_submodule(name), torch.cat(weight.chunk(2)[::-1]))


def test_curvature(saved, tmp_path):
    """Gradients are autograd's; factors that are run one by one are layers to K-FAC."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion)
    block = "mid_block.attentions.0.transformer_blocks.0"
    forms = {
        f"{block}.attn1.to_q": (lokr, None),
        f"{block}.attn1.to_k": (lokr_of_products, 0),
        f"{block}.attn1.to_v": (loha, None),
        f"{block}.attn2.to_q": (matrices, 1),
        "mid_block.resnets.0.conv1": (lokr_with_core, None),
        "down_blocks.0.downsamplers.0.conv": (matrices_with_core, 0),
    }
    written = Written()
    for name, (form, along) in forms.items():
        weight = parts["unet"].get_parameter(f"{name}.weight") * 1.0
        written.add(f"lora_unet_{name.replace('.', '_')}", form, weight, along)
    file = write(written.tensors, tmp_path / "a.safetensors")
    found = load_adapters([file], parts, pipeline)
    objective = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    names = names_in(objective.model, parts, found)
    params = params_of(objective.model, names)
    others = cover(objective.model, dict(zip(names, params, strict=True))).others
    assert {name.split(".")[-2] for name in others} == {
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lora_magnitude_vector")
    }
    data = pipelines.data_for(pipelines.stable_diffusion)
    regression = NoisedRegression(objective, data, 2)
    J = ExampleGradientLinearOperator(regression, names)
    assert_close(J.rows(), example_gradients(regression, params), 1e-8)
    with warnings.catch_warnings():  # as it would be, if derivatives went through a norm
        warnings.filterwarnings("error", "The gradients of .* automatic differentiation")
        EK = DiffusionEKFACLinearOperator(regression, names, fisher_type="empirical")
    assert_close(EK.trace(), dense_loss_ggn(regression, params).trace(), 1e-8)


def test_decomposed_adapters_in_unequal_batches(saved):
    """PEFT's norm of an identity matrix is no input of an example, however many there are."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion)
    one = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    inject_adapter_in_model(lora(use_dora=True, target_modules=[one]), parts["unet"])
    trained(parts["unet"])
    objective = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    data = pipelines.data_for(pipelines.stable_diffusion)
    traces = [
        DiffusionEKFACLinearOperator(
            NoisedRegression(objective, data, 2, batch_size=size),
            lora_names(parts["unet"]),
            fisher_type="empirical",
        ).trace()
        for size in (2, 3)
    ]
    assert_close(*traces, 1e-10)


@pytest.mark.parametrize(("given", "scale"), [("True", 3.0), ("False", 1.0)])
def test_two_whole_factors_scaled_by_the_root_of_the_rank(saved, tmp_path, given, scale):
    """LyCORIS' rs_lora has the root of the rank for a scale, and writes its third power."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = parts["unet"].get_parameter(f"{name}.weight").detach()
    file, change = lokr(*weight.shape)
    tensors = {f"{STEM}.{key}": z for key, z in file.items()}
    tensors[f"{STEM}.alpha"] = torch.tensor(27.0)
    metadata = {"ss_network_args": json.dumps({"algo": "lokr", "rs_lora": given})}
    file = write(tensors, tmp_path / "a.safetensors", metadata)
    load_adapters([file], parts, pipeline)
    acts_as(parts["unet"].get_submodule(name), weight + scale * change)


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
BAD = {
    "half": ({f"{STEM}.hada_w1_a": (4, 2)}, "'hada_w1_a' of .*, which are not the factors of one"),
    "magnitudes alone": ({f"{STEM}.dora_scale": (4, 1)}, "'lora_magnitude_vector' of 'lora_unet"),
    "sizes": (
        {f"{STEM}.lokr_w1": (2, 2), f"{STEM}.lokr_w2": (2, 3)},
        r"not of this network: .*lokr_w2 \(2, 3\), which make no weight of 4×4\. Pass the network",
    ),
    "magnitudes": (
        {f"{STEM}.lokr_w1": (2, 2), f"{STEM}.lokr_w2": (2, 2), f"{STEM}.dora_scale": (5, 1)},
        r"lora_magnitude_vector \(5, 1\), .* which make no weight of 4×4",
    ),
    "other layer": (
        {"lora_unet_x.lokr_w1": (2, 2), "lora_unet_x.lokr_w2": (2, 2)},
        r"2 of its weights \(LoKr\) have no place in the StableDiffusionPipeline: 'lora_unet_x",
    ),
    "a norm": (
        {"lora_unet_conv_norm_out.lokr_w1": (2, 2), "lora_unet_conv_norm_out.lokr_w2": (2, 2)},
        "'lora_unet_conv_norm_out' belongs to a GroupNorm",
    ),
    "(IA)³": (
        {f"{STEM}.weight": (4,), f"{STEM}.on_input": (1,)},
        r"1 of its weights \(\(IA\)³\) have no place",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_layer(saved, tmp_path, case):
    pipeline, parts = again(saved, pipelines.stable_diffusion)
    shapes, told = BAD[case]
    before = [name for name, _ in parts["unet"].named_parameters()]
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    file = write(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=told) as caught:
        load_adapters([file], parts, pipeline)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in parts["unet"].named_parameters()] == before


@pytest.mark.parametrize(("along", "w1", "told"), [(1, 6, "magnitudes of col"), (0, 2, "divided")])
def test_rows_that_several_layers_have_in_common(saved, tmp_path, along, w1, told):
    pipeline, parts = again(saved, pipelines.flux)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {"lokr_w1": random(w1, 2), "lokr_w2": random(24 // w1, 4)}
    tensors["dora_scale"] = random(24, 1) if along == 0 else random(1, 8)
    file = write({f"{stem}.{k}": z for k, z in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"'{stem}' .*{told}"):
        load_adapters([file], parts, pipeline)


def test_beside_another_adapter(saved, tmp_path):
    """Adapters on the same layer add up, whichever comes first."""
    pipeline, parts = doubled(saved, pipelines.stable_diffusion)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = parts["unet"].get_parameter(f"{name}.weight").detach().clone()
    files, change = [], 0
    for n, form in enumerate((lokr, matrices)):
        written = Written()
        change = change + written.add(STEM, form, base) - base
        files.append(f"a{n}={write(written.tensors, tmp_path / f'{n}.safetensors')}")
    for order in (files, files[::-1]):
        pipeline, parts = doubled(saved, pipelines.stable_diffusion)
        found = load_adapters(order, parts, pipeline)
        acts_as(parts["unet"].get_submodule(name), base + change)
        assert len(found["unet"]) == 4


def test_differences_by_original_names(saved, tmp_path):
    """Of layers that were one, each gets its rows."""
    names = {
        pipelines.stable_diffusion_xl: ("lora_unet_input_blocks_1_0_in_layers_2", "conv1"),
        pipelines.flux: ("lora_unet_double_blocks_0_img_attn_qkv", "attn.to_"),
    }
    for make, (stem, end) in names.items():
        pipeline, parts = doubled(saved, make)
        block = "down_blocks.0.resnets.0" if end == "conv1" else "transformer_blocks.0"
        model = next(iter(parts.values()))
        layers = [f"{block}.{end}{n}" for n in ("qkv" if end == "attn.to_" else [""])]
        before = torch.cat([model.get_parameter(f"{n}.weight").detach() for n in layers])
        bias = torch.cat([model.get_parameter(f"{n}.bias").detach() for n in layers])
        tensors = {f"{stem}.diff": random(*before.shape), f"{stem}.diff_b": random(len(bias))}
        found = load_adapters([write(tensors, tmp_path / "a.safetensors")], parts, pipeline)
        after = torch.cat([model.get_parameter(f"{n}.weight") for n in layers])
        assert torch.equal(after, before + tensors[f"{stem}.diff"])
        after = torch.cat([model.get_parameter(f"{n}.bias") for n in layers])
        assert torch.equal(after, bias + tensors[f"{stem}.diff_b"])
        assert sum(map(len, found.values())) == 2 * len(layers)
