"""``NoisedRegression``: its loss, how the network is called, and curvlinops' operators on it."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

from benchmarks.upstream import their_parameters, upstream_operator
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    NoisedRegression,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cases import TimeBlind, images, noise_levels, plain_regression, seeded, unet_regression
from tests.comparisons import assert_close
from tests.reference import params_of, to_dense


def tiny_model():
    return seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1))


def regression_on(data, model=None, **options):
    objective = DenoisingObjective(tiny_model() if model is None else model, noise_levels())
    return NoisedRegression(objective, data, **({"num_draws": 2} | options))


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


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_weighted_training_loss(reduction):
    """By a transcription of a training loop with the scheduler's own methods."""
    scheduler = DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction")
    regression = unet_regression(
        scheduler=scheduler, objective={"weighting": MinSNRWeighting(5.0), "reduction": reduction}
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


def with_functions_that_upstream_cannot_differentiate_twice():
    middle = nn.Conv2d(2, 2, 2), nn.GroupNorm(1, 2), nn.SiLU(inplace=True), nn.Mish()
    return seeded(
        nn.Conv2d(1, 2, 1), nn.SiLU(), *middle, nn.Flatten(), nn.Linear(2, 4), Unflatten()
    )


class Unflatten(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1, 2, 2)


def test_the_hessian_of_curvlinops():
    """Of functions that it cannot differentiate twice as they are."""
    regression = plain_regression(
        with_functions_that_upstream_cannot_differentiate_twice(),
        (1, 2, 2),
        objective={"weighting": lambda t: 1 + t / 10},
        batch_size=2,
    )
    truth = dense_hessian(regression, params_of(regression.objective.model))
    assert_close(to_dense(upstream_operator("HessianLinearOperator", regression)), truth, 1e-10)


def hessian_product(regression, params, vector):
    total = sum(
        batch.loss(regression.objective.predict(batch)).sum() for batch in regression.batches()
    )
    pieces = torch.autograd.grad(total / regression.num_samples, params, create_graph=True)
    along = torch.cat([piece.flatten() for piece in pieces]) @ vector
    return torch.cat([piece.flatten() for piece in torch.autograd.grad(along, params)])


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


def ekfac_product(regression, params, vector):
    """``curvlinops``' weighs the gradients of summed squares: ``D`` times that."""
    EK = DiffusionEKFACLinearOperator(regression, params, fisher_type="empirical", exact_bias=False)
    return next(iter(regression.batches())).target_BD.shape[1] * (EK @ vector)


ON_ATTENTION = [
    ("HessianLinearOperator", {}, hessian_product, 1e-10),
    ("JacobianLinearOperator", {}, jacobian_product, 1e-6),
    ("EKFACLinearOperator", {"fisher_type": "empirical"}, ekfac_product, 1e-10),
]


@pytest.mark.parametrize(
    ("kind", "options", "truth", "tolerance"), ON_ATTENTION, ids=[kind for kind, *_ in ON_ATTENTION]
)
def test_operators_of_curvlinops_on_a_unet_with_attention(kind, options, truth, tolerance):
    regression = unet_regression(count=2, num_draws=1)
    names = their_parameters(regression) if "KFAC" in kind else None
    operator = upstream_operator(kind, regression, names, check_deterministic=True, **options)
    params = params_of(regression.objective.model, names)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(operator.shape[1], generator=generator, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = truth(regression, params, v)
    assert_close(operator @ v, expected, tolerance)


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size.* whole number of at least 1"),
        ({"num_draws": -3}, "num_draws.* whole number of at least 1"),
        ({"timesteps": "often"}, "`timesteps` must be one of 'stratified', .* got 'often'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        regression_on(images(3), **arguments)


def test_bad_objective():
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="`objective` must be a DenoisingObjective, got Conv2d"):
        NoisedRegression(nn.Conv2d(1, 1, 1), images(2))
    with pytest.raises(ValueError, match=r"`model` must be an nn.Module, got str"):
        DenoisingObjective("unet", scheduler)
    with pytest.raises(ValueError, match="floating-point parameters"):
        DenoisingObjective(nn.ReLU(), scheduler)
    with pytest.raises(ValueError, match=r"reduction.*'mean', 'sum'"):
        DenoisingObjective(tiny_model(), scheduler, reduction="none")
    with pytest.raises(ValueError, match=r"`model_kwargs` must be a dict .* got list"):
        DenoisingObjective(tiny_model(), scheduler, model_kwargs=[1])


def test_an_output_of_three_times_the_channels():
    regression = regression_on(images(2), TimeBlind(nn.Conv2d(1, 3, 1)).double())
    with pytest.raises(ValueError, match=r"a variance is predicted, too, got \(2, 3, 8, 8\)"):
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
    with pytest.raises(
        ValueError, match=r"the same condition .* got .*True.* and .*False.* as a tensor"
    ):
        list(changing)
    prompts = {"x0": images(2), "prompt": ["a", "b"]}
    with pytest.raises(
        ValueError, match=r"got 'prompt' of the condition as a list of str.*LatentEncoder"
    ):
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


class TimeByName(Timed):
    def forward(self, x, *, t):
        return super().forward(x, t)


class TimeLast(Timed):
    def forward(self, x, mask=None, y=None, sigmas=None):
        assert mask is None
        return super().forward(x, sigmas)


@pytest.mark.parametrize("kind", [Timed, TimeByName, TimeLast])
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


def test_whole_timesteps_stay_whole():
    regression = unet_regression(dtype=torch.float32)
    assert next(regression.batches()).timestep_B.dtype == torch.int64
