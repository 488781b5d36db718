"""Measured quantities against plain transcriptions of their formulas."""

import sys
from types import ModuleType

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.distributions import Normal, kl_divergence

from curvlinops_diffusion import (
    DenoisingObjective,
    ExampleGradientLinearOperator,
    NoisedRegression,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.cli import program
from curvlinops_diffusion.cli.options import commands
from curvlinops_diffusion.diffusion.ancestral import discretised_log_probability
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.influence.measurements import registry
from curvlinops_diffusion.influence.measurements.base import measurement_of
from curvlinops_diffusion.influence.measurements.losses import ELBO, SimplifiedELBO, WeightedLoss
from curvlinops_diffusion.influence.measurements.registry import Better
from curvlinops_diffusion.influence.measurements.trajectories import (
    TrajectoryRegression,
    record_trajectories,
)
from curvlinops_diffusion.measurements import ExampleFunction, LogLikelihood
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cases import TimeBlind, seeded
from tests.comparisons import assert_close

T = 6
TYPES = ["epsilon", "sample", "v_prediction"]


def scheduler(prediction_type="epsilon", variance="fixed_small"):
    return DDPMScheduler(
        num_train_timesteps=T,
        beta_start=0.02,
        beta_end=0.3,
        prediction_type=prediction_type,
        variance_type=variance,
        clip_sample=False,
    )


def grey_images(count=3):
    generator = torch.Generator().manual_seed(2)
    grey = torch.randint(0, 256, (count, 1, 2, 2), generator=generator)
    grey[0, 0, 0] = torch.tensor([0, 255])  # the open bins
    return grey.double() / 127.5 - 1


def problem(prediction_type="epsilon", variance="fixed_small", **options):
    model = seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1))
    objective = DenoisingObjective(model, scheduler(prediction_type, variance))
    options = {"num_draws": None, "timesteps": "all", "batch_size": 2} | options
    return NoisedRegression(objective, grey_images(), **options)


def eps_and_x0(s, x_t, t, prediction):
    """What a prediction stands for, by the scheduler itself."""
    alpha, sigma = s.alphas_cumprod[t].double().sqrt(), (1 - s.alphas_cumprod[t].double()).sqrt()
    kind = s.config.prediction_type
    if kind == "epsilon":
        return prediction, (x_t - sigma * prediction) / alpha
    if kind == "sample":
        return (x_t - alpha * prediction) / sigma, prediction
    return alpha * prediction + sigma * x_t, alpha * x_t - sigma * prediction


def betas(s):
    """In float64, where the scheduler's own are rounded."""
    bar = s.alphas_cumprod.double()
    return 1 - bar / torch.cat([torch.ones(1).double(), bar[:-1]])


def variance_of(s, t):
    bar = s.alphas_cumprod.double()
    beta = betas(s)[t]
    previous = bar[t - 1] if t > 0 else torch.tensor(1.0).double()
    small = beta * (1 - previous) / (1 - bar[t])
    return beta if s.config.variance_type == "fixed_large" else small, small


def log_probability_of_bin(x, mean, std):
    """Of a grey value's bin under a Gaussian, from the tail that the bin lies in."""
    above, below = ((x - 1 / 255 - mean) / std, (x + 1 / 255 - mean) / std)
    if x > 0.999:
        return torch.special.log_ndtr(-above)
    if x < -0.999:
        return torch.special.log_ndtr(below)
    if above > 0:
        above, below = -below, -above
    larger, smaller = torch.special.log_ndtr(below), torch.special.log_ndtr(above)
    return larger + torch.log1p(-torch.exp(smaller - larger))


