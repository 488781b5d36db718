"""K-FAC and EK-FAC against upstream, against plain loops, and against the exact blocks."""

import dataclasses
import inspect
import re

import pytest
import torch
from torch import nn

from benchmarks.upstream import upstream_operator, upstream_trace
from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
)
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.diffusion.draws import ProbeType
from tests.cases import plain_regression, seeded, tiny_unet, two_convolutions, unet_regression
from tests.comparisons import assert_close, relative_error
from tests.reference import (
    block_of,
    dense_ggn,
    dense_loss_ggn,
    ekfac_block,
    empirical_vectors,
    example_gradients,
    kronecker_factors,
    layer_ggn,
    params_of,
    to_dense,
    type2_vectors,
)

APPROXES = ("expand", "reduce")


def conv_net(**options):
    """A convolution of any geometry, then a layer that restores the input's shape."""
    conv = nn.Conv2d(2, 3, **options)
    size = conv(torch.zeros(1, 2, 5, 6)).shape[2:]
    return seeded(
        conv, nn.Tanh(), nn.Flatten(), nn.Linear(3 * size.numel(), 60), nn.Unflatten(1, (2, 5, 6))
    )


def blocks_by_name(operator):
    return {placed.name: placed.block for placed in operator.blocks}


# ---------------------------------------------------------------------------------------------
# Upstream, on the same batches
# ---------------------------------------------------------------------------------------------

# a selection: layers/test_patches.py compares the patches of every geometry with plain loops
STRIDE_2 = {"kernel_size": 3, "stride": 2, "padding": 1}
AXES_THAT_DIFFER = {
    "kernel_size": (3, 1),
    "dilation": (2, 1),
    "padding": (1, 0),
    "stride": (2, 1),
}
CASES = [
    # the geometry enters through the layer's inputs, which do not depend on the Fisher type
    ({"kernel_size": 1, "padding": 1}, "empirical", "expand", True),  # pixels that see only a bias
    ({"kernel_size": 5, "padding": 1}, "empirical", "reduce", True),
    (STRIDE_2, "empirical", "expand", False),
    (STRIDE_2, "type-2", "reduce", False),
    (AXES_THAT_DIFFER, "type-2", "expand", True),
    (AXES_THAT_DIFFER, "empirical", "reduce", False),
    ({"kernel_size": 3, "padding": "same", "dilation": 2}, "empirical", "expand", False),
    ({"kernel_size": 3, "padding": 1, "bias": False}, "empirical", "reduce", True),
]


@pytest.mark.parametrize(("geometry", "fisher_type", "approx", "separate"), CASES, ids=str)
def test_equals_curvlinops(geometry, fisher_type, approx, separate):
    """Ours equals upstream's K-FAC and EK-FAC on the same ``(X, y)`` batches.

    With ``MSELoss(mean)`` upstream's empirical Fisher weights the gradients of the *summed* squared
    error by ``1/(ND)``: it is ``D`` times the second moment of ``∇ℓ_t``, our GGN of the loss.
    There are enough draws for factors of full rank, whose eigenbasis is unique. Where the
    approximation "reduce" makes taps see the same sum of pixels (wide padding), the basis of the
    factor's null space is arbitrary and only EK-FAC's trace can be compared.
    """
    model = conv_net(**geometry)
    regression = plain_regression(model, (2, 5, 6), count=45, num_draws=3, batch_size=25)
    params = list(model.parameters())
    options = {
        "fisher_type": fisher_type,
        "kfac_approx": approx,
        "separate_weight_and_bias": separate,
    }
    scale = 60 if fisher_type == "empirical" else 1
    V = torch.randn(sum(p.numel() for p in params), 3, dtype=torch.float64)
    for ours, theirs in (
        (DiffusionKFACLinearOperator, "KFACLinearOperator"),
        (DiffusionEKFACLinearOperator, "EKFACLinearOperator"),
    ):
        upstream = upstream_operator(theirs, regression, check_deterministic=False, **options)
        operator = ours(regression, params, exact_bias=False, **options)
        assert_close(scale * operator.trace(), upstream_trace(upstream), 1e-10)
        if ours is DiffusionKFACLinearOperator:
            unique = all(
                _full_rank(f) for placed in operator.blocks for f in placed.block.tensors().values()
            )
        # with "expand", gradients have no component in a factor's null space
        if ours is DiffusionKFACLinearOperator or unique or approx == "expand":
            assert_close(scale * (operator @ V), upstream @ V, 1e-10)


