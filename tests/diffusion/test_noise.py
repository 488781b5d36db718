"""Noise processes and weightings against diffusers' schedulers and plain formulas."""

import dataclasses

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionGGNLinearOperator,
    NoisedBatch,
    NoisedRegression,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.diffusion.ancestral import AncestralSteps
from curvlinops_diffusion.diffusion.noise import PREDICTIONS
from curvlinops_diffusion.diffusion.schedulers import noise_process
from curvlinops_diffusion.diffusion.weightings import weight_table
from curvlinops_diffusion.weightings import MinSNRWeighting, PreconditionedWeighting
from tests.cases import images, noise_levels
from tests.comparisons import assert_close
from tests.reference import to_dense

X0 = images(5)
EPS = images(10)[5:]
LEVELS = torch.tensor([0, 7, 31, 70, 99])
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
DISCRETE_TYPES = ["epsilon", "sample", "v_prediction"]
DISCRETE = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler,
            UniPCMultistepScheduler]  # fmt: skip
SOLVERS = [DPMSolverMultistepScheduler, UniPCMultistepScheduler]
KARRAS = [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]


def _config(beta_schedule, prediction_type, **extra):
    return {
        "num_train_timesteps": 100,
        "beta_schedule": beta_schedule,
        "prediction_type": prediction_type,
    } | extra


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", DISCRETE_TYPES)
@pytest.mark.parametrize("scheduler_type", DISCRETE + KARRAS)
def test_noised_examples_and_targets_are_the_schedulers(
    scheduler_type, beta_schedule, prediction_type
):
    if scheduler_type is PNDMScheduler and prediction_type == "sample":
        pytest.skip("PNDM has no such prediction type")
    extra = {"timestep_spacing": "trailing"} if scheduler_type in SOLVERS else {}
    scheduler = scheduler_type(**_config(beta_schedule, prediction_type, **extra))
    process = noise_process(scheduler)
    if scheduler_type in SOLVERS:
        # before set_timesteps their add_noise pairs timesteps with the noise levels in reverse
        scheduler.set_timesteps(100)
        assert scheduler.timesteps.tolist() == list(range(99, -1, -1))
    noised = scheduler.add_noise(X0, EPS, LEVELS)
    if scheduler_type in KARRAS:  # the network sees x_t / sqrt(1 + sigma²)
        order = scheduler.timesteps.argsort()
        sigmas = scheduler.sigmas[:-1][order][LEVELS].double()
        noised = noised / (sigmas**2 + 1).sqrt().reshape(-1, 1, 1, 1)
    float32_tables = scheduler_type in KARRAS + SOLVERS
    tolerance = 1e-6 if float32_tables else 1e-12
    assert_close(process.noised(X0, EPS, LEVELS), noised, tolerance)
    assert process.timesteps_T.tolist() == list(range(100))
    target = {
        "epsilon": EPS,
        "sample": X0,
        "v_prediction": DDPMScheduler(**_config(beta_schedule, prediction_type)).get_velocity(
            X0, EPS, LEVELS
        ),
    }[prediction_type]
    assert_close(process.target(X0, EPS, LEVELS), target, tolerance)


def test_zero_terminal_snr():
    scheduler = DDIMScheduler(**_config("linear", "v_prediction", rescale_betas_zero_snr=True))
    process = noise_process(scheduler)
    assert process.snr_T[-1] < 1e-12
    assert_close(process.noised(X0, EPS, LEVELS), scheduler.add_noise(X0, EPS, LEVELS), 1e-12)
    epsilon = noise_process(
        DDIMScheduler(**_config("linear", "epsilon", rescale_betas_zero_snr=True))
    )
    weights_T = weight_table(MinSNRWeighting(), epsilon)  # min(SNR, 5) / SNR
    assert_close(weights_T, (5 / epsilon.snr_T).clamp(max=1), 1e-12)
    assert weights_T[-1] == 1


