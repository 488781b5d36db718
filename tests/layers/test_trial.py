"""What a network is tried out for: that its output is a function of each example alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    Encoded,
    ExampleGradientLinearOperator,
    LatentEncoder,
    NoisedRegression,
)
from curvlinops_diffusion.layers.trial import Trial
from tests.cases import images, noise_levels, plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import dense_ggn, example_gradients, to_dense

OPERATORS = {
    "K-FAC": DiffusionKFACLinearOperator,
    "GGN": lambda r: (
        DiffusionGGNLinearOperator(r)
        @ torch.ones(sum(p.numel() for p in r.objective.model.parameters())).double()
    ),
    "rows": lambda r: ExampleGradientLinearOperator(r).rows(),
    "values": lambda r: ExampleGradientLinearOperator(r).values(),
}


class Changed(nn.Module):
    """A network whose output is changed by a function of (output, x_t, t)."""

    def __init__(self, change):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1).double()
        self._change = change

    def forward(self, x_t, t):
        return self._change(self.layer(x_t), x_t, t)


def dropping_seldom(y, x, t):
    keep = torch.rand(len(y)) > 1e-3
    return y * keep.reshape(-1, 1, 1, 1)


RANDOM = {
    "functional dropout": lambda y, x, t: nn.functional.dropout(y, 0.5),
    "a seldom event": dropping_seldom,
    "numpy": lambda y, x, t: y * float(np.random.rand()),  # noqa: NPY002
    "python": lambda y, x, t: y * (1 + (random.random() > 0.9)),
}
COUPLED = {
    "the batch's mean": lambda y, x, t: y - 0.1 * y.mean(0),
    "the first timestep": lambda y, x, t: y if t[0] > 5 else 2 * y,
    "the highest timestep": lambda y, x, t: y * (1 + t.max()),
    "the batch's size": lambda y, x, t: y * len(y),
}


# all operators look in the same way
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "K-FAC") for name in list(RANDOM)[1:]),
        *(("functional dropout", k) for k in OPERATORS),
    ],
)
def test_random_networks_are_refused(name, kind):
    regression = plain_regression(Changed(RANDOM[name]).eval(), (1, 4, 4))
    with pytest.raises(ValueError, match=r"draws random numbers.*Every module is in eval mode"):
        OPERATORS[kind](regression)


@pytest.mark.parametrize("name", COUPLED)
def test_networks_that_couple_examples_are_refused(name):
    model = Changed(COUPLED[name]).train()
    regression = plain_regression(model, (1, 4, 4), num_draws=2, timesteps=[2, 7])
    with pytest.raises(ValueError, match=r"depends on the rest of its.*'Changed'.*model.eval\(\)"):
        DiffusionKFACLinearOperator(regression)


def test_another_operator_tries_nothing_out_again():
    """Unless the network has changed: its weights in whatever way, its modes, or the draws."""
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    regression = plain_regression(model, (1, 4, 4), count=4, num_draws=2, batch_size=4)
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))

    def runs(make=DiffusionKFACLinearOperator, of=regression):
        calls.clear()
        make(of)
        return len(calls)

    first, again = runs(), runs()
    # two runs, eight examples alone, three for gradients, and two in which calls are counted
    assert first - again >= 14
    assert again == 2  # draws
    assert runs(OPERATORS["rows"]) == 2
    assert runs(OPERATORS["values"]) == 2
    model.layers[0].weight.data.mul_(2)
    assert runs() == first
    assert runs() == again
    assert runs(of=regression.with_seed(1)) > again
    model.eval()
    assert runs() == first


def test_the_precision_of_the_network_may_change():
    """The examples that it is tried out on are in its precision, and on its device."""
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    regression = plain_regression(model, (1, 4, 4))
    before = DiffusionKFACLinearOperator(regression)
    model.float()
    assert DiffusionKFACLinearOperator(regression).dtype == torch.float32
    model.double()
    assert_close(to_dense(DiffusionKFACLinearOperator(regression)), to_dense(before), rtol=1e-4)


@pytest.mark.parametrize("size", [1, 5])
def test_examples_are_found_whatever_the_batches(size):
    """Some of the first: with one in each batch, nothing would be told apart within one."""
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    data = DataLoader(TensorDataset(images(6)), batch_size=size)
    regression = NoisedRegression(
        DenoisingObjective(model, noise_levels()), data, timesteps=[7, 2, 5]
    )
    trial = Trial.of(regression)
    assert list(trial.low.indices) == list(trial.high.indices) == [0, 1, 2, 3]
    assert set(trial.low.level_B.tolist()) == {2}
    assert set(trial.high.level_B.tolist()) == {7}
    assert trial.mixed.indices == [0, 0, 1, 1, 2, 2, 3, 3]
    assert trial.few.indices == [0, 0, 1, 1]
    noised = {b.common_draw: b for b in regression.batches() if 1 in b.indices}
    for batch in (trial.low, trial.high):
        whole = noised[batch.common_draw]
        assert torch.equal(batch.x_t[1], whole.x_t[list(whole.indices).index(1)])


class Odd(nn.Module):
    """A network that does something else for one image."""

    def __init__(self, odd):
        super().__init__()
        self.layer = seeded(nn.Conv2d(1, 1, 3, padding=1))
        self.odd = odd

    def forward(self, x, t, token):
        if not (token == 14).any():
            return self.layer(x, t)
        return self.odd(self.layer, x, t, (token == 14).reshape(-1, 1, 1, 1))


def coupled(layer, x, t, odd):
    return layer(x, t) + x.mean(0)


def drawing(layer, x, t, odd):
    return layer(x, t) + torch.rand(1)


def used_directly(layer, x, t, odd):
    return layer(x, t) + odd * layer.layers[0].bias.sum()


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (coupled, "depends on the rest of its batch"),
        (drawing, r"draws random numbers of its own \(seen at example 14\)"),
        (used_directly, r"At example 14 of the data, hooks do not see the gradient of 'layer.l"),
    ],
)
def test_in_the_middle_of_the_data(odd, message):
    """What the first examples do not show is found in the course of the pass."""
    data = {"x0": images(16), "token": torch.arange(16)}
    objective = DenoisingObjective(Odd(odd).double().eval(), noise_levels())
    regression = NoisedRegression(objective, data, 4, batch_size=2)
    with pytest.raises(ValueError, match=message):
        DiffusionKFACLinearOperator(regression)
    if odd is used_directly:  # these are read by no hooks
        rows = ExampleGradientLinearOperator(regression).rows()
        params = list(regression.objective.model.parameters())
        assert_close(rows, example_gradients(regression, params), 1e-12)
        return
    with pytest.raises(ValueError, match=message):
        ExampleGradientLinearOperator(regression).rows()
    with pytest.raises(ValueError, match=message):
        DiffusionGGNLinearOperator(regression) @ torch.ones(10).double()


class Rotary(nn.Module):
    """A network that makes its table anew each time; it is the same each time."""

    def __init__(self):
        super().__init__()
        self.layer = seeded(nn.Conv2d(1, 1, 3, padding=1))
        self.register_buffer("table", torch.ones(4).double())

    def forward(self, x, t):
        self.table = torch.arange(4).double().cos() if len(self.table) != 4 else self.table.clone()
        return self.layer(x, t) * self.table


class Rows(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer, self.rows = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(10, 16, **options)

    def forward(self, x, t):
        return self.layer(x) + self.rows(t).reshape(x.shape)


def spectral(wrap):
    return seeded(wrap(nn.Conv2d(1, 1, 3, padding=1))).train()


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (
            lambda: seeded(
                nn.InstanceNorm2d(1, affine=True, track_running_stats=True), nn.Conv2d(1, 1, 1)
            ).train(),
            "'layers.0.running_mean'",
        ),
        (lambda: spectral(nn.utils.spectral_norm), "'layers.0.weight_[uv]'"),
        (
            lambda: spectral(nn.utils.parametrizations.spectral_norm),
            "'layers.0.parametrizations.weight.0._[uv]'",
        ),
        (lambda: Rows(max_norm=0.5).eval(), "'rows.weight'"),
    ],
)
def test_a_network_that_changes_while_it_runs(make, changed):
    """It is refused, and put back as it was."""
    model = make().double()
    regression = plain_regression(model, (1, 4, 4), count=3, num_draws=2)
    before = {name: z.clone() for name, z in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"The network changes .*{changed}"):
        OPERATORS["values"](regression)
    assert all(torch.equal(z, before[name]) for name, z in model.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        Rotary,
        lambda: Rows(max_norm=100.0),
        lambda: seeded(nn.InstanceNorm2d(1, affine=True, track_running_stats=True)),
        lambda: seeded(nn.utils.spectral_norm(nn.Conv2d(1, 1, 3, padding=1))),
    ],
)
def test_a_network_that_stays_the_same(make):
    model = make().double().eval()
    regression = plain_regression(model, (1, 4, 4), count=3, num_draws=2)
    params = list(model.parameters())
    rows = ExampleGradientLinearOperator(regression).rows()
    assert_close(rows, example_gradients(regression, params), 1e-12)
    G = dense_ggn(regression, params)
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-12)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    assert_close(EK.trace(), G.trace(), 1e-11)


class Ignoring(nn.Module):
    """A network that is given more than it uses."""

    def __init__(self, what):
        super().__init__()
        self.layer = seeded(nn.Conv2d(1, 1, 3, padding=1))
        self.labels, self.what = nn.Embedding(4, 1), what

    def forward(self, x, t, class_labels=None, **others):
        h = self.layer(x, t)
        match self.what:
            case "ignored":
                return h
            case "looked at":  # its form alone
                return h if len(class_labels.shape) == class_labels.ndim else h + 1
            case "nested":
                return h + self.labels(class_labels)[:, :, None, None]
            case "zero":  # as in networks that start from no conditioning
                return h + 0 * self.labels(class_labels)[:, :, None, None]
            case "compared":
                return h + torch.tensor([int(label) for label in class_labels]).reshape(-1, 1, 1, 1)
        raise AssertionError


def given_entries(what, count=3, **entries):
    """A network that is given labels and other entries."""
    data = {"x0": images(count), "class_labels": torch.arange(count), **entries}
    model = Ignoring(what).double().eval()
    return NoisedRegression(DenoisingObjective(model, noise_levels()), data, 2)


@pytest.mark.parametrize("what", ["ignored", "looked at"])
def test_an_entry_that_the_network_ignores_is_warned_of(what):
    """It has an argument for it, so that may be meant."""
    match = r"makes nothing of \['class_labels'\].* \(Ignoring ignores"
    with pytest.warns(UserWarning, match=match):
        OPERATORS["values"](given_entries(what))


def test_entries_that_nothing_takes_are_refused():
    """Or warned of where all are alike: it cannot be seen whether they have an effect."""
    extra = {"sizes": torch.rand(3, 2), "flag": True}
    with pytest.raises(ValueError, match=r"makes nothing of \['extra/sizes'\]"):
        OPERATORS["values"](given_entries("nested", extra=extra))
    with pytest.warns(UserWarning, match=r"makes nothing of \['scale'\]"):
        OPERATORS["values"](given_entries("nested", scale=torch.ones(3)))


@pytest.mark.filterwarnings("error:The network makes nothing")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("what", ["nested", "zero", "compared"])
def test_entries_that_are_used(what, count):
    """Also without effect yet, and in ways that are not differentiable."""
    OPERATORS["values"](given_entries(what, count))


def inference():
    with torch.inference_mode():
        return nn.Conv2d(1, 1, 1)


class FlatParameter(nn.Parameter):
    """By the name of what FSDP1 makes of parameters."""


def divided():
    model = nn.Conv2d(1, 1, 1)
    model.weight = FlatParameter(model.weight.detach())
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1, device="meta"), "'weight' has no values here"),
        (inference, r"'weight' was made under torch.inference_mode\(\)"),
        (divided, "'weight' is divided among processes"),
    ],
)
def test_parameters_that_are_not_there(make, message):
    with pytest.raises(ValueError, match=message):
        DenoisingObjective(make(), noise_levels())


def test_complex_parameters_are_said_to_be_left_out():
    model = seeded(nn.Conv2d(1, 1, 1))
    model.factor = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    regression = plain_regression(model, (1, 4, 4), count=3, num_draws=2)
    with pytest.warns(UserWarning, match="1 complex parameters are left out, .* 'factor'"):
        assert DiffusionKFACLinearOperator(regression).shape == (2, 2)


def test_what_encodes_the_data_is_not_random():
    """A text encoder left in training, latents that are samples, dropout without effect so far."""
    words, dropout = torch.arange(12).reshape(3, 4).double(), nn.Dropout(0.5)

    def embed(x0, condition):
        return {"class_labels": dropout(words)[: len(x0)].sum(1).long() % 4}

    def sampled(x0, condition):
        return Encoded(x0 + torch.randn(x0.shape).double(), None, condition)

    def drew(x0, condition):
        torch.rand(1)
        return Encoded(x0, None, condition)

    model = Ignoring("nested").double().eval()
    labels = {"x0": images(3), "class_labels": torch.arange(3)}
    for encode, data, what in (
        (LatentEncoder(embed=embed), {"x0": images(3)}, "'class_labels' varied"),
        (sampled, labels, "'mean' varied"),
        (drew, labels, "a generator of random numbers varied"),
    ):
        objective = DenoisingObjective(model, noise_levels(), encode=encode)
        regression = NoisedRegression(objective, data, 2)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of which some labels are not the same twice
            with pytest.raises(ValueError, match=f"encoder, encode=\\) is random: .*{what}"):
                OPERATORS["values"](regression)
    dropout.eval()
    objective = DenoisingObjective(model, noise_levels(), encode=LatentEncoder(embed=embed))
    DiffusionKFACLinearOperator(NoisedRegression(objective, {"x0": images(3)}, 2))


@pytest.mark.parametrize(
    "kind",
    [
        DiffusionKFACLinearOperator,
        DiffusionEKFACLinearOperator,
        DiffusionGGNLinearOperator,
        ExampleGradientLinearOperator,
    ],
)
def test_a_model_in_place_of_a_problem(kind):
    with pytest.raises(ValueError, match=r"made of a NoisedRegression\(Denoising.*, got Conv2d"):
        kind(nn.Conv2d(1, 1, 1), images(3))


# ---------------------------------------------------------------------------------------------
# Every run under the same conditions
# ---------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Transformers of torch.nn, some of whose tokens are padded."""

    def __init__(self, kind):
        super().__init__()
        options = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "batch_first": True}
        self.kind, self.outward = kind, nn.Linear(4, 4)
        if kind == "attention":
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        else:
            self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2)

    def forward(self, x, t, padding):
        mask = padding.bool()
        if self.kind == "attention":
            return self.outward(self.inner(x, x, x, key_padding_mask=mask, need_weights=False)[0])
        return self.outward(self.inner(x, src_key_padding_mask=mask))