def _full_rank(factor):
    eigenvalues = torch.linalg.eigvalsh(factor)
    return bool(eigenvalues[0] > 1e-12 * eigenvalues[-1])


def test_gradients_of_the_loss_have_no_factor_that_the_design_lacks():
    """The GGN of the loss is the second moment of ``∇ℓ_t``; upstream's is ``D`` times that."""
    model = seeded(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    regression = plain_regression(model, (3,))
    params = list(model.parameters())
    exact = dense_loss_ggn(regression, params)
    EK = DiffusionEKFACLinearOperator(regression, params, fisher_type="empirical")
    assert_close(EK.trace(), exact.trace(), 1e-12)
    upstream = upstream_operator("EFLinearOperator", regression)
    assert_close(to_dense(upstream), 3 * exact, 1e-12)


# ---------------------------------------------------------------------------------------------
# Plain loops
# ---------------------------------------------------------------------------------------------

OTHER_GEOMETRIES = [
    # more padding on one side, which upstream refuses
    {"kernel_size": 4, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 5, "padding": 4, "dilation": 2},  # taps that read only padding
]


@pytest.mark.parametrize("geometry", OTHER_GEOMETRIES, ids=str)
@pytest.mark.parametrize(("approx", "separate"), [("expand", False), ("reduce", False)])
def test_equals_plain_loops(geometry, approx, separate):
    model = conv_net(**geometry)
    regression = plain_regression(model, (2, 5, 6), count=30, num_draws=2)
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
    _compare_with_loops(regression, model, "empirical", empirical_vectors, **options)


@pytest.mark.parametrize("approx", APPROXES)
@pytest.mark.parametrize("probe_type", ["rademacher", "gaussian"])
def test_random_loss_vectors_equal_plain_loops(approx, probe_type):
    """With the same draws ``u``, ``v = √(2 w r / K) u``."""
    model = conv_net(kernel_size=3, padding=1)
    regression = plain_regression(model, (2, 5, 6), count=3, batch_size=2)

    def vectors(batch, prediction):
        probes = [
            regression.draws.probe(
                batch.indices, batch.common_draw, k, prediction.shape[1], ProbeType(probe_type)
            )
            for k in range(3)
        ]
        return [(2 * batch.weight_B / 3).sqrt().unsqueeze(1) * u.double() for u in probes]

    options = {"kfac_approx": approx, "mc_samples": 3, "probe_type": probe_type}
    _compare_with_loops(regression, model, "mc", vectors, **options)


def test_batch_of_one_and_varying_image_sizes():
    """A fully convolutional network sees images of several sizes; ``S`` is each image's own."""
    model = two_convolutions()
    regression = plain_regression(model, (1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1, 4, 5), (2, 1, 3, 3), (1, 1, 4, 5), (1, 1, 1, 6)]
    data = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    regression = type(regression)(regression.objective, data, 2)
    _compare_with_loops(regression, model, "empirical", empirical_vectors)


class Tied(nn.Module):
    """Calls one layer three times, the third time without effect on the output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.last = nn.Linear(3, 3).double()

    def forward(self, x, t):
        first = torch.tanh(self.layer(x))
        self.layer(first.detach()).sum()
        return self.last(torch.tanh(self.layer(first)))


@pytest.mark.parametrize("approx", APPROXES)
def test_a_layer_called_several_times(approx):
    """Its gradient is the sum over the calls; their positions count like those of one call."""
    model = Tied()
    regression = plain_regression(model, (2, 3), count=3)
    _compare_with_loops(regression, model, "type-2", type2_vectors, kfac_approx=approx)


def _compare_with_loops(regression, model, fisher_type, vectors, **options):
    K = DiffusionKFACLinearOperator(regression, fisher_type=fisher_type, **options)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type=fisher_type, **options)
    approx = options.get("kfac_approx", "expand")
    seen = 0
    for k, e in zip(K.blocks, EK.blocks, strict=True):
        layer_name, part = k.name.rsplit(".", 1)
        if k.num_entries > 200:  # too large for dense matrices
            continue
        module = model.get_submodule(layer_name)
        exact = layer_ggn(regression, module, vectors, part)
        if part == "bias":
            assert_close(k.block.matrix, exact, 1e-12)
            assert_close(e.block.matrix, exact, 1e-12)
            continue
        A, B = kronecker_factors(regression, module, vectors, approx, with_bias=part == "joint")
        assert_close(k.block.output_factor, B, 1e-12)
        assert_close(k.block.input_factor, A, 1e-12)
        if _full_rank(A) and _full_rank(B):
            assert_close(_dense(e.block), ekfac_block(A, B, exact), 1e-8)  # the basis is unique
        assert_close(e.block.trace(), exact.trace(), 1e-11)
        seen += 1
    assert seen > 0


def _dense(block):
    O, I = block.shape
    identity = torch.eye(O * I, dtype=torch.float64)
    return block.multiply(identity.reshape(O, I, O * I)).reshape(O * I, O * I)


# ---------------------------------------------------------------------------------------------
# Exact where the theory says so (Eschenhagen et al., 2023, Propositions 1 and 2)
# ---------------------------------------------------------------------------------------------


def _block_diagonal(G, sizes):
    result, start = torch.zeros_like(G), 0
    for size in sizes:
        piece = slice(start, start + size)
        result[piece, piece] = G[piece, piece]
        start += size
    return result


@pytest.mark.parametrize(("kind", "separate"), [("linear", True), ("conv", False)])
@pytest.mark.parametrize("operator", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_expand_is_exact_in_the_expand_setting(kind, separate, operator):
    """Linear layers that act on every position alone, and a loss that sums over positions.

    For convolutions: kernels of one pixel. ``b`` does not depend on the data, and the exact block
    ``E Σ_s a_s a_sᵀ ⊗ b_s b_sᵀ`` factorises. So does a bias' own block: a loss vector of one
    output entry reaches one position only.
    """
    if kind == "linear":
        model, shape = seeded(nn.Linear(3, 4), nn.Linear(4, 3)), (5, 3)
    else:
        model, shape = seeded(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)), (3, 2, 3)
    regression = plain_regression(model, shape, count=3, num_draws=2)
    K = operator(regression, fisher_type="type-2", separate_weight_and_bias=separate)
    G = dense_ggn(regression, list(model.parameters()))
    sizes = [12, 4, 12, 3] if separate else [16, 15]
    assert_close(to_dense(K), _block_diagonal(G, sizes), 1e-11)


@pytest.mark.parametrize("operator", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_weights_that_vary_over_time_end_exactness(operator):
    """``w_t`` ties ``b bᵀ`` to the inputs' noise level even where the network is linear."""
    model = seeded(nn.Linear(3, 4), nn.Linear(4, 3))
    errors = []
    for weighting in (lambda t: 0 * t + 3.0, lambda t: t.clamp(max=5.0)):
        regression = plain_regression(
            model, (5, 3), count=3, num_draws=4, objective={"weighting": weighting}
        )
        K = operator(regression, fisher_type="type-2")
        exact = _block_diagonal(dense_ggn(regression, list(model.parameters())), [12, 4, 12, 3])
        errors.append(relative_error(to_dense(K), exact))
        if operator is DiffusionEKFACLinearOperator:
            assert_close(K.trace(), exact.trace(), 1e-11)
    assert errors[0] < 1e-11
    assert errors[1] > 0.01


class Pooled(nn.Module):
    """Layers shared over positions whose outputs are averaged, then one layer makes the output."""

    def __init__(self, kind):
        super().__init__()
        if kind == "linear":
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        else:
            self.first, self.second = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 2, 2)
        self.last = nn.Linear(2, 18)
        self.kind = kind

    def forward(self, x, t):
        z = self.second(self.first(x))
        z = z.mean(1) if self.kind == "linear" else z.mean((2, 3))
        return self.last(z).reshape(x.shape)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("operator", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])
