"""Networks of every kind: no parameter left out, each block against the exact one."""

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
from tests.cases import (
    images,
    plain_regression,
    small_unet,
    tiny_unet,
    two_convolutions,
    unet_regression,
)
from tests.comparisons import assert_close
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


def check_against_autograd(regression, names=None):
    """Gradients of single examples, and every block's trace, or whole if it is dense.

    Of the GGN of the loss, the second moment of the gradients; with one draw for each example.
    """
    model = regression.objective.model
    names = [name for name, _ in model.named_parameters()] if names is None else names
    EK = DiffusionEKFACLinearOperator(regression, names, fisher_type="empirical")
    assert list(EK.param_names) == names  # nothing is left out
    rows = example_gradients(regression, params_of(model, names))
    # diffusers' RMSNorm and rotary embeddings compute in float32 even here
    transformer = type(model).__name__ in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    rtol = 1e-6 if transformer else 1e-9
    assert_close(ExampleGradientLinearOperator(regression, names).rows(), rows, rtol)
    noise = 1e-4 * rtol * rows.square().sum()
    for placed in EK.blocks:
        own = rows[:, columns_of(model, names, placed.params)]
        exact = own.square().sum() / len(rows)
        assert abs(placed.block.trace() - exact) <= rtol * exact + noise, placed.name
        if placed.kind == "dense":
            error = dense_block(placed, model) - own.T @ own / len(rows)
            assert error.norm() <= rtol * exact + noise, placed.name
    return EK


@pytest.mark.parametrize("name", MODELS)
def test_every_network(name):
    regression = problem(name, num_draws=1)
    regression.objective.model.requires_grad_(True)  # for the twin
    check_against_autograd(regression)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "EDM-preconditioned network"])
def test_fitted_inverted_saved_loaded_scored(name, tmp_path):
    """With every loss vector, against dense matrices of the exact GGN, in float64."""
    regression = problem(name)
    model = regression.objective.model.requires_grad_(True)  # for the twin
    passes = PassOptions(tmp_path / "checkpoint")  # EK-FAC takes K-FAC's factors from there
    K = DiffusionKFACLinearOperator(regression, fisher_type="type-2", passes=passes)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2", passes=passes)
    names = [name for name, _ in model.named_parameters()]
    R = ggn_rows(regression, params_of(model))
    assert_close(EK.trace(), R.square().sum(), 1e-9)
    for k, e in zip(K.blocks, EK.blocks, strict=True):
        if k.num_entries > 300:  # a dense block of these takes long
            continue
        R_block = R[:, columns_of(model, names, k.params)]
        exact = R_block.T @ R_block
        errors = [(dense_block(one, model) - exact).norm() for one in (e, k)]
        noise = 1e-12 * R.square().sum()
        assert errors[0] <= errors[1] * (1 + 1e-9) + noise, k.name

    EK.save(tmp_path / "ekfac")
    inverse = load_operator(tmp_path / "ekfac", model).inverse(damping=1e-2)
    v = torch.randn(EK.shape[1], dtype=torch.float64)
    assert_close(inverse @ (EK @ v + 1e-2 * v), v, 1e-9)
    J = ExampleGradientLinearOperator(regression, EK.param_names)
    rows = example_gradients(regression, params_of(model))
    truth = rows @ (EK.inverse(damping=1e-2) @ rows.T) / regression.num_data
    assert_close(influence_scores(J, inverse, J), truth, 1e-9)
    assert_close(DiffusionGGNLinearOperator(regression) @ v, R.T @ (R @ v), 1e-9)


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
    check_against_autograd(NoisedRegression(objective, {"x0": x0, "class_labels": labels}, 1))


# ---------------------------------------------------------------------------------------------
# How networks are run
# ---------------------------------------------------------------------------------------------


def everything(unet):
    """What each operator makes of a problem."""
    regression, params = unet_regression(unet, count=2, num_draws=1), list(unet.parameters())
    EK = DiffusionEKFACLinearOperator(regression, params)
    J, G = (
        kind(regression, params)
        for kind in (ExampleGradientLinearOperator, DiffusionGGNLinearOperator)
    )
    v = torch.ones(EK.shape[1], dtype=EK.dtype)
    return [EK.trace(), EK.blocks[0].block.trace(), J.rows(), G @ v]


@pytest.fixture(scope="module")
def truth():
    """Of the network as it is."""
    return everything(small_unet())


def checkpointed(unet):
    unet.train().enable_gradient_checkpointing()  # it has no dropout, and does so in training only
    return unet


def compiled_in_place(unet):
    unet.compile()
    return unet


FORMS = {
    "checkpointed": checkpointed,
    "compiled": torch.compile,
    "compiled in place": compiled_in_place,
    "channels last": lambda unet: unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_a_network(form, truth):
    unet = FORMS[form](small_unet())
    for result, expected in zip(everything(unet), truth, strict=True):
        assert_close(result, expected, 1e-10)
    if form == "checkpointed":
        calls = []
        unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *args: calls.append(1))
        regression = unet_regression(unet)
        forwards = len(list(regression.batches()))
        DiffusionKFACLinearOperator(regression, ["conv_in.weight", "conv_out.weight"])
        assert len(calls) > 1.5 * forwards  # or nothing was recomputed, and this says nothing


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


# ---------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------


ADAPTERS = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"])


def with_adapters():
    """The regression of a network with adapters that are not zero, and their names."""
    regression = problem("UNet2DConditionModel", num_draws=1)
    unet = regression.objective.model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet.add_adapter(ADAPTERS)
        for name, p in unet.named_parameters():
            if "lora_B" in name:  # zero at first
                p.data.normal_(std=0.1)
    unet.double()
    return regression, [name for name, p in unet.named_parameters() if p.requires_grad]


def test_adapters_on_a_frozen_base():
    """Factors for the adapters alone."""
    regression, adapters = with_adapters()
    model = regression.objective.model
    assert adapters
    assert all("lora_" in name for name in adapters)
    EK = check_against_autograd(regression, adapters)
    assert {placed.kind for placed in EK.blocks} == {"eigenbasis"}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == adapters
