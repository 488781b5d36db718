"""``NoisedRegression``: all forms of data and model, and every operator of ``curvlinops`` on it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.upstream import their_parameters, upstream_operator
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    NoisedRegression,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cases import TimeBlind, images, noise_levels, plain_regression, seeded, unet_regression
from tests.comparisons import assert_close
from tests.reference import dense_ggn, example_gradients, params_of, to_dense


def tiny_model():
    return seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1))


def regression_on(data, model=None, **options):
    objective = DenoisingObjective(tiny_model() if model is None else model, noise_levels())
    return NoisedRegression(objective, data, **({"num_draws": 2} | options))


def everything(regression):
    """All noised inputs and targets, ordered by example and draw."""
    rows = {}
    for batch in regression.batches():
        for b, n in enumerate(batch.indices):
            rows[n, batch.common_draw] = torch.cat([batch.x_t[b].flatten(), batch.target_BD[b]])
    return torch.stack([rows[key] for key in sorted(rows)])


# ---------------------------------------------------------------------------------------------
# Forms of data
# ---------------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, form):
        self._form = form
        self._x0 = images(7)

    def __len__(self):
        return len(self._x0)

    def __getitem__(self, n):
        return self._x0[n] if self._form == "tensor" else {"x0": self._x0[n]}


class Stream:
    """Batches from an object that can be iterated again and again."""

    def __iter__(self):
        return iter(images(7).split(4))


FORMS = {
    "tensor": lambda: images(7),
    "dict": lambda: {"x0": images(7)},
    "dataset of tensors": lambda: Images("tensor"),
    "dataset of dicts": lambda: Images("dict"),
    "tensor dataset": lambda: TensorDataset(images(7)),
    "loader": lambda: DataLoader(Images("tensor"), batch_size=3),
    "loader of dicts": lambda: DataLoader(Images("dict"), batch_size=3),
    "loader with workers": lambda: DataLoader(Images("tensor"), batch_size=3, num_workers=1),
    "list of tensors": lambda: list(images(7).split(2)),
    "list of dicts": lambda: [{"x0": x} for x in images(7).split(2)],
    "stream": Stream,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_draws(form):
    regression = regression_on(FORMS[form](), batch_size=3)
    assert regression.num_data == 7
    assert regression.num_samples == 14
    expected = everything(regression_on(images(7)))
    assert torch.equal(everything(regression), expected)
    assert torch.equal(everything(regression), expected)  # and in the second iteration


class Conditioned(nn.Module):
    """Remembers the conditions that it was called with."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.seen = []

    def forward(self, x_t, t, **condition):
        self.seen.append((t, condition))
        return self.scale * x_t


