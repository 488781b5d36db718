"""Operators as things of Python: shown, pickled, copied, moved."""

import copy
import pickle
import re

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    load_operator,
)
from tests.cases import tiny_unet, unet_regression
from tests.comparisons import assert_close


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module", params=[DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def operator(unet, request):
    return request.param(unet_regression(unet, count=3))


def vector(operator, dtype=None):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(operator.shape[1], generator=generator, dtype=torch.float64)
    return v.to(operator.device, dtype or operator.dtype)


def test_in_a_notebook(operator):
    """Blocks as a table; of a long one the start and the end, all of it by print."""
    assert str(operator).count("\n") > 100
    assert repr(operator).count("\n") < 40
    name, hidden = operator.blocks[0].name, len(operator.blocks) - 24
    html = operator._repr_html_()
    for shown in (repr(operator), html):
        assert f"with {operator.shape[0]:,} parameters in {len(operator.blocks)} blocks" in shown
        assert name in shown
        assert f"… {hidden} more, which print() shows" in shown
    assert html.count("<tr>") == html.count("</tr>") == 1 + 25
    assert "100.00%" not in html
    shares = [float(s) for s in re.findall(r"([\d.]+)%", str(operator))]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_others_say_what_they_are(unet):
    regression = unet_regression(unet, count=3)
    P = sum(p.numel() for p in unet.parameters())
    G, J = DiffusionGGNLinearOperator(regression), ExampleGradientLinearOperator(regression)
    assert repr(G) == f"DiffusionGGNLinearOperator [{P:,} × {P:,}], float64 on cpu"
    assert repr(J) == f"ExampleGradientLinearOperator [3 × {P:,}], float64 on cpu"


@pytest.mark.parametrize("again", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy])
def test_copies(operator, again):
    for one in (operator, operator.inverse(1e-3)):
        other = again(one)
        assert type(other) is type(one)
        assert other.info == one.info
        assert torch.equal(other @ vector(one), one @ vector(one))
        assert torch.equal(other.logdet(), one.logdet())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moved(operator, device, dtype):
    device = device.type
    moved = operator.to(device, dtype)
    assert type(moved) is type(operator)
    assert (moved.device.type, moved.dtype) == (device, dtype)
    assert moved.param_names == operator.param_names
    tensors = [z for placed in moved.blocks for z in placed.block.tensors().values()]
    assert {z.device.type for z in tensors} == {device}
    # weight and bias still share their bases
    assert len({z.data_ptr() for z in tensors}) == len(
        {z.data_ptr() for placed in operator.blocks for z in placed.block.tensors().values()}
    )
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for one, two in ((operator, moved), (operator.inverse(1e-2), moved.inverse(1e-2))):
        assert_close((two @ vector(two)).double().cpu(), one @ vector(one), 10 * rtol)
    back = moved.to("cpu").to(torch.float64)
    assert_close(back @ vector(back), operator @ vector(operator), rtol)


def test_moved_nowhere(operator):
    assert operator.to("cpu") is operator
    assert operator.to(torch.float64) is operator
    with pytest.raises(ValueError, match=r"or torch.float64, got torch.bfloat16"):
        operator.to(torch.bfloat16)


def test_loaded_elsewhere_than_the_model(operator, unet, device, tmp_path):
    operator.save(tmp_path / "o.safetensors")
    loaded = load_operator(tmp_path / "o.safetensors", unet, device=device)
    assert loaded.device.type == device.type
    assert next(unet.parameters()).device.type == "cpu"
    assert_close((loaded @ vector(loaded)).cpu(), operator @ vector(operator), 1e-12)
