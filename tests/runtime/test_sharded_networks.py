"""Networks divided by ``fully_shard`` (FSDP2), on gloo: the same numbers as of whole ones."""

import copy
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    PassOptions,
    StoredScores,
    influence_scores,
    load_operator,
    regression_scores,
    split_half_scores,
    top_influences,
)
from tests.cases import small_unet, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.runtime.test_processes import assert_all_close, processes

COUNT = 5
#: Of every kind of layer one or two, in several blocks: each is gathered when it is tried out.
LAYERS = [
    *("conv_in.weight", "class_embedding.weight", "down_blocks.0.resnets.0.norm1.bias"),
    *("mid_block.attentions.0.to_q.weight", "mid_block.attentions.0.to_q.bias"),
    *("up_blocks.0.resnets.1.conv1.weight", "conv_out.bias"),
]

DISTRIBUTED = {"distributed": True}
SHARDED = {"distributed": True, "sharded": True}


def divided(unet, **options):
    """Its blocks apart, the rest with the whole."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for block in blocks:
        if block is not None:
            fully_shard(block, **options)
    return fully_shard(unet, **options)


def everything(regression, passes):
    """What is made of a network's curvature and gradients, as tensors by name."""
    EK = DiffusionEKFACLinearOperator(regression, LAYERS, passes=passes)
    J, inverse = ExampleGradientLinearOperator(regression, LAYERS), EK.inverse(1e-3)
    vectors = torch.randn(J.shape[1], 2, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.randn(J.shape[0], 2, generator=torch.Generator().manual_seed(1)).double()
    halves = split_half_scores(J, inverse, J, query_block=3, passes=passes)
    return {
        "operator": EK @ vectors,
        "J @ V": J @ vectors,
        "J.T @ W": J.adjoint() @ weights,
        "values": J.values(),
        "scores": halves.scores,
        "first half": halves.first,
        "top": top_influences(J, inverse, J, k=2, passes=passes).positive.scores,
        "regression": regression_scores(J, inverse, J, passes=passes),
    }


def reduced(regression, passes):
    """K-FAC of another kind, of which nothing is streamed."""
    options = {"kfac_approx": "reduce", "fisher_type": "empirical"}
    K = DiffusionKFACLinearOperator(regression, LAYERS, **options, passes=passes)
    return {"reduced": K @ torch.ones(K.shape[0]).double(), "trace": K.trace()}


def problem(unet):
    return unet_regression(unet, count=COUNT, num_draws=4, antithetic=True)


def all_of_it(rank, options):
    passes = PassOptions(**options)
    unet = divided(small_unet())
    regression = problem(unet)
    found = {**everything(regression, passes), **reduced(regression, passes)}
    assert all(isinstance(p, DTensor) for p in unet.parameters())
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())
    return found


def tried_out_again(rank):
    """How often the network runs for an operator: the first, another, and after a change."""
    unet, calls = divided(small_unet()), []
    unet.register_forward_pre_hook(lambda *args: calls.append(1))
    regression, counts = problem(unet), []
    for change in (lambda: None, lambda: None, lambda: next(unet.parameters()).data.mul_(1.01)):
        with torch.no_grad():
            change()
        calls.clear()
        DiffusionKFACLinearOperator(regression, LAYERS, passes=PassOptions(distributed=True))
        counts.append(len(calls))
    return counts


@pytest.fixture(scope="module")
def expected():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regression = problem(small_unet())
        return {**everything(regression, PassOptions()), **reduced(regression, PassOptions())}


def test_as_a_whole_network(tmp_path, expected):
    """Five examples in batches of two: each process has one of two, and both the last."""
    for found in processes(2, tmp_path / "run", all_of_it, DISTRIBUTED):
        assert_all_close(found, expected)


def with_shards(rank, folder):
    """A network and its factors, both divided; saved, and opened for a network that is whole."""
    unet = divided(small_unet())
    regression = problem(unet)
    EK = DiffusionEKFACLinearOperator(regression, LAYERS, passes=PassOptions(**SHARDED))
    EK.save(folder / "ekfac.safetensors")
    J = ExampleGradientLinearOperator(regression, LAYERS)
    stored = StoredScores.create(
        folder / "scores.safetensors",
        J,
        EK.inverse(1e-3),
        J,
        query_block=5,
        passes=PassOptions(**DISTRIBUTED),
    )
    opened = load_operator(folder / "ekfac.safetensors", unet, passes=PassOptions(**SHARDED))
    column = torch.ones(EK.shape[0]).double()
    return {"scores": stored.whole(), "trace": EK.trace(), "product": opened @ column}


def test_with_shards_of_the_factors(tmp_path):
    results = processes(3, tmp_path / "run", with_shards, tmp_path)
    unet = small_unet()
    regression = problem(unet)
    EK = DiffusionEKFACLinearOperator(regression, LAYERS)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    expected = {
        "scores": influence_scores(J, EK.inverse(1e-3), J),
        "trace": EK.trace(),
        "product": EK @ torch.ones(EK.shape[0]).double(),
    }
    for found in results:
        assert_all_close(found, expected)
    assert_close(load_operator(tmp_path / "ekfac.safetensors", unet).trace(), EK.trace(), 1e-10)