def test_conditions_go_to_the_model_example_by_example():
    """Tensors are cut into batches and cast to the model's precision, whatever their nesting."""
    model = Conditioned()
    data = {
        "x0": images(5),
        "class_labels": torch.arange(5),
        "added_cond_kwargs": {"text_embeds": torch.arange(10.0).reshape(5, 2)},
        "guidance": torch.tensor(3.0),
        "return_dict": False,
    }
    regression = regression_on(data, model, batch_size=2)
    for X, _ in regression:
        regression.model_func(X)
    assert len(model.seen) == 6  # three batches, two draws
    for number, (t, condition) in enumerate(model.seen):
        examples = torch.arange(5)[2 * (number // 2) :][:2]
        assert t.shape == examples.shape
        assert torch.equal(condition["class_labels"], examples)
        embeds = condition["added_cond_kwargs"]["text_embeds"]
        assert torch.equal(embeds, torch.arange(10.0).reshape(5, 2)[examples].double())
        assert embeds.dtype == torch.float64
        assert condition["guidance"].shape == ()
        assert condition["return_dict"] is False


class Returning(TimeBlind):
    def __init__(self, wrap):
        super().__init__(nn.Conv2d(1, 1, 1))
        self._wrap = wrap

    def forward(self, x_t, t):
        return self._wrap(self.layers(x_t))


@pytest.mark.parametrize(
    "wrap",
    [lambda z: z, lambda z: (z, "more"), lambda z: SimpleNamespace(sample=z)],
    ids=["tensor", "tuple", "sample"],
)
def test_forms_of_output(wrap):
    model = Returning(wrap).double()
    regression = regression_on(images(3), model)
    batch = next(regression.batches())
    expected = model.layers(batch.x_t).flatten(1)
    assert torch.equal(regression.objective.predict(batch), expected)


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_weighted_training_loss(reduction):
    """By a transcription of a training loop with the scheduler's own methods."""
    scheduler = DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction")
    regression = unet_regression(
        scheduler=scheduler,
        objective={"weighting": MinSNRWeighting(5.0), "reduction": reduction},
    )
    unet, draws = regression.objective.model, regression.draws
    x0, labels = images(3), torch.arange(3)
    truth = 0
    for n in range(3):
        for r in range(2):
            t = draws.levels([n], r)
            eps = draws.noise([n], r, (1, 8, 8)).double()
            y = scheduler.get_velocity(x0[n : n + 1], eps, t)
            f = unet(scheduler.add_noise(x0[n : n + 1], eps, t), t, labels[n : n + 1]).sample
            alpha_bar = scheduler.alphas_cumprod[t].double()
            snr = alpha_bar / (1 - alpha_bar)
            weight = snr.clamp(max=5.0) / (snr + 1)
            error = mse_loss(f, y) if reduction == "mean" else (f - y).square().sum()
            truth = truth + weight * error / 6

    with torch.no_grad():
        losses = [b.loss(regression.objective.predict(b)) for b in regression.batches()]
    ours, truth = torch.cat(losses).mean(), truth.detach()
    assert_close(ours, truth.squeeze(), 1e-6)  # the scheduler's own tables are float32

    # the form that curvlinops sees: means over batches of different sizes
    total, count = 0, 0
    for X, y in regression:
        size = regression.batch_size_fn(X)
        total = total + size * regression.loss_func(regression.model_func(X), y).detach()
        count += size
    assert count == regression.num_samples
    assert_close(total / count, ours, 1e-12)


# ---------------------------------------------------------------------------------------------
# The operators of curvlinops, unchanged; each checks on construction that it is deterministic
# ---------------------------------------------------------------------------------------------


def dense_hessian(regression, params):
    """By differentiating the loss as a function of one vector twice."""
    model = regression.objective.model
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in params]

    def loss(theta):
        pieces = theta.split([s.numel() for s in shapes])
        values = dict(
            zip(names, [p.reshape(s) for p, s in zip(pieces, shapes, strict=True)], strict=True)
        )
        total = 0
        for batch in regression.batches():
            output = functional_call(model, values, (batch.x_t, batch.timestep_B))
            total = total + batch.loss(output.flatten(1)).sum()
        return total / regression.num_samples

    theta = torch.cat([p.detach().flatten() for p in params])
    return torch.autograd.functional.hessian(loss, theta)


def dense_empirical_fisher(regression, params):
    """``1/(NR) Σ D ∇ℓ ∇ℓᵀ``: for the mean squared error ``curvlinops`` counts each output entry."""
    total = 0
    for batch in regression.batches():
        losses = batch.loss(regression.objective.predict(batch))
        for value in losses:
            gradient = torch.autograd.grad(value, params, retain_graph=True)
            g = torch.cat([p.flatten() for p in gradient])
            total = total + torch.outer(g, g)
    D = batch.target_BD.shape[1]
    return D * total / regression.num_samples


UPSTREAM = [
    ("HessianLinearOperator", dense_hessian),
    ("EFLinearOperator", dense_empirical_fisher),
]


def with_functions_that_upstream_cannot_differentiate_twice():
    middle = nn.Conv2d(2, 2, 2), nn.GroupNorm(1, 2), nn.SiLU(inplace=True), nn.Mish()
    return seeded(
        nn.Conv2d(1, 2, 1), nn.SiLU(), *middle, nn.Flatten(), nn.Linear(2, 4), Unflatten()
    )


class Unflatten(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1, 2, 2)


NETWORKS = {
    "linear": (lambda: seeded(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), (3,)),
    "functions": (with_functions_that_upstream_cannot_differentiate_twice, (1, 2, 2)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("kind", "truth"), UPSTREAM, ids=["Hessian", "EF"])
def test_hessian_and_empirical_fisher_of_curvlinops(kind, truth, network):
    make, shape = NETWORKS[network]
    regression = plain_regression(
        make(),
        shape,
        objective={"weighting": lambda t: 1 + t / 10},
        batch_size=2,
    )
    params = params_of(regression.objective.model)
    operator = upstream_operator(kind, regression)
    assert_close(to_dense(operator), truth(regression, params), 1e-10)


def hessian_product(regression, params, vector):
    total = sum(
        batch.loss(regression.objective.predict(batch)).sum() for batch in regression.batches()
    )
    pieces = torch.autograd.grad(total / regression.num_samples, params, create_graph=True)
    along = torch.cat([piece.flatten() for piece in pieces]) @ vector
    return torch.cat([piece.flatten() for piece in torch.autograd.grad(along, params)])


def empirical_fisher_product(regression, params, vector):
    rows = example_gradients(regression, params)  # of a single draw
    D = next(iter(regression.batches())).target_BD.shape[1]
    return D * rows.T @ (rows @ vector) / len(rows)


def jacobian_product(regression, params, vector, step=1e-6):
    """By differences of the predictions."""

    def shifted(sign):
        for p, piece in zip(params, vector.split([p.numel() for p in params]), strict=True):
            p.data += sign * step * piece.reshape(p.shape)
        with torch.no_grad():
            found = [regression.objective.predict(batch) for batch in regression.batches()]
        for p, piece in zip(params, vector.split([p.numel() for p in params]), strict=True):
            p.data -= sign * step * piece.reshape(p.shape)
        return torch.cat(found).flatten()

    return (shifted(1) - shifted(-1)) / (2 * step)


def ours(kind, **options):
    def product(regression, params, vector):
        return kind(regression, params, **options) @ vector

    return product


def ours_of_the_loss(kind):
    """``curvlinops``' weighs the gradients of summed squares: ``D`` times that."""

    def product(regression, params, vector):
        operator = kind(regression, params, fisher_type="empirical", exact_bias=False)
        return next(iter(regression.batches())).target_BD.shape[1] * (operator @ vector)

    return product


EMPIRICAL = {"fisher_type": "empirical"}
ON_ATTENTION = [
    ("GGNLinearOperator", {}, ours(DiffusionGGNLinearOperator), 1e-10),
    ("HessianLinearOperator", {}, hessian_product, 1e-10),
    ("EFLinearOperator", {}, empirical_fisher_product, 1e-10),
    ("JacobianLinearOperator", {}, jacobian_product, 1e-6),
    (
        "KFACLinearOperator",
        EMPIRICAL,
        ours_of_the_loss(DiffusionKFACLinearOperator),
        1e-10,
    ),
    (
        "EKFACLinearOperator",
        EMPIRICAL,
        ours_of_the_loss(DiffusionEKFACLinearOperator),
        1e-10,
    ),
]


def on_attention(kind, **options):
    """An operator of ``curvlinops`` on a UNet, and its problem and parameters."""
    regression = unet_regression(count=2, num_draws=1)
    names = their_parameters(regression) if "KFAC" in kind else None
    operator = upstream_operator(kind, regression, names, check_deterministic=True, **options)
    return operator, regression, params_of(regression.objective.model, names)


def random_vectors(size, count=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "options", "truth", "tolerance"),
    ON_ATTENTION,
    ids=[kind for kind, *_ in ON_ATTENTION],
)
def test_operators_of_curvlinops_on_a_unet_with_attention(kind, options, truth, tolerance):
    operator, regression, params = on_attention(kind, **options)
    (v,) = random_vectors(operator.shape[1])
    with sdpa_kernel(SDPBackend.MATH):
        expected = truth(regression, params, v)
    assert_close(operator @ v, expected, tolerance)


def test_the_monte_carlo_fisher_of_curvlinops_on_a_unet_with_attention():
    """The same product each time, of a symmetric and positive semi-definite matrix."""
    operator, *_ = on_attention("FisherMCLinearOperator", mc_samples=2)
    u, v = random_vectors(operator.shape[1], 2)
    assert torch.equal(operator @ v, operator @ v)
    assert_close(u @ (operator @ v), v @ (operator @ u), 1e-10)
    assert v @ (operator @ v) > 0


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def with_entry(value):
    x0 = images(5)
    x0[3, 0, 0, 0] = value
    return x0


class Augmented(Images):
    def __getitem__(self, n):
        return super().__getitem__(n) + torch.rand(1)


class RandomCaptions(Dataset):
    """The same images, each time with another of their captions."""

    def __init__(self):
        self.calls = 0

    def __len__(self):
        return 4

    def __getitem__(self, n):
        self.calls += 1
        return {"x0": images(4)[n], "class_labels": torch.tensor(self.calls % 7)}


BAD_DATA = {
    "random captions": (RandomCaptions(), r"batches: 'class_labels' varied. .*of captions\) off"),
    "array": (images(4).numpy(), r"arrived as ndarray \(pass torch.from_numpy"),
    "no examples": (images(0), r"shape \(0, 1, 8, 8\). Pass non-empty batches"),
    "no batches": ([], r"The data is empty. Pass a tensor of clean examples"),
    "empty dataset": (TensorDataset(images(0)), "The data is empty"),
    "no axes": (torch.zeros(4).double(), r"shape \(4,\). Pass non-empty batches of shape \[batch"),
    "integers": (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"torch.uint8. Pass floating-point"),
    "NaN": (with_entry(torch.nan), r"1 example\(s\) hold NaN.*at index \[3\] of the data"),
    "infinity in a batch": (list(with_entry(torch.inf).split(2)), r"at index \[3\] of the data"),
    "no x0": ({"images": images(3)}, r"keys \['images'\].*dict with key 'x0'"),
    "not tensors": ([["a", "b"]], r"arrived as list of length 2. Each batch"),
    "labelled": (
        TensorDataset(images(3), torch.arange(3.0)),
        r"list of length 2.*pair of these and integer labels or prompts, or a dict with key 'x0'",
    ),
    "x0 no tensor": ({"x0": [1.0, 2.0]}, r"arrived as list. Pass a floating-point tensor"),
    "short condition": (
        {"x0": images(3), "class_labels": torch.arange(2)},
        r"condition\['class_labels'\] arrived with shape \(2,\) beside 3 clean",
    ),
    "nested condition": (
        {"x0": images(3), "added": {"ids": torch.zeros(4, 2)}},
        r"condition\['added'\]\['ids'\] arrived with shape \(4, 2\) beside 3",
    ),
    "generator": (iter([images(3)]), "iterated only once"),
    "number": (3, "The data arrived as int. Pass a tensor"),
    "shuffling": (DataLoader(Images("tensor"), shuffle=True), "shuffles.*pass shuffle=False"),
    "dropping": (
        DataLoader(Images("tensor"), batch_size=4, drop_last=True),
        "would leave out 3 of 7 examples. Pass drop_last=False",
    ),
    "augmenting": (Augmented("tensor"), "'x0' varied. .*random augmentation"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case):
    data, message = BAD_DATA[case]
    with pytest.raises(ValueError, match=message):
        list(regression_on(data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"num_draws": -3}, "`num_draws` must be a whole number of at least 1, got -3"),
        ({"timesteps": "often"}, "timesteps='often' is unknown. Pass one of: 'stratified'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        regression_on(images(3), **arguments)


def test_bad_objective():
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="The objective arrived as Conv2d"):
        NoisedRegression(nn.Conv2d(1, 1, 1), images(2))
    with pytest.raises(ValueError, match=r"The model arrived as str. Pass an nn.Module"):
        DenoisingObjective("unet", scheduler)
    with pytest.raises(ValueError, match="floating-point parameters"):
        DenoisingObjective(nn.ReLU(), scheduler)
    with pytest.raises(ValueError, match=r"`reduction` must be one of 'mean', 'sum', got 'none'"):
        DenoisingObjective(tiny_model(), scheduler, reduction="none")


class Flattening(TimeBlind):
    def forward(self, x_t, t):
        return self.layers(x_t).flatten(1)


class Silent(TimeBlind):
    def forward(self, x_t, t):
        return {"output": x_t}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Flattening(nn.Conv2d(1, 1, 1)), r"returned shape \(2, 64\) for an input of shape \(2, 1"),
        (TimeBlind(nn.Conv2d(1, 3, 1)), r"returned shape \(2, 3, 8, 8\).*a variance is predicted"),
        (Silent(nn.Conv2d(1, 1, 1)), r"returned dict. It must return a tensor, a tuple"),
    ],
    ids=["flat", "three times the channels", "dict"],
)
def test_bad_output(model, message):
    regression = regression_on(images(2), model.double())
    with pytest.raises(ValueError, match=message):
        regression.objective.predict(next(regression.batches()))


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm2d(1)])
def test_random_or_coupling_layers_are_refused_in_train_mode(layer):
    model = TimeBlind(nn.Conv2d(1, 1, 1), layer).double()
    regression = regression_on(images(4), model)
    with pytest.raises(ValueError, match=r"'layers.1' \(.*train mode.*Call model.eval\(\)"):
        list(regression)
    model.eval()
    assert len(list(regression)) == 2
    model.train()
    layer.p = 0.0
    if isinstance(layer, nn.Dropout):
        assert len(list(regression)) == 2


