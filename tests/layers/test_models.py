"""Networks of every kind: no parameter left out, each block against the exact one."""

import copy

import peft
import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn.utils import parametrizations

from benchmarks.models import MODELS, problem
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    influence_scores,
    load_operator,
)
from tests.cases import images, plain_regression, tiny_unet, two_convolutions, unet_regression
from tests.comparisons import assert_close, relative_error
from tests.reference import (
    dense_block,
    dense_ggn,
    example_gradients,
    ggn_rows,
    params_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def columns_of(model, all_names, names):
    """Where some parameters lie within the flattened whole."""
    own, index, start = dict(model.named_parameters()), {}, 0
    for name in all_names:
        index[name] = torch.arange(start, start + own[name].numel())
        start += own[name].numel()
    return torch.cat([index[name] for name in names])


@pytest.mark.parametrize("name", MODELS)
def test_fitted_inverted_saved_loaded_scored(name, tmp_path):
    """With every loss vector, against dense matrices of the exact GGN, in float64."""
    regression = problem(name)
    model = regression.objective.model.requires_grad_(True)  # for the twin
    passes = PassOptions(tmp_path / "checkpoint")  # EK-FAC takes K-FAC's factors from there
    K = DiffusionKFACLinearOperator(regression, fisher_type="type-2", passes=passes)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2", passes=passes)
    names = [name for name, _ in model.named_parameters()]
    assert list(EK.param_names) == list(K.param_names) == names  # nothing is left out
    R = ggn_rows(regression, params_of(model))

    # diffusers' RMSNorm and rotary embeddings compute in float32 even here
    rtol = 1e-6 if name.startswith(("SD3", "Flux")) else 1e-9
    total = R.square().sum()
    assert_close(EK.trace(), total, rtol)
    for k, e in zip(K.blocks, EK.blocks, strict=True):
        if k.num_entries > 600:  # a dense block of these takes long
            continue
        R_block = R[:, columns_of(model, names, k.params)]
        exact = R_block.T @ R_block
        dense_k, dense_e = dense_block(k, model), dense_block(e, model)
        noise = 1e-4 * rtol * total
        assert abs(dense_e.trace() - exact.trace()) <= rtol * exact.trace() + noise, k.name
        assert (dense_e - exact).norm() <= (dense_k - exact).norm() * (1 + rtol) + noise, k.name
        if k.kind == "dense":
            assert (dense_k - exact).norm() <= rtol * exact.norm() + noise, k.name

    EK.save(tmp_path / "ekfac")
    loaded = load_operator(tmp_path / "ekfac", model)
    v = torch.randn(EK.shape[1], dtype=torch.float64)
    inverse = loaded.inverse(damping=1e-2)
    assert_close(inverse @ (EK @ v + 1e-2 * v), v, 1e-9)

    J = ExampleGradientLinearOperator(regression, EK.param_names)
    rows = example_gradients(regression, params_of(model))
    assert_close(J.rows(), rows, rtol)
    truth = rows @ (EK.inverse(damping=1e-2) @ rows.T) / regression.num_data
    assert_close(influence_scores(J, inverse, J), truth, rtol)
    G = DiffusionGGNLinearOperator(regression)
    assert_close(G @ v, R.T @ (R @ v), rtol)


# ---------------------------------------------------------------------------------------------
# Every block type of UNet2DModel
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("ResnetDownsample", "ResnetUpsample"),
        ("SkipDown", "SkipUp"),
        ("AttnSkipDown", "AttnSkipUp"),
        ("DownEncoder", "UpDecoder"),
        ("AttnDownEncoder", "AttnUpDecoder"),
        ("KDown", "KUp"),
        ("AttnDown", "AttnUp"),
    ],
)
def test_block_types_of_the_unet(down, up):
    """Those that run in ``UNet2DModel`` at all."""
    channels = 32 if "Skip" in down or "K" in down else 4  # these have a fixed number of groups
    x0, labels = images(1, channels=3), torch.tensor([1])
    try:
        unet = tiny_unet(
            down_block_types=(f"{down}Block2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", f"{up}Block2D"),
            block_out_channels=(channels, channels),
            norm_num_groups=min(channels, 4),
            in_channels=3,
            out_channels=3,
        )
        unet(x0, 5, class_labels=labels)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        pytest.skip(f"does not run: {error}")
    objective = DenoisingObjective(unet, DDPMScheduler(num_train_timesteps=100))
    regression = NoisedRegression(objective, {"x0": x0, "class_labels": labels}, 1)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="empirical")
    assert EK.shape[0] == sum(p.numel() for p in unet.parameters())
    rows = example_gradients(regression, params_of(unet))
    assert_close(ExampleGradientLinearOperator(regression).rows(), rows, 1e-10)
    assert_close(EK.trace(), rows.square().sum(), 1e-9)


# ---------------------------------------------------------------------------------------------
# How networks are run
# ---------------------------------------------------------------------------------------------


def everything(regression, params=None):
    """What each operator makes of a problem."""
    K = DiffusionKFACLinearOperator(regression, params)
    EK = DiffusionEKFACLinearOperator(regression, params)
    J = ExampleGradientLinearOperator(regression, params)
    G = DiffusionGGNLinearOperator(regression, params)
    v = torch.randn(K.shape[1], generator=torch.Generator().manual_seed(0)).to(K.dtype)
    return [K @ v, EK.trace(), J.rows(), G @ v]


@pytest.fixture(scope="module")
def truth():
    """Of the network as it is."""
    return everything(unet_regression(tiny_unet()))


