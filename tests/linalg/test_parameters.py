"""Parameters by the names that wrappers give them: the model's own, or refused."""

import peft
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.linalg.parameters import select_parameters
from tests.cases import images, noise_levels

CHOSEN = ["blocks.0.weight", "blocks.1.bias"]


class Network(nn.Module):
    """Takes the time first, which only its own signature says."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Conv2d(1, 2, 1)
        self.blocks = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)])

    def forward(self, t, x):
        return self.blocks[1](torch.tanh(self.blocks[0](self.inward(x))))


class Handing(nn.Module):
    """Hands its arguments on."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Scaling(nn.Module):
    """Has a parameter of its own."""

    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return self.scale * self.model(t, x)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().double().eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_within():
    model = network()
    model.blocks[0] = compiled(model.blocks[0])
    return model


def rows(model, params):
    objective = DenoisingObjective(model, noise_levels())
    regression = NoisedRegression(objective, images(3, size=3), 2)
    DiffusionKFACLinearOperator(regression, params)
    return ExampleGradientLinearOperator(regression, params).rows()


# made of a network, and what comes before its names
WRAPPED = {
    "compiled": (lambda: compiled(network()), "_orig_mod."),
    "parallel": (lambda: nn.DataParallel(network()), "module."),
    "averaged": (lambda: AveragedModel(network()), "module."),
    "handed to": (lambda: Handing(network()), "model."),
    "scaled": (lambda: Scaling(network()).double(), "model."),
    "scaled and compiled": (lambda: Scaling(compiled(network())).double(), "model._orig_mod."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers(wrapper):
    """As names, in a mapping and as tensors: by the wrapper's names and by the network's."""
    make, prefix = WRAPPED[wrapper]
    expected = rows(network(), CHOSEN)
    model = make()
    own = dict(model.named_parameters())
    assert prefix + CHOSEN[0] in own
    given = {prefix + name: own[prefix + name] for name in CHOSEN}
    plain = dict(zip(CHOSEN, given.values(), strict=True))
    for params in (list(given), given, CHOSEN, plain, list(given.values())):
        assert torch.equal(rows(model, params), expected)


def test_names_of_what_is_compiled_within():
    expected = rows(network(), CHOSEN)
    model = compiled_within()
    inner = ["blocks.0._orig_mod.weight", "blocks.1.bias"]
    assert inner[0] in dict(model.named_parameters())
    for params in (inner, CHOSEN):
        assert torch.equal(rows(model, params), expected)
        assert list(select_parameters(model, params)) == inner
    # the other way round: saved from a compiled one
    assert torch.equal(rows(network(), inner), expected)


def test_names_of_adapted_networks():
    config = peft.LoraConfig(r=1, target_modules=["inward", "blocks.0"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(network(), config).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = [name.removeprefix("base_model.model.") for name in trained]
    expected = rows(model, own)
    for params in (list(trained), trained, list(trained.values())):
        assert torch.equal(rows(model, params), expected)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bias = nn.Linear(2, 2), nn.Linear(2, 2), nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["weight"], r"'weight', which the model does not have.* \['a.weight', 'b.weight'\]"),
        (["weight", "bias"], r"'weight', which the model does not have"),
        (["a.weight", "weight"], "names 'weight', which the model does not have"),
        (["other.a.weight"], "names 'other.a.weight', which the model does not have"),
        (["eight"], "names 'eight', which the model does not have"),
        ({"a.weight": nn.Parameter(torch.ones(2, 2))}, r"\['a.weight'\] is not the model's own"),
        ({"module.a.weight": nn.Parameter(torch.ones(2, 2))}, "is not the model's own"),
        (["a.weight", "module.a.weight"], r"lists \['a.weight'\] more than once"),
    ],
)
def test_names_that_are_not_clear(params, message):
    with pytest.raises(ValueError, match=message):
        select_parameters(Two(), params)


@pytest.mark.parametrize("name", ["0.weight", "weight", "enc.weight", "weigh"])
def test_the_end_of_a_name(name):
    """Only what holds all other parameters is wrapped: one part of several is none."""
    part = nn.Sequential(nn.Conv2d(1, 1, 1))
    whole = nn.ModuleDict({"enc": part, "out": nn.GroupNorm(1, 1, affine=False)})
    assert list(select_parameters(whole, ["0.weight"])) == ["enc.0.weight"]
    whole["out"] = nn.ConvTranspose2d(1, 1, 1)
    with pytest.raises(ValueError, match=f"'{name}', which the model does not have"):
        select_parameters(whole, [name])


def test_names_within_several_wrappers():
    inner = nn.Module()
    inner.weight, inner.a = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"may be any of \['b.weight', 'b.a.weight'\]"):
        select_parameters(nn.ModuleDict({"b": inner}), ["weight"])


def test_a_mapping_of_another_parameter():
    model = Two()
    with pytest.raises(ValueError, match=r"params\['a.weight'\] is not the model's own"):
        select_parameters(model, {"a.weight": model.b.weight})
