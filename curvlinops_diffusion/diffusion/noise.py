"""Noise processes: noised inputs, targets, what predictions stand for; read off schedulers.

Legend: T noise levels, B batch. A *level* is an index ``0 .. T-1`` in order of rising noise; a
*timestep* is the number that the network is given at that level.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.devices import to_like


class PredictionType(str, Enum):
    """The quantity that the network regresses.

    Attributes:
        EPSILON: ``'epsilon'``, the noise ``eps``.
        SAMPLE: ``'sample'``, the clean example ``x0``.
        V: ``'v_prediction'``, ``alpha_t eps - sigma_t x0`` (Salimans & Ho, 2022, Section 4).
        FLOW: ``'flow'``, ``eps - x0`` (flow matching, Lipman et al., 2023).
        REVERSE_FLOW: ``'reverse_flow'``, ``x0 - eps``: the velocity from noise to data.
        CONDITIONAL_FLOW: ``'conditional_flow'``, ``x0 - (1 - σ_min) eps``, with ``σ_min`` the noise
            left where the signal is largest (Lipman et al., 2023, Equation 23).
    """

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V = "v_prediction"
    FLOW = "flow"
    REVERSE_FLOW = "reverse_flow"
    CONDITIONAL_FLOW = "conditional_flow"


@dataclass(frozen=True)
class Clip:
    """Clips predicted clean examples, as ancestral sampling does.

    Attributes:
        range: They are clipped to ``[-range, range]``.
        quantile: Dynamic thresholding (Saharia et al., 2022, Section 2.3): to ``[-s, s]`` and
            divided by ``s``, this quantile of an example's absolute entries, between one and
            ``range``; ``None`` for none.
    """

    range: float
    quantile: float | None = None

    def __call__(self, x0_BD: Tensor) -> Tensor:
        """Clip examples, ``[B, D]``."""
        if self.quantile is None:
            return x0_BD.clamp(-self.range, self.range)
        s_B1 = x0_BD.abs().quantile(self.quantile, dim=1, keepdim=True).clamp(1, self.range)
        return x0_BD.clamp(-s_B1, s_B1) / s_B1


#: What the network regresses, ``y = a x0 + b eps``: ``(a, b)`` from the scales ``alpha_t`` and
#: ``sigma_t`` of every level. Targets, weights, predicted examples and noise, the means of
#: ancestral steps and the drift of the probability flow all follow from a type's line.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]] = {
    PredictionType.EPSILON: lambda alpha, sigma: (0.0, 1.0),
    PredictionType.SAMPLE: lambda alpha, sigma: (1.0, 0.0),
    PredictionType.V: lambda alpha, sigma: (-sigma, alpha),
    PredictionType.FLOW: lambda alpha, sigma: (-1.0, 1.0),
    PredictionType.REVERSE_FLOW: lambda alpha, sigma: (1.0, -1.0),
    # 1 − σ_min of the path sigma = 1 − (1 − σ_min) alpha, where the signal is largest
    PredictionType.CONDITIONAL_FLOW: lambda alpha, sigma: (
        1.0,
        ((sigma - 1) / alpha)[alpha.argmax()],
    ),
}


@dataclass(frozen=True)
class NoiseProcess:
    """The noising ``x_t = alpha_t x0 + sigma_t eps`` at every level, and the network's target.

    Attributes:
        alphas_T: Signal scale of each level, float64, shape ``[T]``.
        sigmas_T: Noise scale of each level, float64, shape ``[T]``.
        timesteps_T: The network's time at each level, shape ``[T]``.
        prediction_type: What the network regresses: a key of :data:`PREDICTIONS`.
        variance: Which variance ancestral sampling adds, ``'small'`` (that of the posterior given
            ``x0``) or ``'large'`` (``beta_t``).
        clip: What ancestral sampling does to predicted clean examples; ``None`` for nothing.
        weighed_alphas_T: The signal scales by which training weighed levels whose variance is
            preserved, where these were other ones; ``None`` for ``alphas_T``.
    """

    alphas_T: Tensor
    sigmas_T: Tensor
    timesteps_T: Tensor
    prediction_type: PredictionType | str
    variance: str = "small"
    clip: Clip | None = None
    weighed_alphas_T: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown prediction type."""
        if self.prediction_type not in PREDICTIONS:
            known = sorted(str(getattr(name, "value", name)) for name in PREDICTIONS)
            raise ValueError(
                f"`prediction_type` must be one of {known}, got {self.prediction_type!r}."
            )

    @property
    def num_levels(self) -> int:
        """The number of noise levels ``T``."""
        return len(self.timesteps_T)

    @property
    def weighed(self) -> NoiseProcess:
        """The process by whose levels weightings are made."""
        alphas_T = self.weighed_alphas_T
        if alphas_T is None:
            return self
        sigmas_T = (1 - alphas_T.square()).sqrt()
        return replace(self, alphas_T=alphas_T, sigmas_T=sigmas_T, weighed_alphas_T=None)

    @property
    def snr_T(self) -> Tensor:
        """Signal-to-noise ratio ``alpha_t² / sigma_t²`` of each level, shape ``[T]``."""
        return (self.alphas_T / self.sigmas_T).square()

    @classmethod
    def edm(cls, p_mean: float = -1.2, p_std: float = 1.2, num_levels: int = 1000) -> NoiseProcess:
        """EDM's training noise: ``x_t = x0 + sigma eps`` with log-normal ``sigma``.

        The levels are the distribution's quantiles, so that uniform levels are log-normal. The
        network is given ``sigma`` and predicts ``x0``: it is the whole preconditioned denoiser
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

    @classmethod
    def flow(cls, sigma_min: float = 0.0, num_levels: int = 1000) -> NoiseProcess:
        """Conditional flow matching from noise to data, given the time ``t`` in ``(0, 1)``.

        ``x_t = t x0 + (1 − (1 − σ_min) t) eps``, and the network predicts the velocity
        ``x0 − (1 − σ_min) eps``. The levels are the middles of equal parts of the time, so that
        uniform levels are uniform times.

        Source: Lipman et al., 2023, Equations 20 to 23.

        Args:
            sigma_min: The noise that is left at ``t = 1``.
            num_levels: The number of levels.

        Raises:
            ValueError: If ``sigma_min`` is not in ``[0, 1)``.
        """
        if not 0 <= sigma_min < 1:
            raise ValueError(f"`sigma_min` must be from 0 to below 1, got {sigma_min!r}.")
        t_T = 1 - (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
        sigmas_T = 1 - (1 - sigma_min) * t_T
        return cls(t_T, sigmas_T, t_T, PredictionType.CONDITIONAL_FLOW)

    def noised(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """Noise clean examples: ``x_t = alpha_t x0 + sigma_t eps``.

        Args:
            x0: Clean examples, shape ``[B, ...]``.
            eps: Noise, of the same shape.
            level: Noise level of each example, shape ``[B]``.

        Returns:
            The noised examples, shape ``[B, ...]``.
        """
        return _combined((self.alphas_T, self.sigmas_T), x0, eps, level)

    def target(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The prediction that is right; arguments and shape as in :meth:`noised`."""
        return _combined(self.target_coefficients(), x0, eps, level)

    def clean(self, x_t: Tensor, y: Tensor, level: Tensor) -> Tensor:
        """The clean example that a prediction ``y`` of noised ones stands for, ``[B, ...]``.

        ``x0 = (b x_t − sigma_t y) / (b alpha_t − a sigma_t)``.
        """
        return _combined(self.clean_coefficients(), x_t, y, level)

    def noise(self, x_t: Tensor, y: Tensor, level: Tensor) -> Tensor:
        """The noise that a prediction stands for; arguments and shape as in :meth:`clean`.

        ``eps = (alpha_t y − a x_t) / (b alpha_t − a sigma_t)``.
        """
        return _combined(self.noise_coefficients(), x_t, y, level)

    def target_coefficients(self) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of ``y = a x0 + b eps`` at every level, float64, shape ``[T]``."""
        a, b = PREDICTIONS[self.prediction_type](self.alphas_T, self.sigmas_T)
        one_T = torch.ones_like(self.alphas_T)
        return a * one_T, b * one_T

    def determinant_T(self) -> Tensor:
        """``b alpha_t − a sigma_t``; zero where a noised example and ``y`` do not tell ``x0``.

        That of ``v`` is ``alpha_t² + sigma_t²``, which is one but for the rounding of two roots.
        """
        a_T, b_T = self.target_coefficients()
        determinant_T = b_T * self.alphas_T - a_T * self.sigmas_T
        return torch.where((determinant_T - 1).abs() < 1e-14, 1.0, determinant_T)

    def check_clean_is_told(self, level_B: Tensor, what: str) -> None:
        """Refuse levels without signal where the network predicts the noise."""
        silent = (self.determinant_T() == 0) & (self.target_coefficients()[1] != 0)
        if silent[level_B].any():
            level = int(level_B[silent[level_B]][0])
            raise ValueError(
                f"Noise level {level} has no signal (zero terminal signal-to-noise ratio), where a "
                f"prediction of the noise says nothing of x0, and {what} does not exist. Leave "
                "that level out, or predict 'v_prediction' or 'sample'."
            )

    def clean_coefficients(self) -> tuple[Tensor, Tensor]:
        """The coefficients of ``x_t`` and ``y`` in ``x0``, shape ``[T]``.

        Where ``y`` is a multiple of ``x0``, that holds at levels without noise as well.
        """
        a_T, b_T = self.target_coefficients()
        determinant_T = self.determinant_T()
        of_y_T = torch.where(b_T == 0, 1 / a_T, -self.sigmas_T / determinant_T)
        return torch.where(b_T == 0, 0.0, b_T / determinant_T), of_y_T

    def noise_coefficients(self) -> tuple[Tensor, Tensor]:
        """The coefficients of ``x_t`` and ``y`` in ``eps``, shape ``[T]``.

        Where ``y`` is a multiple of ``eps``, that holds at levels without signal as well.
        """
        a_T, b_T = self.target_coefficients()
        determinant_T = self.determinant_T()
        of_y_T = torch.where(a_T == 0, 1 / b_T, self.alphas_T / determinant_T)
        return torch.where(a_T == 0, 0.0, -a_T / determinant_T), of_y_T


def _combined(
    coefficients: tuple[Tensor, Tensor], first: Tensor, second: Tensor, level: Tensor
) -> Tensor:
    """Sum two tensors ``[B, ...]`` with coefficients of each example's level."""
    of_first, of_second = (
        to_like(c_T[level.to(c_T.device)], second).reshape(-1, *[1] * (second.ndim - 1))
        for c_T in coefficients
    )
    return of_first * first + of_second * second


