"""Random small networks of every layer kind and odd call patterns: right, or refused.

The twins are plain reverse-mode autograd in float64, example by example.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from tests.cases import images, noise_levels
from tests.comparisons import assert_close
from tests.reference import (
    block_of,
    dense_block,
    dense_ggn,
    example_gradients,
    kronecker_factors,
    params_of,
    to_dense,
    type2_vectors,
)

C, SIZE = 2, 2  # channels and pixels of the images, and of everything in between


def of_positions(module):
    """A module on ``[N, S, C]`` as one on images."""

    def call(h):
        return module(h.flatten(2).mT).mT.reshape(h.shape)

    return call


def of_sequences(module):
    """A module on ``[N, C, S]`` as one on images."""
    return lambda h: module(h.flatten(2)).reshape(h.shape)


def of_vectors(module):
    """A module on ``[N, D]`` as one on images."""
    return lambda h: module(h.flatten(1)).reshape(h.shape)


def of_tokens(module):
    """An embedding of the signs of the pixels."""

    def call(h):
        tokens = (h.detach()[:, 0] > 0).long().flatten(1)
        return h + module(tokens).mT.reshape(h.shape)

    return call


class Scale(nn.Module):
    """Parameters that no known layer holds."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, h):
        return h * self.factor


# what a network is built of: a module, and how images go through it
LAYERS = {
    "conv": lambda: (nn.Conv2d(C, C, 3, padding=1), None),
    "conv, circular": lambda: (nn.Conv2d(C, C, 3, padding=1, padding_mode="circular"), None),
    "conv, no bias": lambda: (nn.Conv2d(C, C, 1, bias=False), None),
    "depthwise": lambda: (nn.Conv2d(C, C, 3, padding=1, groups=C), None),
    "transposed": lambda: (nn.ConvTranspose2d(C, C, 3, padding=1), None),
    "conv 1d": lambda: (nn.Conv1d(C, C, 3, padding=1), of_sequences),
    "linear": lambda: (nn.Linear(C, C), of_positions),
    "linear, no bias": lambda: (nn.Linear(C, C, bias=False), of_positions),
    "dense": lambda: (nn.Linear(C * SIZE**2, C * SIZE**2), of_vectors),
    "group norm": lambda: (nn.GroupNorm(1, C), None),
    "layer norm": lambda: (nn.LayerNorm(C), of_positions),
    "instance norm": lambda: (nn.InstanceNorm2d(C, affine=True), None),
    "batch norm": lambda: (nn.BatchNorm2d(C), None),
    "tokens": lambda: (nn.Embedding(2, C), of_tokens),
    "padded tokens": lambda: (nn.Embedding(2, C, padding_idx=0), of_tokens),
    "scale": lambda: (Scale(), None),
}
ACTIVATIONS = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "silu, in place": lambda: nn.SiLU(inplace=True),
    "mish, in place": lambda: nn.Mish(inplace=True),
    "leaky relu, in place": lambda: nn.LeakyReLU(0.3, inplace=True),
    "gelu": nn.GELU,
    "none": nn.Identity,
}


# how a layer is called, given the function that calls it
def _under_no_grad(call, h, t):
    with torch.no_grad():
        first = call(h)
    return call(h + first)


def _without_gradient(call, h):
    with torch.no_grad():
        return call(h)


def _varying(call, h, t):
    for _ in range(1 + int(t[0]) % 2):
        h = h + call(h)  # a norm twice in a row would be the same as once, but for 1e-8
    return h


PATTERNS = {
    "plain": lambda call, h, t: call(h),
    "residual": lambda call, h, t: h + call(h),
    "twice": lambda call, h, t: call(torch.tanh(call(h))),
    "detached input": lambda call, h, t: h + call(h.detach()),
    "detached output": lambda call, h, t: h + call(h).detach(),
    "self-conditioned": _under_no_grad,
    "stopped on the way": lambda call, h, t: call(call(h).detach() + h),
    "other pixels": lambda call, h, t: call(h) + call(h.flip(-1)),
    "varying calls": _varying,
    "unused": lambda call, h, t: (call(h), h)[1],
    "kept for later": lambda call, h, t: h + 0 * call(h),
    "switched off": lambda call, h, t: _without_gradient(call, h) + h,
    "behind a detached tensor": lambda call, h, t: h + torch.tanh(call(h)).detach() * h,
}


@dataclass(frozen=True)
class Step:
    """One step of a network.

    Attributes:
        layer: A layer's name, or the number of an earlier step whose module is called again.
        pattern: How it is called.
        activation: What follows.
        frozen: Whether its weight is not trained.
    """

    layer: str | int
    pattern: str
    activation: str
    frozen: bool


class Network(nn.Module):
    """A network of steps."""

    def __init__(self, steps):
        super().__init__()
        self.steps, modules, calls = steps, [], []
        for number, step in enumerate(steps):
            again = isinstance(step.layer, int)
            if again and number > 0:  # a module under two names
                modules.append(modules[step.layer % number])
                calls.append(calls[step.layer % number])
                continue
            module, adapted = LAYERS["conv" if again else step.layer]()
            modules.append(module)
            calls.append(module if adapted is None else adapted(module))
        self.layers = nn.ModuleList(modules)
        self.activations = nn.ModuleList(ACTIVATIONS[step.activation]() for step in steps)
        self._calls = calls
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data = 0.2 + 0.5 * noise
        self.double().eval()
        for step, module in zip(steps, modules, strict=True):
            if step.frozen and hasattr(module, "weight") and module.weight is not None:
                module.weight.requires_grad_(False)

    def forward(self, x, t):
        h = x
        for step, call, activation in zip(self.steps, self._calls, self.activations, strict=True):
            h = activation(PATTERNS[step.pattern](call, h, t) + 0)  # a new tensor to be changed
        return h


