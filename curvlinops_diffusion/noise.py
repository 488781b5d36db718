"""Noise processes: what a scheduler says about noised inputs, targets and weights.

Legend: T noise levels, B batch. A *level* is an index ``0 .. T-1`` in order of rising noise; a
*timestep* is the number that the network is told at that level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import pi
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class PredictionType(str, Enum):
    """What the network regresses.

    Attributes:
        EPSILON: ``'epsilon'``, the noise ``eps``.
        SAMPLE: ``'sample'``, the clean example ``x0``.
        V: ``'v_prediction'``, ``alpha_t eps - sigma_t x0`` (Salimans & Ho, 2022, Section 4).
        FLOW: ``'flow'``, ``eps - x0`` (flow matching, Lipman et al., 2023).
    """

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V = "v_prediction"
    FLOW = "flow"


@dataclass(frozen=True)
class NoiseProcess:
    """The noising ``x_t = alpha_t x0 + sigma_t eps`` at every level, and the network's target.

    Attributes:
        alphas_T: Signal scale of each level, float64, shape ``[T]``.
        sigmas_T: Noise scale of each level, float64, shape ``[T]``.
        timesteps_T: What the network is told at each level, shape ``[T]``.
        prediction_type: What the network regresses.
        variance: Which variance ancestral sampling adds, ``'small'`` (that of the posterior given
            ``x0``) or ``'large'`` (``beta_t``).
    """

    alphas_T: Tensor
    sigmas_T: Tensor
    timesteps_T: Tensor
    prediction_type: PredictionType
    variance: str = "small"

    @property
    def num_levels(self) -> int:
        """The number of noise levels ``T``."""
        return len(self.timesteps_T)

    @property
    def snr_T(self) -> Tensor:
        """Signal-to-noise ratio ``alpha_t² / sigma_t²`` of each level, shape ``[T]``."""
        return (self.alphas_T / self.sigmas_T).square()

    @classmethod
    def edm(cls, p_mean: float = -1.2, p_std: float = 1.2, num_levels: int = 1000) -> NoiseProcess:
        """EDM's training noise: ``x_t = x0 + sigma eps`` with log-normal ``sigma``.

        The levels are the distribution's quantiles, so that uniform levels are log-normal. The
        network is told ``sigma`` and predicts ``x0``: it is the whole preconditioned denoiser
        ``c_skip x_t + c_out F(c_in x_t, c_noise)``. Weight with :class:`EDMWeighting`.

        Source: Karras et al., 2022, Table 1 and Section 5.

        Args:
            p_mean: Mean of ``log sigma``.
            p_std: Standard deviation of ``log sigma``.
            num_levels: The number of quantiles.
        """
        middle_T = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
        sigmas_T = (p_mean + p_std * torch.special.ndtri(middle_T)).exp()
        return cls(torch.ones_like(sigmas_T), sigmas_T, sigmas_T, PredictionType.SAMPLE)

    def noised(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """Noise clean examples: ``x_t = alpha_t x0 + sigma_t eps``.

        Args:
            x0: Clean examples, shape ``[B, ...]``.
            eps: Noise, of the same shape.
            level: Noise level of each example, shape ``[B]``.

        Returns:
            The noised examples, shape ``[B, ...]``.
        """
        alpha, sigma = self._scales(x0, level)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """What the network should predict; arguments and shape as in :meth:`noised`."""
        match self.prediction_type:
            case PredictionType.EPSILON:
                return eps
            case PredictionType.SAMPLE:
                return x0
            case PredictionType.FLOW:
                return eps - x0
            case PredictionType.V:
                alpha, sigma = self._scales(x0, level)
                return alpha * eps - sigma * x0

    def _scales(self, x0: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t`` of each example, ready to multiply ``x0``."""
        shape = (-1, *[1] * (x0.ndim - 1))
        index = level.to(self.alphas_T.device)
        alpha, sigma = (s_T[index].to(x0).reshape(shape) for s_T in (self.alphas_T, self.sigmas_T))
        return alpha, sigma


def noise_process(scheduler: Any) -> NoiseProcess:
    """Read the noise process that a ``diffusers`` scheduler trains with.

    The scheduler is rebuilt from its config, since ``set_timesteps`` overwrites the training
    tables of some. Schedulers in the variance-exploding form (Euler) rescale the input of the
    network by ``1 / sqrt(1 + sigma²)``, which is the variance-preserving ``x_t`` again.

    Args:
        scheduler: A scheduler with ``alphas_cumprod`` (DDPM, DDIM, Euler, DPM-Solver, PNDM, …), a
            ``FlowMatchEulerDiscreteScheduler``, or a :class:`NoiseProcess`, which is returned.

    Returns:
        The noise process.

    Raises:
        ValueError: If the scheduler or its prediction type is of no known kind.
    """
    if isinstance(scheduler, NoiseProcess):
        return scheduler
    if not hasattr(scheduler, "config"):
        raise ValueError(
            f"The scheduler arrived as {type(scheduler).__name__}. Pass a diffusers scheduler (one "
            "with alphas_cumprod, or FlowMatchEulerDiscreteScheduler) or a NoiseProcess."
        )
    fresh = type(scheduler).from_config(scheduler.config)
    if isinstance(fresh, FlowMatchEulerDiscreteScheduler):
        return _flow_matching(fresh)
    if hasattr(fresh, "alphas_cumprod"):
        return _variance_preserving(fresh)
    raise ValueError(
        f"{type(scheduler).__name__} has no alphas_cumprod and is not a "
        "FlowMatchEulerDiscreteScheduler. Pass one of these, or describe the noise by a "
        "NoiseProcess(alphas_T, sigmas_T, timesteps_T, prediction_type)."
    )


