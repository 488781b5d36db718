"""Adapters by the program: every form of file, on every base, their parameters alone."""

import json

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import bnb as lora_bnb
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.models import tiny_conditional_unet
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    influence_scores,
    load_operator,
)
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import FitOptions
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.read_scores import read_scores
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.runtime.adapters import common_names
from curvlinops_diffusion.runtime.digests import fingerprint
from tests.cases import tiny_unet
from tests.cli.cases import write_images
from tests.comparisons import assert_close
from tests.diffusion import test_pipelines as pipelines
from tests.reference import dense_loss_ggn, example_gradients, params_of, to_dense

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COUNT = 3


def config(rank=2, **options):
    return LoraConfig(r=rank, lora_alpha=3, target_modules=TARGETS, **options)


def denoiser_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def trained(model, seed=0):
    """Adapters as after training: both matrices away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(generator=generator)


def images_with_prompts(folder, size=8, beside=()):
    """Images, and perhaps masks or control images of theirs."""
    (folder / "beside").mkdir(parents=True)
    generator, lines = np.random.default_rng(0), []
    for n in range(COUNT):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"i{n}.png")
        lines.append({"file_name": f"i{n}.png", "text": pipelines.PROMPTS[n]})
        for name in beside:
            mode = "L" if name == "mask_image" else "RGB"
            Image.fromarray(pixels[::-1]).convert(mode).save(folder / "beside" / f"i{n}.png")
            lines[-1][f"{name}_file_name"] = f"beside/i{n}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def problem(make, tmp_path):
    """A base and images, written, and the pipeline in memory with a trained adapter."""
    pipeline = pipelines.made(make, tmp_path)
    beside = ["mask_image"] * (make in pipelines.INPAINTING)
    beside += ["conditioning_image"] * (make in pipelines.CONTROLLED)
    images_with_prompts(tmp_path / "train", pipelines.size_of(make), beside)
    model = denoiser_of(pipeline)
    inject_adapter_in_model(config(), model)
    trained(model)
    return pipeline


def lora_names(model):
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def saved(pipeline, folder):
    """By diffusers' training scripts, the scaling in the file's metadata; else by PEFT."""
    model = denoiser_of(pipeline)
    if not hasattr(pipeline, "save_lora_weights"):
        return peft_folder(model, folder)
    model.peft_config = {"default": config()}
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    weights = get_peft_model_state_dict(model)
    if part == "unet":
        weights = convert_state_dict_to_diffusers(weights)
    metadata = _collate_lora_metadata({part: model})
    type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": weights}, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def options(tmp_path, lora, **more):
    return FitOptions(
        pipeline=tmp_path / "pipeline", data=tmp_path, output=tmp_path, lora=lora, **more
    )


def loaded(tmp_path, *lora, **more):
    return load_network(options(tmp_path, [str(word) for word in lora], **more))


def assert_same_adapters(model, expected, dtype=torch.float32):
    """The same values under the same names, whatever the adapters are called."""
    there, here = dict(expected.named_parameters()), dict(model.named_parameters())
    names = common_names(lora_names(expected))
    own = {common: name for name, common in common_names(lora_names(model)).items()}
    assert set(own) == set(names.values())
    for name, common in names.items():
        assert here[own[common]].dtype == dtype
        assert torch.equal(here[own[common]], there[name])


# by the program, which loads it with its own template
BASES = [make for make in pipelines.PROMPTED if make is not pipelines.qwen_image]


@pytest.mark.parametrize("make", BASES, ids=lambda make: make.__name__)
def test_a_lora_from_fit_to_scores(make, tmp_path):
    """The program's scores are those of dense algebra on the adapters' parameters alone."""
    pipeline = problem(make, tmp_path)
    saved(pipeline, tmp_path / "lora")
    words = ["--pipeline", tmp_path / "pipeline", "--lora", tmp_path / "lora"]
    words += ["--data", tmp_path / "train", "--num-draws", 2, "--quiet", "--dtype", "float64"]
    fit = ["fit", *words, "--output", tmp_path / "e.safetensors", "--curvature", "kfac"]
    score = ["score", *words, "--output", tmp_path / "s.safetensors", "--query-draws", 2]
    score += ["--operator", tmp_path / "e.safetensors", "--queries", tmp_path / "train"]
    assert run([str(word) for word in fit]) == 0
    assert run([str(word) for word in [*score, "--damping", 1e-3]]) == 0
    scores, _ = read_scores(tmp_path / "s.safetensors")

    network = loaded(tmp_path, tmp_path / "lora", dtype="float64")
    model = network.objective.model
    names = lora_names(model)
    assert names
    assert network.params == names
    data = open_images(tmp_path / "train", network.form(None), network.condition)
    train, query = (
        NoisedRegression(network.objective, data, 2, seed, antithetic=True) for seed in (0, 1)
    )
    K = load_operator(tmp_path / "e.safetensors", model)
    assert list(K.param_names) == names
    rows, queries = (example_gradients(r, params_of(model, names)) for r in (train, query))
    damped = to_dense(K).double() + 1e-3 * torch.eye(K.shape[0], dtype=torch.float64)
    expected = queries @ torch.linalg.solve(damped, rows.T) / COUNT
    assert_close(scores, expected, 1e-6)


def same_prediction(pipeline, network):
    """Adapters act as in memory: scaling and all."""
    ours = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    theirs = network.objective
    data = pipelines.data_for(pipelines.stable_diffusion)
    batch = next(NoisedRegression(ours, data, 1).batches())
    assert_close(theirs.predict(batch).double(), ours.predict(batch).double(), 1e-5)


def test_forms_of_files(tmp_path):
    pipeline = problem(pipelines.stable_diffusion, tmp_path)
    file = saved(pipeline, tmp_path / "lora")
    unet = pipeline.unet

    kohya = {}
    for name, z in get_peft_model_state_dict(unet).items():
        layer, _, part = name.removesuffix(".weight").rpartition(".lora_")
        key = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{key}.lora_{'down' if part == 'A' else 'up'}.weight"] = z.contiguous()
        kohya[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(kohya, tmp_path / "kohya.safetensors")

    peft = peft_folder(unet, tmp_path / "peft")
    for path in (tmp_path / "lora", file, tmp_path / "kohya.safetensors", peft):
        network = loaded(tmp_path, path)
        assert_same_adapters(network.objective.model, unet)
        same_prediction(pipeline, network)
        assert fingerprint(network.objective.model) == fingerprint(unet)


def peft_folder(model, folder):
    """PEFT's folder of adapters that are in a network already."""
    wrapped = get_peft_model(type(model).from_config(model.config), config())
    inner = dict(wrapped.base_model.model.named_parameters())
    for name in lora_names(model):
        inner[name].data.copy_(model.get_parameter(name))
    wrapped.save_pretrained(folder)
    return folder


