"""Digests tell apart what is not the same, and are alike in every process and version of Python."""

import copy
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionKFACLinearOperator,
    NoisedRegression,
    PassOptions,
    load_operator,
)
from curvlinops_diffusion.influence.measurements.losses import (
    ELBO,
    SimplifiedELBO,
    WeightedLoss,
    loss,
)
from curvlinops_diffusion.runtime.checkpoints import OtherCheckpointError
from curvlinops_diffusion.runtime.digests import Named, digest_of, fingerprint, name_of
from tests.cases import TimeBlind, noise_levels


def scaled(factor):
    def measured(batch, prediction_BD):
        return factor * prediction_BD.sum(1)

    return measured


@dataclass(frozen=True)
class Measured:
    function: Any


class Callable:
    """An object of somebody's own, with a memory that is no setting."""

    def __init__(self, setting):
        self._setting, self.memory = setting, {}

    def __call__(self, batch, prediction_BD):
        self.memory[len(self.memory)] = batch
        return prediction_BD.sum(1)


def keyed(key):
    """A function that is known by its name and a key, whatever its code."""
    function = scaled(1)
    function.key = key
    return function


def recursive():
    def inner(n):
        return inner(n - 1) if n else 0

    return inner


DIFFERENT = {
    "enclosed values": (scaled(1.0), scaled(2.0)),
    "enclosed tensors": (scaled(torch.zeros(2)), scaled(torch.ones(2))),
    "names": (scaled, recursive),
    "places of lambdas": (lambda x: x + 1, lambda x: x + 2),
    "keys": (keyed("1"), keyed("2")),
    "defaults": (lambda x, a=1: x, lambda x, a=2: x),
    "partial": (partial(scaled, 1), partial(scaled, 2)),
    "weighting": (WeightedLoss(torch.zeros(2000)), WeightedLoss(torch.arange(2000) == 1000)),
    "fields": (ELBO("small"), ELBO("large")),
    "types": (SimplifiedELBO(), ELBO()),
    "dtype": (torch.zeros(2), torch.zeros(2).double()),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "module": (nn.Linear(1, 1), nn.Linear(1, 1)),
    "nested": ({"a": [1, {"b": scaled(1)}]}, {"a": [1, {"b": scaled(2)}]}),
    "sets": ({1, 2}, {1, 3}),
    "objects' numbers": (Callable(1.0), Callable(2.0)),
    "objects' tensors": (Callable(torch.zeros(2)), Callable(torch.ones(2))),
    "objects' networks": (Callable(nn.Linear(1, 1)), Callable(nn.Linear(1, 1))),
    "methods": (Callable(1.0).__call__, Callable(2.0).__call__),
    "functions in dataclasses": (Measured(scaled(1)), Measured(scaled(2))),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different(kind):
    one, other = DIFFERENT[kind]
    assert digest_of(one) == digest_of(one)
    assert digest_of(one) != digest_of(other)
    assert name_of(one) != name_of(other)


def test_the_text_of_a_function(tmp_path):
    """One of another body is another one, unless a key stands for it."""
    digests = {}
    for body in ("2 * x", "3 * x"):
        path = tmp_path / f"{body[0]}.py"
        path.write_text(f"def measured(x):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location("measurements_of_mine", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        plain = name_of(module.measured)
        module.measured.key = "1"
        digests[body] = plain, name_of(module.measured)
    assert digests["2 * x"][0] != digests["3 * x"][0]
    assert digests["2 * x"][1] == digests["3 * x"][1]


def test_alike():
    assert name_of(scaled(1.0)) == name_of(scaled(1.0))
    assert name_of(recursive()) == name_of(recursive())  # a function that encloses itself
    assert name_of("loss") == "loss"
    one, other = Callable(1.0), Callable(1.0)
    one(torch.zeros(2), torch.zeros(2, 2))
    assert name_of(one) == name_of(other)
    assert digest_of("ab", "c") != digest_of("a", "bc")


def test_a_name_that_no_version_of_python_changes():
    """Bytecode is another in each: a checkpoint must outlive an update."""
    assert name_of(scaled(1.0)) == "scaled.<locals>.measured:9fcc7d33a4983e0c"


def test_in_another_process():
    program = (
        "from tests.runtime.test_digests import scaled, loss, name_of;"
        "print(name_of(scaled(1.0)), name_of(loss))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert found.split() == [name_of(scaled(1.0)), name_of(loss)]


CHANGES = {
    "in place": lambda p: p.detach().mul_(2),
    "by .data": lambda p: p.data[0, 0].add_(1),
    "order of rows": lambda p: p.data.copy_(p.data.clone().flipud()),
    "sign of a zero": lambda p: p.data.view(-1)[7].neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_weights(change):
    """However they are made; what is moved in memory has not changed."""
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(2))
    network[0].weight.data.view(-1)[7] = 0
    one = fingerprint(network)
    network[0].weight.data = network[0].weight.data.clone()
    assert fingerprint(network) == one == fingerprint(copy.deepcopy(network))
    CHANGES[change](network[0].weight)
    other = fingerprint(network)
    assert {key for key in one if one[key] != other[key]} == {"weights"}


def test_weights_of_any_kind_are_marked():
    network = nn.Module()
    odd = torch.zeros(4099, dtype=torch.uint8)
    network.register_buffer("bytes", odd[3:])  # words that begin in the middle of others
    network.register_buffer("flags", torch.zeros(9, dtype=torch.bool))
    network.register_buffer("complex", torch.zeros(3, dtype=torch.complex64))
    network.register_buffer("none", torch.zeros(0))
    network.register_buffer("scalar", torch.zeros(()))
    network.register_buffer("strided", torch.zeros(1100, 1100).t())
    with torch.inference_mode():
        network.register_buffer("inference", torch.zeros(3))
    before = fingerprint(network)
    odd[-1] = 1
    assert fingerprint(network)["weights"] != before["weights"]


def counting():
    calls, seen = 0, []

    def measured(batch):
        nonlocal calls
        calls += 1
        seen.append(batch)

    return measured


class Counting:
    def __init__(self):
        self.calls, self.table = 0, None

    def __call__(self, batch):
        self.calls += 1
        self.table = torch.ones(self.calls)


@pytest.mark.parametrize("make", [counting, Counting])
def test_names_of_functions_that_remember(make):
    function = make()
    name = Named(function)
    assert str(name) == name_of(function)
    before = str(name)
    function(0)
    assert str(name) == before == str(Named(make()))
    assert name_of(function) != before


def test_names_follow_the_networks_within():
    """In place, as by another of the same weights; whatever it is that holds them."""
    network = nn.Linear(2, 2)
    holders = [Callable(network), partial(scaled, network), scaled(network), network.forward]
    names = [Named(holder) for holder in holders]
    before = [str(name) for name in names]
    assert before == [str(Named(holder)) for holder in holders]
    network.weight.data.mul_(2)
    after = [str(name) for name in names]
    assert not set(before) & set(after)
    assert after == [str(Named(holder)) for holder in holders]


def network(groups=2, act=nn.SiLU, padding="zeros", eps=1e-5):
    return TimeBlind(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding),
        nn.GroupNorm(groups, 4, eps=eps),
        act(),
        nn.Conv2d(4, 2, 1),
    )


def unet(**options):
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"attention_head_dim": 4, **options},
    )


