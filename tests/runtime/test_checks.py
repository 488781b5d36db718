"""Users' tensors however they were made: their numbers count, or an error comes first; quotes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    Encoded,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.measurements import ExampleFunction
from curvlinops_diffusion.runtime.checks import quoted
from tests.cases import noise_levels

LABELS = torch.tensor([2, 0, 1])


class Labelled(nn.Module):
    """Layers of every kind that labels, times and images go through."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.out = nn.Conv2d(2, 1, 1)

    def forward(self, x, timestep, class_labels, factor=1.0):
        h = self.conv(x) + self.table(class_labels)[:, :, None, None]
        return self.out((h + timestep.to(x).reshape(-1, 1, 1, 1) / 10).tanh()) * factor


def network(cls=Labelled):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return cls().double()


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    return x.half().double()  # of half precision, so that a lower one holds the same


def results(data, model=None, **objective):
    """Gradients of examples: forward and backward passes of everything that data goes through."""
    model = network() if model is None else model
    objective = DenoisingObjective(model, noise_levels(), **objective)
    return ExampleGradientLinearOperator(NoisedRegression(objective, data, 2, batch_size=2)).rows()


def of(x0=None, labels=None):
    return {
        "x0": images() if x0 is None else x0,
        "class_labels": LABELS if labels is None else labels,
    }


@pytest.fixture(scope="module")
def expected():
    return results(of())


def in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


class Subclass(torch.Tensor):
    """A tensor of somebody's own."""


