"""Forward-mode derivatives, mapped over directions, of what denoisers are made of.

However their tensors lie in memory: kernels of some devices are particular about it.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops_diffusion.runtime.modes import forward_mode
from tests.comparisons import assert_close

SIZES = (2, 4, 6, 6)


def _attention(x):
    q = x.flatten(2).mT.unsqueeze(1)
    return functional.scaled_dot_product_attention(q, 2 * q, q.tanh())


def _with(function, *args, **kwargs):
    return lambda x: function(x, *args, **kwargs)


def _scaled(count, device):
    return torch.linspace(0.5, 2, count, dtype=torch.float64, device=device)


FUNCTIONS = {
    "group_norm": lambda x: functional.group_norm(x, 2, _scaled(4, x.device), _scaled(4, x.device)),
    "group_norm without weight": _with(functional.group_norm, 2),
    "layer_norm": lambda x: functional.layer_norm(
        x, (6,), _scaled(6, x.device), _scaled(6, x.device)
    ),
    "rms_norm": lambda x: functional.rms_norm(x, (6,), _scaled(6, x.device)),
    "batch_norm": lambda x: functional.batch_norm(
        x, _scaled(4, x.device), _scaled(4, x.device), _scaled(4, x.device)
    ),
    "instance_norm": functional.instance_norm,
    "normalize": _with(functional.normalize, dim=1),
    **{
        function.__name__: function
        for function in (
            functional.silu,
            functional.mish,
            functional.gelu,
            functional.relu,
            functional.leaky_relu,
            functional.softplus,
            functional.hardswish,
            functional.glu,
            torch.tanh,
            torch.sigmoid,
        )
    },
    "gelu (tanh)": _with(functional.gelu, approximate="tanh"),
    "softmax": _with(functional.softmax, -1),
    "scaled_dot_product_attention": _attention,
    "conv2d": lambda x: functional.conv2d(x, _scaled(144, x.device).view(4, 4, 3, 3), padding=1),
    "conv2d, strided": lambda x: functional.conv2d(
        x, _scaled(144, x.device).view(4, 4, 3, 3), stride=2, padding=1
    ),
    "conv_transpose2d": lambda x: functional.conv_transpose2d(
        x, _scaled(64, x.device).view(4, 4, 2, 2), stride=2
    ),
    "linear": lambda x: functional.linear(x, _scaled(18, x.device).view(3, 6)),
    "interpolate, nearest": _with(functional.interpolate, scale_factor=2.0),
    "interpolate, bilinear": _with(
        functional.interpolate, scale_factor=2.0, mode="bilinear", align_corners=False
    ),
    "avg_pool2d": _with(functional.avg_pool2d, 2),
    "pad": _with(functional.pad, (0, 1, 0, 1)),
    "pixel_unshuffle": _with(functional.pixel_unshuffle, 2),
}

LAYOUTS = {
    "contiguous": lambda z: z.contiguous(),
    "channels last": lambda z: z.movedim(-3, -1).contiguous().movedim(-1, -3),
    "transposed": lambda z: z.mT.contiguous().mT,
    "examples last": lambda z: z.movedim(0, -1).contiguous().movedim(-1, 0),
}


def _pushed(function, x, v):
    return jvp(function, (x,), (v,))[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mapped_over_directions(device, name):
    """Against the Jacobian that reverse mode gives, contiguous."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZES, generator=generator, dtype=torch.float64).to(device)
    V = torch.randn(3, *SIZES, generator=generator, dtype=torch.float64).to(device)
    function = FUNCTIONS[name]
    J = torch.autograd.functional.jacobian(function, x)
    expected = torch.einsum("...bchw,kbchw->k...", J, V)
    for layout in LAYOUTS.values():
        primal = layout(x)
        for directions in (layout(V), V.movedim(0, 2).contiguous().movedim(2, 0)):
            with forward_mode():
                found = vmap(partial(_pushed, function, primal))(directions)
            assert_close(found, expected, 1e-12)


class _Functions(TorchDispatchMode):
    """Notes which functions of torch's core are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(str(func))
        return func(*args, **(kwargs or {}))


def test_group_norms_derivative_is_that_of_elementary_functions():
    """On CUDA that of its kernel refuses what is not contiguous."""
    norm = nn.GroupNorm(2, 4).double()
    x = torch.ones(1, 4, 2, 2).double()
    with _Functions() as outside, torch.no_grad():
        norm(x)
    with _Functions() as within, torch.no_grad(), forward_mode():
        norm(x)
    assert any("group_norm" in name for name in outside.called)
    assert not any("group_norm" in name for name in within.called)