def test_gradient_checkpointing(truth):
    unet = tiny_unet().train()  # it has no dropout, and checkpoints in training mode only
    unet.enable_gradient_checkpointing()
    calls = []
    unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *args: calls.append(1))
    regression = unet_regression(unet)
    for result, expected in zip(everything(regression), truth, strict=True):
        assert_close(result, expected, 1e-10)
    assert unet.down_blocks[0].gradient_checkpointing
    calls.clear()
    forwards = len(list(regression.batches()))
    DiffusionKFACLinearOperator(regression, ["conv_in.weight", "conv_out.weight"])
    assert len(calls) > 1.5 * forwards  # or nothing was recomputed, and this test says nothing


def compiled_in_place(unet):
    unet.compile()
    return unet


@pytest.mark.parametrize(
    "changed",
    [
        torch.compile,
        compiled_in_place,
        lambda unet: unet.to(memory_format=torch.channels_last),
    ],
    ids=["compiled", "compiled in place", "channels last"],
)
def test_other_forms_of_a_network(changed, truth):
    unet = changed(tiny_unet())
    for result, expected in zip(
        everything(unet_regression(unet), list(unet.parameters())), truth, strict=True
    ):
        assert_close(result, expected, 1e-10)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrisations(wrap):
    """What a parametrisation holds is in no layer: its blocks are exact."""
    model = two_convolutions()
    wrap(model.layers[0])
    model.eval()
    regression = plain_regression(model, (1, 3, 3), count=2, num_draws=2)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    names = [name for name, _ in model.named_parameters()]
    assert list(EK.param_names) == names
    G = dense_ggn(regression, params_of(model))
    assert_close(EK.trace(), G.trace(), 1e-9)
    for placed in EK.blocks:
        if "parametrizations" in placed.name:
            index = columns_of(model, names, placed.params)
            assert placed.kind == "dense"
            assert_close(placed.block.matrix, G[index][:, index], 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
@pytest.mark.parametrize("name", ["EDM-preconditioned network", "DiTTransformer2DModel"])
def test_precision(name, dtype, tolerance):
    """Against the float64 network with the same (rounded) weights and draws."""
    low = problem(name, dtype)
    high = problem(name)
    high.objective.model.load_state_dict(low.objective.model.state_dict())
    K, twin = (DiffusionKFACLinearOperator(r) for r in (low, high))
    assert K.dtype == torch.float32
    v = torch.randn(K.shape[1], generator=torch.Generator().manual_seed(0))
    assert relative_error(K @ v, twin @ v.double()) < tolerance
    EK, twin = (DiffusionEKFACLinearOperator(r) for r in (low, high))
    assert relative_error(EK.trace(), twin.trace()) < tolerance


def test_label_dropout_in_train_mode_is_refused():
    regression = problem("DiTTransformer2DModel")
    regression.objective.model.train()
    with pytest.raises(ValueError, match=r"class_embedder.*is in train mode.*Call model.eval\(\)"):
        DiffusionKFACLinearOperator(regression)


# ---------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------


ADAPTERS = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"])


def with_adapters():
    """The regression of a network with adapters that are not zero, and their names."""
    objective = problem("UNet2DConditionModel").objective
    unet = copy.deepcopy(objective.model).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet.add_adapter(ADAPTERS)
        for name, p in unet.named_parameters():
            if "lora_B" in name:  # zero at first
                p.data.normal_(std=0.1)
    names = [name for name, p in unet.named_parameters() if p.requires_grad]
    return on_noise(unet.double(), objective.process), names


def on_noise(unet, process):
    generator = torch.Generator().manual_seed(1)
    data = {
        "x0": torch.randn(3, 2, 4, 4, generator=generator).double(),
        "encoder_hidden_states": torch.randn(3, 3, 4, generator=generator).double(),
    }
    return NoisedRegression(DenoisingObjective(unet, process), data, 2)


def test_a_model_that_peft_wrapped():
    """Names are the network's own, and numbers those of the adapters within it."""
    inside, adapters = with_adapters()
    base = copy.deepcopy(problem("UNet2DConditionModel").objective.model).requires_grad_(False)
    wrapped = peft.get_peft_model(base, ADAPTERS).double()
    wrapped.get_base_model().load_state_dict(inside.objective.model.state_dict())
    regression = on_noise(wrapped, inside.objective.process)
    assert regression.objective.model is wrapped.get_base_model()
    found, expected = (
        ExampleGradientLinearOperator(r, adapters).rows() for r in (regression, inside)
    )
    assert_close(found, expected, 1e-12)
    assert list(DiffusionKFACLinearOperator(regression, adapters).param_names) == adapters


def test_adapters_on_a_frozen_base():
    """Factors for the adapters alone, and the exact GGN's trace for them."""
    regression, adapters = with_adapters()
    params = params_of(regression.objective.model, adapters)
    assert adapters
    assert all("lora_" in name for name in adapters)
    EK = DiffusionEKFACLinearOperator(regression, adapters, fisher_type="type-2")
    assert list(EK.param_names) == adapters
    assert {placed.kind for placed in EK.blocks} == {"eigenbasis"}
    R = ggn_rows(regression, params)
    assert_close(EK.trace(), R.square().sum(), 1e-9)
    rows = example_gradients(regression, params)
    assert_close(ExampleGradientLinearOperator(regression, adapters).rows(), rows, 1e-10)
    trained = [name for name, p in regression.objective.model.named_parameters() if p.requires_grad]
    assert trained == adapters
