"""Every kind of layer: its factors against plain loops, its blocks against the exact ones."""

import copy
from itertools import product

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.nn.functional import pad

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
)
from curvlinops_diffusion.layers import LAYER_KINDS, SharingKind
from tests.cases import plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import (
    block_of,
    dense_block,
    dense_ggn,
    example_gradients,
    params_of,
    pulled_back,
    type2_vectors,
)

# ---------------------------------------------------------------------------------------------
# Networks around one layer
# ---------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A layer between a non-linearity and a map back to the input's shape."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.tokens = copy.deepcopy(layer).eval(), isinstance(layer, nn.Embedding)
        seen = torch.zeros(1, 2).long() if self.tokens else torch.zeros(1, *shape)
        self.back = nn.Linear(self.layer(seen).numel(), torch.Size(shape).numel())
        generator = torch.Generator().manual_seed(3)
        for p in self.double().parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)

    def forward(self, x, t):
        if self.tokens:  # of which some come twice
            seen = torch.stack([t % 3, (t + 1) % 2], 1)
        else:
            seen = torch.tanh(x)
        return self.back(torch.tanh(self.layer(seen)).flatten(1)).reshape(x.shape) + 0.1 * x


def problem(case):
    """A network around a case's layer, and its regression."""
    layer, shape = (CASES | NORMS)[case]
    model = Around(layer, shape)
    return model, regression_of(model, shape)


# each with the shape of its input; of convolutions, what a geometry exercises that none before it
# does, whatever the number of its dimensions
CASES = {
    "Conv1d": (nn.Conv1d(2, 2, 3, padding=1), (2, 5)),
    "Conv1d: stride, dilation": (nn.Conv1d(2, 2, 2, stride=2, dilation=2, padding=1), (2, 6)),
    "Conv1d: circular": (nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"), (2, 5)),
    "Conv1d: groups": (nn.Conv1d(4, 4, 3, groups=2), (4, 5)),
    "Conv2d: groups": (nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 2, 3)),
    "Conv2d: axes that differ": (nn.Conv2d(2, 4, (2, 3), padding=(1, 0), groups=2), (2, 3, 4)),
    "Conv2d: more zeros at the end, no bias": (
        nn.Conv2d(2, 4, 2, padding="same", groups=2, bias=False),
        (2, 3, 3),
    ),
    "Conv2d: phases of images": (nn.Conv2d(2, 2, 3, stride=2, padding=1), (2, 4, 4)),
    "Conv2d: depthwise": (nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 3, 3)),
    "Conv3d": (nn.Conv3d(2, 2, 2, padding=1, stride=2), (2, 2, 3, 3)),
    "Conv3d: along time only": (nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0)), (2, 4, 1, 2)),
    "Conv3d: images only": (nn.Conv3d(2, 2, (1, 2, 2), padding=(0, 1, 0)), (2, 3, 2, 2)),
    "Conv3d: groups": (nn.Conv3d(2, 4, (3, 1, 2), groups=2), (2, 3, 2, 2)),
    "ConvTranspose1d: stride": (nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1), (2, 4)),
    "ConvTranspose1d: dilation, no bias": (
        nn.ConvTranspose1d(2, 2, 2, dilation=2, bias=False),
        (2, 3),
    ),
    "ConvTranspose1d: groups": (nn.ConvTranspose1d(4, 4, 3, groups=2), (4, 3)),
    "ConvTranspose2d: output padding": (
        nn.ConvTranspose2d(2, 2, (2, 3), stride=2, output_padding=1),
        (2, 2, 3),
    ),
    "ConvTranspose2d: a channel a group": (nn.ConvTranspose2d(4, 8, 2, groups=4), (4, 2, 2)),
    "ConvTranspose2d: output padding beyond the kernel": (
        nn.ConvTranspose2d(2, 2, 2, stride=(1, 3), output_padding=(0, 2)),
        (2, 3, 2),
    ),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=(1, 2, 1)), (2, 1, 2, 2)),
    "Linear": (nn.Linear(3, 2), (2, 3)),
    "Embedding": (nn.Embedding(4, 3), (3,)),
    "Embedding with padding": (nn.Embedding(4, 3, padding_idx=1), (3,)),
}
NORMS = {
    "GroupNorm": (nn.GroupNorm(2, 4), (4, 2, 3)),
    "GroupNorm without positions": (nn.GroupNorm(2, 4), (4,)),
    "LayerNorm": (nn.LayerNorm(4), (3, 4)),
    "LayerNorm over two axes": (nn.LayerNorm((3, 4)), (2, 3, 4)),
    "LayerNorm without bias": (nn.LayerNorm(4, bias=False), (4,)),
    "RMSNorm": (nn.RMSNorm(4, eps=1e-5), (3, 4)),
    "RMSNorm of diffusers": (RMSNorm(4, 1e-5), (3, 4)),
    "RMSNorm of diffusers with bias": (RMSNorm(4, 1e-5, bias=True), (3, 4)),
    "BatchNorm1d": (nn.BatchNorm1d(3), (3, 4)),
    "BatchNorm2d": (nn.BatchNorm2d(3), (3, 2, 2)),
    "InstanceNorm2d": (nn.InstanceNorm2d(3, affine=True), (3, 2, 3)),
}


