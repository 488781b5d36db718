"""Products of 16 bits that are summed in float32, as a GPU does; here they are converted first."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from curvlinops_diffusion import DiffusionKFACLinearOperator
from curvlinops_diffusion.layers import products
from tests.cases import plain_regression, seeded, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import to_dense


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Inputs stay in 16 bits, and convolutions take shifted products."""
    seen = []

    def multiplied(a, b):
        assert a.dtype == b.dtype == torch.bfloat16
        seen.append(a)
        return a.float() @ b.float()

    monkeypatch.setattr(products, "stays_low", lambda z: z.dtype == torch.bfloat16)
    monkeypatch.setattr(products, "_summed_in_float32", multiplied)
    monkeypatch.setattr(products, "TENSOR_CORES", {"cpu"})
    return seen


def low(**options):
    unet = tiny_unet(torch.float32)
    regression = unet_regression(unet, dtype=torch.float32, objective={"autocast": torch.bfloat16})
    return DiffusionKFACLinearOperator(regression, **options)


@pytest.mark.filterwarnings("ignore:.*in no supported layer")
@pytest.mark.parametrize(
    "options",
    [{}, {"separate_weight_and_bias": False}, {"kfac_approx": "reduce"}, {"max_positions": 6}],
    ids=["separate", "joint", "reduce", "sampled"],
)
def test_factors_are_the_same(options, request):
    """To the rounding of float32, and not of bfloat16."""
    expected = low(**options)
    seen = request.getfixturevalue("as_on_a_gpu")
    found = low(**options)
    assert bool(seen) == (options.get("kfac_approx") != "reduce")
    for one, other in zip(expected.blocks, found.blocks, strict=True):
        assert_close(other.block.trace(), one.block.trace(), 1e-5)
    v = torch.linspace(-1, 1, expected.shape[0])
    assert_close(found @ v, expected @ v, 1e-5)


def test_groups(request):
    """One product for each group."""
    model = seeded(nn.Conv2d(4, 4, 3, padding=1, groups=2), dtype=torch.float32)
    regression = plain_regression(
        model, (4, 4, 4), dtype=torch.float32, objective={"autocast": torch.bfloat16}
    )
    expected = to_dense(DiffusionKFACLinearOperator(regression))
    seen = request.getfixturevalue("as_on_a_gpu")
    assert_close(to_dense(DiffusionKFACLinearOperator(regression)), expected, 1e-5)
    assert any(z.ndim == 3 for z in seen)


def test_on_a_gpu_that_need_not_be_there():
    with FakeTensorMode():
        a = torch.empty(4, 8, dtype=torch.bfloat16, device="cuda")
        for found in (products.product(a.T, a), products.product(a.T[None], a[None])[0]):
            assert found.dtype == torch.float32
            assert found.shape == (8, 8)
        assert products.summable(a, torch.float32) is a
        assert products.summable(a, torch.float64).dtype == torch.float64
        total = torch.empty(1, 8, 8, device="cuda")
        products.add_product(total, a.T[None], a[None], 0.5)
    b = torch.ones(2, 2, dtype=torch.bfloat16)
    assert products.summable(b, torch.float32).dtype == torch.float32
    assert not products.stays_low(b)
    tokens = torch.ones(2, dtype=torch.int64)
    assert products.summable(tokens, torch.float32) is tokens
