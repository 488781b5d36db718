"""Weights of the loss by level of noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.noise import NoiseProcess, PredictionType


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
    and ``min(SNR, γ) s²`` with ``s = sigma_t / (alpha_t + sigma_t)`` for flow matching. Without
    signal, a prediction of the noise says nothing of ``x0``; its weight is ``min(1, γ/SNR)`` in
    units of the error of ``eps``, which is ``SNR`` times that of ``x0``.

    Source: Hang et al., 2023, Section 3.4.

    Attributes:
        gamma: The cap γ on the signal-to-noise ratio.
    """

    gamma: float = 5.0

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        snr_T = process.snr_T
        x0_of_y_T = process.clean_coefficients()[1]
        eps_of_y_T = process.noise_coefficients()[1]
        a_T, _ = process.target_coefficients()
        return torch.where(
            a_T == 0,
            (self.gamma / snr_T).clamp(max=1) * eps_of_y_T.square(),
            snr_T.clamp(max=self.gamma) * x0_of_y_T.square(),
        )


class DebiasedWeighting(ProcessWeighting):
    """``w_t = 1 / √SNR`` for ``eps``, ``1 / (SNR + 1)`` for ``v``, with ``SNR`` at most 1,000.

    The debiased estimation loss of kohya's scripts (Yu et al., 2023, for ``eps``).
    """

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        snr_T = process.snr_T.clamp(max=1000)
        weights = {PredictionType.EPSILON: snr_T.rsqrt(), PredictionType.V: 1 / (snr_T + 1)}
        if process.prediction_type not in weights:
            raise ValueError(
                "The debiased weighting is that of networks that predict 'epsilon' or "
                f"'v_prediction', got {process.prediction_type!r}. Pass another weighting."
            )
        return weights[PredictionType(process.prediction_type)]


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
    """SD3's ``w = 2 / (π (1 - 2 s + 2 s²))`` in flow matching's ``s`` (Esser et al., 2024, 3.1).

    ``diffusers``' training scripts of SD3 multiply it by ``s²``, unless they are run with
    ``--precondition_outputs 0`` (see :class:`InverseVarianceWeighting`).
    """

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        s_T = process.sigmas_T
        return 2 / (pi * (1 - 2 * s_T + 2 * s_T.square()))


class InverseVarianceWeighting(ProcessWeighting):
    """``w = 1 / sigma²``, called ``sigma_sqrt`` in ``diffusers``' training scripts of SD3.

    That is their weight with ``--precondition_outputs 0``. By default they compare clean images,
    whose squared error is ``sigma²`` times that of the velocity, so that the weight in our units is
    ``sigma²`` times the scheme's: ``weighting=None`` for their ``sigma_sqrt``, and
    :class:`PreconditionedWeighting` for their default, where the scheme's weight is one.
    """

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        return process.sigmas_T.square().reciprocal()


class PreconditionedWeighting(ProcessWeighting):
    """``w = sigma²``, by which flow matching counts errors of the clean example.

    ``‖x_t − s f − x0‖² = s² ‖f − (eps − x0)‖²``: the loss of ``diffusers``' training scripts of
    SD3, whose ``--precondition_outputs`` is 1 by default.
    """

    def __call__(self, process: NoiseProcess) -> Tensor:
        """The weight of each level, float64, shape ``[T]``."""
        return process.sigmas_T.square()


Weighting = ProcessWeighting | Callable[[Tensor], Tensor] | Tensor | None


def weighting_of(name: str | None, snr_gamma: float = 5.0) -> ProcessWeighting | None:
    """The weighting of a name; ``None`` for none."""
    if name == "min-snr":
        return MinSNRWeighting(snr_gamma)
    made: dict[str, type[ProcessWeighting]] = {
        "debiased": DebiasedWeighting,
        "cosmap": CosmapWeighting,
        "inverse-variance": InverseVarianceWeighting,
        "preconditioned": PreconditionedWeighting,
    }
    return None if name is None else made[name]()


def weight_table(weighting: Weighting, process: NoiseProcess) -> Tensor:
    """Evaluate a weighting ``w_t`` at every level, float64, shape ``[T]``."""
    if weighting is None:
        return torch.ones(process.num_levels, dtype=torch.float64)
    weights: Any = weighting
    if isinstance(weighting, ProcessWeighting):
        weights = weighting(process.weighed)
    elif callable(weighting):
        weights = weighting(process.timesteps_T)
    try:
        weights_T = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "`weighting` must be None, a weighting like MinSNRWeighting(gamma), a callable of the "
            f"timesteps, or a table with one weight for each noise level, got {weighting!r}."
        ) from None
    if weights_T.shape != (process.num_levels,):
        raise ValueError(
            f"`weighting` must give one weight for each of the {process.num_levels} noise levels, "
            f"in order of rising noise, got shape {tuple(weights_T.shape)}."
        )
    if not (weights_T.isfinite() & (weights_T >= 0)).all():
        raise ValueError(
            "The weights must be finite and at least 0, got values from "
            f"{weights_T.min():.3g} to {weights_T.max():.3g}."
        )
    return weights_T