FORMS = {
    "inference": lambda: of(in_inference_mode(images()), in_inference_mode(LABELS)),
    "leaf": lambda: of(images().requires_grad_()),
    "parameter": lambda: of(nn.Parameter(images())),
    "torchvision": lambda: of(tv_tensors.Image(images())),
    "subclass": lambda: of(images().as_subclass(Subclass)),
    "half": lambda: of(images().half()),
    "conjugate view": lambda: of(torch.complex(images(), images()).conj().real),
    "columns first": lambda: of(images().mT.contiguous().mT),
    "channels last": lambda: of(images().contiguous(memory_format=torch.channels_last)),
    "numbers": lambda: of(labels=LABELS.tolist()),
    "reversed array": lambda: of(labels=LABELS.numpy()[::-1].copy()[::-1]),
    "big-endian array": lambda: of(labels=LABELS.numpy().astype(">i8")),
    "bytes": lambda: of(labels=LABELS.byte()),
    "int32": lambda: of(labels=LABELS.int()),
    "batches": lambda: [
        {"x0": in_inference_mode(images()[:2]), "class_labels": LABELS[:2].numpy()},
        (nn.Parameter(images()[2:]), LABELS[2:].byte()),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_numbers_give_the_same_results(expected, form):
    found = results(FORMS[form]())
    if form == "columns first":  # a convolution may add in another order
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(found, expected)


class Items(Dataset):
    """Examples that a function makes."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, n):
        return self.make(images()[n], int(LABELS[n]))


def read_only(x):
    array = x.numpy().copy()
    array.setflags(write=False)
    return array


ITEMS = {
    "within a graph": lambda x, y: (x.requires_grad_() * 1, y),
    "inference": lambda x, y: (in_inference_mode(x), torch.tensor(y, dtype=torch.uint8)),
    "read-only array": lambda x, y: {"x0": read_only(x), "class_labels": np.int64(y)},
    "torchvision": lambda x, y: (tv_tensors.Image(x), y),
}


@pytest.mark.parametrize("item", ITEMS)
def test_items_of_a_data_set(expected, item):
    assert torch.equal(results(Items(ITEMS[item])), expected)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (lambda: of(images().to("meta")), "The data has no values"),
        (lambda: images().to("meta"), "The data has no values"),
        (lambda: of(labels=LABELS.to("meta")), "'class_labels' of the data has no values"),
        (lambda: of(images().to_sparse()), "has the layout torch.sparse_coo. Pass tensor.to_dense"),
        (lambda: of(images().float().to_mkldnn()), "has the layout torch._mkldnn"),
        (
            lambda: of(torch.quantize_per_tensor(images().float(), 0.1, 0, torch.qint8)),
            "is quantised",
        ),
        (lambda: of(torch.nested.nested_tensor(list(images()))), "is a nested tensor"),
        (lambda: of(images().to(torch.float8_e4m3fn)), "is of torch.float8_e4m3fn"),
        (lambda: of(labels=np.array(["a", "b", "c"])), "'class_labels' of the data is an array of"),
        (lambda: of((images() * 127).byte()), "got torch.uint8"),
        (lambda: of(images() / 0), "NaN or infinite"),
    ],
)
def test_other_forms_are_refused(data, told):
    with pytest.raises(ValueError, match=r"\S") as error:
        NoisedRegression(DenoisingObjective(network(), noise_levels()), data())
    assert told in str(error.value)


def test_what_is_passed_beside_the_data(expected):
    """Its graph is no part of the network's, whether it comes from arguments or an encoder."""
    half = torch.tensor(0.5, dtype=torch.float64)
    scaled = results(of(), model_kwargs={"factor": half})
    leaf = half.clone().requires_grad_()
    for factor in (leaf, leaf * 1, in_inference_mode(half)):
        assert torch.equal(results(of(), model_kwargs={"factor": factor}), scaled)
        found = results(of(), model_kwargs=lambda x, c, factor=factor: {"factor": factor})
        assert torch.equal(found, scaled)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert torch.equal(results(of(), encode=lambda x, c: Encoded(x * weight, None, c)), expected)
    for wrong, told in (
        (lambda x, c: x, r"`encode` must return .* got a Tensor"),
        (lambda x, c: (x, None, c), r"`encode` must return .* got a tuple"),
        (lambda x, c: Encoded(x.numpy(), None, c), "got mean of type ndarray"),
    ):
        with pytest.raises(ValueError, match=told):
            results(of(), encode=wrong)
    with pytest.raises(ValueError, match="A tensor of model_kwargs has no values"):
        results(of(), model_kwargs={"factor": half.to("meta")})
    with pytest.raises(ValueError, match=r"`model_kwargs` must be .* got NoneType"):
        results(of(), model_kwargs=lambda x, c: None)


def test_hooks_and_graphs_that_training_left(expected):
    """They change no derivative, and are there afterwards."""

    class Shifted(Labelled):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 0 * self.shift

    model = network(Shifted)
    model.shift = torch.ones(1, dtype=torch.float64, requires_grad=True) * 2
    calls = []
    for p in model.parameters():
        p.register_hook(lambda g: calls.append(1) or 2 * g)
    assert torch.equal(results(of(), model), expected)
    assert not calls
    assert model.shift.requires_grad
    model(images(), torch.zeros(3), LABELS).sum().backward()
    assert len(calls) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: setattr(m, "lazy", nn.LazyLinear(2)), "'lazy.weight' has no shape yet"),
        (
            lambda m: setattr(m, "own", nn.Parameter(torch.eye(3).to_sparse())),
            "'own' has the layout torch.sparse_coo",
        ),
        (
            lambda m: setattr(m.out, "bias", nn.Parameter(torch.ones(1).double().expand(2))),
            "Entries of parameter 'out.bias' share one place in memory",
        ),
        (
            lambda m: m.register_buffer("own", in_inference_mode(torch.ones(1))),
            "Buffer 'own' was made under torch.inference_mode()",
        ),
        (
            lambda m: m.register_buffer("own", torch.ones(1, device="meta")),
            "Buffer 'own' has no values",
        ),
    ],
)
def test_parameters_that_cannot_be_differentiated(change, told):
    model = network()
    change(model)
    with pytest.raises(ValueError, match=r"\S") as error:
        DenoisingObjective(model, noise_levels())
    assert told in str(error.value)


