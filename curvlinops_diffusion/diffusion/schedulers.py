"""Noise processes of diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import torch

from curvlinops_diffusion.diffusion.noise import Clip, NoiseProcess, PredictionType


def noise_process(scheduler: Any) -> NoiseProcess:
    """Read the noise process that a ``diffusers`` scheduler trains with.

    The tables are those of the object, which training may have replaced after making it (for a
    terminal signal-to-noise ratio of zero, say). Where ``set_timesteps`` has overwritten them for
    sampling, they are made anew from the config. Schedulers in the variance-exploding form (Euler)
    rescale the input of the network by ``1 / sqrt(1 + sigma²)``, which is the variance-preserving
    ``x_t`` again.
    """
    if isinstance(scheduler, NoiseProcess):
        return scheduler
    if hasattr(scheduler, "config"):
        fresh = type(scheduler).from_config(scheduler.config)
        # known by name, as pipelines are: diffusers is slow to import, and need not be there
        if any(cls.__name__ == "FlowMatchEulerDiscreteScheduler" for cls in type(fresh).__mro__):
            return _flow_matching(_flow_in_training(scheduler, fresh))
        if hasattr(fresh, "alphas_cumprod"):
            _check_betas(scheduler, fresh)
            return _variance_preserving(scheduler)
    raise ValueError(
        f"The scheduler must have alphas_cumprod or be a FlowMatchEulerDiscreteScheduler, got "
        f"{type(scheduler).__name__}. Pass a scheduler of diffusers, or describe the noise by a "
        "NoiseProcess(alphas_T, sigmas_T, timesteps_T, prediction_type)."
    )


def _flow_in_training(scheduler: Any, fresh: Any) -> Any:
    """The scheduler with its training tables: its own, unless it has sampled."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        changed = getattr(scheduler, "shift", None) != getattr(fresh, "shift", None)
        same = torch.equal(scheduler.sigmas, fresh.sigmas)
        if not (changed and same):
            return scheduler
    # ``set_shift`` takes effect when tables are made
    return type(scheduler).from_config(scheduler.config, shift=getattr(scheduler, "shift", 1.0))


def _check_betas(scheduler: Any, fresh: Any) -> None:
    """Refuse ``betas`` that were replaced alone: noise is added by ``alphas_cumprod``."""
    if not hasattr(fresh, "betas") or scheduler.betas.shape != scheduler.alphas_cumprod.shape:
        return
    replaced = not torch.equal(scheduler.betas, fresh.betas)
    product_T = (1 - scheduler.betas.double()).cumprod(0)
    if replaced and not torch.allclose(product_T, scheduler.alphas_cumprod.double(), atol=1e-4):
        raise ValueError(
            "The scheduler's betas were replaced, but not alphas_cumprod, by which noise is added: "
            "set scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0) as well."
        )


def _flow_matching(scheduler: Any) -> NoiseProcess:
    """``x_t = (1 - s) x0 + s eps``; the scheduler lists its levels from noise to data."""
    order = scheduler.sigmas.argsort()
    sigmas_T = scheduler.sigmas[order].double()
    return NoiseProcess(1 - sigmas_T, sigmas_T, scheduler.timesteps[order], PredictionType.FLOW)


def _variance_preserving(scheduler: Any) -> NoiseProcess:
    """``alpha_t² + sigma_t² = 1`` with ``alpha_t²`` the scheduler's ``alphas_cumprod``."""
    name = scheduler.config.get("prediction_type", "epsilon")
    discrete = {p.value for p in PredictionType if not p.value.endswith("flow")}
    if name not in discrete:
        raise ValueError(
            f"The prediction_type of {type(scheduler).__name__} must be one of {sorted(discrete)}, "
            f"got {name!r}. For flow matching pass a FlowMatchEulerDiscreteScheduler."
        )
    alphas_cumprod_T = scheduler.alphas_cumprod.double().cpu()
    falling = (alphas_cumprod_T.diff() <= 0).all() and alphas_cumprod_T.ndim == 1
    if not falling or not ((alphas_cumprod_T >= 0) & (alphas_cumprod_T <= 1)).all():
        raise ValueError(
            "The scheduler's alphas_cumprod must fall from level to level, between 1 and 0, got "
            f"shape {tuple(alphas_cumprod_T.shape)} and entries from "
            f"{float(alphas_cumprod_T.min()):.3g} to {float(alphas_cumprod_T.max()):.3g}."
        )
    alphas_T, sigmas_T = alphas_cumprod_T.sqrt(), (1 - alphas_cumprod_T).sqrt()
    timesteps_T = torch.arange(len(alphas_T))
    continuous = scheduler.config.get("timestep_type", "discrete") == "continuous"
    if continuous and name == PredictionType.V:
        # EulerDiscreteScheduler then tells the network a quarter of the log noise level
        timesteps_T = 0.25 * (sigmas_T / alphas_T).log().float()
    large = str(scheduler.config.get("variance_type", "fixed_small")).startswith("fixed_large")
    variance = "large" if large else "small"
    config, clip = scheduler.config, None
    if config.get("thresholding", False):
        quantile = float(config.get("dynamic_thresholding_ratio", 0.995))
        clip = Clip(float(config.get("sample_max_value", 1.0)), quantile)
    elif config.get("clip_sample", False):
        clip = Clip(float(config.get("clip_sample_range", 1.0)))
    return NoiseProcess(alphas_T, sigmas_T, timesteps_T, PredictionType(name), variance, clip)