def test_other_kinds_of_adapters(tmp_path):
    """Decomposed weights (DoRA) and PEFT's LoHa, in PEFT's folders; rows against autograd."""
    pipelines.made(pipelines.stable_diffusion, tmp_path)
    images_with_prompts(tmp_path / "train")
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline").unet.config
    kinds = {
        "dora": config(use_dora=True),
        "loha": LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    }
    for name, kind in kinds.items():
        wrapped = get_peft_model(UNet2DConditionModel.from_config(base), kind)
        for n, p in wrapped.named_parameters():
            if "magnitude" not in n and (".lora_" in n or ".hada_" in n):
                p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        wrapped.save_pretrained(tmp_path / name)
        network = loaded(tmp_path, tmp_path / name, dtype="float64")
        assert network.params
        data = open_images(tmp_path / "train", network.form(None), network.condition)
        regression = NoisedRegression(network.objective, data, 2)
        rows = example_gradients(regression, params_of(network.objective.model, network.params))
        J = ExampleGradientLinearOperator(regression, network.params)
        assert_close(J.rows(), rows, 1e-8)
        params = params_of(network.objective.model, network.params)
        EK = DiffusionEKFACLinearOperator(regression, network.params, fisher_type="empirical")
        assert_close(EK.trace(), dense_loss_ggn(regression, params).trace(), 1e-8)


def test_a_network_without_pipeline(tmp_path):
    """Adapters of an unconditional network, in PEFT's folder."""
    unet = tiny_unet(torch.float32, num_class_embeds=None)
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    wrapped = get_peft_model(unet, config())
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


def test_several_at_once(tmp_path):
    pipeline = problem(pipelines.stable_diffusion, tmp_path)
    saved(pipeline, tmp_path / "one")
    trained(pipeline.unet, seed=1)
    saved(pipeline, tmp_path / "two")
    network = loaded(tmp_path, f"style={tmp_path / 'one'}", f"subject={tmp_path / 'two'}")
    names = lora_names(network.objective.model)
    assert network.params == names
    assert {name.split(".")[-2] for name in names} == {"style", "subject"}
    both = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    for name, folder in (("style", "one"), ("subject", "two")):
        both.load_lora_weights(tmp_path / folder, adapter_name=name)
    both.set_adapters(["style", "subject"])
    same_prediction(both, network)


def test_patterns(tmp_path):
    pipeline = problem(pipelines.stable_diffusion, tmp_path)
    saved(pipeline, tmp_path / "lora")
    words = ["fit", "--pipeline", tmp_path / "pipeline", "--data", tmp_path / "train", "--quiet"]
    words += ["--num-draws", 1, "--lora", tmp_path / "lora"]
    output = tmp_path / "e.safetensors"
    patterns = ["--params", "mid_block*lora_A.default.*", "conv_in.*"]
    assert run([str(w) for w in [*words, "--output", output, *patterns]]) == 0
    model = loaded(tmp_path, tmp_path / "lora").objective.model
    names = load_operator(output, model).param_names
    assert set(names) == {
        *("conv_in.weight", "conv_in.bias"),
        *(n for n, _ in model.named_parameters() if n.startswith("mid_block") and "lora_A" in n),
    }
    with pytest.raises(
        ValueError, match=r"--params 'mid\*lora_C\*' matches no parameter of the UNet"
    ):
        loaded(tmp_path, tmp_path / "lora", params=["conv_in.*", "mid*lora_C*"])


