"""Checks of a network tell a fault from the rounding of products, and settings are left alone."""

import warnings

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
)
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.layers.layer import Part
from curvlinops_diffusion.layers.moments import MomentSums
from curvlinops_diffusion.runtime.precision import (
    full_precision,
    products_are_rounded,
    without_autocast,
)
from tests.cases import plain_regression, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import example_gradients

CPU = torch.device("cpu")


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_settings_are_put_back(precision):
    reduced = precision != "highest"
    found = products_are_rounded(CPU), torch.backends.cudnn.allow_tf32
    assert found[0] in ({reduced} if precision != "high" else {True, False})
    with full_precision():
        assert not products_are_rounded(CPU)
        assert not products_are_rounded(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert (products_are_rounded(CPU), torch.backends.cudnn.allow_tf32) == found
    assert torch.get_float32_matmul_precision() == precision


def test_convolutions_on_a_gpu_are_rounded_by_default():
    assert products_are_rounded(torch.device("cuda"))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert not products_are_rounded(torch.device("cuda"))
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("chosen", [None, "high", "highest"])
@pytest.mark.parametrize("kind", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_products_of_factors_are_rounded_and_the_network_is_not(kind, chosen, monkeypatch):
    """As on a GPU, whose settings can be looked at here."""
    on_gpu = KFACOptions.rounds_products
    monkeypatch.setattr(
        KFACOptions, "rounds_products", lambda self, device: on_gpu(self, torch.device("cuda"))
    )
    seen = {"network": set(), "factors": set(), "gradients": set()}

    def note(where):
        owner = torch.backends.cuda.matmul
        # the older setting cannot be read while the newer one is another
        new = hasattr(owner, "fp32_precision")
        seen[where].add(owner.fp32_precision == "tf32" if new else owner.allow_tf32)

    add, squares = MomentSums.add_second_moment, Part.squares
    monkeypatch.setattr(
        MomentSums, "add_second_moment", lambda *args: note("factors") or add(*args)
    )
    monkeypatch.setattr(Part, "squares", lambda *args: note("gradients") or squares(*args))
    regression = unet_regression(count=2, num_draws=1)
    regression.objective.model.conv_in.register_forward_hook(lambda *args: note("network"))
    operator = kind(regression, ["conv_in.weight", "conv_out.weight"], matmul_precision=chosen)
    expected = {chosen != "highest"}
    assert seen["network"] == {False}
    assert seen["factors"] == expected
    assert seen["gradients"] == (expected if kind is DiffusionEKFACLinearOperator else set())
    assert not torch.backends.cuda.matmul.allow_tf32
    assert operator.info["options"]["matmul_precision"] == chosen


def test_which_products_are_rounded():
    assert KFACOptions().rounds_products(torch.device("cuda"))
    assert not KFACOptions(matmul_precision="highest").rounds_products(torch.device("cuda"))
    assert not KFACOptions(matmul_precision="high").rounds_products(CPU)
    with pytest.raises(ValueError, match=r"must be 'highest', .* got 'medium'"):
        KFACOptions(matmul_precision="medium")


class Rounded(nn.Linear):
    """As a GPU's convolutions: with other rounding for other batches, and with other derivatives.

    Relative errors are of the size of TF32's, while products are rounded.
    """

    faulty = False

    def forward(self, x):
        out = super().forward(x)
        if products_are_rounded(CPU) or self.faulty:
            # what the kernel is chosen by
            seed = len(x) + 100 * self.weight.requires_grad + 10 * torch.is_grad_enabled()
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(out.shape, generator=generator).to(out)
            out = out * (1 + 2e-3 * noise)
        return out


@pytest.fixture
def rounded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Rounded(4, 8), nn.Tanh(), Rounded(8, 8), nn.Tanh(), Rounded(8, 4))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x, t):
            return self.layers(x)

    return Network()


def fitted(model):
    regression = plain_regression(model, (4,), count=4, num_draws=2, dtype=torch.float32)
    DiffusionEKFACLinearOperator(regression)
    return regression, ExampleGradientLinearOperator(regression).rows()


@pytest.mark.parametrize("precision", ["medium"], indirect=True)
def test_rounding_is_no_fault(rounded, precision):
    """Neither refused, nor differentiated example by example (of which one is warned)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regression, rows = fitted(rounded)
    truth = example_gradients(regression, list(rounded.parameters()))
    assert_close(rows, truth, 0.05)


@pytest.mark.parametrize("precision", ["medium"], indirect=True)
def test_a_fault_is_one_in_full_precision_as_well(rounded, precision):
    rounded.layers[2].faulty = True
    with pytest.raises(ValueError, match="depends on the rest of its batch"):
        fitted(rounded)


def test_a_network_in_every_precision(precision):
    """On processors that have bfloat16, ``"medium"`` takes it for float32."""
    regression = unet_regression(tiny_unet(torch.float32), dtype=torch.float32)
    low = ExampleGradientLinearOperator(regression).rows()
    with full_precision():
        high = ExampleGradientLinearOperator(regression).rows()
    assert_close(low, high, 0.1 if precision == "medium" else 1e-4)
    DiffusionEKFACLinearOperator(regression)


def test_without_autocast():
    """Within it alone, also after an error; where there is none, nothing."""
    a = torch.ones(2, 2)
    with without_autocast("cpu"):
        assert (a @ a).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
        with pytest.raises(RuntimeError), without_autocast("cpu"):
            a @ torch.ones(3)
        assert (a @ a).dtype == torch.bfloat16