# ---------------------------------------------------------------------------------------------
# Schedulers of diffusers
# ---------------------------------------------------------------------------------------------


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
            scheduler = _flow_in_training(scheduler, fresh)
            order = scheduler.sigmas.argsort()  # it lists its levels from noise to data
            s_T = scheduler.sigmas[order].double()
            return NoiseProcess(1 - s_T, s_T, scheduler.timesteps[order], PredictionType.FLOW)
        if hasattr(fresh, "alphas_cumprod"):
            _check_betas(scheduler, fresh)
            return _variance_preserving(scheduler)
    raise ValueError(
        f"The scheduler must have alphas_cumprod or be a FlowMatchEulerDiscreteScheduler, got "
        f"{type(scheduler).__name__}. Pass a scheduler of diffusers, or describe the noise by a "
        "NoiseProcess(alphas_T, sigmas_T, timesteps_T, prediction_type)."
    )


def as_trained(
    scheduler: Any,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    shift: float | None = None,
    weights_before_rescaling: bool | None = None,
) -> Any:
    """A copy of a scheduler with what training set otherwise; ``None`` for what it has.

    Args:
        scheduler: The scheduler of a pipeline.
        prediction_type: What the network regresses.
        rescale_betas_zero_snr: Whether no signal is left at the last level (Lin et al., 2024,
            Algorithm 1), for any class of schedulers.
        shift: The shift of flow matching's levels.
        weights_before_rescaling: Whether levels are weighed by the signal that they had before
            none was left at the last, as by kohya's scripts.
    """
    if shift is not None:
        return type(scheduler).from_config(
            scheduler.config, shift=shift, use_dynamic_shifting=False
        )
    made = before = deepcopy(scheduler)
    if made.config.get("rescale_betas_zero_snr"):
        before = type(made).from_config(made.config, rescale_betas_zero_snr=False)
    if rescale_betas_zero_snr is False:
        made = before
    weighed = before.alphas_cumprod if weights_before_rescaling else None
    if prediction_type is not None:
        made.register_to_config(prediction_type=prediction_type)
    if rescale_betas_zero_snr:
        alphas_T = made.alphas_cumprod.double().sqrt()
        alphas_T = (alphas_T - alphas_T[-1]) * alphas_T[0] / (alphas_T[0] - alphas_T[-1])
        made.alphas_cumprod = alphas_T.square()
    if weighed is not None:
        made.weighed_alphas_cumprod = weighed
    return made