def test_reduce_is_exact_in_the_reduce_setting(kind, operator):
    """Positions are averaged before the loss: all have the same ``b``, only ``Σ_s a_s`` counts.

    The second convolution's output is smaller than the first's: the first's pixels do not all weigh
    the same, so for convolutions exactness holds for the second and the last layer only.
    """
    model = Pooled(kind).double()
    shape = (6, 3) if kind == "linear" else (3, 2, 3)
    if kind == "conv":
        model.second = nn.Conv2d(4, 2, 1).double()
    regression = plain_regression(model, shape, count=3, num_draws=2)
    names = ["second.weight", "second.bias", "last.weight", "last.bias"]
    names = ["first.weight", "first.bias", *names]
    options = {"fisher_type": "type-2", "kfac_approx": "reduce"}
    K = operator(regression, names, separate_weight_and_bias=False, **options)
    own = dict(model.named_parameters())
    G = dense_ggn(regression, [own[n] for n in names])
    sizes = [sum(own[n].numel() for n in names[i : i + 2]) for i in (0, 2, 4)]
    assert_close(to_dense(K), _block_diagonal(G, sizes), 1e-11)
    # in the other setting it is not exact, so the assertion above says something
    K = operator(regression, names, separate_weight_and_bias=False, fisher_type="type-2")
    if operator is DiffusionKFACLinearOperator:
        assert relative_error(to_dense(K), _block_diagonal(G, sizes)) > 0.01