def test_batch_norm_without_running_statistics_is_refused():
    model = TimeBlind(nn.BatchNorm2d(1, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"'layers.0' \(BatchNorm2d\) has no running statistics"):
        list(regression_on(images(2), model.double()))


def test_batch_is_not_changed_by_iterating():
    """What a user passes stays as it was."""
    x0 = images(4)
    copy: Tensor = x0.clone()
    data = {"x0": x0}
    list(regression_on(data))
    assert torch.equal(x0, copy)
    assert list(data) == ["x0"]


# ---------------------------------------------------------------------------------------------
# What curvlinops sees
# ---------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A network to whose output every entry of its condition contributes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.embed = nn.Embedding(5, 1)

    def forward(self, x_t, t, class_labels=None, added=None, guidance=None, scaled=False):
        out = self.layer(x_t) * (1 + 0.1 * t.reshape(-1, 1, 1, 1))
        if class_labels is not None:
            out = out + self.embed(class_labels).reshape(-1, 1, 1, 1)
        if added is not None:
            text = added["deep/text"] if "deep/text" in added else added["deep"]["text"]
            out = out * text.sum(1).reshape(-1, 1, 1, 1) * (2 if "none" in added else 1)
        if guidance is not None:
            out = out * guidance
        return 2 * out if scaled else out


CONDITIONS = {
    "none": {},
    "labels": {"class_labels": torch.arange(5)},
    "nested": {"added": {"deep": {"text": torch.arange(10.0).reshape(5, 2)}}},
    "scalar": {"guidance": torch.tensor(3.0)},
    "plain": {"scaled": True},
    "empty": {"added": {"deep": {"text": torch.arange(10.0).reshape(5, 2)}, "none": {}}},
    "slashes": {"added": {"deep/text": torch.arange(10.0).reshape(5, 2)}},
}


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_a_graph_traced_on_one_batch_is_right_for_another(condition):
    """As by ``backend="make_fx"`` of curvlinops, which traces once for batches of a size."""
    regression = regression_on({"x0": images(5), **condition}, Everything().double(), batch_size=2)
    model = regression.model_func
    params = dict(model.named_parameters())
    batches = [X for X, _ in regression if regression.batch_size_fn(X) == 2]
    assert len(batches) == 4
    for X in batches:
        assert all(isinstance(value, torch.Tensor) for value in X.values())
    traced = make_fx(lambda p, X: functional_call(model, p, (X,)))(params, batches[0])
    noised = [batch for batch in regression.batches() if len(batch.indices) == 2]
    for X, batch in zip(batches, noised, strict=True):
        scale_B = (batch.weight_B * batch.target_BD.shape[1]).sqrt()
        truth = scale_B.unsqueeze(1) * regression.objective.predict(batch)
        assert_close(model(X), truth, 0.0)
        assert_close(traced(params, X), truth, 1e-14)
    # what a batch does not hold is known without an iteration
    other = regression_on({"x0": images(5), **condition}, regression.objective.model, batch_size=2)
    assert_close(other.model_func(batches[0]), model(batches[0]), 0.0)


def test_conditions_that_curvlinops_cannot_see():
    def data(*values):
        return [{"x0": images(2), "scaled": value} for value in values]

    regression = regression_on(data(True, True), Everything().double())
    assert len(list(regression)) == 4
    changing = regression_on(data(True, False), Everything().double())
    with pytest.raises(ValueError, match=r"the condition is .*True.* and .*False.* as a tensor"):
        list(changing)
    prompts = {"x0": images(2), "prompt": ["a", "b"]}
    with pytest.raises(ValueError, match=r"'prompt' arrived as a list of str.*LatentEncoder"):
        list(regression_on(prompts, Everything().double()))


# ---------------------------------------------------------------------------------------------
# How the network is called
# ---------------------------------------------------------------------------------------------


class Timed(nn.Module):
    """Fails where time and image are not of one precision, and records what it is told."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.told = []

    def forward(self, x, t):
        self.told.append(t)
        return self.layer(torch.cat([x, t.unsqueeze(1)], 1))


class TimeFirst(Timed):
    def forward(self, t, x, y=None):
        return super().forward(x, t)


class SigmaFirst(Timed):
    def forward(self, sigma, sample):
        return super().forward(sample, sigma)


class ByName(Timed):
    def forward(self, *, sample, time):
        return super().forward(sample, time)


class TimeByName(Timed):
    def forward(self, x, *, t):
        return super().forward(x, t)


class TimeLast(Timed):
    def forward(self, x, mask=None, y=None, sigmas=None):
        assert mask is None
        return super().forward(x, sigmas)


@pytest.mark.parametrize("kind", [Timed, TimeFirst, SigmaFirst, ByName, TimeByName, TimeLast])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_time_comes_as_the_network_takes_it(kind, dtype):
    """Tables are float64; no network in float32 is told a float64."""
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    process = NoiseProcess(1 - t, t, t, PredictionType.FLOW)
    model = kind().to(dtype)
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    regression = NoisedRegression(DenoisingObjective(model, process), data, 2)
    batch = next(regression.batches())
    expected = model.layer(torch.cat([batch.x_t, t[batch.level_B].to(dtype).unsqueeze(1)], 1))
    assert_close(regression.objective.predict(batch), expected, 1e-6)
    assert {z.dtype for z in model.told} == {dtype}
    params = list(model.parameters())
    G = DiffusionGGNLinearOperator(regression)
    assert_close(to_dense(G), dense_ggn(regression, params).to(dtype), 1e-5)


def test_whole_timesteps_stay_whole():
    regression = unet_regression(dtype=torch.float32)
    assert next(regression.batches()).timestep_B.dtype == torch.int64


class Items:
    """Map-style, as many data sets are, without being one of torch."""

    def __init__(self, x0, labels=None):
        self._x0, self._labels = x0, labels

    def __len__(self):
        return len(self._x0)

    def __getitem__(self, n):
        if self._labels is None:
            return {"x0": self._x0[n]}
        return {"x0": self._x0[n], "class_labels": self._labels[n]}


def hugging_face(x0, labels=None):
    import datasets

    columns = {"x0": x0.tolist()} | ({} if labels is None else {"class_labels": labels.tolist()})
    return datasets.Dataset.from_dict(columns).with_format("torch", dtype=torch.float64)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0, 1])])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 4), (1, 4, 4)])
@pytest.mark.parametrize("make", [Items, hugging_face])
def test_map_style_data_of_any_kind(make, shape, labels):
    """An item is an example, whatever its class inherits from; never a batch."""
    x0 = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).double()
    model = TimeBlind(nn.Identity(), nn.Linear(4, 4)).double()
    whole = {"x0": x0} if labels is None else {"x0": x0, "class_labels": labels}
    expected = regression_on(whole, model, batch_size=2)
    found = regression_on(make(x0, labels), model, batch_size=2)
    assert found.num_data == 5
    assert found.batch_size == 2
    for a, b in zip(found.batches(), expected.batches(), strict=True):
        assert_close(a.x_t, b.x_t, 1e-6)
        if labels is not None:
            told = a.condition["class_labels"].long()
            assert torch.equal(told, b.condition["class_labels"])