def regression_of(model, shape):
    return plain_regression(model, shape, count=3, num_draws=2, batch_size=2)


# ---------------------------------------------------------------------------------------------
# Gradients of single examples
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *NORMS])
def test_gradients_of_single_examples(case):
    model, regression = problem(case)
    if isinstance(getattr(model.layer, "running_var", None), torch.Tensor):
        model.layer.running_mean.fill_(0.3), model.layer.running_var.fill_(2.0)
    names = [name for name, _ in model.named_parameters()]
    J = ExampleGradientLinearOperator(regression, names)
    assert_close(J.rows(), example_gradients(regression, params_of(model, names)), 1e-12)


# ---------------------------------------------------------------------------------------------
# Kronecker factors, by loops over positions
# ---------------------------------------------------------------------------------------------


def window(z, position, kernel, stride, dilation):
    """What a kernel's taps see of ``[C, *size]`` at an output position, flattened."""
    for axis, (o, K, s, d) in enumerate(zip(position, kernel, stride, dilation, strict=True), 1):
        z = z.index_select(axis, o * s + d * torch.arange(K))
    return z.flatten()


def positions_of(size):
    return list(product(*(range(n) for n in size)))


def loops(module, x, g):
    """``(a [S, I], b [S, O])`` of one example for every group of a layer."""
    if isinstance(module, nn.Linear):
        return [(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))]
    if isinstance(module, nn.Embedding):
        a = nn.functional.one_hot(x, module.num_embeddings).double()
        if module.padding_idx is not None:
            a[x == module.padding_idx] = 0
        return [(a, g)]
    geometry = module.kernel_size, module.stride, module.dilation
    found = []
    for x_group, g_group in zip(x.chunk(module.groups), g.chunk(module.groups), strict=True):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            padded = pad(x_group[None], module._reversed_padding_repeated_twice, mode)[0]
            where = positions_of(g_group.shape[1:])
            a = torch.stack([window(padded, o, *geometry) for o in where])
            b = torch.stack([g_group[(slice(None), *o)] for o in where])
        else:
            padding = [p for p in module.padding[::-1] for _ in range(2)]
            padded = pad(g_group, padding)
            where = positions_of(x_group.shape[1:])
            a = torch.stack([x_group[(slice(None), *o)] for o in where])
            b = torch.stack([window(padded, o, *geometry) for o in where])
        found.append((a, b))
    return found


def factors_by_loops(regression, module, approx):
    """``A`` and ``B`` of every group."""
    A = B = 0
    D = next(iter(regression.batches())).target_BD.shape[1]
    for x, g in pulled_back(regression, module, type2_vectors, raw=True):
        pairs = loops(module, x, g)
        if approx == "expand":
            A = A + torch.stack([a.T @ a / len(a) for a, _ in pairs]) / D
            B = B + torch.stack([b.T @ b for _, b in pairs])
        else:
            A = A + torch.stack([torch.outer(a.mean(0), a.mean(0)) for a, _ in pairs]) / D
            B = B + torch.stack([torch.outer(b.sum(0), b.sum(0)) for _, b in pairs])
    return A / regression.num_samples, B / regression.num_samples


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_factors_equal_loops(case, approx):
    model, regression = problem(case)
    K = DiffusionKFACLinearOperator(
        regression, ["layer.weight"], fisher_type="type-2", kfac_approx=approx
    )
    (placed,) = K.blocks
    A, B = factors_by_loops(regression, model.layer, approx)
    kept_A, kept_B = placed.block.input_factor, placed.block.output_factor
    if isinstance(model.layer, nn.Embedding):  # diagonal, and that of "expand" in each case
        A, kept_A = factors_by_loops(regression, model.layer, "expand")[0], torch.diag(kept_A)
    assert_close(kept_A.reshape(A.shape), A, 1e-12)
    assert_close(kept_B.reshape(B.shape), B, 1e-12)


# ---------------------------------------------------------------------------------------------
# Blocks, against the exact ones
# ---------------------------------------------------------------------------------------------