def _flow_matching(scheduler: FlowMatchEulerDiscreteScheduler) -> NoiseProcess:
    """``x_t = (1 - s) x0 + s eps``; the scheduler lists its levels from noise to data."""
    order = scheduler.sigmas.argsort()
    sigmas_T = scheduler.sigmas[order].double()
    return NoiseProcess(1 - sigmas_T, sigmas_T, scheduler.timesteps[order], PredictionType.FLOW)


def _variance_preserving(scheduler: Any) -> NoiseProcess:
    """``alpha_t² + sigma_t² = 1`` with ``alpha_t²`` the scheduler's ``alphas_cumprod``."""
    name = scheduler.config.get("prediction_type", "epsilon")
    discrete = {p.value for p in PredictionType} - {PredictionType.FLOW.value}
    if name not in discrete:
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type={name!r}. Accepted: "
            f"{sorted(discrete)}; for flow matching pass a FlowMatchEulerDiscreteScheduler."
        )
    alphas_cumprod_T = scheduler.alphas_cumprod.double()
    alphas_T, sigmas_T = alphas_cumprod_T.sqrt(), (1 - alphas_cumprod_T).sqrt()
    timesteps_T = torch.arange(len(alphas_T))
    continuous = scheduler.config.get("timestep_type", "discrete") == "continuous"
    if continuous and name == PredictionType.V:
        # EulerDiscreteScheduler then tells the network a quarter of the log noise level
        timesteps_T = 0.25 * (sigmas_T / alphas_T).log().float()
    large = str(scheduler.config.get("variance_type", "fixed_small")).startswith("fixed_large")
    variance = "large" if large else "small"
    return NoiseProcess(alphas_T, sigmas_T, timesteps_T, PredictionType(name), variance)


# ---------------------------------------------------------------------------------------------
# Weightings
# ---------------------------------------------------------------------------------------------


class ProcessWeighting(ABC):
    """A weighting that is made of the noise process."""

    @abstractmethod
    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""


@dataclass(frozen=True)
class MinSNRWeighting(ProcessWeighting):
    """Min-SNR-γ weighting: ``w_t = min(SNR_t, γ)`` in units of the error of ``x0``.

    The error of ``x0`` is a multiple of the error of the network's target, so that ``w_t`` becomes
    ``min(1, γ/SNR)`` for ``eps``, ``min(SNR, γ)`` for ``x0``, ``min(SNR, γ)/(SNR + 1)`` for ``v``
    and ``min(SNR, γ) s²`` for flow matching (Hang et al., 2023, Section 3.4).

    Attributes:
        gamma: The cap γ on the signal-to-noise ratio.
    """

    gamma: float = 5.0

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        snr_T = process.snr_T
        match process.prediction_type:
            case PredictionType.EPSILON:  # this form is finite at SNR = 0 (zero terminal SNR)
                return (self.gamma / snr_T).clamp(max=1.0)
            case PredictionType.SAMPLE:
                return snr_T.clamp(max=self.gamma)
            case PredictionType.V | PredictionType.FLOW:
                return snr_T.clamp(max=self.gamma) * process.sigmas_T.square()


@dataclass(frozen=True)
class EDMWeighting(ProcessWeighting):
    """EDM's ``w = (sigma² + sigma_data²) / (sigma sigma_data)²`` (Karras et al., 2022, Section 5).

    Attributes:
        sigma_data: The standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        sigma_T = process.sigmas_T / process.alphas_T
        return (sigma_T.square() + self.sigma_data**2) / (sigma_T * self.sigma_data).square()


class CosmapWeighting(ProcessWeighting):
    """SD3's ``w = 2 / (π (1 - 2 s + 2 s²))`` in flow matching's ``s`` (Esser et al., 2024, 3.1)."""

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        s_T = process.sigmas_T
        return 2 / (pi * (1 - 2 * s_T + 2 * s_T.square()))


class InverseVarianceWeighting(ProcessWeighting):
    """``w = 1 / sigma²``, called ``sigma_sqrt`` in ``diffusers``' training scripts of SD3."""

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        return process.sigmas_T.square().reciprocal()


Weighting = ProcessWeighting | Callable[[Tensor], Tensor] | Tensor | None


def weight_table(weighting: Weighting, process: NoiseProcess) -> Tensor:
    """Evaluate a weighting ``w_t`` at every level.

    Args:
        weighting: ``None`` for ``w_t = 1``, a :class:`ProcessWeighting`, a callable that maps the
            timesteps (what the network is told, shape ``[T]``) to weights, or a table of ``T``
            weights in order of rising noise.
        process: The noise process.

    Returns:
        The weights, float64, shape ``[T]``.

    Raises:
        ValueError: If the weights are not ``T`` finite numbers of at least zero.
    """
    if weighting is None:
        return torch.ones(process.num_levels, dtype=torch.float64)
    if isinstance(weighting, ProcessWeighting):
        weights: Any = weighting(process)
    elif callable(weighting):
        weights = weighting(process.timesteps_T)
    else:
        weights = weighting
    try:
        weights_T = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"weighting={weighting!r} is none of: None, a weighting like MinSNRWeighting(gamma), a "
            "callable of the timesteps, or a table with one weight for each noise level."
        ) from None
    if weights_T.shape != (process.num_levels,):
        raise ValueError(
            f"The weighting gave weights of shape {tuple(weights_T.shape)}. It must give one for "
            f"each of the {process.num_levels} noise levels, in order of rising noise."
        )
    if not (weights_T.isfinite() & (weights_T >= 0)).all():
        raise ValueError(
            f"The weighting gave weights from {weights_T.min():.3g} to {weights_T.max():.3g}. They "
            "must be finite and at least 0."
        )
    return weights_T
