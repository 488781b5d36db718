"""The forms in which a network is run: derivatives of all kinds are of one function."""

from functools import partial
from math import prod

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.func import functional_call, jvp, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
)
from curvlinops_diffusion.runtime.modes import (
    forward_mode,
    replaced_parameters,
    twice_differentiable,
)
from tests.cases import plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import dense_ggn, example_gradients, to_dense


class Shared(nn.Module):
    """One module under two names, and one parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.other = nn.Linear(3, 3)
        self.other.bias = self.first.bias

    def forward(self, x, t):
        return self.other(torch.tanh(self.again(torch.tanh(self.first(x)))))


def test_replaced_parameters():
    """Each place once: the module that has two names, and both modules of a shared parameter."""
    model = Shared().double()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    before = dict(model.named_parameters())
    values = {name: torch.ones_like(p) for name, p in before.items()}
    places = replaced_parameters(model, values)
    assert sorted(places) == ["first.bias", "first.weight", "other.bias", "other.weight"]
    out = functional_call(model, places, (x, None), tie_weights=False)
    hidden = torch.tanh(x.sum(1, keepdim=True) + 1)
    hidden = torch.tanh(3 * hidden + 1)
    assert_close(out, (3 * hidden + 1).expand(2, 3), 1e-14)
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, p in model.named_parameters():
        assert p is before[name]


def test_products_leave_a_module_under_two_names_alone():
    model = Shared().double()
    regression = plain_regression(model, (3,), count=3, num_draws=2)
    params = list(model.parameters())
    J = ExampleGradientLinearOperator(regression)
    rows, G = example_gradients(regression, params), dense_ggn(regression, params)
    v = torch.randn(J.shape[1], generator=torch.Generator().manual_seed(0)).double()
    before = [p.clone() for p in params]
    for _ in range(2):
        assert_close(DiffusionGGNLinearOperator(regression) @ v, G @ v, 1e-12)
        assert_close(J @ v, rows @ v, 1e-12)
        assert_close(J.rows(), rows, 1e-12)
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Mish])
def test_plain_forms_write_in_place(kind):
    """What else holds the tensor sees the value there: here a connection around the layer."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(3, 3), kind(inplace=True)

        def forward(self, x, t):
            h = self.layer(x)
            return self.act(h) * 2 + h

    model = Around().double()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    with twice_differentiable():
        found = model(x, None)
    assert_close(found, model(x, None), 1e-14)
    regression = plain_regression(model, (3,), count=2, num_draws=1)
    X, _ = next(iter(regression))
    scaled = X["scale"].unsqueeze(1) * model(X["x_t"], None)
    assert_close(regression.model_func(X), scaled, 1e-14)


class Padded(nn.Module):
    def __init__(self, padding_idx):
        super().__init__()
        self.embed = nn.Embedding(3, 3, padding_idx=padding_idx)
        nn.init.normal_(self.embed.weight)

    def forward(self, x, t):
        return torch.tanh(x + self.embed((x > 0).long().sum(1) % 3))


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_the_padding_row_has_no_derivative(padding_idx):
    model = Padded(padding_idx).double()
    regression = plain_regression(model, (3,), count=6, num_draws=2)
    G = to_dense(DiffusionGGNLinearOperator(regression))
    truth = dense_ggn(regression, list(model.parameters()))
    assert_close(G, truth, 1e-12)
    row = padding_idx % 3
    assert G[3 * row : 3 * row + 3].norm() == 0
    assert truth.norm() > 0


class Stopped(nn.Module):
    """Self-conditioning: a first pass of which no derivative is taken."""

    def __init__(self, switched_off):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self._switched_off = switched_off

    def forward(self, x, t):
        with self._switched_off():
            first = self.layer(x)
            with torch.enable_grad():  # and part of the first pass has one after all
                second = self.layer(torch.tanh(x))
            third = self.layer(first)
        return self.layer(x + first) + second * third


