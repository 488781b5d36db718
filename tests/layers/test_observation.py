"""The loop that observes layers: its order, its clean-up, and that nothing outlives it."""

import gc
import weakref

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
)
from curvlinops_diffusion.curvature.kronecker_factors import _OutputFactors
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.layers.moments import LatestProduct
from curvlinops_diffusion.layers.observation import Observer, Observers, WholeLayers, observed
from tests.cases import plain_regression, seeded, tiny_unet, unet_regression
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of


class Diary(Observer):
    def __init__(self):
        self.pages = []

    def start(self, batch):
        self.pages.append("start")

    def input(self, layer, x):
        self.pages.append(f"input {layer.name}")

    def predicted(self, batch, prediction_BD):
        self.pages.append("predicted")

    def gradient(self, layer, call, g, calls):
        self.pages.append(f"gradient {layer.name} {call} of {calls}")

    def pulled_back(self, batch, v_BD):
        self.pages.append("pulled back")

    def finish(self):
        self.pages.append("finish")


class Twice(nn.Module):
    """Calls its first layer twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, t):
        return self.two(self.one(torch.tanh(self.one(x))))


def two_vectors(batch, prediction_BD):
    ones = torch.ones_like(prediction_BD)
    yield ones, True
    yield 2 * ones, False


@pytest.fixture
def regression():
    return plain_regression(Twice().double(), (3,), count=2, num_draws=1)


def layers_of(regression):
    return covered_parameters(regression.objective.model, None).layers


def test_the_order(regression):
    one, two = Diary(), Diary()
    batch = next(regression.batches())
    with observed(regression.objective, layers_of(regression), Observers([one, two])) as network:
        network.run(batch, two_vectors)
    backward = ["gradient two 0 of 1", "gradient one 1 of 2", "gradient one 0 of 2", "pulled back"]
    forward = ["input one", "input one", "input two"]
    assert one.pages == ["start", *forward, "predicted", *backward, *backward, "finish"]
    assert two.pages == one.pages


def test_calls_are_brought_together(regression):
    seen = {}

    class Seen(WholeLayers):
        def whole(self, layer, xs, gs, N):
            assert N == 2
            seen.setdefault(layer.name, []).append((xs, gs))

    batch = next(regression.batches())
    with observed(regression.objective, layers_of(regression), Seen(torch.float64)) as network:
        network.run(batch, two_vectors)
    for name, vectors in seen.items():
        (xs, gs), (xs_again, gs_again) = vectors
        assert len(xs) == len(gs) == {"one": 2, "two": 1}[name]
        for x, again in zip(xs, xs_again, strict=True):
            assert torch.equal(x, again)
        for g, again in zip(gs, gs_again, strict=True):
            assert_close(again, 2 * g, 1e-14)
    model = regression.objective.model
    (x, _), _ = seen["one"][0]
    assert torch.equal(x, batch.x_t)
    assert torch.equal(seen["one"][0][0][1], torch.tanh(model.one(batch.x_t)).detach())


def test_everything_is_as_it_was_after_an_error(regression):
    model = regression.objective.model
    model.two.weight.requires_grad_(False)
    diary = Diary()

    def failing(batch, prediction_BD):
        raise RuntimeError("no vectors")
        yield

    with (
        pytest.raises(RuntimeError, match="no vectors"),
        observed(regression.objective, layers_of(regression), diary) as network,
    ):
        network.run(next(regression.batches()), failing)
    assert diary.pages[-1] == "finish"
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert not any(m._forward_hooks for m in model.modules())


def test_only_the_pass_is_observed(regression):
    """Not what runs the network before, after, or while vectors are made: an encoder, say."""
    diary, batch = Diary(), next(regression.batches())
    model = regression.objective.model

    def vectors(batch, prediction_BD):
        model(torch.ones(5, 3).double(), None)
        yield torch.ones_like(prediction_BD), False

    with observed(regression.objective, layers_of(regression), diary) as network:
        model(torch.ones(5, 3).double(), None)
        network.run(batch, vectors)
        model(torch.ones(5, 3).double(), None)
        once = list(diary.pages)
        network.run(batch, vectors)
    assert diary.pages == [*once, *once]
    assert sum(page.startswith("input") for page in once) == 3


def test_the_copies_of_inputs_are_gone_before_the_backward_pass(monkeypatch):
    """K-FAC needs none of them by then, and a network in low precision has one for each layer."""
    model = seeded(nn.Linear(3, 3), nn.Linear(3, 3), dtype=torch.bfloat16)
    copies, alive = [], []
    of, gradient = LatestProduct.of, _OutputFactors.gradient

    def recorded(self, x):
        copies.append(weakref.ref(x))
        return of(self, x)

    def counted(self, *args):
        alive.append(sum(copy() is not None for copy in copies))
        gradient(self, *args)

    monkeypatch.setattr(LatestProduct, "of", recorded)
    monkeypatch.setattr(_OutputFactors, "gradient", counted)
    DiffusionKFACLinearOperator(plain_regression(model, (3,), count=2, num_draws=1))
    assert len(copies) == 2
    assert set(alive) == {0}


MADE = {
    "EK-FAC": DiffusionEKFACLinearOperator,
    "Shampoo": lambda r: DiffusionKFACLinearOperator(r, kfac_approx="shampoo"),
    "gradients": lambda r: ExampleGradientLinearOperator(r).rows(),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_nothing_waits_for_the_garbage_collector(make):
    """A dropped result's memory is free at once, on a GPU all of it.

    Python looks for reference cycles when there are many objects, not when memory runs out.
    """
    regression = unet_regression(tiny_unet(), count=2, num_draws=1)
    make(regression)  # whatever is made once
    gc.collect()
    gc.disable()
    try:
        before = {id(z) for z in gc.get_objects() if isinstance(z, torch.Tensor)}
        result = make(regression)
        last = result if isinstance(result, torch.Tensor) else result.blocks[0]
        told = weakref.ref(last)
        del result, last
        assert told() is None
        tensors = [z for z in gc.get_objects() if isinstance(z, torch.Tensor)]
        assert not [tuple(z.shape) for z in tensors if id(z) not in before]
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------
# Sharing
# ---------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Queries, keys and values of one tensor; between the last two it may be changed in place."""

    def __init__(self, changed):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 3) for _ in range(3))
        self._changed = changed

    def forward(self, x, t):
        tokens = torch.tanh(x)
        out = self.q(tokens) * self.k(tokens)
        if self._changed:
            with torch.no_grad():  # autograd would refuse
                tokens.data.mul_(1)
                tokens.add_(1)
        return out + self.v(tokens)


