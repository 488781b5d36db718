"""Parameters without effect on the prediction: named, with what to call; layers without entries."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    load_operator,
)
from curvlinops_diffusion.measurements import ExampleFunction
from curvlinops_diffusion.runtime.modes import modules_of
from tests.cases import TimeBlind, plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import dense_ggn, example_gradients, params_of, to_dense

KINDS = [
    DiffusionKFACLinearOperator,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    ExampleGradientLinearOperator,
]


class Partly(nn.Module):
    """Layers that take part, and some that do not, each for another reason."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused, self.detached, self.scaled, self.silent, self.expert = (
            nn.Linear(3, 3) for _ in range(5)
        )
        self.zero = nn.Parameter(torch.zeros(3))
        self.double().eval()

    def forward(self, x, t):
        h = torch.tanh(self.used(x)) + self.detached(x).detach() + 0 * self.scaled(x)
        with torch.no_grad():
            constant = self.silent(x) + self.zero
        h = h + constant
        routed = x[:, 0] > 1.5  # some examples alone
        return torch.where(routed.unsqueeze(1), self.expert(h), h) if routed.any() else h


def problem(model, count=5):
    return plain_regression(model, (3,), count=count, num_draws=2, batch_size=2)


def computed(kind, regression, names):
    """Everything that an operator or a Jacobian is asked for first."""
    made = kind(regression, names)
    return made @ torch.ones(made.shape[1], dtype=torch.float64)


DEAD = ["unused.weight", "detached.bias", "scaled.weight", "silent.weight", "zero"]


def first_with_all(cases):
    """Each case with one operator, and the first with all of them."""
    first, *others = cases
    pairs = [*((first, kind) for kind in KINDS), *((case, KINDS[0]) for case in others)]
    return pytest.mark.parametrize(("case", "kind"), pairs)


@first_with_all(DEAD)
def test_none_of_them_takes_part(case, kind):
    match = rf"None of the 1 parameters has an effect on the prediction.*'{case}'"
    with pytest.raises(ValueError, match=match):
        computed(kind, problem(Partly()), [case])