class OneLayer(nn.Module):
    """What can be scripted."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.layer(x)


def test_derivatives_that_a_scripted_network_has_not():
    objective = DenoisingObjective(torch.jit.script(OneLayer().double()), noise_levels())
    J = ExampleGradientLinearOperator(NoisedRegression(objective, images(), 2))
    assert torch.isfinite(J.values()).all()
    with pytest.raises(ValueError, match="The model is a TorchScript module"):
        J @ torch.ones(2, dtype=torch.float64)


def test_contexts_around(expected):
    """Those that change nothing are no obstacle; the others are named, also between two steps."""
    with torch.no_grad():
        assert torch.equal(results(of()), expected)
    model = network()  # whose random weights are of the default precision
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(results(of(), model), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    objective = DenoisingObjective(network(), noise_levels())
    regression = NoisedRegression(objective, of(), 2)
    J, G = ExampleGradientLinearOperator(regression), DiffusionGGNLinearOperator(regression)
    measured = J.measuring(ExampleFunction(lambda *_: None))  # of single examples
    with torch.inference_mode():  # in which predictions may be looked at, but not differentiated
        predicted = [objective.predict(batch) for batch in regression.batches()]
        for differentiate in (J.rows, measured.rows, lambda: G @ torch.ones(G.shape[1]).double()):
            with pytest.raises(ValueError, match=r"inference_mode.. is on"):
                differentiate()
    again = [objective.predict(batch) for batch in regression.batches()]
    assert all(torch.equal(a, b) for a, b in zip(predicted, again, strict=True))
    assert J.rows().isfinite().all()  # whatever was made in that mode is not kept
    for context, told in (
        (torch.inference_mode(), "inference_mode.. is on"),
        (torch.device("meta"), "torch's default device is 'meta'"),
    ):
        for make in (
            lambda: DenoisingObjective(objective.model, objective.process),
            lambda: NoisedRegression(objective, of()),
            lambda: DiffusionEKFACLinearOperator(regression),
            lambda: ExampleGradientLinearOperator(regression),
        ):
            with context, pytest.raises(ValueError, match=told):
                make()


def test_lists_of_numbers_are_left_to_the_network():
    """Only labels are looked up, and so become a tensor."""
    seen = []

    class Sized(Labelled):
        def forward(self, x, timestep, class_labels, sizes):
            seen.append(sizes)
            factor = torch.tensor([float(size) for size in sizes]).to(x).reshape(-1, 1, 1, 1)
            return super().forward(x, timestep, class_labels, factor)

    batch = of(labels=LABELS.tolist()) | {"sizes": [1, 2, 3]}
    regression = NoisedRegression(DenoisingObjective(network(Sized), noise_levels()), [batch], 1)
    assert ExampleGradientLinearOperator(regression).rows().isfinite().all()
    assert all(isinstance(sizes, list) for sizes in seen)


def raised_from(cause, text):
    try:
        raise ValueError(text) from cause
    except ValueError as error:
        return error


SIZES = [f"size mismatch for layer{n}.weight: copying a param with shape [2]" for n in range(32)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("The following keys are left:\n\n a.diff,\tb.diff"), None),
        (KeyError("conv_in"), "KeyError: 'conv_in'"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\n\n"), "RuntimeError"),
        (RuntimeError("same\nsame\nother"), "same other"),
        (RuntimeError("no\nException raised from x at y.cpp:1\nframe #0: f\nframe #1: g"), "no"),
        (raised_from(OSError("file not covered"), "No weights."), "No weights (file not covered)"),
        (raised_from(OSError("No"), "No weights."), "No weights."),
    ],
)
def test_quotes(error, expected):
    text = quoted(error)
    assert text == (expected or "The following keys are left: a.diff, b.diff")


def test_long_messages_keep_both_ends():
    text = quoted(RuntimeError("Errors in loading:\n" + "\n".join([*SIZES, "the cause is y.z"])))
    assert text.startswith("Errors in loading: size mismatch for layer0.weight: copying")
    assert text.endswith("the cause is y.z")
    assert " … " in text
    assert len(text) <= 400
    assert len(quoted(RuntimeError("x" * 10_000))) <= 400