def test_adapters_of_the_text_encoder(tmp_path, capsys):
    """Loaded with the others, and covered where patterns ask for them: in one network with it."""
    pipeline = problem(pipelines.stable_diffusion, tmp_path)
    peft_folder(pipeline.unet, tmp_path / "lora" / "unet")
    targets = ["q_proj", "v_proj", "out_proj"]
    wrapped = get_peft_model(pipeline.text_encoder, LoraConfig(r=2, target_modules=targets))
    trained(wrapped, seed=3)
    wrapped.save_pretrained(tmp_path / "lora" / "text_encoder")
    words = ["--pipeline", tmp_path / "pipeline", "--lora", tmp_path / "lora"]
    words += ["--data", tmp_path / "train", "--num-draws", 4, "--quiet"]
    fit = ["fit", *words, "--output", tmp_path / "e.safetensors", "--params"]
    fit += ["unet.*lora*", "text_encoder.*lora*"]
    score = ["score", *words, "--output", tmp_path / "s.safetensors", "--query-draws", 4]
    score += ["--operator", tmp_path / "e.safetensors", "--queries", tmp_path / "train"]
    for command in (fit, [*score, "--damping", 1e-3]):
        assert run([str(word) for word in command]) == 0
    header = read_header(tmp_path / "e.safetensors")
    names = [name for name, _ in header["parameters"]]
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    assert all("lora_" in name for name in names)
    scores, _ = read_scores(tmp_path / "s.safetensors")
    assert scores.isfinite().all()
    capsys.readouterr()
    with pytest.warns(UserWarning, match="have weights in text_encoder too, which are left out"):
        network = loaded(tmp_path, tmp_path / "lora")
    assert network.params == lora_names(network.objective.model)


def test_precision(tmp_path):
    """A base in bfloat16, adapters as the file has them; scores still those of dense algebra."""
    pipeline = problem(pipelines.stable_diffusion, tmp_path)
    saved(pipeline, tmp_path / "lora")
    network = loaded(tmp_path, tmp_path / "lora", dtype="bfloat16")
    model = network.objective.model
    assert model.conv_in.weight.dtype == torch.bfloat16
    assert_same_adapters(model, pipeline.unet)
    data = open_images(tmp_path / "train", network.form(None), network.condition)
    regression = NoisedRegression(network.objective, data, 2)
    J = ExampleGradientLinearOperator(regression, network.params)
    assert J.dtype == torch.float32
    rows = example_gradients(regression, params_of(model, network.params))
    assert_close(J.rows().double(), rows, 0.05)  # products of bfloat16, in another order
    EK = DiffusionEKFACLinearOperator(regression, network.params)
    assert influence_scores(J, EK.inverse(1e-3), J).isfinite().all()


def test_what_does_not_fit(tmp_path):
    pipeline = problem(pipelines.stable_diffusion, tmp_path)
    file = saved(pipeline, tmp_path / "lora")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    some = next(name for name in tensors if "lora_A" in name or "lora.down" in name)
    path = tmp_path / "changed.safetensors"

    def write(changed):
        save_file(changed, path, metadata=metadata)
        return path

    layer = some.partition(".lora")[0]
    pair = {k: z for k, z in tensors.items() if k.startswith(layer)}
    unknown = {k.replace("to_", "to_x"): z + 1 for k, z in pair.items()}
    for changed, told in (
        (tensors | unknown, "is not of this network"),
        ({k: z for k, z in tensors.items() if k != some}, f"lacks '{some}'"),
    ):
        with pytest.raises(ValueError, match=rf"changed\.safetensors' .*{told}"):
            loaded(tmp_path, write(changed))
    other = tiny_conditional_unet(cross_attention_dim=12)
    other.add_adapter(config())
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(other))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "other", weights)
    with pytest.raises(ValueError, match="other' is not of this network: "):
        loaded(tmp_path, tmp_path / "other")
    with pytest.raises(ValueError, match=r"nothing' does not exist. Pass the file or folder of an"):
        loaded(tmp_path, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="should hold the weights of one adapter, and holds none"):
        loaded(tmp_path, tmp_path / "empty")
    torch.save(tensors, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"lora.bin' is no .safetensors file"):
        loaded(tmp_path, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="Two adapters are called 'a'"):
        loaded(tmp_path, f"a={file}", f"a={file}")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base(bits, tmp_path):
    """As bitsandbytes does it; diffusers loads such pipelines on a GPU alone."""
    pipeline = pipelines.made(pipelines.stable_diffusion, tmp_path)
    quantised(pipeline.unet, bits)
    pipeline.unet.add_adapter(config())
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
    draws = NoisedRegression(objective, data, 2)
    squares = dense_loss_ggn(draws, params_of(pipeline.unet, names)).trace()
    assert_close(EK.trace().double(), squares, 1e-3)
    EK.save(tmp_path / "e.safetensors")
    again = load_operator(tmp_path / "e.safetensors", pipeline.unet)
    assert torch.equal(again.eigenvalues(), EK.eigenvalues())


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