def _flow_in_training(scheduler: Any, fresh: Any) -> Any:
    """The scheduler with its training tables: its own, unless it has sampled."""
    changed = getattr(scheduler, "shift", None) != getattr(fresh, "shift", None)
    sampled = getattr(scheduler, "num_inference_steps", None) is not None
    if not sampled and not (changed and torch.equal(scheduler.sigmas, fresh.sigmas)):
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


def _variance_preserving(scheduler: Any) -> NoiseProcess:
    """``alpha_t² + sigma_t² = 1`` with ``alpha_t²`` the scheduler's ``alphas_cumprod``."""
    config = scheduler.config
    name = config.get("prediction_type", "epsilon")
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
    if config.get("timestep_type") == "continuous" and name == PredictionType.V:
        # EulerDiscreteScheduler then tells the network a quarter of the log noise level
        timesteps_T = 0.25 * (sigmas_T / alphas_T).log().float()
    large = str(config.get("variance_type")).startswith("fixed_large")
    variance, clip = "large" if large else "small", None
    if config.get("thresholding", False):
        quantile = float(config.get("dynamic_thresholding_ratio", 0.995))
        clip = Clip(float(config.get("sample_max_value", 1.0)), quantile)
    elif config.get("clip_sample", False):
        clip = Clip(float(config.get("clip_sample_range", 1.0)))
    weighed = getattr(scheduler, "weighed_alphas_cumprod", None)
    weighed_T = None if weighed is None else weighed.double().cpu().sqrt()
    return NoiseProcess(
        alphas_T, sigmas_T, timesteps_T, PredictionType(name), variance, clip, weighed_T
    )