def adapted(scale=1.0, disabled=False, names=("default",)):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for name in names:
        config = LoraConfig(r=1, lora_alpha=scale, target_modules=["0"], init_lora_weights=False)
        inject_adapter_in_model(config, model, name)
    layer = model[0]
    layer.enable_adapters(not disabled)
    return model


def autoencoder(tiled=False):
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    if tiled:
        model.enable_tiling()
    return model


OTHERS = {
    "groups of a norm": (network(), network(groups=4)),
    "rounding of a norm": (network(), network(eps=1e-3)),
    "activation": (network(), network(act=nn.GELU)),
    "padding": (network(), network(padding="circular")),
    "heads, by a config": (unet(), unet(attention_head_dim=8)),
    "scale of an adapter": (adapted(), adapted(scale=0.5)),
    "adapter switched off": (adapted(), adapted(disabled=True)),
    "adapter that is used": (adapted(names="ab"), adapted(names="ab")),
    "tiles": (autoencoder(), autoencoder(tiled=True)),
}
OTHERS["adapter that is used"][1][0].set_adapter(["a", "b"])


@pytest.mark.parametrize("kind", OTHERS)
def test_settings_that_decide(kind):
    one, other = OTHERS[kind]
    other.load_state_dict(one.state_dict())
    first, second = fingerprint(one), fingerprint(other)
    assert {key for key in first if first[key] != second[key]} == {"settings"}
    assert fingerprint(copy.deepcopy(one)) == first


SAME = {
    "dropout": (unet(), unet(dropout=0.5)),
    "mode": (network(), network().eval()),
    "name of an adapter": (adapted(), adapted(names=["other"])),
    "class of a layer": (nn.Linear(2, 2), type("Counting", (nn.Linear,), {"calls": 3})(2, 2)),
}


@pytest.mark.parametrize("kind", SAME)
def test_settings_that_do_not(kind):
    one, other = SAME[kind]
    assert fingerprint(one)["settings"] == fingerprint(other)["settings"]


def test_checkpoints_and_operators_are_of_one_network(tmp_path):
    """Neither sums nor factors of a network are taken for those of another with its weights."""
    one, other = network(), network(groups=4)
    other.load_state_dict(one.state_dict())
    x0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def fitted(model, passes):
        regression = NoisedRegression(DenoisingObjective(model, noise_levels()), x0, 2)
        return DiffusionKFACLinearOperator(regression, passes=passes)

    K = fitted(one, PassOptions(tmp_path / "checkpoint"))
    with pytest.raises(OtherCheckpointError, match=r"model.settings"):
        fitted(other, PassOptions(tmp_path / "checkpoint"))
    K.save(tmp_path / "k.safetensors")
    assert load_operator(tmp_path / "k.safetensors", one).shape == K.shape
    with pytest.raises(ValueError, match=r"with other settings of this model: its config, const"):
        load_operator(tmp_path / "k.safetensors", other)