def bound(regression, s, full):
    """The bound, term by term, in plain loops over the draws."""
    bar, beta = s.alphas_cumprod.double(), betas(s)
    totals = torch.zeros(3).double()
    x0s = grey_images()
    for batch in regression.batches():
        prediction = regression.objective.predict(batch).reshape(batch.x_t.shape)
        for b, n in enumerate(batch.indices):
            t, x_t, x0 = int(batch.timestep_B[b]), batch.x_t[b], x0s[n]
            _, x0_hat = eps_and_x0(s, x_t, t, prediction[b])
            variance, small = variance_of(s, t)
            if t > 0:
                # KL(q(x_{t-1} | x_t, x0) ‖ p(x_{t-1} | x_t)), Ho et al., Equations 6 and 7
                def posterior_mean(clean, t=t, x_t=x_t):
                    first = bar[t - 1].sqrt() * beta[t] / (1 - bar[t]) * clean
                    return first + (1 - beta[t]).sqrt() * (1 - bar[t - 1]) / (1 - bar[t]) * x_t

                if full:
                    p = Normal(posterior_mean(x0_hat), variance.sqrt())
                    totals[n] += kl_divergence(Normal(posterior_mean(x0), small.sqrt()), p).sum()
                else:
                    difference = posterior_mean(x0) - posterior_mean(x0_hat)
                    totals[n] += difference.square().sum() / (2 * variance)
            elif full:
                std = (beta[0] if variance > 0 else variance_of(s, 1)[1]).sqrt()
                for x, mean in zip(x0.flatten(), x0_hat.flatten(), strict=True):
                    totals[n] -= log_probability_of_bin(x, mean, std)
    if full:
        q = Normal(bar[-1].sqrt() * x0s, (1 - bar[-1]).sqrt())
        totals += kl_divergence(q, Normal(torch.zeros(()).double(), 1.0)).flatten(1).sum(1)
    return totals


def gradients(values, model):
    """Of each of some values, in all parameters."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(value, params, retain_graph=True) for value in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize(
    ("prediction_type", "variance", "full"),
    [
        ("epsilon", "fixed_small", False),
        ("sample", "fixed_large", False),
        ("epsilon", "fixed_large", True),
        ("v_prediction", "fixed_small", True),
    ],
)
def test_bounds(prediction_type, variance, full):
    """Every timestep once: the sum over timesteps, with its gradients."""
    regression = problem(prediction_type, variance)
    J = ExampleGradientLinearOperator(regression, measurement="elbo" if full else "simplified_elbo")
    truth = bound(regression, scheduler(prediction_type, variance), full)
    assert_close(J.values(), truth, 1e-9)
    assert_close(J.rows(), gradients(truth, regression.objective.model), 1e-8)


@pytest.mark.slow
def test_bounds_from_some_timesteps_are_unbiased():
    values = torch.stack(
        [
            ExampleGradientLinearOperator(
                problem(num_draws=24, timesteps="uniform", seed=seed), measurement=SimplifiedELBO()
            ).values()
            for seed in range(500)
        ]
    )
    # other noise than the one draw of each timestep above: compare with many
    many = ExampleGradientLinearOperator(
        problem(num_draws=T * 300), measurement="simplified_elbo"
    ).values()
    error = values.std(0) / 500**0.5
    assert ((values.mean(0) - many) / error).abs().max() < 4
    assert (error / many).max() < 0.05 / 4  # so that a scale wrong by 5 % would be seen


def test_variances_can_be_chosen():
    small = ExampleGradientLinearOperator(
        problem("epsilon", "fixed_large"), measurement=ELBO(variance="small")
    )
    truth = ExampleGradientLinearOperator(problem(), measurement="elbo")
    assert_close(small.values(), truth.values(), 1e-12)
    with pytest.raises(ValueError, match=r"`variance` must be 'small' or 'large', got 'big'"):
        ExampleGradientLinearOperator(problem(), measurement=ELBO(variance="big"))


@pytest.mark.parametrize("measurement", ["elbo", "simplified_elbo"])
def test_bounds_need_all_levels_of_variance_preserving_noise(measurement):
    objective = DenoisingObjective(seeded(nn.Conv2d(1, 1, 1)), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="variance-preserving noise only"):
        ExampleGradientLinearOperator(
            NoisedRegression(objective, grey_images(), 2), measurement=measurement
        )
    for timesteps in ([1, 2], "logit-normal"):
        with pytest.raises(ValueError, match="a sum over all noise levels"):
            ExampleGradientLinearOperator(
                problem(num_draws=2, timesteps=timesteps), measurement=measurement
            )
    ExampleGradientLinearOperator(problem(timesteps="stratified"), measurement=measurement)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_bounds_without_signal_at_the_last_level(prediction_type):
    """Finite, and continuous in the last level's signal, unless the noise is predicted."""
    model = seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1))
    values = []
    for signal in (0.0, 1e-6):
        alphas = torch.tensor([0.99, 0.9, 0.5, signal]).double()
        sigmas = (1 - alphas.square()).sqrt()
        process = NoiseProcess(alphas, sigmas, torch.arange(4), PredictionType(prediction_type))
        regression = NoisedRegression(
            DenoisingObjective(model, process), grey_images(), timesteps="all", batch_size=3
        )
        if prediction_type == "epsilon" and signal == 0:
            with pytest.raises(ValueError, match="a level without signal"):
                ExampleGradientLinearOperator(regression, measurement="elbo")
            return
        J = ExampleGradientLinearOperator(regression, measurement="elbo")
        assert J.rows().isfinite().all()
        values.append(J.values())
    assert_close(*values, 1e-4)