def test_continuous_timesteps_of_euler():
    scheduler = EulerDiscreteScheduler(
        **_config("linear", "v_prediction", timestep_type="continuous")
    )
    process = noise_process(scheduler)
    assert_close(process.timesteps_T.flip(0), scheduler.timesteps, 1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=shift)
    process = noise_process(scheduler)
    assert process.prediction_type is PredictionType.FLOW
    told = process.timesteps_T[LEVELS]
    assert_close(process.noised(X0, EPS, LEVELS), scheduler.scale_noise(X0, told, EPS), 1e-12)
    assert_close(process.target(X0, EPS, LEVELS), EPS - X0, 1e-12)
    assert_close(told, 100 * process.sigmas_T[LEVELS], 1e-6)
    assert (process.sigmas_T.diff() > 0).all()  # in order of rising noise


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(num_train_timesteps=100),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=2.0),
        DDPMScheduler(num_train_timesteps=100),
    ],
    ids=lambda s: type(s).__name__,
)
def test_sampling_before_does_not_matter(scheduler):
    """``set_timesteps`` overwrites the tables of the scheduler, not those of training."""
    before = noise_process(scheduler)
    scheduler.set_timesteps(10)
    after = noise_process(scheduler)
    for name in ("alphas_T", "sigmas_T", "timesteps_T"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.num_levels == 100


@pytest.mark.parametrize("prediction_type", list(PredictionType))
def test_min_snr_weighting(prediction_type):
    """In units of the error of ``x0``: ``min(SNR, γ)`` times its ratio to the target's error."""
    process = noise_levels(prediction_type)
    snr = (process.alphas_T / process.sigmas_T) ** 2
    capped = torch.minimum(snr, torch.tensor(0.7, dtype=torch.float64))
    # in the coordinates of flow matching, in which signal and noise add up to one
    s_T = process.sigmas_T / (process.alphas_T + process.sigmas_T)
    straight = (1 - process.sigmas_T[0]) / process.alphas_T[0]
    expected = {
        PredictionType.EPSILON: capped / snr,
        PredictionType.SAMPLE: capped,
        PredictionType.V: capped / (snr + 1),  # σ² = 1/(SNR + 1) where α² + σ² = 1
        PredictionType.FLOW: capped * s_T**2,
        PredictionType.REVERSE_FLOW: capped * s_T**2,
        PredictionType.CONDITIONAL_FLOW: capped
        * (process.sigmas_T / (straight * process.alphas_T + process.sigmas_T)) ** 2,
    }[prediction_type]
    assert_close(weight_table(MinSNRWeighting(0.7), process), expected, 1e-12)
    assert (snr > 0.7).any()
    assert (snr < 0.7).any()


def test_weights_of_preconditioned_flows():
    """Errors of the clean example that SD3's script makes of the network's answer."""
    process = noise_process(FlowMatchEulerDiscreteScheduler(shift=3.0))
    x0, eps, answer = torch.randn(
        3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    level = torch.tensor([0, 10, 500, 900, 999])
    s = process.sigmas_T[level].unsqueeze(1)
    x_t = process.noised(x0, eps, level)
    script = (x_t - s * answer - x0).square().mean(1)
    ours = (answer - process.target(x0, eps, level)).square().mean(1)
    assert_close(weight_table(PreconditionedWeighting(), process)[level] * ours, script, 1e-10)


OF_0_1 = [t for t in PredictionType if t.value in ("epsilon", "sample", "v_prediction", "flow")]


@pytest.mark.parametrize("prediction_type", OF_0_1)
def test_min_snr_weights_are_those_of_0_1_to_the_last_bit(prediction_type):
    """Files of results hold a digest of them."""
    if prediction_type is PredictionType.FLOW:
        process = noise_process(FlowMatchEulerDiscreteScheduler(shift=3.0))
    else:
        process = noise_process(DDPMScheduler(prediction_type=prediction_type.value))
    snr = process.snr_T
    expected = {
        PredictionType.EPSILON: (5.0 / snr).clamp(max=1.0),
        PredictionType.SAMPLE: snr.clamp(max=5.0),
        PredictionType.V: snr.clamp(max=5.0) * process.sigmas_T.square(),
        PredictionType.FLOW: snr.clamp(max=5.0) * process.sigmas_T.square(),
    }[prediction_type]
    assert torch.equal(weight_table(MinSNRWeighting(), process), expected)


def test_weightings():
    process = noise_levels(num_levels=4)
    assert weight_table(None, process).tolist() == [1, 1, 1, 1]
    assert weight_table(lambda t: t + 0.5, process).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert weight_table(torch.tensor([1, 2, 0, 3]), process).tolist() == [1, 2, 0, 3]
    assert weight_table([1, 2, 0, 3], process).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (torch.ones(3), r"shape \(3,\). It must give one for each of the 4 noise levels"),
        (lambda t: -t.double(), r"from -3 to -?0. They must be finite and at least 0"),
        (torch.full((4,), torch.nan), "must be finite"),
        ("snr", r"weighting='snr' is none of: None, a weighting like MinSNRWeighting"),
    ],
)
def test_bad_weightings(weighting, message):
    with pytest.raises(ValueError, match=message):
        DenoisingObjective(nn.Linear(2, 2), noise_levels(num_levels=4), weighting)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler has no alphas_cumprod and is not a Flow"),
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction"),
            r"prediction_type='flow_prediction'. Accepted: \['epsilon', 'sample', 'v_prediction'\]",
        ),
        ("ddpm", "The scheduler arrived as str. Pass a diffusers scheduler"),
    ],
)
def test_bad_schedulers(scheduler, message):
    with pytest.raises(ValueError, match=message):
        noise_process(scheduler)


