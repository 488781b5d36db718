"""Adapters by the program: every form of file, on every base, their parameters alone."""

import copy
import shutil

import bitsandbytes as bnb
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import bnb as lora_bnb
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    StoredScores,
    load_operator,
)
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import options_of
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.loading.adapters import load_adapters, networks_of
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.runtime.adapters import common_names
from curvlinops_diffusion.runtime.digests import fingerprint
from tests.cases import tiny_unet
from tests.cli.cases import write_images
from tests.comparisons import assert_close
from tests.diffusion import test_pipelines as pipelines
from tests.loading.cases import (
    COUNT,
    TARGETS,
    images_with_prompts,
    lora,
    lora_names,
    peft_folder,
    trained,
)
from tests.reference import dense_loss_ggn, example_gradients, params_of, to_dense


def denoiser_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def problem(make, folder):
    """A base and its adapter, written, and the pipeline in memory with it."""
    pipeline = pipelines.made(make, folder)
    inject_adapter_in_model(lora(), denoiser_of(pipeline))
    trained(denoiser_of(pipeline))
    saved(pipeline, folder / "lora")
    return pipeline


def saved(pipeline, folder):
    """By diffusers' training scripts, the scaling in the file's metadata; else by PEFT."""
    model = denoiser_of(pipeline)
    if not hasattr(pipeline, "save_lora_weights"):
        return peft_folder(model, folder)
    model.peft_config = {"default": lora()}
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    weights = get_peft_model_state_dict(model)
    if part == "unet":
        weights = convert_state_dict_to_diffusers(weights)
    metadata = _collate_lora_metadata({part: model})
    type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": weights}, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """The folder of a Stable Diffusion, its LoRA and images, and the pipeline in memory."""
    folder = tmp_path_factory.mktemp("stable")
    images_with_prompts(folder / "train")
    return folder, problem(pipelines.stable_diffusion, folder)


def loaded(folder, *lora, **more):
    own = {"pipeline": folder / "pipeline", "lora": [str(word) for word in lora], "quiet": True}
    return load_network(options_of("fit", **own, **more), more.get("params", ()))


def assert_same_adapters(model, expected):
    """The same values under the same names, whatever the adapters are called."""
    there, here = dict(expected.named_parameters()), dict(model.named_parameters())
    names = common_names(lora_names(expected))
    own = {common: name for name, common in common_names(lora_names(model)).items()}
    assert set(own) == set(names.values())
    for name, common in names.items():
        assert here[own[common]].dtype == torch.float32
        assert torch.equal(here[own[common]], there[name])


def assert_same_prediction(pipeline, network, make=pipelines.stable_diffusion):
    ours = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    batch = next(NoisedRegression(ours, pipelines.data_for(make), 1).batches())
    theirs = network.objective.predict(batch)
    assert_close(theirs.double(), ours.predict(batch).double(), 1e-5)


# by the program, which loads it with its own template
BASES = [make for make in pipelines.PROMPTED if make is not pipelines.qwen_image]


@pytest.mark.parametrize("make", BASES, ids=lambda make: make.__name__)
def test_a_lora_on_every_base(make, tmp_path):
    """Its parameters alone are covered, and it acts as in memory: scaling and all."""
    pipeline = problem(make, tmp_path)
    network = loaded(tmp_path, tmp_path / "lora")
    assert network.params == lora_names(network.objective.model)
    assert len(network.params) == len(lora_names(denoiser_of(pipeline)))
    assert_same_prediction(pipeline, network, make)


def test_a_lora_of_convolutions_by_diffusers_scripts(tmp_path):
    """Their names are half of diffusers' (attention) and half of PEFT's (all else)."""
    pipeline = pipelines.made(pipelines.stable_diffusion, tmp_path)
    base = copy.deepcopy(pipeline)
    inject_adapter_in_model(lora(target_modules=[*TARGETS, "conv1"]), pipeline.unet)
    trained(pipeline.unet)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    assert all(any(end in key for key in weights) for end in ("lora_A.weight", "down.weight"))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", weights)
    found = load_adapters([str(tmp_path / "lora")], networks_of(base), base)
    assert found["unet"] == lora_names(base.unet)
    assert_same_adapters(base.unet, pipeline.unet)


def test_a_lora_from_fit_to_scores(stable, tmp_path):
    """The program's scores are those of dense algebra on the adapters' parameters alone."""
    folder, _ = stable
    shutil.copytree(folder / "train", tmp_path / "copies")
    fitted, written = tmp_path / "e.safetensors", tmp_path / "s.safetensors"
    words = ["--pipeline", folder / "pipeline", "--lora", folder / "lora", "--dtype", "float64"]
    words += ["--data", folder / "train", "--num-draws", 2, "--quiet"]
    score = ["score", *words, "--operator", fitted, "--queries", tmp_path / "copies"]
    score += ["--output", written, "--query-draws", 2, "--damping", 1e-3, "--method", "influence"]
    for command in (["fit", *words, "--output", fitted, "--curvature", "kfac"], score):
        assert run([str(word) for word in command]) == 0
    network = loaded(folder, folder / "lora", dtype="float64")
    model, names = network.objective.model, network.params
    data = open_images(folder / "train", network.form(None), network.condition)
    train, query = (
        NoisedRegression(network.objective, data, 2, seed, antithetic=True) for seed in (0, 1)
    )
    K = load_operator(fitted, model)
    assert list(K.param_names) == names
    rows, queries = (example_gradients(r, params_of(model, names)) for r in (train, query))
    damped = to_dense(K).double() + 1e-3 * torch.eye(K.shape[0], dtype=torch.float64)
    expected = queries @ torch.linalg.solve(damped, rows.T) / COUNT
    assert_close(StoredScores.open(written).whole(), expected, 1e-6)


def test_forms_of_files(stable, tmp_path):
    """Of diffusers, kohya and PEFT, for the same network."""
    folder, pipeline = stable
    unet, kohya = pipeline.unet, {}
    for name, z in get_peft_model_state_dict(unet).items():
        layer, _, part = name.removesuffix(".weight").rpartition(".lora_")
        key = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{key}.lora_{'down' if part == 'A' else 'up'}.weight"] = z.contiguous()
        kohya[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    peft = peft_folder(unet, tmp_path / "peft")
    for path in (folder / "lora", tmp_path / "kohya.safetensors", peft):
        network = loaded(folder, path)
        assert_same_adapters(network.objective.model, unet)
        assert_same_prediction(pipeline, network)
        assert fingerprint(network.objective.model) == fingerprint(unet)


def test_a_network_without_pipeline(tmp_path):
    """Adapters of an unconditional network, in PEFT's folder."""
    unet = tiny_unet(torch.float32, num_class_embeds=None)
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    wrapped = get_peft_model(unet, lora())
    trained(unet)
    wrapped.save_pretrained(tmp_path / "lora")
    write_images(tmp_path / "train", 3, 0)
    words = ["fit", "--model", tmp_path / "unet", "--scheduler", tmp_path / "scheduler"]
    words += ["--lora", tmp_path / "lora", "--data", tmp_path / "train", "--quiet"]
    assert run([str(w) for w in [*words, "--output", tmp_path / "e.safetensors"]]) == 0
    EK = load_operator(tmp_path / "e.safetensors", wrapped)
    assert list(EK.param_names) == lora_names(unet)
    # called otherwise, it is the same
    again = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    with pytest.raises(ValueError, match=r"Load the adapter that it is of .* \(--lora\)"):
        load_operator(tmp_path / "e.safetensors", again)
    PeftModel.from_pretrained(again, tmp_path / "lora", adapter_name="other")
    EK_again = load_operator(tmp_path / "e.safetensors", again)
    assert list(EK_again.param_names) == lora_names(again)
    assert all(".other." in name for name in EK_again.param_names)
    v = torch.randn(EK.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(EK @ v, EK_again @ v)


def test_several_at_once(stable, tmp_path):
    folder, pipeline = stable
    other = copy.deepcopy(pipeline)
    trained(other.unet, seed=1)
    saved(other, tmp_path / "two")
    network = loaded(folder, f"style={folder / 'lora'}", f"subject={tmp_path / 'two'}")
    names = lora_names(network.objective.model)
    assert network.params == names
    assert {name.split(".")[-2] for name in names} == {"style", "subject"}
    both = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    for name, path in (("style", folder / "lora"), ("subject", tmp_path / "two")):
        both.load_lora_weights(path, adapter_name=name)
    both.set_adapters(["style", "subject"])
    assert_same_prediction(both, network)
    with pytest.raises(ValueError, match="Two adapters are called 'a'"):
        loaded(folder, f"a={folder / 'lora'}", f"a={folder / 'lora'}")


def test_patterns(stable):
    folder, _ = stable
    patterns = ["mid_block*lora_A.default.*", "conv_in.*"]
    network = loaded(folder, folder / "lora", params=patterns)
    names = [name for name, _ in network.objective.model.named_parameters()]
    chosen = {n for n in names if n.startswith("mid_block") and "lora_A" in n}
    assert set(network.params) == {*chosen, "conv_in.weight", "conv_in.bias"}
    told = r"--params 'mid\*lora_C\*' matches no parameter of the UNet"
    with pytest.raises(ValueError, match=told):
        loaded(folder, folder / "lora", params=["conv_in.*", "mid*lora_C*"])


def test_adapters_of_the_text_encoder(stable, tmp_path):
    """Loaded with the others, and covered where patterns ask for them: in one network with it."""
    folder, pipeline = stable
    peft_folder(pipeline.unet, tmp_path / "unet")
    encoder = copy.deepcopy(pipeline.text_encoder)
    wrapped = get_peft_model(encoder, lora(target_modules=["q_proj", "v_proj", "out_proj"]))
    trained(wrapped, seed=3)
    wrapped.save_pretrained(tmp_path / "text_encoder")
    network = loaded(folder, tmp_path, params=["unet.*lora*", "text_encoder.*lora*"])
    assert {name.split(".")[0] for name in network.params} == {"unet", "text_encoder"}
    assert network.params == lora_names(network.objective.model)
    with pytest.warns(UserWarning, match="have weights in text_encoder too, which are left out"):
        network = loaded(folder, tmp_path)
    assert network.params == lora_names(network.objective.model)


def test_precision(stable):
    """A base in bfloat16, adapters as the file has them, of which gradients are."""
    folder, pipeline = stable
    network = loaded(folder, folder / "lora", dtype="bfloat16")
    model = network.objective.model
    assert model.conv_in.weight.dtype == torch.bfloat16
    assert_same_adapters(model, pipeline.unet)
    data = open_images(folder / "train", network.form(None), network.condition)
    regression = NoisedRegression(network.objective, data, 2)
    J = ExampleGradientLinearOperator(regression, network.params)
    assert J.dtype == torch.float32
    rows = example_gradients(regression, params_of(model, network.params))
    assert_close(J.rows().double(), rows, 0.05)  # products of bfloat16, in another order


def test_what_does_not_fit(stable, tmp_path):
    folder, _ = stable
    tensors = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    layer = next(name for name in tensors if "lora" in name).partition(".lora")[0]
    unknown = {k.replace("to_", "to_x"): z + 1 for k, z in tensors.items() if k.startswith(layer)}
    save_file(tensors | unknown, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=r"changed\.safetensors' .*is not of this network"):
        loaded(folder, tmp_path / "changed.safetensors")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base(bits, tmp_path):
    """As bitsandbytes does it; diffusers loads such pipelines on a GPU alone."""
    pipeline = pipelines.made(pipelines.stable_diffusion, tmp_path)
    quantised(pipeline.unet, bits)
    pipeline.unet.add_adapter(lora())
    trained(pipeline.unet)
    names = lora_names(pipeline.unet)
    assert any(
        isinstance(m, getattr(lora_bnb, f"Linear{bits}bit{'Lt' * (bits == 8)}"))
        for m in pipeline.unet.modules()
    )
    objective = DenoisingObjective.from_pipeline(pipeline)
    data = pipelines.data_for(pipelines.stable_diffusion)
    regression = NoisedRegression(objective, data, 2)
    J = ExampleGradientLinearOperator(regression, names)
    rows = example_gradients(regression, params_of(pipeline.unet, names))
    assert_close(J.rows().double(), rows, 1e-3)
    EK = DiffusionEKFACLinearOperator(regression, names, fisher_type="empirical")
    squares = dense_loss_ggn(regression, params_of(pipeline.unet, names)).trace()
    assert_close(EK.trace().double(), squares, 1e-3)


def quantised(model, bits):
    """Put quantised layers in the place of linear ones, as diffusers does before it loads."""
    kinds = {
        8: lambda *size: bnb.nn.Linear8bitLt(*size, has_fp16_weights=False),
        4: lambda *size: bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4"),
    }
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear:
            own = kinds[bits](layer.in_features, layer.out_features, layer.bias is not None)
            own.load_state_dict(layer.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, own.requires_grad_(False).to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