def exact_blocks(regression, model, K):
    G = dense_ggn(regression, params_of(model, K.param_names))
    return {p.name: block_of(G, model, K.param_names, p.params) for p in K.blocks}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_those_of_their_own_basis(case):
    """EK-FAC keeps the diagonal of the exact block in K-FAC's basis, and so its trace.

    Being the nearest such matrix, it is no further from the exact block than K-FAC.
    """
    model, regression = problem(case)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    names = [name for name, _ in model.named_parameters() if name.startswith("layer.")]
    K = DiffusionKFACLinearOperator(regression, names, **options)
    EK = DiffusionEKFACLinearOperator(regression, names, **options)
    exact = exact_blocks(regression, model, K)
    for k, e in zip(K.blocks, EK.blocks, strict=True):
        G, dense_k, dense_e = exact[k.name], dense_block(k, model), dense_block(e, model)
        assert_close(dense_e.trace(), G.trace(), 1e-10)
        assert (dense_e - G).norm() <= (dense_k - G).norm() * (1 + 1e-9) + 1e-12
        if k.kind == "dense":
            assert_close(dense_k, G, 1e-11)


@pytest.mark.parametrize(("case", "max_dense"), [*((n, 1024) for n in NORMS), ("GroupNorm", 0)])
def test_norms_have_exact_blocks(case, max_dense):
    model, regression = problem(case)
    options = {"fisher_type": "type-2", "max_dense": max_dense}
    (placed,) = [
        p for p in DiffusionEKFACLinearOperator(regression, **options).blocks if "norm" in p.name
    ]
    assert placed.kind == ("dense" if max_dense else "diagonal")
    for names in (placed.params, placed.params[:1]):  # and one of them alone
        K = DiffusionKFACLinearOperator(regression, names, **options)
        G = exact_blocks(regression, model, K)["layer.norm"]
        truth = G if max_dense else torch.diag(torch.diag(G))
        assert_close(dense_block(K.blocks[0], model), truth, 1e-11)


class Table(nn.Module):
    """Parameters that no layer holds, as in PixArt's blocks, and a scalar."""

    def __init__(self):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, 3))
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        shift, scale = (self.scale_shift_table[None] + x.unsqueeze(1)).unbind(1)
        return self.gain * torch.tanh(self.layer(x) * (1 + scale)) + shift.square()


class NotMappable(Table):
    """Has control flow that depends on the data."""

    def forward(self, x, t):
        if float(x.sum()) > 1e9:
            raise AssertionError
        return super().forward(x, t)


@pytest.mark.parametrize("model", [Table(), NotMappable()], ids=["mapped", "looped"])
@pytest.mark.parametrize("max_dense", [1024, 3])
def test_parameters_of_no_layer(model, max_dense):
    model = model.double()
    regression = regression_of(model, (3,))
    K = DiffusionEKFACLinearOperator(regression, fisher_type="type-2", max_dense=max_dense)
    exact = exact_blocks(regression, model, K)
    kinds = {placed.name: placed.kind for placed in K.blocks}
    assert kinds["scale_shift_table"] == ("dense" if max_dense > 3 else "diagonal")
    assert kinds["gain"] == "dense"
    for placed in K.blocks:
        if placed.params in {("scale_shift_table",), ("gain",)}:
            G = exact[placed.name]
            truth = G if placed.kind == "dense" else torch.diag(torch.diag(G))
            assert_close(dense_block(placed, model), truth, 1e-11)
    J = ExampleGradientLinearOperator(regression)
    assert_close(J.rows(), example_gradients(regression, list(model.parameters())), 1e-12)


# ---------------------------------------------------------------------------------------------
# Frames folded into the batch
# ---------------------------------------------------------------------------------------------


class Video(nn.Module):
    """Sees the frames of a video ``[N, C, F, H, W]`` as images, or convolves it as a whole."""

    def __init__(self, frames_first=False, whole=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        if whole:
            self.conv = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1))
        self.norm, self.shared, self.whole = nn.GroupNorm(1, 2), nn.Linear(2, 2), whole
        self.order = (2, 0, 1, 3, 4) if frames_first else (0, 2, 1, 3, 4)

    def images(self, video):
        return video.permute(self.order).flatten(0, 1)

    def forward(self, x, t):
        out = self.images(self.conv(x)) if self.whole else self.conv(self.images(x))
        out = self.norm(torch.tanh(out))
        out = self.shared(out.movedim(1, -1)).movedim(-1, 1)
        back = [self.order.index(axis) for axis in range(5)]
        return out.reshape(x.permute(self.order).shape).permute(back)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_frames_are_positions(approx):
    """As of one layer on the whole video: a Conv3d that leaves time alone."""
    model, whole = Video().double(), Video(whole=True).double()
    weights = model.state_dict()
    whole.load_state_dict(weights | {"conv.weight": weights["conv.weight"].unsqueeze(2)})
    regression = regression_of(model, (2, 3, 2, 3))
    names = [name for name, _ in model.named_parameters()]
    J = ExampleGradientLinearOperator(regression, names)
    assert_close(J.rows(), example_gradients(regression, params_of(model, names)), 1e-12)
    options = {"fisher_type": "type-2", "kfac_approx": approx, "separate_weight_and_bias": False}
    for kind in (DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator):
        folded = kind(regression, ["conv.weight", "conv.bias"], **options)
        truth = kind(regression_of(whole, (2, 3, 2, 3)), ["conv.weight", "conv.bias"], **options)
        V = torch.randn(folded.shape[1], 3, dtype=torch.float64)
        if kind is DiffusionKFACLinearOperator or approx == "expand":  # else the basis is arbitrary
            assert_close(folded @ V, truth @ V, 1e-9)