@pytest.mark.parametrize("distance", [0.0, 5.6, 30.0])
def test_reconstruction_is_symmetric_and_does_not_vanish(distance):
    """In float32, against float64 where that suffices; its gradient pulls back from anywhere."""
    x, std = torch.tensor([[7 / 255]]), 0.02
    found, gradients = [], []
    for sign in (1, -1):
        mean = (sign * x + sign * distance * std).requires_grad_()
        value = discretised_log_probability(sign * x, mean, std)
        (gradient,) = torch.autograd.grad(value.sum(), mean)
        found.append(value.detach())
        gradients.append(sign * gradient)
    assert_close(found[0], found[1], 1e-5)
    assert_close(gradients[0], gradients[1], 1e-4)
    assert (gradients[0] < -1 if distance else gradients[0].abs() < 1e-3).all()
    if distance < 6:
        z = torch.tensor([distance * std - 1 / 255, distance * std + 1 / 255]).double() / std
        lower, upper = torch.special.ndtr(-z)
        assert_close(found[0].double(), (lower - upper).log().reshape(1), 1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_loss(reduction):
    model = seeded(nn.Conv2d(1, 1, 3, padding=1))
    objective = DenoisingObjective(model, scheduler(), reduction=reduction)
    regression = NoisedRegression(objective, grey_images(), 3)
    weighted = DenoisingObjective(model, scheduler(), MinSNRWeighting(1.0), reduction=reduction)
    twin = ExampleGradientLinearOperator(NoisedRegression(weighted, grey_images(), 3))
    J = ExampleGradientLinearOperator(regression, measurement=WeightedLoss(MinSNRWeighting(1.0)))
    assert_close(J.values(), twin.values(), 1e-12)
    assert_close(J.rows(), twin.rows(), 1e-12)


LEVELS = [5, 3, 2, 0]


def trajectories(prediction_type="epsilon", variance="fixed_small", **options):
    objective = problem(prediction_type, variance).objective
    states = record_trajectories(objective, (3, 1, 2, 2), LEVELS, seed=4).double()
    return TrajectoryRegression(objective, states, LEVELS, **options), states


def log_probability(regression, states, s):
    """``Σ_s log N(x_{s+1}; μ, σ²)``, in plain loops; a step without noise does not count."""
    bar = s.alphas_cumprod.double()
    totals = torch.zeros(len(states)).double()
    for n, path in enumerate(states):
        for step, t in enumerate(LEVELS):
            following = bar[LEVELS[step + 1]] if step + 1 < len(LEVELS) else torch.ones(()).double()
            beta = 1 - bar[t] / following
            small = beta * (1 - following) / (1 - bar[t])
            variance = beta if s.config.variance_type == "fixed_large" else small
            x = path[step]
            prediction = regression.objective.model(x[None], torch.tensor([t]))[0]
            _, x0_hat = eps_and_x0(s, x, t, prediction)
            mean = following.sqrt() * beta / (1 - bar[t]) * x0_hat
            mean = mean + (1 - beta).sqrt() * (1 - following) / (1 - bar[t]) * x
            if variance > 0:
                totals[n] += Normal(mean, variance.sqrt()).log_prob(path[step + 1]).sum()
    return totals


@pytest.mark.parametrize(
    ("prediction_type", "variance"),
    [("epsilon", "fixed_large"), ("sample", "fixed_small"), ("v_prediction", "fixed_small")],
)
def test_log_probability_of_trajectories(prediction_type, variance):
    regression, states = trajectories(prediction_type, variance)
    J = ExampleGradientLinearOperator(regression, measurement=regression.log_probability)
    s = scheduler(prediction_type, variance)
    truth = log_probability(regression, states, s)
    assert_close(J.values(), truth, 1e-10)
    assert_close(J.rows(), gradients(truth, regression.objective.model), 1e-9)
    examples = ExampleGradientLinearOperator(problem(), measurement=regression.log_probability)
    with pytest.raises(ValueError, match="got other examples"):
        examples.values()


@pytest.mark.slow
def test_log_probability_from_some_steps_is_unbiased():
    regression, states = trajectories()
    states = states + 0.5 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    truth = log_probability(regression, states, scheduler()).detach()
    objective = regression.objective
    values = []
    for seed in range(6000):
        some = TrajectoryRegression(objective, states, LEVELS, num_draws=2, seed=seed)
        J = ExampleGradientLinearOperator(some, measurement=some.log_probability)
        values.append(J.values())
    values = torch.stack(values)
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - truth) / error).abs().max() < 4.5
    assert (error / truth.abs()).max() < 0.05 / 4


