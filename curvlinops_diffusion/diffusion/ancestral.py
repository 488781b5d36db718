"""Ancestral sampling: the Gaussian steps from a noised example to a less noised one.

Legend: T noise levels, B batch, D entries of a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi, sqrt

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.noise import Clip, NoiseProcess


def discretised_log_probability(x_BD: Tensor, mean_BD: Tensor, std: float) -> Tensor:
    """The log-probability of grey values under a Gaussian in bins, shape ``[B]``."""
    upper, lower = ((x_BD + side / 255 - mean_BD) / std for side in (1, -1))
    open_above, open_below = x_BD > 1 - 1e-3, x_BD < -1 + 1e-3
    # in the tail below the mean, where probabilities do not round to one
    flipped = upper + lower > 0
    upper, lower = torch.where(flipped, -lower, upper), torch.where(flipped, -upper, lower)
    no_upper = torch.where(flipped, open_below, open_above)
    no_lower = torch.where(flipped, open_above, open_below)
    log_upper = torch.where(no_upper, torch.zeros_like(upper), _log_ndtr(upper))
    # log(Φ(u) − Φ(l)) = log Φ(u) + log(1 − Φ(l) / Φ(u))
    log_ratio = torch.where(
        no_lower, torch.full_like(lower, -torch.inf), _log_ndtr(lower) - log_upper
    )
    # below zero also where two logarithms are too large to tell them apart
    log_ratio = log_ratio.clamp(max=-torch.finfo(log_ratio.dtype).eps)
    return (log_upper + (-torch.expm1(log_ratio)).log()).sum(1)


def _log_ndtr(x: Tensor) -> Tensor:
    """``log Φ(x)``, with a precise gradient in the tail.

    That of ``torch.special.log_ndtr`` is ``φ(x)`` over ``exp(log Φ(x))``: a difference of two
    exponents of about ``x² / 2``. There ``Φ(x) = exp(−x²/2) erfcx(−x/√2) / 2``.
    """
    tail = (x < 0) & (torch.finfo(x.dtype).eps * x.square() > 1e-6)
    z = torch.where(tail, x, -1.0)
    log_tail = (torch.special.erfcx(-z / sqrt(2)) / 2).log() - z.square() / 2
    return torch.where(tail, log_tail, torch.special.log_ndtr(torch.where(tail, -1.0, x)))


@dataclass(frozen=True)
class AncestralSteps:
    """The Gaussian steps ``p_θ(x_{t−1} | x_t)`` of ancestral sampling between noise levels.

    Attributes:
        process: The noise process, variance-preserving.
        previous_T: ``ᾱ_{t−1}``, that of the level that a step leads to; 1 for the data.
        variance_T: ``σ_t²``.
        small_T: ``β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)``.
        clip: What is done to predicted clean examples; ``None`` for nothing.
    """

    process: NoiseProcess
    previous_T: Tensor
    variance_T: Tensor
    small_T: Tensor
    clip: Clip | None = None

    @classmethod
    def of(
        cls, process: NoiseProcess, variance: str | None, previous_T: Tensor | None = None
    ) -> AncestralSteps:
        """The steps of a noise process.

        Args:
            process: The noise process.
            variance: ``'small'``, ``'large'``, or ``None`` for what the scheduler says.
            previous_T: ``ᾱ`` of the level that the step from each level leads to; by default that
                of the next lower one.
        """
        squared_T = process.alphas_T.square()
        total_T = squared_T + process.sigmas_T.square()
        if not torch.allclose(total_T, torch.ones_like(total_T)):
            raise ValueError(
                "Ancestral steps (the ELBO, a trajectory's log-probability) exist for "
                "variance-preserving noise only. Measure 'loss' or a WeightedLoss."
            )
        variance = process.variance if variance is None else variance
        if variance not in ("small", "large"):
            raise ValueError(f"`variance` must be 'small' or 'large', got {variance!r}.")
        if previous_T is None:
            previous_T = torch.cat([torch.ones(1, dtype=squared_T.dtype), squared_T[:-1]])
        beta_T = 1 - squared_T / previous_T
        noised = squared_T < 1  # else there is no step
        small_T = beta_T * (1 - previous_T) / torch.where(noised, 1 - squared_T, 1.0)
        return cls(process, previous_T, small_T if variance == "small" else beta_T, small_T)

    @property
    def alpha_T(self) -> Tensor:
        """``α_t = ᾱ_t / ᾱ_{t−1}``."""
        return self.process.alphas_T.square() / self.previous_T

    def noise_error_factor_T(self) -> Tensor:
        """``β_t² / (2 σ_t² α_t (1 − ᾱ_t))`` over the squared error of the network's own target."""
        squared_T, alpha_T = self.process.alphas_T.square(), self.alpha_T
        factor_T = (1 - alpha_T).square() / (2 * self.variance_T * (1 - squared_T))
        determinant_T = self.process.determinant_T()
        if not determinant_T[self.process.alphas_T == 0].all():
            raise ValueError(
                "The noise process has a level without signal (zero terminal signal-to-noise "
                "ratio), where a prediction of the noise says nothing of x0 and the bound is "
                "infinite. Measure 'loss' or a WeightedLoss, or predict 'v_prediction' or 'sample'."
            )
        # the error of the noise is √ᾱ_t / determinant times that of the target; ᾱ_t / α_t = ᾱ_{t−1}
        return factor_T * self.previous_T / determinant_T.square()

    def mean(self, batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        """The step's mean from the states of a batch, shape ``[B, D]``."""
        x_BD = batch.noised_BD.to(prediction_BD)
        of_x0_B1, of_x_B1 = self._mean_coefficients(batch, prediction_BD)
        x0_BD = self.process.clean(x_BD, prediction_BD, batch.level_B)
        if self.clip is not None:
            x0_BD = self.clip(x0_BD)
        return of_x0_B1 * x0_BD + of_x_B1 * x_BD

    def prediction_for(self, batch: NoisedBatch, mean_BD: Tensor) -> Tensor:
        """The prediction whose step has a given mean: the inverse of :meth:`mean`, unclipped.

        Zero at levels where the mean does not depend on the prediction.
        """
        x_BD = batch.noised_BD.to(mean_BD)
        of_x0_B1, of_x_B1 = self._mean_coefficients(batch, mean_BD)
        x0_BD = (mean_BD - of_x_B1 * x_BD) / of_x0_B1
        of_x_t, of_y = (
            c_T[batch.level_B].to(mean_BD).unsqueeze(1) for c_T in self.process.clean_coefficients()
        )
        depends_B1 = (of_x0_B1 != 0) & (of_y != 0)
        return torch.where(depends_B1, (x0_BD - of_x_t * x_BD) / of_y, 0.0)

    def _mean_coefficients(self, batch: NoisedBatch, like: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients of ``x0`` and ``x_t`` in the step's mean, shape ``[B, 1]``.

        In float64, since they are made of small differences; at a level without noise those of the
        clean example itself.
        """
        squared, previous, alpha = (
            z_T[batch.level_B]
            for z_T in (self.process.alphas_T.square(), self.previous_T, self.alpha_T)
        )
        noised = squared < 1
        rest = torch.where(noised, 1 - squared, 1.0)
        of_x0_B = torch.where(noised, previous.sqrt() * (1 - alpha) / rest, 1.0)
        of_x_B = alpha.sqrt() * (1 - previous) / rest
        return of_x0_B.to(like).unsqueeze(1), of_x_B.to(like).unsqueeze(1)

    def log_probability(
        self, batch: NoisedBatch, prediction_BD: Tensor, reached_BD: Tensor
    ) -> Tensor:
        """``log N(x_{t−1}; μ_θ(x_t), σ_t² I)``, shape ``[B]``; zero for a step without noise."""
        variance_B1 = self.variance_T[batch.level_B].to(prediction_BD).unsqueeze(1)
        noisy_B1 = variance_B1 > 0
        safe_B1 = torch.where(noisy_B1, variance_B1, torch.ones_like(variance_B1))
        error_BD = reached_BD - self.mean(batch, prediction_BD)
        squares_BD = torch.where(noisy_B1, error_BD, 0.0).square()
        terms_BD = -0.5 * (squares_BD / safe_B1 + safe_B1.log() + log(2 * pi))
        return (terms_BD * noisy_B1).sum(1)