def test_a_noise_process_of_ones_own():
    process = NoiseProcess(
        torch.ones(3),
        torch.tensor([0.1, 1.0, 9.0]),
        torch.tensor([3.0, 4.0, 5.0]),
        PredictionType.SAMPLE,
    )
    assert noise_process(process) is process
    assert_close(
        process.noised(X0[:2], EPS[:2], torch.tensor([2, 0])),
        X0[:2] + torch.tensor([9.0, 0.1]).reshape(2, 1, 1, 1) * EPS[:2],
        1e-7,
    )


# ---------------------------------------------------------------------------------------------
# Prediction types: y = a x0 + b eps
# ---------------------------------------------------------------------------------------------

SIGMA_DATA = 0.5

# two that the library does not have, each a line
OWN = {
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "edm_f": lambda alpha, sigma: (  # Karras et al., 2022, Table 1: F = (x0 - c_skip x_t) / c_out
        (1 - alpha * c_skip(sigma)) / c_out(sigma),
        -sigma * c_skip(sigma) / c_out(sigma),
    ),
}


def c_skip(sigma):
    return SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)


def c_out(sigma):
    return sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()


# the path that a straight one from its largest signal on would be
FIRST = noise_levels(num_levels=6)
LEAST_NOISE = 1 - float((1 - FIRST.sigmas_T[0]) / FIRST.alphas_T[0])


def plain_target(name, x0, eps, alpha, sigma):
    """Written out for each type, one level."""
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow": eps - x0,
        "reverse_flow": x0 - eps,
        "conditional_flow": x0 - (1 - LEAST_NOISE) * eps,
        "score": -eps / sigma,
        "edm_f": (x0 - c_skip(sigma) * (alpha * x0 + sigma * eps)) / c_out(sigma),
    }[name]


@pytest.fixture
def own_types(monkeypatch):
    for name, coefficients in OWN.items():
        monkeypatch.setitem(PREDICTIONS, name, coefficients)


ALL_TYPES = [*(p.value for p in PredictionType), *OWN]


def process_of(name):
    return dataclasses.replace(noise_levels(num_levels=6), prediction_type=name)


@pytest.mark.usefixtures("own_types")
@pytest.mark.parametrize("name", ALL_TYPES)
def test_all_of_a_prediction_type_follows_from_its_line(name):
    process = process_of(name)
    level = torch.arange(5) + 1
    x_t, y = process.noised(X0, EPS, level), process.target(X0, EPS, level)
    for b, t in enumerate(level):
        alpha, sigma = process.alphas_T[t], process.sigmas_T[t]
        assert_close(y[b], plain_target(name, X0[b], EPS[b], alpha, sigma), 1e-14)
    assert_close(process.clean(x_t, y, level), X0, 6e-13)
    assert_close(process.noise(x_t, y, level), EPS, 6e-13)
    # the conversions are linear in the prediction: an error of y is one of x0 and eps
    off = images(15)[10:]
    for t in range(5):
        scales = process.alphas_T[level[t]], process.sigmas_T[level[t]]
        step = process.clean(x_t, y + off, level)[t] - process.clean(x_t, y, level)[t]
        # x_t does not move: alpha dx0 + sigma deps = 0, and a dx0 + b deps = dy
        moved = plain_target(name, step, -scales[0] / scales[1] * step, *scales)
        assert_close(moved, off[t], 1e-11)


