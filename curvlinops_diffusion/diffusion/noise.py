"""Noise processes: what a scheduler says about noised inputs, targets and weights.

Legend: T noise levels, B batch. A *level* is an index ``0 .. T-1`` in order of rising noise; a
*timestep* is the number that the network is told at that level.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
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
