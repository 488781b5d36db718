"""Noise processes: what a scheduler says about noised inputs, targets and weights.

Legend: T noise levels, B batch. A *level* is an index ``0 .. T-1`` in order of rising noise; a
*timestep* is the number that the network is told at that level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

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
    """What ancestral sampling does to predicted clean examples.

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


Coefficient = Tensor | float


def _slope(alpha_T: Tensor, sigma_T: Tensor) -> float:
    """``1 − σ_min`` of the path ``sigma = 1 − (1 − σ_min) alpha``."""
    most = int(alpha_T.argmax())
    return float((1 - sigma_T[most]) / alpha_T[most])


#: What the network regresses, ``y = a x0 + b eps``: ``(a, b)`` from the scales ``alpha_t`` and
#: ``sigma_t`` of every level. Targets, weights, predicted examples and noise, the means of
#: ancestral steps and the drift of the probability flow all follow from a type's line.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Coefficient, Coefficient]]] = {
    PredictionType.EPSILON: lambda alpha, sigma: (0.0, 1.0),
    PredictionType.SAMPLE: lambda alpha, sigma: (1.0, 0.0),
    PredictionType.V: lambda alpha, sigma: (-sigma, alpha),
    PredictionType.FLOW: lambda alpha, sigma: (-1.0, 1.0),
    PredictionType.REVERSE_FLOW: lambda alpha, sigma: (1.0, -1.0),
    PredictionType.CONDITIONAL_FLOW: lambda alpha, sigma: (1.0, -_slope(alpha, sigma)),
}


@dataclass(frozen=True)
class NoiseProcess:
    """The noising ``x_t = alpha_t x0 + sigma_t eps`` at every level, and the network's target.

    Attributes:
        alphas_T: Signal scale of each level, float64, shape ``[T]``.
        sigmas_T: Noise scale of each level, float64, shape ``[T]``.
        timesteps_T: What the network is told at each level, shape ``[T]``.
        prediction_type: What the network regresses: a key of :data:`PREDICTIONS`.
        variance: Which variance ancestral sampling adds, ``'small'`` (that of the posterior given
            ``x0``) or ``'large'`` (``beta_t``).
        clip: What ancestral sampling does to predicted clean examples; ``None`` for nothing.
    """

    alphas_T: Tensor
    sigmas_T: Tensor
    timesteps_T: Tensor
    prediction_type: PredictionType | str
    variance: str = "small"
    clip: Clip | None = None

    def __post_init__(self) -> None:
        """Check the prediction type.

        Raises:
            ValueError: If it is unknown.
        """
        if self.prediction_type not in PREDICTIONS:
            known = sorted(str(getattr(name, "value", name)) for name in PREDICTIONS)
            raise ValueError(f"prediction_type={self.prediction_type!r} is none of {known}.")

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

    @classmethod
    def flow(cls, sigma_min: float = 0.0, num_levels: int = 1000) -> NoiseProcess:
        """Conditional flow matching from noise to data, told the time ``t`` in ``(0, 1)``.

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
            raise ValueError(f"sigma_min={sigma_min!r} arrived. Pass a number from 0 to below 1.")
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
        alpha, sigma = self._scales(x0, level)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The prediction that is right; arguments and shape as in :meth:`noised`."""
        a, b = (_of_levels(c_T, x0, level) for c_T in self.target_coefficients())
        return a * x0 + b * eps

    def clean(self, x_t: Tensor, y: Tensor, level: Tensor) -> Tensor:
        """The clean example that a prediction (or the target) stands for.

        Args:
            x_t: Noised examples, shape ``[B, ...]``.
            y: What the network predicts of them, of the same shape.
            level: Noise level of each example, shape ``[B]``.

        Returns:
            ``x0 = (b x_t − sigma_t y) / (b alpha_t − a sigma_t)``, shape ``[B, ...]``.
        """
        return self._solved(self.clean_coefficients(), x_t, y, level)

    def noise(self, x_t: Tensor, y: Tensor, level: Tensor) -> Tensor:
        """The noise that a prediction stands for; arguments and shape as in :meth:`clean`.

        ``eps = (alpha_t y − a x_t) / (b alpha_t − a sigma_t)``.
        """
        return self._solved(self.noise_coefficients(), x_t, y, level)

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
        """Check that predictions at some levels stand for clean examples.

        Raises:
            ValueError: If at one there is no signal, and the network predicts the noise.
        """
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

    def _scales(self, x0: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t`` of each example, ready to multiply ``x0``."""
        return _of_levels(self.alphas_T, x0, level), _of_levels(self.sigmas_T, x0, level)

    @staticmethod
    def _solved(
        coefficients: tuple[Tensor, Tensor], x_t: Tensor, y: Tensor, level: Tensor
    ) -> Tensor:
        of_x, of_y = (_of_levels(c_T, y, level) for c_T in coefficients)
        return of_x * x_t + of_y * y


def _of_levels(table_T: Tensor, like: Tensor, level: Tensor) -> Tensor:
    """The entries of each example's level, ready to multiply ``[B, ...]``."""
    entries = to_like(table_T[level.to(table_T.device)], like)
    return entries.reshape(-1, *[1] * (like.ndim - 1))
