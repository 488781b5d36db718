"""The whole chain: exact GGN, block diagonal, EK-FAC, K-FAC; each rung against the one above."""

import pytest
import torch
from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.upstream import upstream_operator
from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
)
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cases import plain_regression, seeded, small_unet, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import block_of, dense_block, dense_ggn, params_of, to_dense

pytestmark = pytest.mark.filterwarnings("ignore:.*in no supported layer")


@pytest.fixture(scope="module")
def unet(device):
    return tiny_unet().to(device)


@pytest.fixture(scope="module")
def matrix(unet, device):
    """Random columns, more than the GGN's chunk size."""
    P = sum(p.numel() for p in unet.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(P, 9, generator=generator, dtype=torch.float64).to(device)


@pytest.mark.parametrize(("train", "reduction"), [(True, "mean"), (False, "sum")])
def test_ggn_equals_jacobians_curvlinops_and_backpack(unet, matrix, train, reduction):
    """The network has attention, GroupNorm, up- and downsampling and a class condition."""
    unet.train(train)
    regression = unet_regression(
        unet,
        num_draws=1,
        count=2,
        objective={"reduction": reduction, "weighting": MinSNRWeighting(2)},
    )
    params = list(unet.parameters())
    ours = DiffusionGGNLinearOperator(regression) @ matrix

    assert_close(ours, dense_ggn(regression, params) @ matrix, 1e-12)

    theirs = upstream_operator("GGNLinearOperator", regression)
    assert_close(ours, theirs @ matrix, 1e-12)

    backpack = torch.zeros_like(matrix[:, 0])
    vector = [
        c.reshape(p.shape)
        for c, p in zip(matrix[:, 0].split([p.numel() for p in params]), params, strict=True)
    ]
    for X, y in regression:
        with sdpa_kernel(SDPBackend.MATH):
            output = regression.model_func(X)
            loss = regression.loss_func(output, y)
            product = ggn_vector_product_from_plist(loss, output, params, vector)
        share = len(y) / regression.num_samples
        backpack += share * torch.cat([p.detach().flatten() for p in product])
    assert_close(ours[:, 0], backpack, 1e-12)


def test_ggn_of_some_parameters_and_of_flow_matching(unet, matrix):
    """A principal submatrix, in another order."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    regression = unet_regression(unet, num_draws=1, count=1, scheduler=scheduler)
    all_names = [name for name, _ in unet.named_parameters()]
    names = [name for name in all_names if "attentions.0.to_" in name][::-1]
    G = dense_ggn(regression, params_of(unet, names))
    assert_close(to_dense(DiffusionGGNLinearOperator(regression, names)), G, 1e-12)


def test_blocks_of_ekfac_and_kfac_against_the_exact_blocks(device):
    """EK-FAC is no further than K-FAC from every exact block, and has its trace.

    With every loss vector (type-2), the eigenvalues are those of the exact block in EK-FAC's basis.
    """
    unet = tiny_unet(block_out_channels=(2, 2), norm_num_groups=1, attention_head_dim=2)
    regression = unet_regression(unet.to(device), num_draws=1, count=2)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = DiffusionKFACLinearOperator(regression, **options)
    EK = DiffusionEKFACLinearOperator(regression, **options)
    G = dense_ggn(regression, params_of(unet, K.param_names))
    improved = 0
    for k, e in zip(K.blocks, EK.blocks, strict=True):
        assert k.params == e.params
        exact = block_of(G, unet, K.param_names, k.params)
        dense_k, dense_e = dense_block(k, unet), dense_block(e, unet)
        distance_k, distance_e = (dense_k - exact).norm(), (dense_e - exact).norm()
        assert distance_e <= distance_k * (1 + 1e-9) + 1e-12 * exact.norm(), k.name
        # keys' biases have no influence: attention weights do not change when all keys move
        assert abs(dense_e.trace() - exact.trace()) <= 1e-10 * exact.trace() + 1e-25, k.name
        improved += bool(distance_e < 0.99 * distance_k)
    assert improved > len(K.blocks) / 4  # or the comparison would say nothing
    assert_close(EK.trace(), G.trace(), 1e-10)


# ---------------------------------------------------------------------------------------------
# The model is left as it was found
# ---------------------------------------------------------------------------------------------


def _state(model):
    flags = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.is_grad_enabled(),
    )
    return (
        flags,
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        [p.detach().clone() for p in model.parameters()],
    )


def _assert_same(before, after):
    assert before[:-1] == after[:-1]
    assert all(torch.equal(a, b) for a, b in zip(before[-1], after[-1], strict=True))


def _ones(count, regression):
    return torch.ones(count, dtype=torch.float64, device=regression.device)


def _product(make):
    def use(regression):
        operator = make(regression)
        return operator @ _ones(operator.shape[1], regression)

    return use


USES = {
    "ggn": _product(DiffusionGGNLinearOperator),
    "kfac": DiffusionKFACLinearOperator,
    "ekfac": DiffusionEKFACLinearOperator,
    "rows": lambda r: ExampleGradientLinearOperator(r).rows(),
    "directional": _product(ExampleGradientLinearOperator),
    "adjoint": _product(lambda r: ExampleGradientLinearOperator(r).adjoint()),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_the_model_is_left_as_it_was(use, device):
    unet = small_unet().to(device).train()
    unet.mid_block.eval()
    for p in unet.down_blocks.parameters():
        p.requires_grad_(False)
    before = _state(unet)
    use(unet_regression(unet))
    _assert_same(before, _state(unet))


class _Failing(nn.Module):
    """Raises in its forward pass, after its first layer, from a given call on."""

    def __init__(self, calls: int):
        super().__init__()
        self.inner = seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1))
        self.calls = calls

    def forward(self, x, t):
        self.calls -= 1
        self.inner.layers[0](x)
        if self.calls < 0:
            raise RuntimeError("out of paper")
        return self.inner(x, t)


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("calls", [0, 3])
def test_the_model_is_left_as_it_was_after_an_exception(use, calls, device):
    model = _Failing(calls).to(device)
    model.inner.layers[0].bias.requires_grad_(False)
    before = _state(model)
    regression = plain_regression(model, (1, 3, 3), batch_size=2)
    with pytest.raises(RuntimeError, match="out of paper"):
        use(regression)
    _assert_same(before, _state(model))