steps = st.builds(
    Step,
    layer=st.one_of(st.sampled_from(sorted(LAYERS)), st.integers(0, 3)),
    pattern=st.sampled_from(sorted(PATTERNS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    frozen=st.sampled_from([False, False, False, True]),
)
networks = st.lists(steps, min_size=1, max_size=4)


def problem(model):
    """Each draw has one noise level; where the calls depend on it, batches of several couple."""
    objective = DenoisingObjective(model, noise_levels())
    # no batch of one example: torch 2.14's own gradient of a batch norm is wrong there (on a CPU),
    # where the pixels of image or gradient lie in memory as those of channels_last
    data = images(4, channels=C, size=SIZE)
    return NoisedRegression(objective, data, timesteps=[2, 7], batch_size=2)


def has_gradients(regression):
    """Whether the prediction depends on any parameter, by more than rounding errors.

    Of a saturated activation the output says nothing of what is before it, nor can a trial.
    """
    model = regression.objective.model
    if not all(regression.objective.predict(b).requires_grad for b in regression.batches()):
        return False
    trained = [p for p in model.parameters() if p.requires_grad]
    return bool((example_gradients(regression, trained).norm(dim=1) > 1e-6).all())


def check(model):
    """Compare everything with its twin; tell what was right and what was refused."""
    regression = problem(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = params_of(model, names)
    before = {name: z.clone() for name, z in model.state_dict().items()}
    rows = example_gradients(regression, params)
    G = dense_ggn(regression, params)
    outcomes = {}

    def attempt(what, compute):
        try:
            made = compute()
        except ValueError:
            outcomes[what] = "refused"
            return None
        outcomes[what] = "right"
        return made

    J = attempt("rows", lambda: ExampleGradientLinearOperator(regression, names))
    found = None if J is None else attempt("rows", J.rows)
    if found is not None:
        assert_close(found, rows, 1e-9)
    if J is not None:
        v = torch.randn(J.shape[1], generator=torch.Generator().manual_seed(1)).double()
        product = attempt("product", lambda: J @ v)
        if product is not None:
            assert_close(product, rows @ v, 1e-9)
    GGN = attempt("GGN", lambda: DiffusionGGNLinearOperator(regression, names))
    dense = None if GGN is None else attempt("GGN", lambda: to_dense(GGN))
    if dense is not None:
        assert_close(dense, G, 1e-9)
    own = dict(model.named_modules())
    for what, kind in (
        ("K-FAC", DiffusionKFACLinearOperator),
        ("EK-FAC", DiffusionEKFACLinearOperator),
    ):
        operator = attempt(what, lambda kind=kind: kind(regression, names, fisher_type="type-2"))
        for placed in () if operator is None else operator.blocks:
            exact = block_of(G, model, names, placed.params)
            block = dense_block(placed, model)
            if placed.kind in ("dense", "diagonal"):
                truth = exact if placed.kind == "dense" else exact.diagonal().diag()
                assert_close(block, truth, 1e-9)
            elif what == "EK-FAC":
                # the exact second moments in its own basis, whatever that is
                assert_close(block.trace(), exact.trace(), 1e-9)
                eigen = placed.block
                if eigen.output_basis.ndim == 2 and not placed.transposed:
                    I = eigen.shape[-1]
                    U_A = torch.eye(I).double() if eigen.input_basis is None else eigen.input_basis
                    U = torch.kron(eigen.output_basis, U_A)
                    assert_close(eigen.eigenvalues.flatten(), (U.T @ exact @ U).diag(), 1e-8)
            else:
                module = own[placed.params[0].rpartition(".")[0]]
                if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
                    A, B = kronecker_factors(regression, module, type2_vectors, "expand")
                    if isinstance(A, torch.Tensor):
                        assert_close(block, torch.kron(B, A), 1e-9)
                    else:
                        assert block.norm() == 0
        if operator is not None:
            check_relative_damping(operator, model)
    after = model.state_dict()
    assert all(torch.equal(after[name], z) for name, z in before.items())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    return outcomes


def check_relative_damping(operator, model):
    """Compare with dense inverses of the blocks; those of parameters without effect are zero."""
    found = operator.inverse(0.1, relative=True)
    dense = [dense_block(placed, model) for placed in operator.blocks]
    largest = max(float(block.diagonal().max()) for block in dense)
    for block, inverse in zip(dense, found.blocks, strict=True):
        F_inv = dense_block(inverse, model)
        if block.diagonal().max() <= 1e-26 * largest:
            assert F_inv.norm() == 0
        else:
            damped = block + 0.1 * block.diagonal().mean() * torch.eye(len(block)).double()
            assert_close(F_inv, torch.linalg.inv(damped), 1e-9)


COUNTED = Counter()


def compared(steps):
    model = Network(steps)
    if not any(p.requires_grad for p in model.parameters()) or not has_gradients(problem(model)):
        return
    for what, outcome in check(model).items():
        COUNTED[what, outcome] += 1


OPTIONS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def compare_random(networks, count):
    """Compare so many networks; most of those that have gradients are right in everything."""
    COUNTED.clear()
    settings(max_examples=count, **OPTIONS)(given(networks)(compared))()
    for what in ("rows", "product", "GGN", "K-FAC", "EK-FAC"):
        assert COUNTED[what, "right"] > 0.6 * COUNTED["rows", "right"], COUNTED


def test_random_networks():
    compare_random(networks, 20)


@pytest.mark.slow
def test_thousands_of_random_networks():
    compare_random(st.lists(steps, min_size=1, max_size=6), 3000)