@pytest.mark.parametrize(
    ("switched_off", "outside"),
    [
        (torch.no_grad, torch.enable_grad),
        (lambda: torch.set_grad_enabled(False), torch.no_grad),
    ],
)
def test_forward_mode_stops_where_gradients_are_off(switched_off, outside):
    model = Stopped(switched_off).double()
    regression = plain_regression(model, (3,), count=3, num_draws=2)
    params = list(model.parameters())
    rows, G = example_gradients(regression, params), dense_ggn(regression, params)
    v = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    with outside():
        assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
        assert_close(ExampleGradientLinearOperator(regression) @ v, rows @ v, 1e-12)
        assert torch.is_grad_enabled() == (outside is torch.enable_grad)
    assert torch._C._is_fwd_grad_enabled()
    with forward_mode(), pytest.raises(ZeroDivisionError), torch.no_grad():
        raise ZeroDivisionError
    assert torch._C._is_fwd_grad_enabled()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, t):
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_fast_path_of_attention_is_off():
    """In eval mode ``nn.MultiheadAttention`` has one that no derivative goes through."""
    model = Attending().double().eval()
    regression = plain_regression(model, (3, 4), count=2, num_draws=1)
    fast = torch.backends.mha.get_fastpath_enabled()
    G = dense_ggn(regression, list(model.parameters()))
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-11)
    assert torch.backends.mha.get_fastpath_enabled() == fast


class OwnCheckpoint(Function):
    """A checkpoint as some networks have of their own."""

    @staticmethod
    def forward(ctx, run, x, *params):
        ctx.run, ctx.params = run, params
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        return (None, *torch.autograd.grad(out, (x, *ctx.params), g))


class Recomputed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.layer, self.last = (nn.Linear(3, 3) for _ in range(3))
        self._how = how

    def forward(self, x, t):
        x = self.first(x)
        if self._how == "own":
            h = OwnCheckpoint.apply(self.layer, x, *self.layer.parameters())
        else:
            h = checkpoint(self.layer, x, use_reentrant=self._how == "reentrant")
        return self.last(torch.tanh(h))


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *(("K-FAC", "own"), ("K-FAC", "reentrant"), ("K-FAC", "not reentrant")),
        *(("rows", "own"), ("rows", "not reentrant"), ("GGN", "not reentrant")),
    ],
)
def test_checkpoints_go_through_or_are_named(what, how):
    model = Recomputed(how).double()
    regression = plain_regression(model, (3,), count=3, num_draws=2)

    def run():
        if what == "GGN":
            return to_dense(DiffusionGGNLinearOperator(regression))
        if what == "rows":
            return ExampleGradientLinearOperator(regression).rows()
        return DiffusionKFACLinearOperator(regression, fisher_type="type-2")

    if how == "not reentrant" and what != "GGN":
        found = run()
        if what == "rows":
            assert_close(found, example_gradients(regression, list(model.parameters())), 1e-12)
        else:
            G = dense_ggn(regression, list(model.parameters()))
            assert_close(found.trace(), G.trace(), 0.5)
        return
    with pytest.raises(ValueError, match=r"recomputed in the backward pass.*gradient checkpoints"):
        run()


def test_other_errors_of_the_network_are_told_in_its_words():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, t):
            return self.layer(x) @ torch.ones(7, 7).double()

    regression = plain_regression(Broken().double(), (3,))
    with pytest.raises(ValueError, match="shapes cannot be multiplied") as error:
        DiffusionKFACLinearOperator(regression)
    assert isinstance(error.value.__cause__, RuntimeError)


class Tokens(nn.Module):
    """An embedding of the pixels' signs, several of each in an example."""

    def __init__(self, table):
        super().__init__()
        self.layer, self.table = nn.Conv2d(2, 2, 3, padding=1), table

    def forward(self, x, t):
        tokens = (x[:, 0] > 0).long().flatten(1)
        if isinstance(self.table, nn.EmbeddingBag):
            return self.layer(x) + self.table(tokens).reshape(len(x), 2, 1, 1)
        return self.layer(x) + self.table(tokens).mT.reshape(x.shape)


@pytest.mark.parametrize(
    "table",
    [
        nn.Embedding(2, 2, sparse=True),
        nn.Embedding(2, 2, scale_grad_by_freq=True),
        nn.EmbeddingBag(2, 2, sparse=True),
    ],
)
def test_tables_of_embeddings_give_dense_derivatives(table):
    model = Tokens(table).double()
    regression = plain_regression(model, (2, 3, 3), count=3, num_draws=2)
    own = (table.sparse, table.scale_grad_by_freq)
    table.sparse = table.scale_grad_by_freq = False
    params = list(model.parameters())
    rows, G = example_gradients(regression, params), dense_ggn(regression, params)
    table.sparse, table.scale_grad_by_freq = own
    regression = plain_regression(model, (2, 3, 3), count=3, num_draws=2)
    J = ExampleGradientLinearOperator(regression)
    assert_close(J.rows(), rows, 1e-12)
    assert_close(J.adjoint() @ torch.eye(3).double(), rows.T, 1e-12)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    assert_close(EK.trace(), G.trace(), 1e-11)
    if isinstance(table, nn.EmbeddingBag):
        for product in (lambda: J @ G[0], lambda: DiffusionGGNLinearOperator(regression) @ G[0]):
            with pytest.raises(
                ValueError, match="uses '_embedding_bag', of which PyTorch has no f"
            ):
                product()
    else:
        assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
    assert (table.sparse, table.scale_grad_by_freq) == own


