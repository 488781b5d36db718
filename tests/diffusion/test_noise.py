"""Noise processes and weightings against diffusers' schedulers and plain formulas."""

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

from curvlinops_diffusion import DenoisingObjective, MinSNRWeighting, NoiseProcess, PredictionType
from curvlinops_diffusion.diffusion.schedulers import noise_process
from curvlinops_diffusion.diffusion.weightings import weight_table
from tests.cases import images, noise_levels
from tests.comparisons import assert_close

X0 = images(5)
EPS = images(10)[5:]
LEVELS = torch.tensor([0, 7, 31, 70, 99])
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
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
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
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
    expected = {
        PredictionType.EPSILON: capped / snr,
        PredictionType.SAMPLE: capped,
        PredictionType.V: capped / (snr + 1),  # σ² = 1/(SNR + 1) where α² + σ² = 1
        PredictionType.FLOW: capped * process.sigmas_T**2,
    }[prediction_type]
    assert_close(weight_table(MinSNRWeighting(0.7), process), expected, 1e-12)
    assert (snr > 0.7).any()
    assert (snr < 0.7).any()


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