# ---------------------------------------------------------------------------------------------
# Choice of parameters
# ---------------------------------------------------------------------------------------------


def test_a_selection_gives_the_same_blocks():
    model = conv_net(kernel_size=3)
    regression = plain_regression(model, (2, 5, 6))
    full = blocks_by_name(DiffusionEKFACLinearOperator(regression))
    for names in (["layers.3.bias"], ["layers.0.weight"], ["layers.3.weight", "layers.0.bias"]):
        EK = DiffusionEKFACLinearOperator(regression, names)
        assert EK.param_names == tuple(names)
        for name, block in blocks_by_name(EK).items():
            kept, truth = (b.eigen(name).eigenvalues for b in (block, full[name]))
            assert_close(kept, truth, 1e-12)


class Shared(nn.Module):
    """Two modules that hold one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x, t):
        return self.three(self.two(torch.tanh(self.one(x))))


def _assert_exact_blocks(model, shape, names):
    regression = plain_regression(model, shape, count=3, num_draws=2)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    assert set(EK.param_names) == {name for name, _ in model.named_parameters()}
    G = dense_ggn(regression, params_of(model, EK.param_names))
    for name in names:
        (block,) = [placed for placed in EK.blocks if placed.params == (name,)]
        assert block.kind == "dense"
        assert_close(block.block.matrix, block_of(G, model, EK.param_names, [name]), 1e-11)
    return EK


def test_a_weight_shared_by_two_modules_has_an_exact_block():
    _assert_exact_blocks(Shared().double(), (3,), ["one.weight"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 4)

    def forward(self, x, t):
        return self.last(self.attention(x, x, x)[0])


def test_multihead_attention_has_exact_blocks():
    """``nn.MultiheadAttention`` reads ``out_proj.weight`` without calling ``out_proj``."""
    names = ["attention.in_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"]
    _assert_exact_blocks(Attention().double(), (5, 4), names)


class Doubled(nn.Linear):
    """Computes more than its type says."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.square(), self.bias)