@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_padded_transformers(kind):
    """Torch's fast path, which gives zeros for padded tokens, is taken in no run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Padded(kind).double().eval()
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).double()
    x0 = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    objective = DenoisingObjective(model, noise_levels())
    regression = NoisedRegression(objective, {"x0": x0, "padding": padding}, 2)
    params = list(model.parameters())
    rows, J = example_gradients(regression, params), ExampleGradientLinearOperator(regression)
    assert_close(J.rows(), rows, 1e-12)
    assert_close(J @ rows[0], rows @ rows[0], 1e-12)
    losses = [b.loss(objective.predict(b)).detach() for b in regression.batches()]
    assert_close(J.values(), sum(losses) / 2, 1e-12)
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    assert_close(EK.trace(), dense_ggn(regression, params).trace(), 1e-11)
    assert torch.backends.mha.get_fastpath_enabled()


class Caching(nn.Module):
    """A table that grows with the longest input, a counter, or numbers of a generator's own."""

    def __init__(self, kind, persistent=False):
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 3), kind
        table = torch.ones(1).double() if kind == "grows" else None
        self.register_buffer("table", table, persistent=persistent)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=persistent)

    def forward(self, x, t):
        length = x.shape[1]
        if self.kind in ("grows", "lazy") and (self.table is None or len(self.table) < length):
            self.table = torch.arange(length).double().cos()
        table = self.table
        if self.kind == "counts":
            self.calls = self.calls + 1
        elif self.kind == "counts for something":
            self.calls = self.calls + 1
            table = self.calls.double().expand(length)
        elif self.kind == "generator":
            table = torch.rand(length, generator=torch.Generator().manual_seed(0)).double()
        y = self.layer(x)
        return y if table is None else y * table[:length].unsqueeze(1)