def full_tensor(rank):
    """The largest share of the parameters that is whole at once, as layers run."""
    unet = divided(tiny_unet(), reshard_after_forward=True)
    total = sum(p.numel() for p in unet.parameters())
    largest = []

    def look(*args):
        own = [p for p in unet.parameters() if not isinstance(p, DTensor)]
        largest.append(sum(p.numel() for p in own) / total)

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)
    regression = problem(unet)
    passes = PassOptions(**DISTRIBUTED)
    K_inv = DiffusionKFACLinearOperator(regression, LAYERS, passes=passes).inverse(1e-3)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    influence_scores(J, K_inv, J, passes=passes)
    return max(largest)


def adapted(unet):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(unet, config).eval()
    return model.to(torch.float64)


def of_adapters(regression, passes):
    names = [n for n, _ in regression.objective.model.named_parameters() if "lora" in n]
    EK = DiffusionEKFACLinearOperator(regression, names, passes=passes)
    J = ExampleGradientLinearOperator(regression, names)
    return {"scores": influence_scores(J, EK.inverse(1e-3), J, passes=passes)}


def of_one_example(passes):
    """Fewer examples than processes: all do them."""
    regression = unet_regression(divided(small_unet()), count=1)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    inverse = DiffusionKFACLinearOperator(regression, LAYERS, passes=passes).inverse(1e-3)
    return {"rows": J.rows(), "scores": influence_scores(J, inverse, J, passes=passes)}


def networks(rank):
    """Results of several networks and ways to divide them."""
    passes = PassOptions(**DISTRIBUTED)
    recomputing = small_unet()
    recomputing.enable_gradient_checkpointing()
    offloaded = divided(small_unet(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    lora = adapted(small_unet())
    divided(lora.base_model.model)
    return {
        "on its own": reduced(problem(divided(small_unet())), PassOptions()),
        "offloaded": reduced(problem(offloaded), passes),
        "with gradient checkpoints": reduced(problem(divided(recomputing)), passes),
        "lora": of_adapters(problem(lora), passes),
        "one example": of_one_example(passes),
        "largest share": full_tensor(rank),
        "calls": tried_out_again(rank),
    }


def test_networks(tmp_path, expected):
    """Never are all parameters whole at once; a network is tried out again after a change."""
    results = processes(2, tmp_path / "run", networks)
    lora = of_adapters(problem(adapted(small_unet())), PassOptions())
    for found in results:
        for name in ("on its own", "offloaded", "with gradient checkpoints"):
            assert_all_close(found[name], {key: expected[key] for key in found[name]})
        assert_all_close(found["lora"], lora)
        assert_all_close(found["one example"], results[0]["one example"])
        assert 0 < found["largest share"] < 0.5
        first, again, changed = found["calls"]
        assert again < first == changed
    assert float(results[0]["one example"]["scores"]) > 0


def stopped(rank, checkpoint, fail_at):
    unet = divided(small_unet())
    regression = problem(unet)
    rows_of = ExampleGradientLinearOperator.rows_of
    calls = []

    def counted(J, clean):
        calls.append(1)
        if rank == 0 and len(calls) == fail_at:
            raise ValueError("stopped here")
        return rows_of(J, clean)

    passes = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
    ExampleGradientLinearOperator.rows_of = counted
    try:
        K_inv = DiffusionKFACLinearOperator(regression, LAYERS, passes=passes).inverse(1e-3)
        J = ExampleGradientLinearOperator(regression, LAYERS)
        return {"scores": influence_scores(J, K_inv, J, passes=passes)}
    finally:
        ExampleGradientLinearOperator.rows_of = rows_of


def test_stopped_and_gone_on(tmp_path):
    told = processes(2, tmp_path / "first", stopped, tmp_path / "checkpoint", 5)
    assert told[0] == "stopped here"
    assert "Another process has stopped" in told[1]
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "again")
    regression = problem(small_unet())
    K_inv = DiffusionKFACLinearOperator(regression, LAYERS).inverse(1e-3)
    J = ExampleGradientLinearOperator(regression, LAYERS)
    expected = {"scores": influence_scores(J, K_inv, J)}
    for found in processes(3, tmp_path / "on", stopped, tmp_path / "again", None):
        assert_all_close(found, expected)


def refused(rank, folder):
    regression = problem(divided(small_unet()))
    J = ExampleGradientLinearOperator(regression, LAYERS)
    K = DiffusionKFACLinearOperator(regression, LAYERS)
    attempts = {
        "GGN": lambda: DiffusionGGNLinearOperator(regression),
        "store": lambda: GradientStore.create(folder, J, K, 1e-3),
        "memory": lambda: DiffusionKFACLinearOperator(
            regression, passes=PassOptions(max_memory=1, **SHARDED)
        ),
        "tensor parallel": parallel,
    }
    told = {}
    for name, attempt in attempts.items():
        with pytest.raises(ValueError, match="divided among processes") as raised:
            attempt()
        told[name] = str(raised.value)
    return told


def parallel():
    unet = small_unet()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(unet, mesh, {"time_embedding.linear_1": ColwiseParallel()})
    objective = unet_regression(small_unet()).objective
    return DenoisingObjective(unet, copy.copy(objective.process))


def test_refused(tmp_path):
    told = processes(2, tmp_path / "run", refused, tmp_path / "folder")[0]
    assert isinstance(told, dict), told
    assert told["GGN"].startswith("A product with the exact GGN needs every parameter at once")
    assert "or take influence_scores" in told["store"]
    assert "Leave it out, or start more of them" in told["memory"]
    assert "tensor parallelism" in told["tensor parallel"]