class Outside(nn.Module):
    """Uses a layer's weight outside its call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.layer(x) + x @ self.layer.weight


@pytest.mark.parametrize(
    ("model", "layer"), [(seeded(Doubled(3, 3)), "layers.0"), (Outside(), "layer")]
)
def test_what_hooks_cannot_see_has_exact_blocks(model, layer):
    names = [f"{layer}.weight", f"{layer}.bias"]
    with pytest.warns(UserWarning, match=f"found by automatic differentiation.*'{layer}.weight'"):
        table = str(_assert_exact_blocks(model.double(), (3,), names))
    assert f"by automatic differentiation: {layer}.weight (its layer's inputs and out" in table


def test_gradients_that_are_rounding_noise_are_accepted():
    """A norm of each channel subtracts what the time embedding added to it."""
    unet = tiny_unet(torch.float32, norm_num_groups=4)
    K = DiffusionKFACLinearOperator(unet_regression(unet, dtype=torch.float32))
    traces = {placed.name: placed.block.trace() for placed in K.blocks}
    noise = traces["down_blocks.0.resnets.0.time_emb_proj.weight"]
    assert noise < 1e-10 * traces["conv_out.weight"]


class Broadcast(nn.Module):
    """A layer sees one row for the whole batch."""

    def __init__(self):
        super().__init__()
        self.time, self.layer = nn.Linear(1, 3), nn.Linear(3, 3)

    def forward(self, x, t):
        return self.layer(x) + self.time(torch.ones(1, 1).to(x))


def test_a_layer_without_batch_axis_has_exact_blocks():
    model = Broadcast().double()
    with pytest.warns(UserWarning, match=r"its layer was given an input of shape \(1, 1\)"):
        _assert_exact_blocks(model, (3,), ["time.weight", "time.bias"])
    regression = plain_regression(model, (3,))
    with pytest.warns(UserWarning, match="found by automatic differentiation"):
        rows = ExampleGradientLinearOperator(regression).rows()
    assert_close(rows, example_gradients(regression, list(model.parameters())), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "exact"}, r"`fisher_type` must be one of 'mc', 'type-2'"),
        ({"kfac_approx": "sum"}, r"`kfac_approx` must be one of"),
        ({"probe_type": "uniform"}, r"`probe_type` must be one of"),
        ({"mc_samples": 0}, r"`mc_samples` must be a whole number of at least 1, got 0"),
        ({"mc_samples": 2, "fisher_type": "type-2"}, r"Only 'mc' draws loss vectors"),
        (
            {"separate_weight_and_bias": None},
            "`separate_weight_and_bias` must be True or",
        ),
        ({"eigenvalue_draws": -1}, "`eigenvalue_draws` must be a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KFACOptions(**options)


def test_operators_and_options_agree():
    """Users see names and defaults where they ask for them."""
    own = {field.name: field.default for field in dataclasses.fields(KFACOptions)}
    for kind in (DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator):
        arguments = inspect.signature(kind).parameters
        assert {name: p.default for name, p in arguments.items() if name in own} == own
        assert [*arguments][:2] == ["regression", "params"]
    documented = inspect.getdoc(KFACOptions)
    assert all(re.search(rf"^    {name}: ", documented, re.MULTILINE) for name in own)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kfac_aprox'"):
        DiffusionKFACLinearOperator(unet_regression(), kfac_aprox="expand")


@pytest.mark.parametrize("options", [{"kfac_approx": "reduce"}, {"eigenvalue_draws": 1}])
def test_the_basis_where_a_factor_is_zero_is_no_rounding_error(options):
    """Gradients may have directions that the inputs' means, or those of other draws, lack."""
    model = seeded(
        nn.Conv2d(2, 7, 3, stride=2, padding=1), nn.Tanh(), nn.ConvTranspose2d(7, 2, 2, stride=2)
    )

    def product(batch_size):
        regression = plain_regression(model, (2, 4, 4), count=4, num_draws=2, batch_size=batch_size)
        EK = DiffusionEKFACLinearOperator(regression, **options)
        v = torch.ones(EK.shape[1], dtype=torch.float64)
        return torch.stack([EK @ v, EK.inverse(1e-3) @ v])

    expected = product(4)
    for batch_size in (1, 3):
        assert_close(product(batch_size), expected, 1e-9)