@pytest.mark.parametrize(
    ("wrap", "dim"),
    [
        (nn.utils.weight_norm, 1),
        (nn.utils.parametrizations.weight_norm, 0),
        (nn.utils.parametrizations.weight_norm, None),
    ],
)
def test_weight_norm(wrap, dim):
    model = seeded(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))
    wrap(model.layers[0], dim=dim)
    regression = plain_regression(model, (2, 3, 3), count=3, num_draws=2)
    params = list(model.parameters())
    G = dense_ggn(regression, params)
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
    rows = example_gradients(regression, params)
    J = ExampleGradientLinearOperator(regression)
    assert_close(J.rows(), rows, 1e-12)
    assert_close(J @ G[:, 0], rows @ G[:, 0], 1e-12)
    X, _ = next(iter(regression))
    plain = regression.objective.predict(next(iter(regression.batches())))
    scaled = regression.model_func(X) / X["scale"].unsqueeze(1)
    assert_close(scaled.detach(), plain.detach(), 1e-13)


SIZES = (2, 4, 6, 6)


def attention(x):
    q = x.flatten(2).mT.unsqueeze(1)
    return functional.scaled_dot_product_attention(q, 2 * q, q.tanh())


def scaled(x, *shape):
    return torch.linspace(0.5, 2, prod(shape), dtype=torch.float64, device=x.device).view(shape)


FUNCTIONS = {
    "group_norm": lambda x: functional.group_norm(x, 2, scaled(x, 4), scaled(x, 4)),
    "group_norm without weight": partial(functional.group_norm, num_groups=2),
    "layer_norm": lambda x: functional.layer_norm(x, (6,), scaled(x, 6), scaled(x, 6)),
    "rms_norm": lambda x: functional.rms_norm(x, (6,), scaled(x, 6)),
    "batch_norm": lambda x: functional.batch_norm(x, scaled(x, 4), scaled(x, 4), scaled(x, 4)),
    "instance_norm": functional.instance_norm,
    "normalize": partial(functional.normalize, dim=1),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "glu": functional.glu,
    "softmax": partial(functional.softmax, dim=-1),
    "scaled_dot_product_attention": attention,
    "conv2d, strided": lambda x: functional.conv2d(x, scaled(x, 4, 4, 3, 3), stride=2, padding=1),
    "conv_transpose2d": lambda x: functional.conv_transpose2d(x, scaled(x, 4, 4, 2, 2), stride=2),
    "linear": lambda x: functional.linear(x, scaled(x, 3, 6)),
    "interpolate, nearest": partial(functional.interpolate, scale_factor=2.0),
    "avg_pool2d": partial(functional.avg_pool2d, kernel_size=2),
}

LAYOUTS = {
    "contiguous": lambda z: z.contiguous(),
    "channels last": lambda z: z.movedim(-3, -1).contiguous().movedim(-1, -3),
    "transposed": lambda z: z.mT.contiguous().mT,
    "examples last": lambda z: z.movedim(0, -1).contiguous().movedim(-1, 0),
}


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
                found = vmap(lambda v, x=primal: jvp(function, (x,), (v,))[1])(directions)
            assert_close(found, expected, 1e-12)


class Functions(TorchDispatchMode):
    """Notes which functions of torch's core are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_group_norms_derivative_is_that_of_elementary_functions():
    """On CUDA that of its kernel refuses what is not contiguous."""
    norm, x = nn.GroupNorm(2, 4).double(), torch.ones(1, 4, 2, 2).double()
    with Functions() as outside, torch.no_grad():
        norm(x)
    with Functions() as within, torch.no_grad(), forward_mode():
        norm(x)
    assert "aten::native_group_norm" in outside.called
    assert "aten::native_group_norm" not in within.called