@pytest.mark.parametrize(("changed", "products"), [(False, 1), (True, 2)])
def test_layers_that_share_an_input_share_its_product(changed, products, monkeypatch):
    """Unless it has changed in between; and their factors are those of layers that do not."""
    model = Projections(changed).double()
    batch = next(plain_regression(model, (5, 3), count=4, num_draws=1).batches())
    objective = plain_regression(model, (5, 3), count=4).objective
    layers = covered_parameters(model, None).layers
    shown = []

    class Shown(Observer):
        def input(self, layer, x):
            shown.append(x)

    with observed(objective, layers, Shown()) as network:
        network.run(batch, two_vectors)
    latest, found = LatestProduct(), []
    for x in shown:
        before = latest._product
        found.append(latest.of(x).clone())
        products -= latest._product is not before
    assert products == 0
    tokens = torch.tanh(batch.x_t)
    for product, x in zip(found[:2], (tokens, tokens), strict=True):
        rows = x.reshape(-1, 3) + changed  # the tensor that they were shown has changed with it
        assert_close(product, rows.T @ rows, 1e-14)


def test_shared_products_in_a_pass():
    model = Projections(changed=False).double()
    regression = plain_regression(model, (5, 3), count=4, num_draws=2, batch_size=2)
    K = DiffusionKFACLinearOperator(regression)
    rows = torch.cat([torch.tanh(b.x_t).reshape(-1, 3) for b in regression.batches()])
    for placed in K.blocks:
        if placed.kind == "Kronecker":
            assert_close(placed.block.input_factor, rows.T @ rows / len(rows), 1e-13)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name_of", [lambda p: p, lambda p: p.t(), lambda p: p[:2].t()])
def test_a_parameter_under_a_second_name(name_of, trainable):
    """Held as a plain attribute, itself or a view of it: gradients go through both names."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            object.__setattr__(self, "second", name_of(self.layer.weight))

        def forward(self, x, t):
            h = torch.tanh(x)[:, : len(self.second)] @ self.second
            return self.layer(x) + h.sum(1, keepdim=True)

    model = Tied()
    second = model.second
    regression = plain_regression(model, (3,), num_draws=2, batch_size=2)
    names = [name for name, _ in model.named_parameters()]
    truth = example_gradients(regression, params_of(model, names))
    model.layer.requires_grad_(trainable)
    J = ExampleGradientLinearOperator(regression)
    for rows in (J.rows([0]), (J.adjoint() @ torch.eye(5).double()[:, :1]).T):
        assert_close(rows, truth[:1], 1e-12)
    assert model.second is second
    assert model.layer.weight.requires_grad == trainable