@pytest.mark.usefixtures("own_types")
@pytest.mark.parametrize("name", ALL_TYPES)
def test_the_weighting_by_snr_is_in_units_of_the_clean_example(name):
    process = process_of(name)
    weights_T = weight_table(MinSNRWeighting(2.0), process)
    level = torch.arange(5) + 1
    x_t, y = process.noised(X0, EPS, level), process.target(X0, EPS, level)
    wrong = y + images(15)[10:]
    in_y = weights_T[level] * (wrong - y).flatten(1).square().sum(1)
    in_x0 = process.snr_T[level].clamp(max=2.0) * (process.clean(x_t, wrong, level) - X0).flatten(
        1
    ).square().sum(1)
    assert_close(in_y, in_x0, 1e-11)


@pytest.mark.usefixtures("own_types")
@pytest.mark.parametrize("name", ALL_TYPES)
def test_ancestral_steps_of_every_prediction_type(name):
    """The mean is that of the posterior; the bound's factor that of the noise' error."""
    process = process_of(name)
    steps = AncestralSteps.of(process, "small")
    level = torch.arange(5) + 1
    x_t, y = process.noised(X0, EPS, level), process.target(X0, EPS, level)
    indices = list(range(5))
    batch = NoisedBatch(indices, 0, level, x_t, level, {}, y.flatten(1), torch.ones(5))
    squared_T = process.alphas_T.square()
    for b, t in enumerate(level):
        here, before = squared_T[t], squared_T[t - 1]
        beta = 1 - here / before
        mean = before.sqrt() * beta / (1 - here) * X0[b]
        mean = mean + (1 - beta).sqrt() * (1 - before) / (1 - here) * x_t[b]
        assert_close(steps.mean(batch, y.flatten(1))[b], mean.flatten(), 1e-11)
        wrong = y + 0.1
        error = (process.noise(x_t, wrong, level) - EPS)[b].square().sum()
        variance = beta * (1 - before) / (1 - here)
        factor = beta**2 / (2 * variance * (1 - beta) * (1 - here))
        ours = steps.noise_error_factor_T()[t] * (wrong - y)[b].square().sum()
        assert_close(ours, factor * error, 1e-11)


class Reading(nn.Module):
    """One network in several parametrisations: it predicts noise, and says it as ``name``."""

    def __init__(self, inner, process):
        super().__init__()
        self.inner, self._process = inner, process

    def forward(self, x_t, t):
        level = t.long()
        eps = self.inner(x_t)
        alpha, sigma = self._process._scales(x_t, level)
        return self._process.target((x_t - sigma * eps) / alpha, eps, level)


@pytest.mark.usefixtures("own_types")
@pytest.mark.parametrize("name", ALL_TYPES)
def test_the_same_network_has_the_same_ggn_in_every_parametrisation(name):
    inner = nn.Conv2d(1, 1, 3, padding=1).double()
    inner.weight.data.copy_(torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(1, 1, 3, 3))

    def ggn(name):
        process = process_of(name)
        objective = DenoisingObjective(
            Reading(inner, process), process, weighting=MinSNRWeighting(2.0)
        )
        regression = NoisedRegression(objective, images(3), 4)
        return to_dense(DiffusionGGNLinearOperator(regression))

    assert_close(ggn(name), ggn("epsilon"), 1e-10)


def test_levels_without_signal_or_noise():
    """What a prediction tells there is exact; what it does not tell is infinite, not wrong."""
    ends_T = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def at_ends(name):
        process = NoiseProcess(ends_T, ends_T.flip(0), torch.arange(2), name)
        assert weight_table(MinSNRWeighting(5.0), process).isfinite().all()
        pairs = process.clean_coefficients(), process.noise_coefficients()
        return [[tuple(z_T.tolist()) for z_T in pair] for pair in pairs]

    (_, clean_of_y), noise = at_ends("epsilon")
    assert noise == [(0, 0), (1, 1)]
    assert (clean_of_y[0], abs(clean_of_y[1])) == (0, torch.inf)
    clean, (_, noise_of_y) = at_ends("sample")
    assert clean == [(0, 0), (1, 1)]
    assert (abs(noise_of_y[0]), noise_of_y[1]) == (torch.inf, 0)
    assert at_ends("v_prediction") == [[(1, 0), (0, -1)], [(0, 1), (1, 0)]]
    assert at_ends("flow") == [[(1, 1), (0, -1)], [(1, 1), (1, 0)]]


def test_unknown_prediction_types_are_refused():
    with pytest.raises(
        ValueError, match=r"prediction_type='x0' is none of \['conditional_flow', 'epsilon'"
    ):
        process_of("x0")


