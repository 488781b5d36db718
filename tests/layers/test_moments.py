"""Products of 16 bits that are summed in float32, as a GPU does; here they are converted first."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from curvlinops_diffusion import DiffusionKFACLinearOperator
from curvlinops_diffusion.layers import moments
from tests.cases import plain_regression, seeded, tiny_unet, unet_regression
from tests.comparisons import assert_close


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Inputs stay in 16 bits, and convolutions take the way that is fastest there."""
    seen = []

    def multiplied(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16
        assert out_dtype == torch.float32
        seen.append(a)
        return a.float() @ b.float()

    monkeypatch.setattr(moments, "stays_low", lambda z: z.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", multiplied)
    monkeypatch.setattr(torch, "bmm", multiplied)
    monkeypatch.setattr(moments, "TENSOR_CORES", {"cpu"})
    return seen


def unet():
    return unet_regression(
        tiny_unet(torch.float32),
        count=2,
        num_draws=1,
        dtype=torch.float32,
        objective={"autocast": torch.bfloat16},
    )


def grouped():
    model = seeded(nn.Conv2d(4, 4, 3, padding=1, groups=2), dtype=torch.float32)
    objective = {"autocast": torch.bfloat16}
    return plain_regression(model, (4, 4, 4), dtype=torch.float32, objective=objective)


@pytest.mark.filterwarnings("ignore:.*in no supported layer")
@pytest.mark.parametrize(
    ("problem", "options"),
    [
        (unet, {"separate_weight_and_bias": False}),
        (unet, {"kfac_approx": "reduce"}),
        (unet, {"max_positions": 6}),
        (grouped, {}),
    ],
    ids=["joint", "reduce", "sampled", "groups"],
)
def test_factors_are_the_same(problem, options, request):
    """To the rounding of float32, and not of bfloat16."""
    expected = DiffusionKFACLinearOperator(problem(), **options)
    seen = request.getfixturevalue("as_on_a_gpu")
    found = DiffusionKFACLinearOperator(problem(), **options)
    assert bool(seen) == (options.get("kfac_approx") != "reduce")
    assert any(z.ndim == 3 for z in seen) == (problem is grouped)  # a product for each group
    for one, other in zip(expected.blocks, found.blocks, strict=True):
        assert_close(other.block.trace(), one.block.trace(), 1e-5)
    v = torch.linspace(-1, 1, expected.shape[0])
    assert_close(found @ v, expected @ v, 1e-5)


def test_on_a_gpu_that_need_not_be_there():
    with FakeTensorMode():
        a = torch.empty(4, 8, dtype=torch.bfloat16, device="cuda")
        for found in (moments.product(a.T, a), moments.product(a.T[None], a[None])[0]):
            assert found.dtype == torch.float32
            assert found.shape == (8, 8)
        assert moments.summable(a, torch.float32) is a
        assert moments.summable(a, torch.float64).dtype == torch.float64
        for total, b in ((torch.empty(8, 8, device="cuda"), a), (torch.empty(1, 8, 8), a[None])):
            moments.add_product(total.to(a.device), b.mT, b, 0.5)
    b = torch.ones(2, 2, dtype=torch.bfloat16)
    assert moments.summable(b, torch.float32).dtype == torch.float32
    assert not moments.stays_low(b)
    tokens = torch.ones(2, dtype=torch.int64)
    assert moments.summable(tokens, torch.float32) is tokens