@pytest.mark.parametrize("kind", KINDS)
def test_some_take_no_part(kind):
    """A warning, once for each problem, and the derivatives of the twin."""
    model = Partly()
    regression = problem(model)
    names = ["used.weight", "unused.weight", "silent.weight"]
    with pytest.warns(UserWarning, match=r"2 of 3 parameters \(18 of 27 entries\) have no effect"):
        computed(kind, regression, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        computed(kind, regression, names)
        J = ExampleGradientLinearOperator(regression, names)
        assert_close(J.rows(), example_gradients(regression, params_of(model, names)), 1e-12)
        G = to_dense(DiffusionGGNLinearOperator(regression, names))
    assert_close(G, dense_ggn(regression, params_of(model, names)), 1e-12)


def test_what_later_examples_use_is_no_error():
    """A layer that the first batches do not reach: a warning, for which the data is searched."""
    model = Partly()
    regression = plain_regression(model, (3,), count=40, num_draws=1, batch_size=2)
    used = [bool((batch.x_t[:, 0] > 1.5).any()) for batch in regression.batches()]
    assert any(used)
    assert not any(used[:2])
    J = ExampleGradientLinearOperator(regression, ["expert.bias"])
    with pytest.warns(UserWarning, match="of the first examples.*other examples may use them"):
        v = J @ torch.ones(3).double()
    assert v.norm() > 0


def test_a_loss_of_weight_zero_is_no_missing_effect():
    """Weights of the first examples may be zero: the prediction depends on the parameters."""
    model = seeded(nn.Linear(3, 3))
    weights = torch.tensor([0.0, 0, 0, 0, 1])
    regression = plain_regression(model, (3,), count=5, num_draws=1, example_weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        EK = DiffusionEKFACLinearOperator(regression)
    assert EK.trace() > 0


# ---------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------


def adapted(**options):
    """A network with the adapters ``style`` and ``other`` in each of its layers."""
    model = seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    for name in ("style", "other"):
        config = LoraConfig(r=2, target_modules=["layers.0", "layers.2"], **options)
        model = inject_adapter_in_model(config, model, name)
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    each(model, lambda layer: layer.set_adapter("style"))
    return model.eval()


def each(model, change):
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            change(module)


def of_adapter(model, name="style"):
    return [n for n, _ in model.named_parameters() if f".{name}." in n]


SWITCHED_OFF = {
    "fused": (lambda layer: layer.merge(), "'style' is fused.*unfuse_lora"),
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled: call enable_lora"),
    "another": (lambda layer: layer.set_adapter("other"), r"not active: call set_adapters\('style"),
    "scale": (lambda layer: layer.scaling.update(style=0.0), "scale 0: call set_adapters"),
    "another, fused": (
        lambda layer: (layer.set_adapter("other"), layer.merge()),
        "'other' is fused.*unfuse_lora",
    ),
    "no scale left": (lambda layer: layer.set_scale("style", 0), "scale 0: call set_adapters"),
    "untrained": (
        lambda layer: layer.lora_B["style"].weight.data.zero_(),
        "2 of 4 parameters.*lora_B of adapter 'style' is zero",
    ),
}


@first_with_all(SWITCHED_OFF)
def test_adapters_that_are_switched_off(case, kind):
    change, match = SWITCHED_OFF[case]
    model = adapted()
    names, regression = of_adapter(model), problem(model)
    right = computed(kind, regression, names)
    each(model, change)
    if case == "untrained":
        with pytest.warns(UserWarning, match=match):
            computed(kind, problem(model), names)  # weights are looked at once for each problem
    else:
        with pytest.raises(ValueError, match=match):
            computed(kind, regression, names)
    if case == "fused":
        each(model, lambda layer: layer.unmerge())
        assert_close(computed(kind, regression, names), right, 1e-8)


@pytest.mark.parametrize("measurement", ["loss", ExampleFunction(lambda m, e, d: m(e.x0, 0).sum())])
def test_adapters_may_be_switched_off_between_products(measurement):
    model = adapted()
    names = of_adapter(model)
    J = ExampleGradientLinearOperator(problem(model), names, measurement=measurement)
    assert J.rows().norm() > 0
    each(model, lambda layer: layer.merge())
    with pytest.raises(ValueError, match="unfuse_lora"):
        J.rows()


def test_what_adapters_save_is_looked_at_as_well():
    """``modules_to_save`` of another adapter, and the module that they replace."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, t):
            return self.last(torch.tanh(self.first(x)))

    config = LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"])
    model = get_peft_model(Two().double(), config)
    model.eval()
    inner = model.base_model.model
    names = [n for n, _ in inner.named_parameters() if "modules_to_save" in n]
    regression = problem(inner)
    assert computed(DiffusionKFACLinearOperator, regression, names).norm() > 0
    others = [n for n, _ in inner.named_parameters() if "original_module" in n]
    with pytest.warns(UserWarning, match="2 of 4 parameters.*original_module"):
        computed(DiffusionKFACLinearOperator, regression, [*names, *others])
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="enable_adapter_layers"):
        computed(DiffusionKFACLinearOperator, regression, names)
    plain = model.merge_and_unload()
    with pytest.raises(ValueError, match="the model has no adapter: it was unloaded"):
        computed(DiffusionKFACLinearOperator, problem(plain), ["first.lora_A.default.weight"])


def test_the_modules_of_a_model():
    """Those that torch finds, each once: also one under two names, and none in place of one."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared))
    model.register_module("none", None)
    model[1].add_module("back", model[0])
    assert set(modules_of(model)) == set(model.modules())
    assert len(modules_of(model)) == len(list(model.modules()))
    assert modules_of(model)[0] is model


# ---------------------------------------------------------------------------------------------
# Layers of size zero
# ---------------------------------------------------------------------------------------------


class WithEmpty(TimeBlind):
    """A network beside whose layers others of size zero are called, or held."""

    def __init__(self, empty, called):
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.empty, self.called = empty, called
        self.double().eval()

    def forward(self, x, t):
        h = self.layers(x)
        return h if self.called is None else self.called(self.empty, h)


def _beside(module, h):
    return torch.cat([h, module(h)], -1)


def _of_nothing(module, h):
    return torch.cat([h, module(h[..., :0])], -1)


class EmptyParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(0, 3))


EMPTY = {
    "no outputs": (lambda: nn.Linear(6, 0), _beside),
    "no inputs": (lambda: nn.Linear(0, 6), lambda module, h: h + module(h[..., :0])),
    "no features": (lambda: nn.LayerNorm(0), _of_nothing),
    "parameter": (EmptyParameter, lambda module, h: h + module.p.sum()),
    "transposed": (lambda: nn.ConvTranspose2d(3, 0, 3), None),
    "embedding": (lambda: nn.Embedding(0, 4), None),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("how", EMPTY)
def test_layers_of_size_zero(how, tmp_path):
    """The same as without them, and vectors in every format have room for them."""
    make, called = EMPTY[how]
    model = WithEmpty(make(), called)
    regression = plain_regression(model, (6,), count=4, num_draws=1, batch_size=2)
    names = [name for name, p in model.named_parameters() if p.numel() > 0]
    tensors = [torch.ones_like(p.detach()) for p in model.parameters()]
    EK, without = (DiffusionEKFACLinearOperator(regression, own) for own in (None, names))
    assert EK.shape == without.shape
    found, right = (one.inverse(0.1, relative=True) for one in (EK, without))
    assert torch.equal(to_dense(found), to_dense(right))
    assert [z.shape for z in EK @ tensors] == [p.shape for p in model.parameters()]
    EK.save(tmp_path / "operator")
    assert torch.equal(to_dense(load_operator(tmp_path / "operator", model)), to_dense(EK))
    J, G = (kind(regression) for kind in (ExampleGradientLinearOperator, KINDS[2]))
    assert_close(J.rows(), example_gradients(regression, params_of(model, names)), 1e-12)
    assert_close(to_dense(G), dense_ggn(regression, params_of(model, names)), 1e-12)