# ---------------------------------------------------------------------------------------------
# Schedulers that were changed after they were made
# ---------------------------------------------------------------------------------------------


def zero_terminal_snr(scheduler):
    """As trainers overwrite the tables of a scheduler that exists."""
    root = scheduler.alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    scheduler.alphas_cumprod = root.square()
    scheduler.alphas = torch.cat(
        [root[:1].square(), scheduler.alphas_cumprod[1:] / scheduler.alphas_cumprod[:-1]]
    )
    scheduler.betas = 1 - scheduler.alphas


def shifted_signal(scheduler):
    """A shift of the signal-to-noise ratio, of one table alone."""
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod) / 4
    scheduler.alphas_cumprod = snr / (1 + snr)


@pytest.mark.parametrize("change", [zero_terminal_snr, shifted_signal])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
def test_tables_of_the_scheduler_as_it_is(kind, change):
    scheduler = kind(num_train_timesteps=100, prediction_type="v_prediction")
    before = noise_process(scheduler)
    change(scheduler)
    process = noise_process(scheduler)
    assert (process.alphas_T - before.alphas_T).abs().max() > 1e-3
    noised = process.noised(X0, EPS, LEVELS)
    assert_close(noised, scheduler.add_noise(X0, EPS, LEVELS), 1e-6)
    if hasattr(scheduler, "get_velocity"):
        velocity = scheduler.get_velocity(X0, EPS, LEVELS)
        assert_close(process.target(X0, EPS, LEVELS), velocity, 1e-6)
    assert weight_table(MinSNRWeighting(), process).isfinite().all()
    scheduler.set_timesteps(10)
    assert torch.equal(noise_process(scheduler).alphas_T, process.alphas_T)


def test_betas_that_were_replaced_alone_are_refused():
    scheduler = DDPMScheduler(num_train_timesteps=100)
    scheduler.betas = scheduler.betas * 2
    with pytest.raises(ValueError, match=r"betas were replaced, but not alphas_cumprod, by which"):
        noise_process(scheduler)
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    noised = noise_process(scheduler).noised(X0, EPS, LEVELS)
    assert_close(noised, scheduler.add_noise(X0, EPS, LEVELS), 1e-6)


@pytest.mark.parametrize("table", [torch.linspace(0, 1, 100), torch.linspace(2, 0, 100)])
def test_tables_that_are_none_are_refused(table):
    scheduler = DDPMScheduler(num_train_timesteps=100)
    scheduler.alphas_cumprod = table
    with pytest.raises(ValueError, match="must fall from level to level, between 1 and 0"):
        noise_process(scheduler)


def test_shifts_of_flow_matching():
    """``set_shift``, tables that training replaced, and tables that sampling overwrote."""
    made = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=3.0)
    expected = noise_process(made)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50)
    assert not torch.equal(noise_process(scheduler).sigmas_T, expected.sigmas_T)
    scheduler.set_shift(3.0)
    for _ in range(2):
        assert torch.equal(noise_process(scheduler).sigmas_T, expected.sigmas_T)
        assert torch.equal(noise_process(scheduler).timesteps_T, expected.timesteps_T)
        scheduler.set_timesteps(7)
    replaced = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50)
    replaced.sigmas = made.sigmas.clone()
    replaced.timesteps = made.timesteps.clone()
    assert torch.equal(noise_process(replaced).sigmas_T, expected.sigmas_T)


@pytest.mark.parametrize("sigma_min", [0.0, 0.01])
def test_conditional_flow_matching(sigma_min):
    """Lipman et al., Equations 22 and 23, with their ``x0`` the noise; the target is ``dx/dt``."""
    process = NoiseProcess.flow(sigma_min, num_levels=5)
    level = torch.arange(5)
    t = process.timesteps_T[:, None, None, None]
    assert (process.timesteps_T.diff() < 0).all()
    assert_close(process.timesteps_T, torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]).double(), 1e-7)

    def path(t):
        return (1 - (1 - sigma_min) * t) * EPS + t * X0

    assert_close(process.noised(X0, EPS, level), path(t), 1e-14)
    velocity = (path(t + 1e-4) - path(t - 1e-4)) / 2e-4
    assert_close(process.target(X0, EPS, level), velocity, 1e-10)


def test_conditional_flow_matching_has_some_signal():
    with pytest.raises(ValueError, match="sigma_min=1 arrived"):
        NoiseProcess.flow(1)