def test_frames_before_examples_have_exact_blocks():
    model = Video(frames_first=True).double()
    regression = regression_of(model, (2, 3, 2, 3))
    with pytest.warns(UserWarning, match="the first axis does not hold one example after the"):
        K = DiffusionKFACLinearOperator(regression, fisher_type="type-2", max_dense=10_000)
    G = dense_ggn(regression, params_of(model, K.param_names))
    dense = [placed for placed in K.blocks if placed.name in K.info["others"]]
    assert dense
    for placed in dense:
        truth = block_of(G, model, K.param_names, placed.params)
        assert_close(placed.block.matrix, truth, 1e-11)


# ---------------------------------------------------------------------------------------------
# A kind of one's own
# ---------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """``x W^T / √I``, with names of its own."""

    def __init__(self, I, O):
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.randn(O, I)), nn.Parameter(torch.randn(O))

    def forward(self, x):
        return x @ self.matrix.T / self.matrix.shape[1] ** 0.5 + self.offset


class ScaledKind(SharingKind):
    weight_name, bias_name, joint = "matrix", "offset", False

    def inputs(self, module, x):
        return x.reshape(len(x), -1, x.shape[-1]) / module.matrix.shape[1] ** 0.5

    def gradients(self, module, g):
        return g.reshape(len(g), -1, g.shape[-1])


@pytest.mark.parametrize("key", [Scaled, f"{__name__}.Scaled"], ids=["class", "name"])
def test_a_kind_of_ones_own(key, monkeypatch):
    model = seeded(nn.Linear(3, 4), nn.Tanh(), Scaled(4, 3))
    regression = regression_of(model, (2, 3))
    unknown = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    assert {p.kind for p in unknown.blocks if "layers.2" in p.name} == {"dense"}
    monkeypatch.setitem(LAYER_KINDS, key, ScaledKind())
    for kind in (DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator):
        K = kind(regression, fisher_type="type-2")
        plain = seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        plain.load_state_dict(
            {
                "layers.2.weight": model.layers[2].matrix / 2,
                "layers.2.bias": model.layers[2].offset,
                "layers.0.weight": model.layers[0].weight,
                "layers.0.bias": model.layers[0].bias,
            }
        )
        truth = kind(regression_of(plain, (2, 3)), fisher_type="type-2")
        (own,) = [p for p in K.blocks if p.name == "layers.2.weight"]
        (twin,) = [p for p in truth.blocks if p.name == "layers.2.weight"]
        assert_close(dense_block(own, model), dense_block(twin, plain) / 4, 1e-9)


def test_a_wrong_kind_is_noticed_whatever_was_tried_out_before(monkeypatch):
    class Unscaled(ScaledKind):
        def inputs(self, module, x):
            return x.reshape(len(x), -1, x.shape[-1])

    regression = regression_of(seeded(nn.Linear(3, 4), nn.Tanh(), Scaled(4, 3)), (2, 3))
    DiffusionKFACLinearOperator(regression)
    monkeypatch.setitem(LAYER_KINDS, Scaled, Unscaled())
    with pytest.warns(UserWarning, match="inputs and outputs do not give its gradient"):
        K = DiffusionKFACLinearOperator(regression)
    assert list(K.info["others"]) == ["layers.2.matrix", "layers.2.offset"]


# ---------------------------------------------------------------------------------------------
# Listing
# ---------------------------------------------------------------------------------------------


def test_the_table_of_blocks():
    _, regression = problem("Conv2d: groups")
    K = DiffusionKFACLinearOperator(regression, fisher_type="type-2")
    rows = {row["block"]: row for row in K.table()}
    assert list(rows) == ["layer.weight", "layer.bias", "back.weight", "back.bias"]
    assert rows["layer.weight"]["kind"] == "Kronecker"
    assert rows["layer.weight"]["shape"] == (2, 2, 18)
    assert rows["layer.weight"]["parameters"] == 72
    assert rows["layer.weight"]["bytes"] == 8 * (2 * 18**2 + 2 * 2**2)
    assert rows["layer.bias"]["kind"] == "dense"
    assert abs(sum(row["trace_share"] for row in rows.values()) - 1) < 1e-12
    text = str(K)
    assert f"{K.shape[0]:,} parameters in 4 blocks" in text
    assert "2×2×18" in text
    assert "nothing selected is left out" in text