def test_recorded_states_have_the_steps_distribution():
    """Whitened increments are standard normal, and the last step adds no noise."""
    objective = problem().objective
    states = record_trajectories(objective, (4000, 1, 2, 2), LEVELS, seed=0).double()
    regression = TrajectoryRegression(objective, states, LEVELS, batch_size=4000)
    for batch in regression.batches():
        prediction = objective.predict(batch)
        steps = regression._steps
        residual = batch.reached_BD - steps.mean(batch, prediction)
        # the target is the prediction that would have led there
        assert_close(steps.mean(batch, batch.target_BD), batch.reached_BD, 1e-9)
        std = steps.variance_T[batch.level_B[0]].sqrt()
        if batch.common_draw == len(LEVELS) - 1:
            assert residual.abs().max() < 1e-5
        else:
            assert abs(residual.mean() / std) < 0.05
            assert abs(residual.std() / std - 1) < 0.05


def test_bad_trajectories():
    for steps, levels, message in (
        (4, LEVELS, r"got shape \[2, 4, 1, 2, 2\] with 4 levels"),
        (5, LEVELS[::-1], "must fall"),
        (5, [9, 3, 2, 0], r"within 0 to 5, got \[9, 3, 2, 0\]"),
        (5, [3, 2, 0, -1], r"within 0 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            TrajectoryRegression(problem().objective, torch.zeros(2, steps, 1, 2, 2), levels)


def test_random_networks_record_no_trajectories():
    model = seeded(nn.Conv2d(1, 1, 1), nn.Dropout())
    objective = DenoisingObjective(model.train(), scheduler())
    with pytest.raises(ValueError, match=r"\(Dropout\) is in train mode"):
        record_trajectories(objective, (3, 1, 2, 2), LEVELS)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast is on"):
        record_trajectories(objective, (3, 1, 2, 2), LEVELS)
    assert record_trajectories(objective, (3, 1, 2, 2), LEVELS).isfinite().all()


def test_targets_of_trajectories_are_finite():
    """Also where a step's mean does not depend on the prediction: the noise of no noise."""
    s = scheduler()
    alphas_T = s.alphas_cumprod.double().sqrt()
    alphas_T[0] = 1.0
    process = NoiseProcess(
        alphas_T, (1 - alphas_T.square()).sqrt(), torch.arange(T), PredictionType.EPSILON
    )
    objective = DenoisingObjective(problem().objective.model, process)
    states = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    targets = [b.target_BD for b in TrajectoryRegression(objective, states, LEVELS).batches()]
    assert all(target_BD.isfinite().all() for target_BD in targets)
    assert targets[0].abs().min() > 0


CLIPS = {
    "0.4": {"clip_sample": True, "clip_sample_range": 0.4},
    "dynamic": {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 3.0},
}


@pytest.mark.parametrize("clip", CLIPS)
def test_samplers_that_clip(clip):
    """Trajectories are those of the scheduler's own steps, and their probability is of these."""
    tables = 1e-4  # the scheduler computes in float32, and divides by 1 − ᾱ
    model = problem().objective.model
    s = DDPMScheduler(num_train_timesteps=T, beta_start=0.02, beta_end=0.3, **CLIPS[clip])
    objective = DenoisingObjective(model, s)
    levels = list(range(T))[::-1]
    states = record_trajectories(objective, (3, 1, 2, 2), levels, seed=4).double()
    regression = TrajectoryRegression(objective, states, levels)
    J = ExampleGradientLinearOperator(regression, measurement=regression.log_probability)
    s.set_timesteps(T)
    totals = torch.zeros(3).double()
    for step, t in enumerate(levels):
        x = states[:, step]
        prediction = model(x, torch.tensor([t])).detach()
        generator = torch.Generator().manual_seed(t)
        made = s.step(prediction, t, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=generator.manual_seed(t), dtype=torch.float64)
        std = s._get_variance(t).double().sqrt() if t > 0 else torch.zeros(()).double()
        mean = made - std * noise
        if t == 0:
            assert_close(states[:, step + 1], mean, tables)
        else:
            totals += Normal(mean, std).log_prob(states[:, step + 1]).flatten(1).sum(1)
    assert_close(J.values(), totals, tables)
    assert J.rows().isfinite().all()


def test_levels_without_signal_are_refused_where_nothing_is_told():
    alphas_T = torch.linspace(1, 0, T + 1, dtype=torch.float64)[1:].sqrt()
    sigmas_T = (1 - alphas_T.square()).sqrt()
    model = problem().objective.model
    for kind in ("epsilon", "v_prediction", "sample"):
        process = NoiseProcess(alphas_T, sigmas_T, torch.arange(T), PredictionType(kind))
        objective = DenoisingObjective(model, process)
        data = NoisedRegression(objective, torch.zeros(2, 1, 2, 2).double(), 1)
        if kind == "epsilon":
            with pytest.raises(ValueError, match=r"Noise level 5 has no signal .*the ancestral"):
                record_trajectories(objective, (1, 1, 2, 2), [5, 3, 0])
            with pytest.raises(ValueError, match=r"Noise level 5 has no signal .*probability flow"):
                ExampleGradientLinearOperator(data, measurement=LogLikelihood(5)).values()
            assert record_trajectories(objective, (1, 1, 2, 2), [4, 3, 0]).isfinite().all()
        else:
            assert record_trajectories(objective, (1, 1, 2, 2), [5, 3, 0]).isfinite().all()


def test_conditions_of_trajectories():
    class Conditional(TimeBlind):
        def forward(self, x_t, t, gain):
            return self.layers(x_t) * gain[:, None, None, None]

    model = Conditional(nn.Conv2d(1, 1, 1)).double()
    objective = DenoisingObjective(model, scheduler())
    condition = {"gain": torch.tensor([1.0, 2.0, 3.0])}
    states = record_trajectories(objective, (3, 1, 2, 2), LEVELS, condition=condition)
    regression = TrajectoryRegression(objective, states, LEVELS, condition=condition, batch_size=2)
    J = ExampleGradientLinearOperator(regression, measurement=regression.log_probability)
    assert J.rows().isfinite().all()
    gains = {
        n: float(g)
        for b in regression.batches()
        for n, g in zip(b.indices, b.condition["gain"], strict=True)
    }
    assert gains == {0: 1.0, 1: 2.0, 2: 3.0}


def test_a_measurement_is_one_file_and_one_line(monkeypatch, capsys):
    """Library, program and report know it by its line."""
    file = ModuleType("brightness")
    file.brightness = lambda batch, prediction_BD: prediction_BD.mean(1)
    monkeypatch.setitem(sys.modules, f"{registry.__package__}.brightness", file)
    line = registry.NamedMeasurement("brightness:brightness", "the mean pixel", Better.HIGHER)
    monkeypatch.setitem(registry.MEASUREMENTS, "brightness", line)
    monkeypatch.setattr(program, "commands", commands.__wrapped__)  # anew

    regression = problem(num_draws=T)
    J = ExampleGradientLinearOperator(regression, measurement="brightness")
    plain = ExampleGradientLinearOperator(regression, measurement=file.brightness)
    assert_close(J.values(), plain.values(), 0.0)

    score = ["score", "--operator=o", "--data=d", "--queries=q", "--output=s"]
    parsed = program.parser().parse_args([*score, "--measurement=brightness"])
    assert parsed.score.measurement == "brightness"
    with pytest.raises(SystemExit):
        program.parser().parse_args(["score", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "brightness (the mean pixel)" in shown
    assert "For log_likelihood and brightness higher is better" in shown
    assert registry.sentence_of("brightness") == (
        "Measured: brightness, the mean pixel; higher is better, so here negative means helpful."
    )


def test_every_named_measurement_loads():
    objective = DenoisingObjective(problem().objective.model, DDPMScheduler())
    for name, line in registry.MEASUREMENTS.items():
        assert callable(measurement_of(name, objective)) or isinstance(
            measurement_of(name, objective), ExampleFunction
        )
        assert line.summary
    assert registry.sentence_of("unknown") == ""


def constant_objective(dtype, prediction_type="epsilon"):
    """Of a network whose prediction no rounding changes."""
    model = seeded(nn.Conv2d(1, 1, 1)).to(dtype)
    model.layers[0].weight.data.fill_(0)
    model.layers[0].bias.data.fill_(0.25)
    return DenoisingObjective(model, scheduler(prediction_type))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_bounds_of_networks_in_low_precision(prediction_type):
    """Only the network is rounded, not the state that its prediction is made something of."""
    found, exact = (
        ExampleGradientLinearOperator(
            NoisedRegression(
                constant_objective(dtype, prediction_type), grey_images(), timesteps="all"
            ),
            measurement="elbo",
        ).values()
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert_close(found.double(), exact, 1e-6)


def test_trajectories_of_networks_in_low_precision():
    states = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        regression = TrajectoryRegression(constant_objective(dtype), states, [5, 3, 1])
        J = ExampleGradientLinearOperator(regression, measurement=regression.log_probability)
        found.append(J.values().double())
    assert_close(*found, 1e-6)


def test_states_are_not_encoded():
    """They are what the network sees, whatever is between it and other data."""

    def encode(x0, condition):
        raise AssertionError

    states = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    objective = DenoisingObjective(problem().objective.model, scheduler(), encode=encode)
    trajectories = TrajectoryRegression(objective, states, [5, 3, 1])
    J = ExampleGradientLinearOperator(trajectories, measurement=trajectories.log_probability)
    assert J.rows().isfinite().all()


def of_second_draw(batch, prediction):
    return prediction.square().mean(1) * (batch.draw == 1)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_measurements_by_the_number_of_the_draw(batch_size):
    """One draw alone is a problem of one draw, in whatever batches draws are seen together."""
    regression = problem(num_draws=4, timesteps=[0, 2, 3, 5], batch_size=batch_size)
    J = ExampleGradientLinearOperator(regression, measurement=of_second_draw)
    alone = ExampleGradientLinearOperator(
        problem(num_draws=4, timesteps=[2] * 4, batch_size=1), measurement=of_second_draw
    )
    assert_close(J.rows(), alone.rows(), 1e-12)
    assert_close(J.values(), alone.values(), 1e-12)
    v = torch.ones(J.shape[1]).double()
    assert_close(J @ v, alone.rows() @ v, 1e-12)
    number = J.measuring(lambda batch, prediction: 0 * prediction[:, 0] + batch.draw)
    assert torch.equal(number.values(), torch.full((3,), 1.5).double())


def test_each_example_keeps_the_number_of_its_draw():
    """Through parts of batches, draws in a row and lots of examples."""
    regression = problem(num_draws=3, timesteps="uniform", batch_size=3)
    draws = list(regression.batches())
    merged = NoisedBatch.interleaved(draws)
    assert list(zip(merged.indices, merged.draw.tolist(), strict=True)) == [
        (n, r) for n in range(3) for r in range(3)
    ]
    some = NoisedBatch.joined([merged.select([1, 5]), draws[2].select(range(1))])
    assert (some.indices, some.draw.tolist()) == ([0, 1, 0], [1, 2, 2])
    for b, (n, r) in enumerate(zip(some.indices, some.draw.tolist(), strict=True)):
        assert torch.equal(some.x_t[b], draws[r].x_t[n])
    assert draws[1].draw.dtype == torch.int64


def process(prediction_type, first, last):
    """A variance-preserving process with edges of any kind."""
    angle = torch.linspace(first, last, 30, dtype=torch.float64)
    alphas = torch.where(angle < torch.pi / 2, angle.cos(), 0.0)
    return NoiseProcess(alphas, angle.sin(), torch.arange(30), PredictionType(prediction_type))


def in_precision(dtype, measurement, prediction_type, first=0.01, last=1.5):
    model = seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1)).to(dtype)
    objective = DenoisingObjective(model, process(prediction_type, first, last))
    x0 = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    regression = NoisedRegression(objective, x0.to(dtype), timesteps="all")
    return ExampleGradientLinearOperator(regression, measurement=measurement)


@pytest.mark.parametrize(
    ("prediction_type", "last"), [("epsilon", 1.57079), ("sample", 1.5), ("flow", torch.pi / 2)]
)
def test_bounds_in_float32(prediction_type, last):
    """Finite and right where predicted examples are far from the data: of little signal."""
    found, exact = (
        in_precision(dtype, "elbo", prediction_type, last=last)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(found.values().double(), exact.values(), 1e-5)
    assert_close(found.rows().double(), exact.rows(), 1e-5)


def test_reconstructions_in_float32_far_from_the_data():
    """The slope of the tail is the distance from it: ``log Φ(−u)' = u + 1/u − …``."""
    x = torch.zeros(1, 5)
    mean = torch.tensor([[-4.0, -2.0, -1e-3, 0.5, 3.0]], requires_grad=True)
    value = discretised_log_probability(x, mean, 0.01)
    (gradient,) = torch.autograd.grad(value.sum(), mean)
    edge = (mean.detach().abs() - 1 / 255) / 0.01
    hazard = edge + 1 / edge
    expected = -mean.detach().sign() * hazard / 0.01
    far = mean[0].abs() > 0.1
    assert_close(gradient[:, far], expected[:, far], 1e-5)
    assert value.isfinite().all()


def test_a_level_without_noise():
    for measurement, prediction_type, message in (
        ("elbo", "epsilon", r"infinite at the noise levels \[1\]"),
        ("simplified_elbo", "v_prediction", r"infinite at the noise levels \[1\]"),
        ("log_likelihood", "sample", "Noise level 0 has no noise"),
    ):
        with pytest.raises(ValueError, match=message):
            in_precision(torch.float64, measurement, prediction_type, first=0.0)


@pytest.mark.parametrize(
    ("prediction_type", "first", "last", "highest"),
    [("epsilon", 0.0, 1.5, 25), ("v_prediction", 0.002, torch.pi / 2, 29)],
)
def test_trajectories_from_and_to_the_edges(prediction_type, first, last, highest):
    """In float32 as in float64; a step without noise counts for nothing."""
    levels, states, found = [highest, 10, 2, 1, 0], None, []
    for dtype in (torch.float64, torch.float32):
        model = seeded(nn.Conv2d(1, 1, 3, padding=1)).to(dtype)
        objective = DenoisingObjective(model, process(prediction_type, first, last))
        if states is None:
            states = record_trajectories(objective, (2, 1, 3, 3), levels)
        regression = TrajectoryRegression(objective, states.to(dtype), levels)
        J = ExampleGradientLinearOperator(regression, measurement=regression.log_probability)
        found.append((J.values().double(), J.rows().double()))
    (values, rows), (others, other_rows) = found
    assert_close(others, values, 1e-4)
    assert_close(other_rows, rows, 1e-3)


def test_a_measurement_that_is_infinite():
    """It is named, not the weights."""

    def root(batch, prediction):
        return (prediction - prediction.detach()).sqrt().sum(1)

    with pytest.raises(
        ValueError, match=r"gradient of 'layers.*that of the measurement .* \(example 0, noise"
    ):
        ExampleGradientLinearOperator(problem(), measurement=root).rows()