def caching(kind, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Caching(kind, **options).double().eval()
    x0 = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    return NoisedRegression(DenoisingObjective(model, noise_levels()), x0, 2)


@pytest.mark.parametrize("kind", ["grows", "lazy", "counts", "generator"])
def test_what_is_cached_is_no_change(kind):
    seen_before, regression = caching(kind), caching(kind)
    G = dense_ggn(seen_before, list(seen_before.objective.model.parameters()))
    EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
    assert_close(EK.trace(), G.trace(), 1e-11)
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-11)
    rows = example_gradients(regression, list(regression.objective.model.parameters()))
    J = ExampleGradientLinearOperator(regression)
    assert_close(J.rows(), rows, 1e-12)
    assert_close(J @ rows[0], rows @ rows[0], 1e-12)


def test_what_is_part_of_the_state_does_not_change():
    """A buffer that is saved with the weights, or that the output depends on."""
    with pytest.raises(ValueError, match=r"changes \['table'\].*persistent=False"):
        OPERATORS["values"](caching("grows", persistent=True))
    regression = caching("counts for something")
    with pytest.raises(ValueError, match=r"changes \['calls'\] while it runs"):
        OPERATORS["values"](regression)
    assert regression.objective.model.calls == 0


def test_examples_beside_values_that_differ_are_not_tried_out_together():
    """A value for a whole batch is that of its own batch."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = seeded(nn.Conv2d(1, 1, 3, padding=1))

        def forward(self, x, t, strength):
            return strength * self.layer(x, t)

    data = [{"x0": images(1), "strength": torch.tensor(s)} for s in (0.5, 2.0)]
    regression = NoisedRegression(DenoisingObjective(Scaled(), noise_levels()), data, 2)
    assert list(Trial.of(regression).low.indices) == [0]
    rows = example_gradients(regression, list(regression.objective.model.parameters()))
    assert_close(ExampleGradientLinearOperator(regression).rows(), rows, 1e-12)
